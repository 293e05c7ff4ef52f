"""The functional core of training: a model cut into what trains and what is frozen, and one step.

The step is a pure function of `(state, frozen, batch)`. The caller compiles it, donating the
state; the frozen arrays are an argument, so they are neither copied nor baked into the program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from spt_jax.config import Form, Trainable, TrainConfig
from spt_jax.forms import set_form
from spt_jax.layers.variables import ADAPTER
from spt_jax.processes import put, to_host
from spt_jax.sharding import BATCH, constrain
from spt_jax.training.losses import Batch
from spt_jax.training.objectives import Objective
from spt_jax.training.optimizer import group_of, learning_rate_schedule, make_optimizer

Params = dict[str, jax.Array]


class TrainState(NamedTuple):
    """All that a step changes.

    Attributes:
        step: optimizer steps taken, int32.
        params: what trains by dotted name, float32 whatever dtype the model computes in.
        opt_state: the optimizer's state.
        key: base random key; step `n` draws from `fold_in(key, n)`.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    key: jax.Array


@dataclass(frozen=True)
class Partition:
    """A model cut in two by variable type.

    Attributes:
        params: what trains by dotted name, as float32 copies.
        groups: learning-rate group of each of them.
        frozen: all other variables.
        merge: builds a model from `(params, frozen)`; usable under `jax.jit`.
    """

    params: Params
    groups: dict[str, str]
    frozen: nnx.State
    merge: Callable[[Params, nnx.State], nnx.Module]

    @property
    def num_trainable(self) -> int:
        """Scalars that train."""
        return sum(p.size for p in self.params.values())

    @property
    def num_parameters(self) -> int:
        """Scalars of all parameters, trained or frozen."""
        frozen = nnx.to_flat_state(nnx.filter_state(self.frozen, nnx.Param)).leaves
        return self.num_trainable + sum(v.size for v in frozen)


def partition(model: nnx.Module, trainable: Trainable) -> Partition:
    """Cut `model` into what trains and what does not.

    Args:
        model: left as it is; its frozen arrays are shared, not copied.
        trainable: "adapter" for LoRA factors, routers, codebooks and head; "all" for every
            parameter.

    Raises:
        ValueError: nothing would train.
    """
    what = ADAPTER if trainable == "adapter" else nnx.Param
    graphdef, chosen, frozen = nnx.split(model, what, ...)  # type: ignore[misc]
    variables = {".".join(map(str, path)): v for path, v in nnx.to_flat_state(chosen)}
    if not variables:
        raise ValueError(
            f"trainable={trainable!r} selects no parameter of {type(model).__name__}: adapt the "
            'model first (spt_jax.adapt), or train everything with trainable="all"'
        )
    names = list(variables)
    treedef = jax.tree.structure(chosen)

    def merge(params: Params, frozen: nnx.State) -> nnx.Module:
        return nnx.merge(
            graphdef, jax.tree.unflatten(treedef, [params[name] for name in names]), frozen
        )

    return Partition(
        params={name: jnp.array(v[...], jnp.float32) for name, v in variables.items()},
        groups={name: group_of(type(v)) for name, v in variables.items()},
        frozen=frozen,
        merge=merge,
    )


def start(
    parts: Partition, config: TrainConfig, *, total_steps: int, objective: Objective
) -> tuple[TrainState, Callable[[TrainState, nnx.State, Batch], Any]]:
    """The state before the first step, and the step: `train_step` of `(state, frozen, batch)`.

    Args:
        parts: the model, cut.
        config: how to train.
        total_steps: length of the schedule.
        objective: what is minimised.
    """
    ranks = {name: p.ndim for name, p in parts.params.items()}
    optimizer = make_optimizer(config, total_steps, parts.groups, ranks)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=parts.params,
        opt_state=optimizer.init(parts.params),
        key=jax.random.key(config.seed),
    )
    return state, partial(
        train_step,
        merge=parts.merge,
        objective=objective,
        optimizer=optimizer,
        schedule=learning_rate_schedule(config, total_steps),
        accumulation=config.accumulation,
        dropout=config.dropout,
    )


