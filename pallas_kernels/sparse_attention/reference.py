"""Specification of sparse attention: dense scores, masked."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int8, UInt8

from pallas_kernels.pq import reference as pq
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
    length = q.shape[1]
    kept = pq.kept_keys(selection, length)
    kept = kept & pq.valid_keys(length, causal, key_mask, segment_ids)[:, None]
    return _softmax_attention(q, k, v, kept, scale)


def decode(
    q: Float[Array, "B N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    query_codes: UInt8[Array, "B N M"],
    key_codes: UInt8[Array, "B K M S"],
    query_codewords: Int8[Array, "K M E W"],
    key_codewords: Int8[Array, "K M E W"],
    *,
    num_keys: int,
    key_mask: Bool[Array, "B S"],
    scale: float,
) -> Float[Array, "B N H"]:
    """As `sparse_decode`, by an explicit sort."""
    queries = pq.decode(query_codes[:, None], query_codewords)
    keys = pq.decode(key_codes.transpose(0, 3, 1, 2), key_codewords)
    keys = jnp.repeat(keys, q.shape[1] // k.shape[1], axis=1)
    score = jnp.einsum("bnqw,bnkw->bnk", queries, keys, precision="highest")
    hidden = jnp.broadcast_to(~key_mask[:, None], score.shape)
    backwards = jnp.broadcast_to(-jnp.arange(k.shape[2]), score.shape)
    rank = jnp.argsort(jnp.lexsort((backwards, -score, hidden)))
    kept = (rank < num_keys) & ~hidden
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    return _softmax_attention(q[:, None], k, v, kept[:, :, None], scale)[:, 0]


def _softmax_attention(
    q: Float[Array, "B Q N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    kept: Bool[Array, "B N Q S"],
    scale: float,
) -> Float[Array, "B Q N H"]:
    heads = q.shape[2]
    queries, keys, values = (a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in (q, k, v))
    keys, values = (jnp.repeat(a, heads // a.shape[2], axis=2) for a in (keys, values))
    logits = scale * jnp.einsum("bqnh,bknh->bnqk", queries, keys, precision="highest")
    some = kept.any(-1, keepdims=True)
    top = jax.lax.stop_gradient(logits).max(-1, keepdims=True, where=kept, initial=-jnp.inf)
    weights = jnp.exp(jnp.where(kept, logits - jnp.where(some, top, 0), -jnp.inf))
    weights = weights / jnp.where(some, weights.sum(-1, keepdims=True), 1)
    out = jnp.einsum("bnqk,bknh->bqnh", weights, values, precision="highest")
    return out.astype(q.dtype)
