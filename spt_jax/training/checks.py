"""What must hold before a run begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
from flax import nnx

from spt_jax.config import TrainConfig
from spt_jax.layers import Attention, FeedForward, RoutedFFN
from spt_jax.processes import exchange, several
from spt_jax.sharding import BATCH, TENSOR, Devices
from spt_jax.training.checkpoint import differences_between
from spt_jax.training.data import Examples, eval_batches
from spt_jax.training.metrics import check_metrics
from spt_jax.training.objectives import Objective, check_targets, next_token
from spt_jax.training.step import Partition, eval_step


def check_kinds(*splits: Any) -> None:
    """Raise a ValueError unless all are `Examples`."""
    for split in splits:
        if not isinstance(split, Examples):
            raise ValueError(
                f"training and evaluation take Examples, not {type(split).__name__}; make them "
                "with tokenize, pack or Examples(columns, name)"
            )


def check_labels(
    parts: Partition, objective: Objective, metrics: Sequence[str], *splits: Examples
) -> None:
    """Raise a ValueError where labels or metrics do not go with the model's outputs."""
    step = partial(eval_step, merge=parts.merge, objective=objective)
    sample = next(eval_batches(splits[0], 1))
    outputs = jax.eval_shape(step, parts.params, parts.frozen, sample)[2]
    columns = None if outputs is None else outputs.shape[-1]
    check_metrics(metrics, columns)
    if objective is next_token:
        model: Any = jax.eval_shape(parts.merge, parts.params, parts.frozen)
        columns = jax.eval_shape(lambda model: model.output_kernel(), model).shape[1]
    for split in splits:
        check_targets(objective, split, columns)


def check_mesh(model: nnx.Module, config: TrainConfig, devices: Devices) -> None:
    """Raise a ValueError where the mesh does not divide the batches or the model."""
    if config.mesh is None and several():
        raise ValueError(
            f"there are {jax.process_count()} processes: say how they share the work, such as "
            "mesh=MeshConfig(), which cuts batches"
        )
    share = devices.size(*BATCH)
    sizes = {
        "batch_size / accumulation": config.batch_size // config.accumulation,
        "eval_batch_size": config.eval_batch_size or config.batch_size,
    }
    for name, size in sizes.items():
        if size % share:
            raise ValueError(
                f"{name} is {size}, and the mesh cuts batches into {share} parts (data times "
                "fsdp); choose a multiple of that"
            )
    _check_widths(model, devices.size(TENSOR))


def _check_widths(model: nnx.Module, cut: int) -> None:
    """Raise a ValueError where so many devices cannot share a layer's heads or hidden units."""
    for path, module in nnx.iter_modules(model):
        name = ".".join(map(str, path))
        if isinstance(module, Attention) and module.num_kv_heads % cut:
            raise ValueError(
                f"{name} has {module.num_kv_heads} key/value heads, which {cut} devices (tensor) "
                "cannot share evenly"
            )
        if isinstance(module, FeedForward | RoutedFFN):
            blocks = module.config.num_blocks if isinstance(module, RoutedFFN) else 1
            if (units := module.up.out_features // blocks) % cut:
                raise ValueError(
                    f"{name} has {units} hidden units{' a block' * (blocks > 1)}, which {cut} "
                    "devices (tensor) cannot share evenly"
                )


def check_processes(run: Mapping[str, Any]) -> None:
    """Raise a ValueError where processes are about to train something else than the first one."""
    first, *others = exchange(run)
    for number, other in enumerate(others, 1):
        if names := [text.partition(" was ")[0] for text in differences_between(other, first)]:
            raise ValueError(
                f"process {number} differs from process 0 in {', '.join(names)}; give the same "
                "options, model and data to all"
            )


def monitored(config: TrainConfig, splits: Mapping[str, Examples], metrics: Sequence[str]) -> str:
    """The metric that says which evaluation is the best; "" where there is none.

    Raises:
        ValueError: it is not evaluated, or evaluations are asked for without examples.
    """
    names = [*metrics, "eval_loss"]
    choices = [name + (f"_{split}" if split else "") for split in splits for name in names]
    if not splits and (config.patience or config.monitor or config.result == "best"):
        raise ValueError('patience, monitor and result="best" need evaluation examples')
    if config.monitor is not None and config.monitor not in choices:
        raise ValueError(f"monitor {config.monitor!r} is not evaluated; choose from {choices}")
    return config.monitor or (choices[0] if choices else "")
