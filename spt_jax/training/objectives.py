"""What a step minimises: from a model and a batch to a weighted sum of losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from spt_jax.training.data import Examples
from spt_jax.training.losses import (
    Batch,
    Loss,
    binary_cross_entropy,
    cross_entropy,
    linear_cross_entropy,
)


class Outcome(NamedTuple):
    """A batch's task loss.

    Attributes:
        loss: weighted sum, a float32 scalar.
        weight: what it is a sum over, a float32 scalar.
        aux: auxiliary losses by name, each a sum over valid tokens.
        outputs: the model's outputs, for metrics; None where none are formed.
    """

    loss: jax.Array
    weight: jax.Array
    aux: dict[str, jax.Array]
    outputs: jax.Array | None


Objective = Callable[[Any, Batch, jax.Array | None], Outcome]
"""What a model is trained for, from it, a batch and a dropout key, None for no dropout."""


@dataclass(frozen=True)
class _Supervised:
    loss: Loss

    def __call__(self, model: Any, batch: Batch, dropout_key: jax.Array | None) -> Outcome:
        outputs, aux = model.forward(*_inputs(batch), dropout_key=dropout_key)
        total, weight = self.loss(outputs, batch["label"], batch["weight"])
        return Outcome(total, weight, aux, outputs)


def supervised(loss: Loss) -> Objective:
    """The objective of a model whose outputs are compared with the batch's labels.

    Args:
        loss: `cross_entropy`, `mean_squared_error` or alike.
    """
    return _Supervised(loss)


def next_token(model: Any, batch: Batch, dropout_key: jax.Array | None) -> Outcome:
    """The objective of a language model: cross-entropy of `label`, the token that follows.

    Logits are formed a chunk of tokens at a time, see `linear_cross_entropy`.
    """
    hidden, aux = model.hidden_states(*_inputs(batch), dropout_key=dropout_key)
    total, weight = linear_cross_entropy(
        hidden, model.output_kernel().astype(hidden.dtype), batch["label"], batch["weight"]
    )
    return Outcome(total, weight, aux, None)


def check_targets(objective: Objective, examples: Examples, columns: int | None) -> None:
    """Raise a ValueError where a label that counts is none that the objective takes.

    Args:
        objective: what is minimised.
        examples: split to train or to evaluate on.
        columns: classes that the model tells apart, or tokens; None where any number is a label.
    """
    label, weight = (examples.columns.get(name) for name in ("label", "weight"))
    label = np.asarray(label)
    counted = np.ones(label.shape, bool) if weight is None else np.asarray(weight) > 0
    counted = np.broadcast_to(
        counted.reshape(*counted.shape, *[1] * (label.ndim - counted.ndim)), label.shape
    )
    if not counted.any():
        raise ValueError(f"{examples.name}: all weights are 0, so there is nothing to learn from")
    wrong, kind = counted & ~np.isfinite(label), "number"
    if columns is not None and (objective is next_token or _is_of_classes(objective)):
        wrong, kind = counted & ((label < 0) | (label >= columns)), f"class in 0..{columns - 1}"
    if isinstance(objective, _Supervised) and objective.loss is binary_cross_entropy:
        wrong, kind = counted & (label != 0) & (label != 1), "0 or 1"
    if wrong.any():
        place = tuple(np.argwhere(wrong)[0])
        raise ValueError(
            f"{examples.name}: label {label[place]} of example {place[0]} is no {kind}; correct "
            "it, load the model with another num_labels, or give it weight 0 to leave it out"
        )


def _is_of_classes(objective: Objective) -> bool:
    return isinstance(objective, _Supervised) and objective.loss is cross_entropy


def _inputs(batch: Batch) -> tuple[Any, ...]:
    return (
        batch["input_ids"],
        batch["attention_mask"],
        batch.get("token_type_ids"),
        batch.get("segment_ids"),
    )
