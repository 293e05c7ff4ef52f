"""What a run is to do, checked before any long work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flax import nnx

from spt_jax.adaptation import AdaptationReport
from spt_jax.config import Form, TrainConfig
from spt_jax.forms import FORMS, has_sparse_parts
from spt_jax.models.common import check_batch
from spt_jax.processes import several
from spt_jax.sharding import Devices
from spt_jax.training.checkpoint import weights_fingerprint
from spt_jax.training.checks import (
    check_kinds,
    check_labels,
    check_mesh,
    check_processes,
    monitored,
)
from spt_jax.training.data import Examples
from spt_jax.training.objectives import Objective
from spt_jax.training.step import Partition, partition

#: On resume; no result depends on the first three, and more steps or epochs extend a run.
_FREE_TO_CHANGE = ("checkpoint_every", "log_every", "mesh", "steps", "epochs")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run is to do.

    Attributes:
        config: how to train.
        objective: what is minimised.
        train_data: training examples.
        splits: examples to evaluate on, by name.
        metrics: names of what they are judged by.
        monitor: the metric that says which evaluation is the best.
        forms: those that the model has.
        total: steps.
        devices: where it runs.
        parts: the model, cut.
        adaptation: how the model was adapted; None where nothing sparse was fitted.
        identity: what must be the same for a checkpoint to be resumed.
    """

    config: TrainConfig
    objective: Objective
    train_data: Examples
    splits: Mapping[str, Examples]
    metrics: Sequence[str]
    monitor: str
    forms: tuple[Form, ...]
    total: int
    devices: Devices
    parts: Partition
    adaptation: AdaptationReport | None
    identity: Mapping[str, Any]

    @property
    def judged(self) -> Form:
        """The form that metrics without a form in their names are of."""
        return self.config.evaluate_as if self.config.evaluate_as in self.forms else "dense"


def planned(
    model: nnx.Module,
    train_data: Examples,
    config: TrainConfig,
    *,
    objective: Objective,
    eval_data: Examples | Mapping[str, Examples] | None,
    metrics: Sequence[str],
    identity: Mapping[str, Any] | None,
    resume: bool,
) -> Plan:
    """The plan of a run, of the arguments of `spt_jax.training.train`.

    Raises:
        ValueError: they contradict each other, the mesh, the model, or other processes.
    """
    splits = _by_name(eval_data)
    check_kinds(train_data, *splits.values())
    monitor = monitored(config, splits, metrics)
    total = config.total_steps(len(train_data))
    found: AdaptationReport | None = getattr(model, "adaptation", None)
    adaptation = found if found is not None and found.layers else None
    devices = Devices(config.mesh)
    check_mesh(model, config, devices)
    parts = _partition(model, config)
    data = {"train": train_data, **{f"eval {name}".strip(): x for name, x in splits.items()}}
    for examples in data.values():
        check_batch(model, examples.columns, examples.name)
    check_labels(parts, objective, metrics if splits else (), *data.values())
    same = _identity(parts, data, config) | dict(identity or {})
    if adaptation is not None:
        same["adaptation"] = {line.path: line.choice for line in adaptation.layers}
    if several():
        trainable = weights_fingerprint(parts.params)
        check_processes(same | {"trainable": trainable, "resume": resume, "steps": total})
    return Plan(
        config=config,
        objective=objective,
        train_data=train_data,
        splits=splits,
        metrics=metrics,
        monitor=monitor,
        forms=FORMS if has_sparse_parts(model) else ("dense",),
        total=total,
        devices=devices,
        parts=parts,
        adaptation=adaptation,
        identity=same,
    )


def _by_name(eval_data: Examples | Mapping[str, Examples] | None) -> Mapping[str, Examples]:
    if eval_data is None:
        return {}
    return eval_data if isinstance(eval_data, Mapping) else {"": eval_data}


def _identity(
    parts: Partition, data: Mapping[str, Examples], config: TrainConfig
) -> dict[str, Any]:
    return {
        "base_weights": weights_fingerprint(parts.frozen),
        "data": {name: weights_fingerprint(dict(x.columns)) for name, x in data.items()},
        "config": {k: v for k, v in asdict(config).items() if k not in _FREE_TO_CHANGE},
    }


def _partition(model: Any, config: TrainConfig) -> Partition:
    if not config.remat:
        return partition(model, config.trainable)
    if not hasattr(model, "remat"):
        raise ValueError(f"{type(model).__name__} has no option remat; train with remat=False")
    before, model.remat = model.remat, True
    try:
        return partition(model, config.trainable)
    finally:
        model.remat = before
