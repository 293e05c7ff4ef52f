"""Sparse attention of one query a sequence in plain XLA: scores by table, then the kept rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int8, UInt8


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
    """As `sparse_decode`."""
    batch, kv_heads, length, width = k.shape
    codes = query_codes.reshape(batch, kv_heads, -1, query_codes.shape[-1])
    score = _scores(codes, key_codes, query_codewords, key_codewords)
    score = jnp.where(key_mask[:, None, None], score, -jnp.inf)
    # Of equals top_k takes those of lowest index: last keys first.
    top, backwards = jax.lax.top_k(score[..., ::-1], num_keys)
    index = length - 1 - backwards
    rows = jnp.arange(batch)[:, None, None, None], jnp.arange(kv_heads)[:, None, None], index
    keys, values = (a.at[rows].get(mode="promise_in_bounds") for a in (k, v))
    queries = q.reshape(batch, kv_heads, -1, width)
    kept = top > -jnp.inf
    logits = scale * _float32("bkrh,bkrlh->bkrl", queries, keys)
    logits = jnp.where(kept, logits, jnp.finfo(jnp.float32).min)
    weights = jnp.where(kept, jax.nn.softmax(logits), 0)
    out = _float32("bkrl,bkrlh->bkrh", weights, values)
    return out.reshape(q.shape).astype(q.dtype)


def _float32(spec: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(spec, *operands, preferred_element_type=jnp.float32)


def _scores(
    query_codes: UInt8[Array, "B K R M"],
    key_codes: UInt8[Array, "B K M S"],
    query_codewords: Int8[Array, "K M E W"],
    key_codewords: Int8[Array, "K M E W"],
) -> Float[Array, "B K R S"]:
    """Score of every key, summed over subspaces from a table of the query's products."""
    kv_heads, spaces = query_codewords.shape[:2]
    head = jnp.arange(kv_heads)[:, None, None]
    rows = query_codewords[head, jnp.arange(spaces), query_codes.astype(jnp.int32)]
    books = (a.astype(jnp.float32) for a in (rows, key_codewords))
    tables = jnp.einsum("bkrmw,kmew->mbkre", *books, precision="highest")

    def step(m: jax.Array, total: jax.Array) -> jax.Array:
        codes = jax.lax.dynamic_index_in_dim(key_codes, m, 2, keepdims=False)
        codes = codes[:, :, None].astype(jnp.int32)
        return total + jnp.take_along_axis(tables[m], codes, -1, mode="promise_in_bounds")

    start = jnp.zeros((*query_codes.shape[:3], key_codes.shape[-1]), jnp.float32)
    return jax.lax.fori_loop(0, spaces, step, start)
