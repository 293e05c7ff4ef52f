"""AdamW with warm-up, decay, clipping and a learning rate for each kind of parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import optax
from flax import nnx

from spt_jax.config import TrainConfig
from spt_jax.layers.variables import CodebookParam, HeadParam, LoRAParam, RouterParam

_GROUPS = {"lora": LoRAParam, "router": RouterParam, "codebook": CodebookParam, "head": HeadParam}


def group_of(variable_type: type[nnx.Variable]) -> str:
    """The learning-rate group of a variable type; "base" where it has none of its own."""
    return next((name for name, kind in _GROUPS.items() if issubclass(variable_type, kind)), "base")


def learning_rate_schedule(config: TrainConfig, total_steps: int) -> optax.Schedule:
    """Linear warm-up to the peak, then the decay that `config` names, ending at 0."""
    warmup = config.warmup_steps(total_steps)
    peak, rest = config.learning_rate, total_steps - warmup
    decay = {
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    if not warmup:
        return decay
    # the first step is worth 1/warmup of the peak, not 0
    ramp = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([ramp, decay], [warmup])


def make_optimizer(
    config: TrainConfig, total_steps: int, groups: Mapping[str, str], ranks: Mapping[str, int]
) -> optax.GradientTransformation:
    """AdamW over a flat `{name: array}` of parameters.

    Args:
        config: its hyperparameters.
        total_steps: length of the schedule.
        groups: learning-rate group of each parameter, from `group_of`.
        ranks: number of dimensions of each parameter; only those of 2 and more decay.
    """
    decays = {name: ranks[name] > 1 and groups[name] != "codebook" for name in groups}
    multipliers = asdict(config.learning_rate_multipliers)
    clip = (
        optax.identity()
        if config.clip_norm is None
        else optax.clip_by_global_norm(config.clip_norm)
    )
    return optax.chain(
        clip,
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        optax.multi_transform({g: optax.scale(m) for g, m in multipliers.items()}, dict(groups)),
        optax.scale_by_learning_rate(learning_rate_schedule(config, total_steps)),
    )
