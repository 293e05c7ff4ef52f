"""What an adapted model is to other tools: its task, and its hidden units in their first order."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from spt_jax.layers import Linear, RoutedFFN
from spt_jax.models.decoder import Decoder
from spt_jax.models.encoder import Encoder
from spt_jax.models.pretrained import Task
from spt_jax.processes import to_host

_ALL = slice(None)


def classifier(model: Encoder | Decoder) -> Linear | None:
    """The map to the labels, where the model has one."""
    if isinstance(model, Decoder):
        return model.score
    return None if model.head is None else model.head.out


def check_model(op: str, model: object) -> None:
    """Raises a ValueError unless a model is of a family whose files are known."""
    if not isinstance(model, Encoder | Decoder):
        raise ValueError(
            f"{op} takes a model of load_pretrained, whose modules transformers and PEFT know by "
            f"name, and got {type(model).__name__}; keep a model of your own as nnx.state(model)"
        )


def task_of(model: Encoder | Decoder) -> Task:
    """The task as `load_pretrained` names it."""
    if classifier(model) is not None:
        return "sequence-classification"
    return model.task if isinstance(model, Decoder) else "backbone"


class Units(NamedTuple):
    """Rows and columns of a linear map, in the original order."""

    rows: np.ndarray | slice = _ALL
    columns: np.ndarray | slice = _ALL

    def of(self, kernel: np.ndarray) -> np.ndarray:
        """The kernel `[in, out]` in the original order."""
        return kernel[self.rows][:, self.columns]


def factor_matrices(a: jax.Array, b: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """LoRA factors `[in, r]` and `[r, out]`, without the axis of blocks of a routed FFN."""
    return to_host(a).reshape(-1, a.shape[-1]), to_host(b).reshape(len(b), -1)


def original_units(model: nnx.Module) -> dict[int, Units]:
    """`id(linear map) -> Units` for those of routed FFNs; others are in the original order."""
    units = {}
    for _, module in nnx.iter_modules(model):
        if isinstance(module, RoutedFFN):
            inverse = np.argsort(to_host(module.permutation[...]))
            units[id(module.down)] = Units(rows=inverse)
            units |= {
                id(linear): Units(columns=inverse)
                for linear in (module.up, module.gate)
                if linear is not None
            }
    return units