def write_back(model: nnx.Module, params: Mapping[str, jax.Array]) -> None:
    """Put trained parameters into `model`, in float32.

    They go where the model's own were, but stay on the mesh where the model's weights lie on one.
    """
    flat = list(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    on_mesh = any(len(v.get_value().sharding.device_set) > 1 for _, v in flat)
    for path, variable in flat:
        if (name := ".".join(map(str, path))) in params:
            param = params[name]
            if not on_mesh:
                whole = param if param.is_fully_addressable else to_host(param)
                param = put(whole, variable.get_value().sharding)
            variable[...] = param


def train_step(
    state: TrainState,
    frozen: nnx.State,
    batch: Batch,
    *,
    merge: Callable[[Params, nnx.State], nnx.Module],
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    accumulation: int = 1,
    dropout: bool = True,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step.

    The loss is `sum(task loss) / sum(weight) + sum(auxiliary losses) / valid tokens`. Both
    denominators are those of the whole batch, so that the sum over microbatches is exact. Where
    the loss or the gradient is not finite, the state is returned as it came, `finite` is False.

    Args:
        state: to be donated.
        frozen: the frozen variables of the model.
        batch: arrays of B examples: input_ids, attention_mask, label, weight and, if the model
            wants them, token_type_ids and segment_ids.
        merge: `Partition.merge`.
        objective: what is minimised, as in `spt_jax.training.objectives`.
        optimizer: see `make_optimizer`.
        schedule: its learning rate, for the record.
        accumulation: microbatches, one after the other.
        dropout: whether to hand the model a dropout key.

    Returns:
        The next state, and float32 scalars: loss, task_loss, each auxiliary loss by its name,
        grad_norm (before clipping), learning_rate; the boolean `finite`; and the int32 `tokens`,
        the number of valid ones.
    """
    weight = jnp.sum(batch["weight"])
    weight = jnp.where(weight > 0, weight, 1)
    tokens = jnp.maximum(jnp.sum(batch["attention_mask"]), 1)
    step_key = jax.random.fold_in(state.key, state.step)

    def microbatch_loss(params: Params, microbatch: Batch, key: jax.Array) -> Any:
        model = merge(params, frozen)
        outcome = objective(model, microbatch, key if dropout else None)
        parts = {"task_loss": outcome.loss / weight}
        parts |= {name: x.astype(jnp.float32) / tokens for name, x in outcome.aux.items()}
        total = sum(parts.values())
        return total, {"loss": total, **parts}

    gradient = jax.grad(microbatch_loss, has_aux=True)
    if accumulation == 1:
        grads, losses = gradient(state.params, batch, step_key)
    else:
        microbatches = jax.tree.map(
            lambda x: constrain(
                x.reshape(accumulation, x.shape[0] // accumulation, *x.shape[1:]), None, BATCH
            ),
            batch,
        )
        keys = jax.random.split(step_key, accumulation)

        def accumulate(sums: Any, inputs: Any) -> Any:
            return jax.tree.map(jnp.add, sums, gradient(state.params, *inputs)), None

        first = jax.tree.map(lambda x: x[0], microbatches)
        shapes = jax.eval_shape(gradient, state.params, first, keys[0])
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (grads, losses), _ = jax.lax.scan(accumulate, zeros, (microbatches, keys))

    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(losses["loss"]) & jnp.isfinite(grad_norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    advanced = TrainState(state.step + 1, params, opt_state, state.key)
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), advanced, state)
    metrics = {
        **losses,
        "grad_norm": grad_norm,
        "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        "finite": finite,
        "tokens": tokens,
    }
    return kept, metrics


def eval_step(
    params: Params,
    frozen: nnx.State,
    batch: Batch,
    *,
    merge: Callable[[Params, nnx.State], nnx.Module],
    objective: Objective,
    with_outputs: bool = True,
    form: Form | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Loss sum, weight sum, and float32 outputs (or None) of a batch, without dropout.

    Nothing that a token of a causal model is judged by depends on a later one. The model is taken
    in the given form, or as it is.
    """
    model = merge(params, frozen)
    if form is not None:
        set_form(model, form)
    model.set_attributes(strict=True, raise_if_not_found=False)
    outcome = objective(model, batch, None)
    outputs = outcome.outputs if with_outputs else None
    outputs = None if outputs is None else outputs.astype(jnp.float32)
    return outcome.loss, outcome.weight, outputs
