from __future__ import annotations

import inspect
import itertools

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spt_jax.config import LearningRateMultipliers, TrainConfig
from spt_jax.training import learning_rate_schedule, make_optimizer

GROUPS = {"w": "lora", "r": "router", "c": "codebook", "h": "head", "v": "lora", "e": "base"}
PARAMS = {name: jnp.full((2,) if name == "v" else (2, 2), 3.0) for name in GROUPS}
RANKS = {name: p.ndim for name, p in PARAMS.items()}


def updates(config, gradient=1.0):
    optimizer = make_optimizer(config, 10, GROUPS, RANKS)
    grads = {name: jnp.full_like(p, gradient) for name, p in PARAMS.items()}
    found, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    return {name: float(x.ravel()[0]) for name, x in found.items()}


@pytest.mark.parametrize(
    ("schedule", "last"), [("linear", 1 / 8), ("cosine", 0.0381), ("constant", 1)]
)
@pytest.mark.parametrize("warmup", [0.2, 2])
def test_schedule(schedule, last, warmup):
    config = TrainConfig(learning_rate=2.0, warmup=warmup, schedule=schedule)
    rates = [float(learning_rate_schedule(config, 10)(step)) / 2 for step in range(10)]
    assert rates[:3] == pytest.approx([0.5, 1, 1])
    assert rates[9] == pytest.approx(last, abs=1e-3)
    assert all(a >= b - 1e-6 for a, b in itertools.pairwise(rates[1:]))


def test_warmup_never_takes_the_whole_run():
    config = TrainConfig(warmup=500, learning_rate=1.0)
    assert config.warmup_steps(10) == 9
    assert float(learning_rate_schedule(config, 1)(0)) == 1


def test_multipliers_act_on_their_group_alone():
    ones = dict.fromkeys(("lora", "router", "codebook", "head", "base"), 1.0)
    plain = TrainConfig(
        warmup=0, weight_decay=0.0, learning_rate_multipliers=LearningRateMultipliers(**ones)
    )
    for group in ones:
        config = TrainConfig(
            warmup=0,
            weight_decay=0.0,
            learning_rate_multipliers=LearningRateMultipliers(**ones | {group: 3.0}),
        )
        before, after = updates(plain), updates(config)
        for name, of in GROUPS.items():
            factor = 3 if of == group else 1
            assert after[name] == pytest.approx(factor * before[name], rel=1e-6)


def test_weight_decay_spares_vectors_and_codebooks():
    config = TrainConfig(
        warmup=0,
        weight_decay=0.1,
        learning_rate=0.1,
        learning_rate_multipliers=LearningRateMultipliers(router=1.0),
        clip_norm=None,
    )
    found = updates(config, gradient=0.0)
    assert found == pytest.approx(
        {name: 0.0 if name in "vc" else -0.1 * 0.1 * 3 for name in GROUPS}, rel=1e-6
    )


def test_is_adamw():
    config = TrainConfig(warmup=0, schedule="constant", clip_norm=None, weight_decay=0.1)
    ours = make_optimizer(config, 10, {"w": "lora"}, {"w": 2})
    theirs = optax.adamw(config.learning_rate, weight_decay=0.1)
    params = [{"w": jnp.ones((3, 3))}] * 2
    states = [ours.init(params[0]), theirs.init(params[1])]
    for step in range(3):
        grads = {"w": jnp.arange(9.0).reshape(3, 3) - 4 * step}
        for i, optimizer in enumerate((ours, theirs)):
            change, states[i] = optimizer.update(grads, states[i], params[i])
            params[i] = optax.apply_updates(params[i], change)
    np.testing.assert_allclose(params[0]["w"], params[1]["w"], rtol=1e-6)


def test_clipping_is_by_the_norm_of_all_groups():
    # eps far above the gradient makes Adam linear, so that clipping shows
    config = {"warmup": 0, "weight_decay": 0.0, "eps": 1e4}
    norm = np.sqrt(sum(p.size for p in PARAMS.values())) * 7
    free = updates(TrainConfig(**config, clip_norm=None), gradient=7.0)
    clipped = updates(TrainConfig(**config, clip_norm=float(norm / 2)), gradient=7.0)
    for name in GROUPS:
        assert clipped[name] == pytest.approx(free[name] / 2, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainable": "lora"}, "adapter or all"),
        ({"schedule": "step"}, "linear, cosine or constant"),
        ({"result": "first"}, "last or best"),
        ({"batch_size": 10, "accumulation": 4}, "10 examples do not cut into 4"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"epochs": 0}, "epochs must be above 0"),
        ({"learning_rate": -1e-3}, r"above 0, got -0\.001"),
        ({"learning_rate": float("nan")}, "got nan"),
        ({"warmup": -1}, "warmup"),
        ({"b1": 1.0}, "b1"),
        ({"b2": 1.5}, "b2"),
        ({"eps": 0}, "eps"),
        ({"weight_decay": -1}, "weight_decay"),
        ({"clip_norm": 0}, "clip_norm"),
        ({"seed": -1}, "seed"),
    ],
)
def test_config_refuses(options, message):
    # past the run-time type checker of the tests, which a user does not have
    init = inspect.unwrap(TrainConfig.__init__)
    with pytest.raises(ValueError, match=message):
        init(object.__new__(TrainConfig), **options)


def test_multiplier_refuses():
    with pytest.raises(ValueError, match="the router learning-rate multiplier"):
        LearningRateMultipliers(router=-1)


def test_total_steps_sees_every_example():
    assert TrainConfig(epochs=3, batch_size=8).total_steps(10) == 4
    assert TrainConfig(epochs=0.1, batch_size=8).total_steps(10) == 1
    assert TrainConfig(steps=7).total_steps(10) == 7
