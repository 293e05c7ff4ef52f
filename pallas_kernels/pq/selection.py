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
    exponent_step,
    group_shares,
    tile_groups,
    tile_list_length,
    tile_score,
)
from pallas_kernels.pq.types import Selection, TileSelection, TokenSelection

CHUNK_BYTES = 2**28  # what the weights of the queries of some tiles and heads may take at once
PADDED = 64  # rows and columns that kernels may pad weights to
WEIGHT_BYTES = 8  # of a query and a group: a weight in bfloat16, and what is made of it
WORD = 32  # keys whose visibility a word holds


class Kernels(NamedTuple):
    """The kernels of one implementation.

    Attributes:
      dtype: Type of codeword rows, a half type.
      tile_scores: `(queries, first, keys, steps, seen, *, key_group, causal)` returns, for every
        one of some queries, of which the first is at position `first`, and every key group the sum
        of 2^x over the keys that the query sees, cut by `cut_weight`: `[B, N, u, g]`, padded or
        not.
      tile_thresholds: `(scores, origin, *, count)` returns the lowest score and the largest tie
        distance of the `count` groups that every tile keeps, `[B, T, Q]` int32; a tile measures
        distances from the group `origin`, `[Q]` int32.
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
    first: Int32[Array, ""],
    queries: int,
    length: int,
    key_group: int,
    causal: bool,
    key_mask: Bool[Array, "B S"] | None,
    segment_ids: Int[Array, "B S"] | None,
) -> Int32[Array, "words B U G"] | None:
    """Whether queries from `first` on see a key, a bit a key; None where positions alone decide."""
    if key_mask is None and segment_ids is None:
        return None
    groups = -(-length // key_group)
    query = first + jnp.arange(queries, dtype=jnp.int32)[:, None, None]
    key = jnp.arange(groups * key_group, dtype=jnp.int32).reshape(groups, key_group)
    valid = (key < length) & (query < length)
    if causal:
        valid = valid & (key <= query)
    valid = valid[None]

    def of_keys(a: jax.Array) -> jax.Array:
        return jnp.pad(a, ((0, 0), (0, groups * key_group - length))).reshape(
            -1, 1, groups, key_group
        )

    if segment_ids is not None:
        own = segment_ids[:, jnp.minimum(query, length - 1)]
        valid = valid & (own == of_keys(segment_ids))
    if key_mask is not None:
        valid = valid & of_keys(key_mask)
    bits = jnp.where(valid, jnp.left_shift(1, jnp.arange(key_group, dtype=jnp.int32) % WORD), 0)
    words = [
        lax.reduce(bits[..., start : start + WORD], jnp.int32(0), lax.bitwise_or, (3,))
        for start in range(0, key_group, WORD)
    ]
    return jnp.stack(words)


class _Part(NamedTuple):
    """The tiles of some sequences and key heads that are chosen for at once.

    Attributes:
      queries: `[B, U, N, V]`, codeword rows of whole tiles.
      first: Position of the first query.
      keys: `[B, S, K, V]`.
      steps: `[K]`, of `exponent_step`.
      seen: Of `_seen_words`.
      counted: `[B, U]`, whether a query counts.
    """

    queries: jax.Array
    first: jax.Array
    keys: jax.Array
    steps: jax.Array
    seen: jax.Array | None
    counted: jax.Array


def _select_tiles(
    kernels: Kernels,
    part: _Part,
    *,
    length: int,
    size: int,
    block_q: int,
    key_group: int,
    share_heads: bool,
    causal: bool,
    own_first: bool,
) -> tuple[Int32[Array, "B T Q P"], Int32[Array, "B T Q"]]:
    """Lists of key groups and their lengths."""
    batch, padded, heads, _ = part.queries.shape
    tiles = padded // block_q
    weights = kernels.tile_scores(
        jnp.moveaxis(part.queries, 2, 1),
        part.first,
        part.keys,
        part.steps,
        part.seen,
        key_group=key_group,
        causal=causal,
    )[:, :, :padded].astype(jnp.float32)
    here = (part.first + jnp.arange(padded, dtype=jnp.int32) < length)[:, None]
    weights = jnp.where(here, weights, 0)
    shares = jnp.where(part.counted[:, None, :, None], group_shares(weights, -1), 0)
    lists = part.keys.shape[2] if share_heads else heads
    of_tiles = batch, lists, heads // lists, tiles, block_q, weights.shape[-1]
    tile = lax.div(part.first, jnp.int32(block_q)) + jnp.arange(tiles, dtype=jnp.int32)
    first = None
    if own_first:
        own, _ = tile_groups(length, block_q, key_group)
        own = jnp.pad(own, ((0, 0), (0, weights.shape[-1] - own.shape[1])))
        first = own[jnp.minimum(tile, len(own) - 1)]
    scores = tile_score(
        shares.reshape(of_tiles).sum((2, 4), dtype=jnp.int32),
        (weights > 0).reshape(of_tiles).any((2, 4)),
        first,
    )
    origin = lax.div(tile * block_q, jnp.int32(key_group))
    level, radius = kernels.tile_thresholds(scores, origin, count=size)
    level, radius = (a[..., None] for a in (level, radius))
    group = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    away = group - origin[:, None]
    distance = 2 * jnp.abs(away) - (away < 0)
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


def _divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is at most `most`, or 1."""
    return max(n for n in range(1, max(1, min(most, number)) + 1) if number % n == 0)


