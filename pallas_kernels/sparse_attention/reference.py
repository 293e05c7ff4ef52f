"""Specification of sparse attention: dense scores, masked."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.pq.reference import kept_keys, valid_keys
from pallas_kernels.pq.types import Selection


def attention(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    selection: Selection,
    *,
    scale: float,
    causal: bool,
    key_mask: Bool[Array, "B S"] | None,
    segment_ids: Int[Array, "B S"] | None,
) -> Float[Array, "B S N H"]:
    """As `sparse_attention`, in float32, or float64 if q is."""
    length, heads = q.shape[1:3]
    kept = kept_keys(selection, length)
    kept = kept & valid_keys(length, causal, key_mask, segment_ids)[:, None]
    queries, keys, values = (a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in (q, k, v))
    keys, values = (jnp.repeat(a, heads // a.shape[2], axis=2) for a in (keys, values))
    logits = scale * jnp.einsum("bqnh,bknh->bnqk", queries, keys, precision="highest")
    some = kept.any(-1, keepdims=True)
    top = jax.lax.stop_gradient(logits).max(-1, keepdims=True, where=kept, initial=-jnp.inf)
    weights = jnp.exp(jnp.where(kept, logits - jnp.where(some, top, 0), -jnp.inf))
    weights = weights / jnp.where(some, weights.sum(-1, keepdims=True), 1)
    out = jnp.einsum("bnqk,bknh->bqnh", weights, values, precision="highest")
    return out.astype(q.dtype)
