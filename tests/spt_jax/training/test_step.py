from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from spt_jax.config import TrainConfig
from spt_jax.training import (
    TrainState,
    cross_entropy,
    eval_batches,
    eval_step,
    learning_rate_schedule,
    make_optimizer,
    mean_squared_error,
    partition,
    supervised,
    train_step,
    write_back,
)
from tests.spt_jax.training.toy import Toy, examples


def setup(model, *, optimizer=None, trainable="adapter", loss=cross_entropy, **options):
    config = TrainConfig(trainable=trainable, warmup=0, clip_norm=None)
    parts = partition(model, trainable)
    ranks = {name: p.ndim for name, p in parts.params.items()}
    optimizer = optimizer or make_optimizer(config, 10, parts.groups, ranks)
    state = TrainState(
        jnp.zeros((), jnp.int32), parts.params, optimizer.init(parts.params), jax.random.key(0)
    )
    step = partial(
        train_step,
        merge=parts.merge,
        objective=supervised(loss),
        optimizer=optimizer,
        schedule=learning_rate_schedule(config, 10),
        **options,
    )
    return parts, state, jax.jit(step, donate_argnums=0)


def batch_of(n, **options):
    batch = next(eval_batches(examples(n, **options), n))
    batch["weight"][::3] = 0.5  # microbatches of unequal weight
    return batch


@pytest.mark.parametrize("scores", [False, True])
@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_accumulated_gradient_is_that_of_the_full_batch(accumulation, scores):
    batch = batch_of(8, scores=scores)
    batch["weight"][2:4] = 0  # one microbatch with no weight at all
    options = {
        "optimizer": optax.sgd(1.0),
        "dropout": False,
        "loss": mean_squared_error if scores else cross_entropy,
    }
    model = Toy(classes=1 if scores else 2)
    model.head[...] = jax.random.normal(jax.random.key(1), model.head.shape)
    model.b[...] = jax.random.normal(jax.random.key(2), model.b.shape)
    parts, state, full = setup(model, **options)
    _, same, cut = setup(model, accumulation=accumulation, **options)
    before = jax.tree.map(np.array, state.params)
    state, metrics = full(state, parts.frozen, batch)
    same, cut_metrics = cut(same, parts.frozen, batch)
    for name in before:
        gradient = before[name] - np.array(state.params[name])
        assert np.abs(gradient).max() > 0, name
        got = before[name] - np.array(same.params[name])
        np.testing.assert_allclose(got, gradient, rtol=2e-6, atol=2e-6, err_msg=name)
    assert metrics.keys() == cut_metrics.keys() > {"codebook", "task_loss", "grad_norm"}
    for name in metrics:
        np.testing.assert_allclose(cut_metrics[name], metrics[name], rtol=2e-6, err_msg=name)
    total = metrics["task_loss"] + metrics["codebook"]
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-6)


def test_filler_examples_do_not_touch_the_task_loss():
    model, batch = Toy(), batch_of(6)
    parts = partition(model, "adapter")
    step = jax.jit(partial(eval_step, merge=parts.merge, objective=supervised(cross_entropy)))
    evaluate = partial(step, parts.params, parts.frozen)
    expected = evaluate(batch)
    padded = {name: np.concatenate([x, x[:2]]) for name, x in batch.items()}
    padded["weight"][6:] = 0
    loss, weight, outputs = evaluate(padded)
    assert float(loss) == pytest.approx(float(expected[0]), rel=1e-6)
    assert float(weight) == float(expected[1])
    np.testing.assert_array_equal(outputs[:6], expected[2])


def test_only_the_adapter_moves_and_the_frozen_arrays_are_not_donated():
    model = Toy()
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    parts, state, step = setup(model)
    for _ in range(3):
        state, _ = step(state, parts.frozen, batch_of(8))
    assert int(state.step) == 3
    write_back(model, state.params)
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    np.testing.assert_array_equal(after["embedding"], before["embedding"])
    for name in before.keys() - {"embedding"}:
        assert np.any(np.array(after[name]) != before[name]), name


def test_all_moves_everything():
    model = Toy()
    before = np.array(model.embedding[...])
    parts, state, step = setup(model, trainable="all")
    state, _ = step(state, parts.frozen, batch_of(8))
    assert not jax.tree.leaves(parts.frozen)
    assert parts.num_trainable == parts.num_parameters
    # the head starts at zero, so that only after one step is there a gradient beneath it
    state, _ = step(state, parts.frozen, batch_of(8))
    assert np.any(np.array(state.params["embedding"]) != before)


def test_master_parameters_are_float32_under_bfloat16():
    model = Toy(dtype=jnp.bfloat16)
    parts, state, step = setup(model, trainable="all")
    state, metrics = step(state, parts.frozen, batch_of(8))
    assert {p.dtype for p in state.params.values()} == {jnp.dtype("float32")}
    counts = {metrics.pop(name).dtype.name for name in ("finite", "tokens")}
    assert counts == {"bool", "int32"}
    assert {v.dtype for v in metrics.values()} == {jnp.dtype("float32")}
    outputs, _ = parts.merge(state.params, parts.frozen).forward(
        jnp.zeros((1, 4), int), jnp.ones((1, 4))
    )
    assert outputs.dtype == jnp.bfloat16


def test_non_finite_loss_leaves_the_state_alone():
    model = Toy()
    parts, state, step = setup(model)
    state, metrics = step(state, parts.frozen, batch_of(8))
    assert metrics["finite"]
    before = jax.tree.map(np.array, (state.step, state.params, state.opt_state))
    broken = batch_of(8)
    broken["weight"][1] = np.inf
    state, metrics = step(state, parts.frozen, broken)
    assert not metrics["finite"]
    jax.tree.map(np.testing.assert_array_equal, (state.step, state.params, state.opt_state), before)


def test_dropout_differs_between_steps_and_microbatches_and_repeats_with_the_seed():
    same = {name: np.repeat(x[:1], 4, 0) for name, x in batch_of(4).items()}
    model = Toy()
    model.head[...] = jax.random.normal(jax.random.key(1), model.head.shape)

    def losses(**options):
        parts, state, step = setup(model, optimizer=optax.sgd(0.0), **options)
        found = []
        for _ in range(2):
            state, metrics = step(state, parts.frozen, same)
            found.append(float(metrics["task_loss"]))
        return found

    dropped, plain, cut = losses(), losses(dropout=False), losses(accumulation=4)
    assert dropped == losses()
    assert dropped[0] != dropped[1] != plain[0] == plain[1]
    single = {name: x[:1] for name, x in same.items()}
    parts, state, step = setup(model, optimizer=optax.sgd(0.0))
    _, metrics = step(state, parts.frozen, single)
    assert cut[0] != pytest.approx(float(metrics["task_loss"]), rel=1e-6)


def test_learning_rate_groups_follow_the_variable_type():
    parts = partition(Toy(), "all")
    assert parts.groups == {
        "a": "lora",
        "b": "lora",
        "router": "router",
        "codebook": "codebook",
        "head": "head",
        "bias": "head",
        "embedding": "base",
    }
    assert partition(Toy(), "adapter").groups.keys() == parts.groups.keys() - {"embedding"}


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match=r"selects no parameter of Linear.*adapt the model"):
        partition(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), "adapter")
