"""What encoders and decoders share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Bool, Int

from spt_jax.layers import AuxLosses

Tokens = Int[Array | np.ndarray, "B S"]
Mask = Bool[Array | np.ndarray, "B S"] | Tokens


def layer_norm(
    width: int, epsilon: float, *, dtype: Dtype, param_dtype: Dtype, rngs: nnx.Rngs
) -> nnx.LayerNorm:
    """LayerNorm with the two-pass variance: the other cancels where a token's mean is large."""
    return nnx.LayerNorm(
        width,
        epsilon=epsilon,
        use_fast_variance=False,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


def positions_in_segments(
    tokens: Bool[Array, "B S"], segment_ids: Int[Array, "B S"] | None
) -> Int[Array, "B S"]:
    """How many of `tokens` precede each position, counted from the start of its segment."""
    count = jnp.cumsum(tokens, axis=1, dtype=jnp.int32)
    before = count - tokens.astype(jnp.int32)
    if segment_ids is not None:
        starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
        before = before - jax.lax.cummax(jnp.where(starts, before, 0), axis=1)
    return before


def sum_aux(*losses: AuxLosses) -> AuxLosses:
    """Sum of auxiliary losses by name."""
    total: AuxLosses = {}
    for aux in losses:
        total |= {name: total[name] + loss if name in total else loss for name, loss in aux.items()}
    return total


def check_token_ids(
    ids: Array | np.ndarray, vocab_size: int | None, name: str, kind: str = "token id"
) -> None:
    """Raise a ValueError unless all token ids lie in the model's vocabulary.

    Values that are not at hand are not checked: those traced by jit, or on devices of other
    processes.

    Args:
        ids: integers of any shape.
        vocab_size: ids must be below it; None for any that are not negative.
        name: what the message calls them.
        kind: "token id", or "token type" for those of a table of `vocab_size` types.
    """
    if isinstance(ids, jax.core.Tracer):
        return
    if isinstance(ids, jax.Array) and not ids.is_fully_addressable:
        return
    array = np.asarray(ids)
    high = np.inf if vocab_size is None else vocab_size
    if (wrong := (array < 0) | (array >= high)).any():
        what = "vocabulary" if kind == "token id" else "table"
        raise ValueError(
            f"{name}: {kind} {array[wrong][0]} is outside the model's {what} of {vocab_size}; "
            "use the tokenizer that belongs to the model"
        )


def check_batch(model: nnx.Module, batch: Mapping[str, Any], name: str) -> None:
    """Raise a ValueError unless a batch's token ids and types lie in the tables of its model.

    Args:
        model: one of this library's, which has a `config`; of others no id may be negative.
        batch: `input_ids` and, optionally, `token_type_ids`, of any shape.
        name: what the message calls the batch.
    """
    config = getattr(model, "config", None)
    check_token_ids(batch["input_ids"], getattr(config, "vocab_size", None), name)
    types, known = batch.get("token_type_ids"), getattr(config, "num_token_types", 0)
    if types is not None and known:
        check_token_ids(types, known, name, "token type")


def token_array(ids: Any, name: str) -> jax.Array:
    """Token ids as an array.

    Args:
        ids: an array, or lists of one length.
        name: what messages call them.

    Raises:
        ValueError: rows differ in length, or ids are not integers.
    """
    try:
        array = jnp.asarray(ids)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} is no array of token ids; pad and truncate its rows to one length"
        ) from None
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} holds {array.dtype}, not token ids, which are integers")
    return array


def check_inputs(input_ids: jax.Array, max_length: int, **others: jax.Array | None) -> None:
    """Raise a ValueError unless all are `[B, S]` and S lies in 1..max_length."""
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must be [batch, sequence], got shape {input_ids.shape}")
    for name, array in others.items():
        if array is not None and array.shape != input_ids.shape:
            raise ValueError(
                f"{name} has shape {array.shape}, input_ids has {input_ids.shape}; they must agree"
            )
    length = input_ids.shape[1]
    if not 1 <= length <= max_length:
        raise ValueError(
            f"the sequence has {length} tokens, but the model's positions serve 1 to "
            f"{max_length}; truncate or split it"
        )
