"""What the sparse parts of an adapted model choose on given sequences, for figures and tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from pallas_kernels import kept_keys, valid_keys
from spt_jax.calibration import INPUTS
from spt_jax.layers import Attention, RoutedFFN, SparseAttention, recording
from spt_jax.models.common import check_batch


class AttentionChoices(NamedTuple):
    """What one sparse attention layer keeps.

    Attributes:
        weights: float32 `[B, N, S, S]`, the softmax over all keys that a query may see; that over
            the kept keys alone is what the layer computes.
        kept: bool `[B, N, S, S]`, whether a query keeps a key. Where a sequence is so short that
            nothing is dropped, all keys that a query may see.
        query_codes: uint8 `[B, S, N, M]`.
        key_codes: uint8 `[B, S, K, M]`.
    """

    weights: jax.Array
    kept: jax.Array
    query_codes: jax.Array
    key_codes: jax.Array


class FFNChoices(NamedTuple):
    """What one routed FFN computes.

    Attributes:
        probabilities: float32 `[B, S, G]`, the router's.
        active: bool `[B, S, G]`, whether a token computes a block.
    """

    probabilities: jax.Array
    active: jax.Array


@dataclass(frozen=True)
class SparseChoices:
    """The choices of all layers, by their path in the model, in its order.

    Attributes:
        attention: of layers with sparse attention, such as "layers.0.attention".
        ffn: of layers with a routed FFN, such as "layers.0.ffn".
    """

    attention: dict[str, AttentionChoices]
    ffn: dict[str, FFNChoices]


def sparse_choices(model: nnx.Module, batch: Mapping[str, jax.Array | np.ndarray]) -> SparseChoices:
    """Which keys, codes and blocks an adapted model picks for the tokens of a batch.

    It holds `[B, N, S, S]` of every attention layer at once: give it a few short sequences.

    Args:
        model: adapted by `adapt` or `load_adapter`; not changed.
        batch: arguments of the model: `input_ids` int `[B, S]` and, optionally, `attention_mask`,
            `token_type_ids` and `segment_ids`; other columns are left out. What padding tokens
            choose is among the result and means nothing.

    Returns:
        The choices.

    Raises:
        ValueError: the model has neither sparse attention nor a routed FFN, calls such a layer
            not once, or a token id or type is outside its tables.

    Example:
        >>> choices = sparse_choices(model, batch)  # doctest: +SKIP
        >>> choices.attention["layers.0.attention"].kept.sum(-1)  # doctest: +SKIP
    """
    if not any(isinstance(m, SparseAttention | RoutedFFN) for _, m in nnx.iter_modules(model)):
        raise ValueError("the model has neither sparse attention nor a routed FFN; adapt it first")
    check_batch(model, batch, "batch")
    inputs = {name: jnp.asarray(batch[name]) for name in INPUTS if batch.get(name) is not None}
    return SparseChoices(*_choices(*nnx.split(model), inputs))


@partial(jax.jit, static_argnames="graphdef")
def _choices(
    graphdef: nnx.GraphDef[nnx.Module], state: nnx.State, inputs: dict[str, jax.Array]
) -> tuple[dict[str, AttentionChoices], dict[str, FFNChoices]]:
    model: Any = nnx.merge(graphdef, state)
    with recording() as records:
        model(**inputs)
    attention, ffn = {}, {}
    for path, module in nnx.iter_modules(model):
        name = ".".join(map(str, path))
        calls = records.get(id(module), [])
        if isinstance(module, Attention) and module.sparse is not None:
            read = _only_call(name, calls)
            attention[name] = _attention_choices(module.sparse, **read, **inputs)
        elif isinstance(module, RoutedFFN):
            ffn[name] = _ffn_choices(module, **_only_call(name, calls))
    return attention, ffn


def _only_call(name: str, calls: list[dict[str, jax.Array]]) -> dict[str, jax.Array]:
    """What a layer recorded in its one call."""
    if not calls:
        raise ValueError(
            f"{name} chose nothing: the model does not call it, or calls a copy, as nnx.remat, "
            "nnx.jit and nnx.scan make; call the layer itself"
        )
    if len(calls) > 1:
        raise ValueError(
            f"the model calls {name} {len(calls)} times and so has as many choices of it; inspect "
            "a model that calls copies of the layer (nnx.clone), each once"
        )
    return calls[0]


def _attention_choices(
    sparse: SparseAttention,
    q: Float[Array, "B S N H"],
    k: Float[Array, "B S K H"],
    attention_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    **_: jax.Array,
) -> AttentionChoices:
    length, config = q.shape[1], sparse.config
    key_mask = None if attention_mask is None else attention_mask != 0
    valid = valid_keys(length, sparse.causal, key_mask, segment_ids)[:, None]
    weights = _softmax(q, k, valid)
    kept = jnp.broadcast_to(valid, weights.shape)
    if (granularity := sparse.granularity_at(length)) != "dense":
        selection = sparse.select(
            q,
            k,
            num_keys=config.num_keys(length),
            granularity=granularity,
            key_mask=key_mask,
            segment_ids=segment_ids,
        )
        kept &= kept_keys(selection, length)
    return AttentionChoices(weights, kept, *sparse.codes(q, k))


def _softmax(
    q: Float[Array, "B S N H"], k: Float[Array, "B S K H"], valid: Bool[Array, "b 1 S S"]
) -> Float[Array, "B N S S"]:
    """Attention over the valid keys; zeros for a query without one."""
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    logits = q.shape[-1] ** -0.5 * jnp.einsum(
        "bqnh,bknh->bnqk", q, k, preferred_element_type=jnp.float32
    )
    return jnp.where(valid, jax.nn.softmax(logits, where=valid), 0)


def _ffn_choices(ffn: RoutedFFN, x: Float[Array, "B S D"]) -> FFNChoices:
    rows = x.reshape(-1, x.shape[-1]).astype(ffn.up.dtype)
    probabilities, index, _ = ffn.route(rows)
    active = jax.nn.one_hot(index, probabilities.shape[1]).any(1)
    return FFNChoices(*(a.reshape(*x.shape[:2], -1) for a in (probabilities, active)))
