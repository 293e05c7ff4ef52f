"""Training: data, one jitted step, the loop around it, checkpoints and metrics.

Names load on first use, so that configurations need none of the machinery.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "checkpoint": ("CheckpointError", "Checkpoints", "weights_fingerprint"),
    "config": ("LearningRateMultipliers", "TrainConfig"),
    "data": ("Examples", "check_labels", "eval_batches", "tokenize", "train_batches"),
    "loop": ("Interrupted", "NonFiniteLoss", "TrainResult", "train"),
    "losses": ("cross_entropy", "mean_squared_error"),
    "metrics": ("environment", "evaluation_metrics", "glue_metrics", "write_json_atomic"),
    "optimizer": ("learning_rate_schedule", "make_optimizer"),
    "step": ("TrainState", "eval_step", "partition", "train_step", "write_back"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