def _chunks(
    batch: int, kv_heads: int, rows: int, tiles: int, block_q: int, groups: int
) -> tuple[int, int, int]:
    """Sequences, key heads and tiles that are chosen for at once; some of one before the next."""
    tile = WEIGHT_BYTES * rows * block_q * -(-groups // PADDED) * PADDED
    most = max(1, CHUNK_BYTES // tile)
    tile_chunk = min(tiles, most)
    head_chunk = _divisor(kv_heads, most // tiles)
    whole = tiles * kv_heads
    return _divisor(batch, most // whole), head_chunk, tile_chunk


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
    share_heads: bool,
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
    size = tile_list_length(
        length,
        num_keys,
        block_q=block_q,
        key_group=key_group,
        causal=causal,
        segments=segment_ids is not None,
    )
    tiles, groups = -(-length // block_q), -(-length // key_group)
    kv_heads, rows = key_codes.shape[2], query_codes.shape[2] // key_codes.shape[2]
    chunk = _chunks(batch, kv_heads, rows, tiles, block_q, groups)
    batch_chunk, head_chunk, tile_chunk = chunk
    tile_steps, head_steps = -(-tiles // tile_chunk), kv_heads // head_chunk
    queries, padded = tile_chunk * block_q, tile_steps * tile_chunk * block_q
    counted = jnp.ones((batch, length), bool) if key_mask is None else key_mask

    def tail(a: jax.Array) -> jax.Array:
        return jnp.pad(a, ((0, 0), (0, padded - length), *((0, 0),) * (a.ndim - 2)))

    query_codes, counted = tail(query_codes), tail(counted)
    steps = exponent_step(score_unit)

    def run(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        first = index % tile_steps * queries
        pair = index // tile_steps
        sequence, head = pair // head_steps * batch_chunk, pair % head_steps * head_chunk

        def sequences(a: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(a, sequence, batch_chunk, 0)

        def mine(a: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(sequences(a), first, queries, 1)

        def heads(a: jax.Array, axis: int, each: int = 1) -> jax.Array:
            return lax.dynamic_slice_in_dim(a, head * each, head_chunk * each, axis)

        part = _Part(
            queries=codeword_rows(
                heads(mine(query_codes), 2, rows), heads(query_codewords, 0), kernels.dtype
            ),
            first=first,
            keys=codeword_rows(
                heads(sequences(key_codes), 2), heads(key_codewords, 0), kernels.dtype
            ),
            steps=heads(steps, 0),
            seen=_seen_words(
                first,
                queries,
                length,
                key_group,
                causal,
                None if key_mask is None else sequences(key_mask),
                None if segment_ids is None else sequences(segment_ids),
            ),
            counted=mine(counted),
        )
        return _select_tiles(
            kernels,
            part,
            length=length,
            size=size,
            block_q=block_q,
            key_group=key_group,
            share_heads=share_heads,
            causal=causal,
            own_first=causal or segment_ids is not None,
        )

    number = batch // batch_chunk * head_steps * tile_steps
    found = lax.map(run, jnp.arange(number, dtype=jnp.int32)) if number > 1 else run(jnp.int32(0))

    per_head = 1 if share_heads else rows  # lists of a key head

    def join(a: jax.Array) -> jax.Array:
        a = a.reshape(
            batch // batch_chunk,
            head_steps,
            tile_steps,
            batch_chunk,
            head_chunk * per_head,
            tile_chunk,
            -1,
        ).transpose(0, 3, 1, 4, 2, 5, 6)
        return a.reshape(batch, kv_heads * per_head, tile_steps * tile_chunk, -1)[:, :, :tiles]

    lists, counts = (join(a) for a in found)
    return TileSelection(
        groups=lists,
        counts=counts[..., 0],
        block_q=block_q,
        key_group=key_group,
        heads=rows // per_head,
    )
