"""What a step minimises: from a model and a batch to a weighted sum of losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from spt_jax.training.losses import Batch, Loss, linear_cross_entropy


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


def supervised(loss: Loss) -> Objective:
    """The objective of a model whose outputs are compared with the batch's labels.

    Args:
        loss: `cross_entropy`, `mean_squared_error` or alike.
    """

    def objective(model: Any, batch: Batch, dropout_key: jax.Array | None) -> Outcome:
        outputs, aux = model.forward(*_inputs(batch), dropout_key=dropout_key)
        total, weight = loss(outputs, batch["label"], batch["weight"])
        return Outcome(total, weight, aux, outputs)

    return objective


def next_token(model: Any, batch: Batch, dropout_key: jax.Array | None) -> Outcome:
    """The objective of a language model: cross-entropy of `label`, the token that follows.

    Logits are formed a chunk of tokens at a time, see `linear_cross_entropy`.
    """
    hidden, aux = model.hidden_states(*_inputs(batch), dropout_key=dropout_key)
    total, weight = linear_cross_entropy(
        hidden, model.output_kernel().astype(hidden.dtype), batch["label"], batch["weight"]
    )
    return Outcome(total, weight, aux, None)


def _inputs(batch: Batch) -> tuple[Any, ...]:
    return (
        batch["input_ids"],
        batch["attention_mask"],
        batch.get("token_type_ids"),
        batch.get("segment_ids"),
    )
