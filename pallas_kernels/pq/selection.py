"""Key selection on GPUs: what the kernels of Mosaic and of Triton have around them.

Kernels score key groups, and find for every row of scores the lowest that is kept; what makes their
inputs, and lists of their outputs, is plain JAX.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int8, Int32, Num, UInt8

from pallas_kernels.pq.reference import (
    TILE_SCORES,
    exponent_step,
    mean_rows,
    sub_tile,
    tile_groups,
    tile_list_length,
    tile_score,
)
from pallas_kernels.pq.types import Selection, TileSelection, TokenSelection

CHUNK_BYTES = 2**26  # what the codeword rows and scores of some heads may take at once
PADDED = 64  # rows and columns that kernels may pad scores to
WORD = 32  # keys whose visibility a word holds


class Kernels(NamedTuple):
    """The kernels of one implementation.

    Attributes:
      dtype: Type of codeword rows and their means, a half type.
      tile_scores: `(means, keys, steps, seen, *, block, key_group, causal)` returns, for every
        sub-tile of queries and key group, the sum of 2^x over the keys that the sub-tile sees:
        `[B, N, t, g]`, padded or not.
      tile_thresholds: `(scores, *, count, block_q, key_group)` returns the lowest score and the
        largest tie distance of the `count` groups that every tile keeps, `[B, N, Q]` int32.
      token_thresholds: `(queries, keys, tags, *, count, causal)` returns those of the `count` keys
        that every query keeps, `[B, N, S]` int32.
    """

    dtype: Any
    tile_scores: Callable[..., Array]
    tile_thresholds: Callable[..., tuple[Array, Array]]
    token_thresholds: Callable[..., tuple[Array, Array]]


def row_width(codewords: Int8[Array, "K M E W"]) -> int:
    """Elements of a token's row of codewords, padded for the tensor core."""
    return -(-codewords.shape[1] * codewords.shape[3] // 32) * 32


def codeword_rows(
    codes: UInt8[Array, "B S N M"], codewords: Int8[Array, "K M E W"], dtype: Any
) -> Num[Array, "B S N V"]:
    """The codewords of every token and head, side by side, zero-padded to `row_width`.

    Integers up to 256 are exact in bfloat16 and float16, so the inner product of a query's row and
    a key's is their score, exactly, when accumulated in float32.

    Args:
      codes: Codes of the tokens.
      codewords: As `scoring_codewords` returns them; head n reads row n // (N // K).
      dtype: Type of the rows.
    """
    batch, length, heads, spaces = codes.shape
    kv_heads, _, num_codewords, width = codewords.shape
    head = jnp.arange(heads, dtype=jnp.int32)[:, None] // (heads // kv_heads)
    first = (head * spaces + jnp.arange(spaces, dtype=jnp.int32)) * num_codewords
    table = codewords.reshape(-1, width).astype(dtype)
    rows = table.at[first + codes.astype(jnp.int32)].get(mode="promise_in_bounds")
    rows = rows.reshape(batch, length, heads, -1)
    return jnp.pad(rows, ((0, 0),) * 3 + ((0, row_width(codewords) - rows.shape[-1]),))


def _seen_words(
    length: int,
    block: int,
    key_group: int,
    causal: bool,
    key_mask: Bool[Array, "B S"] | None,
    segment_ids: Int[Array, "B S"] | None,
) -> Int32[Array, "u B U G"] | None:
    """Whether any of `block` queries sees a key, a bit a key; None where positions alone decide."""
    if key_mask is None and segment_ids is None:
        return None
    tiles, groups = -(-length // block), -(-length // key_group)
    query = jnp.arange(tiles * block, dtype=jnp.int32).reshape(tiles, block, 1, 1)
    key = jnp.arange(groups * key_group, dtype=jnp.int32).reshape(groups, key_group)
    if segment_ids is None:
        query = jnp.minimum(query[:, -1:], length - 1)
    valid = (key < length) & (query < length)
    if causal:
        valid = valid & (key <= query)
    valid = valid[None]
    if segment_ids is not None:
        ids = [
            jnp.pad(segment_ids, ((0, 0), (0, n * size - length))).reshape(-1, n, size)
            for n, size in ((tiles, block), (groups, key_group))
        ]
        valid = valid & (ids[0][:, :, :, None, None] == ids[1][:, None, None])
    if key_mask is not None:
        shown = jnp.pad(key_mask, ((0, 0), (0, groups * key_group - length)))
        valid = valid & shown.reshape(-1, 1, 1, groups, key_group)
    bits = jnp.where(valid, jnp.left_shift(1, jnp.arange(key_group, dtype=jnp.int32) % WORD), 0)
    words = [
        lax.reduce(bits[..., first : first + WORD], jnp.int32(0), lax.bitwise_or, (2, 4))
        for first in range(0, key_group, WORD)
    ]
    return jnp.stack(words)


def _select_tiles(
    kernels: Kernels,
    query_codes: UInt8[Array, "B S N M"],
    key_codes: UInt8[Array, "B S K M"],
    query_codewords: Int8[Array, "K M E W"],
    key_codewords: Int8[Array, "K M E W"],
    score_unit: Float[Array, "K"],
    seen: Int32[Array, "u B U G"] | None,
    key_mask: Bool[Array, "B S"] | None,
    *,
    size: int,
    block_q: int,
    key_group: int,
    causal: bool,
    packed: bool,
) -> tuple[Int32[Array, "B N Q P"], Int32[Array, "B N Q"]]:
    """Lists of key groups and their lengths."""
    length, tiles = key_codes.shape[1], -(-key_codes.shape[1] // block_q)
    block, padded = sub_tile(block_q), tiles * block_q
    rows = codeword_rows(query_codes, query_codewords, kernels.dtype)
    counted = jnp.ones((1, length), bool) if key_mask is None else key_mask
    means, counted = mean_rows(jnp.moveaxis(rows, 2, 1), counted[:, None], block, padded)
    weights = kernels.tile_scores(
        means.astype(kernels.dtype),
        codeword_rows(key_codes, key_codewords, kernels.dtype),
        exponent_step(score_unit),
        seen,
        block=block,
        key_group=key_group,
        causal=causal,
    )
    real = jnp.arange(0, padded, block)[:, None] < length
    weights = jnp.where(real, weights[:, :, : padded // block], 0)
    weights = weights.reshape(*weights.shape[:2], tiles, -1, weights.shape[-1])
    scores = tile_score(weights, counted.reshape(*counted.shape[:2], tiles, -1))
    if packed:
        own, _ = tile_groups(length, block_q, key_group)
        own = jnp.pad(own, ((0, 0), (0, scores.shape[-1] - own.shape[1])))
        scores = jnp.where(own & (scores > -jnp.inf), TILE_SCORES - 1, scores)
    level, radius = kernels.tile_thresholds(
        scores, count=size, block_q=block_q, key_group=key_group
    )
    level, radius = (a[..., None] for a in (level, radius))
    group = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    origin = jnp.arange(tiles, dtype=jnp.int32)[:, None] * block_q // key_group
    distance = 2 * jnp.abs(group - origin) - (group < origin)
    near = (scores == level) & (distance <= radius)
    rank = jnp.cumsum(((scores > level) & (scores > -jnp.inf)) | near, -1, dtype=jnp.int32)
    counts = rank[..., -1]
    nth = jnp.minimum(jnp.arange(1, size + 1, dtype=jnp.int32), counts[..., None])
    groups = jnp.zeros_like(nth)  # binary search for the first group of a rank
    for step in (2**i for i in reversed(range(rank.shape[-1].bit_length()))):
        ahead = jnp.minimum(groups + step, rank.shape[-1])
        lower = jnp.take_along_axis(rank, ahead - 1, -1, mode="promise_in_bounds") < nth
        groups = jnp.where(lower, ahead, groups)
    return groups, counts


def _chunks(
    query_codes: UInt8[Array, "B S N M"],
    key_codes: UInt8[Array, "B S K M"],
    codewords: Int8[Array, "K M E W"],
    tiles: int,
    groups: int,
    sub_tiles: int,
) -> tuple[int, int]:
    """Sequences and key heads whose groups are chosen at once; several of only one of them."""
    batch, length, heads, _ = query_codes.shape
    kv_heads = key_codes.shape[2]
    rows = 3 * -(-tiles // PADDED) + 2 * -(-sub_tiles // PADDED)
    scores = 4 * rows * PADDED * -(-groups // PADDED) * PADDED
    each = 2 * length * row_width(codewords) + heads // kv_heads * scores
    most = max(1, CHUNK_BYTES // each)
    head_chunk = max(n for n in range(1, min(most, kv_heads) + 1) if kv_heads % n == 0)
    most = most // kv_heads if head_chunk == kv_heads else 1
    return max(n for n in range(1, min(most, batch) + 1) if batch % n == 0), head_chunk


def select(
    kernels: Kernels,
    query_codes: UInt8[Array, "B S N M"],
    key_codes: UInt8[Array, "B S K M"],
    query_codewords: Int8[Array, "K M E W"],
    key_codewords: Int8[Array, "K M E W"],
    *,
    num_keys: int,
    granularity: str,
    score_unit: Float[Array, "K"],
    causal: bool,
    key_mask: Bool[Array, "B S"] | None,
    segment_ids: Int[Array, "B S"] | None,
    block_q: int,
    key_group: int,
) -> Selection:
    """As `pq_select`."""
    batch, length = query_codes.shape[:2]
    if granularity == "token":
        tags = None
        if key_mask is not None or segment_ids is not None:
            own = jnp.zeros((batch, length), jnp.int32) if segment_ids is None else segment_ids
            own = own.astype(jnp.int32)
            hidden = own.max(1, keepdims=True) + 1
            tags = own, own if key_mask is None else jnp.where(key_mask, own, hidden)
        threshold, radius = kernels.token_thresholds(
            codeword_rows(query_codes, query_codewords, kernels.dtype),
            codeword_rows(key_codes, key_codewords, kernels.dtype),
            tags,
            count=num_keys,
            causal=causal,
        )
        return TokenSelection(
            query_codes=query_codes,
            key_codes=key_codes,
            query_codewords=query_codewords,
            key_codewords=key_codewords,
            threshold=threshold,
            tie_radius=radius,
        )
    packed, block = segment_ids is not None, sub_tile(block_q)
    size = tile_list_length(
        length, num_keys, block_q=block_q, key_group=key_group, causal=causal, segments=packed
    )
    seen = _seen_words(length, block, key_group, causal, key_mask, segment_ids)
    tiles, groups = -(-length // block_q), -(-length // key_group)
    batch_chunk, head_chunk = _chunks(
        query_codes, key_codes, query_codewords, tiles, groups, tiles * (block_q // block)
    )
    kv_heads, rows = key_codes.shape[2], query_codes.shape[2] // key_codes.shape[2]
    steps = kv_heads // head_chunk

    def run(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        sequence, head = index // steps * batch_chunk, index % steps * head_chunk

        def part(a: jax.Array, axis: int = 0) -> jax.Array:
            return lax.dynamic_slice_in_dim(a, sequence, batch_chunk, axis)

        def heads(a: jax.Array, axis: int, each: int = 1) -> jax.Array:
            return lax.dynamic_slice_in_dim(a, head * each, head_chunk * each, axis)

        return _select_tiles(
            kernels,
            heads(part(query_codes), 2, rows),
            heads(part(key_codes), 2),
            heads(query_codewords, 0),
            heads(key_codewords, 0),
            heads(score_unit, 0),
            None if seen is None else part(seen, 1),
            None if key_mask is None else part(key_mask),
            size=size,
            block_q=block_q,
            key_group=key_group,
            causal=causal,
            packed=packed,
        )

    chunks = batch // batch_chunk * steps
    found = lax.map(run, jnp.arange(chunks, dtype=jnp.int32)) if chunks > 1 else run(jnp.int32(0))
    lists, counts = (a.reshape(batch, kv_heads * rows, tiles, -1) for a in found)
    return TileSelection(groups=lists, counts=counts[..., 0], block_q=block_q, key_group=key_group)
