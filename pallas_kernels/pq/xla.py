"""Product-quantized key selection in plain XLA, by blocks that stay in cache.

The n-th highest score of a row is found by bisection on the integers: each step counts the scores
above a few middles of the interval, so nothing is sorted. Scores lie keys first, queries last,
which makes those counts sums of vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int8, Int32, UInt8

from pallas_kernels.pq.reference import (
    bits_of_power,
    cut_weight,
    exponent_step,
    group_shares,
    tile_groups,
    tile_list_length,
    tile_score,
)
from pallas_kernels.pq.types import Selection, TileSelection, TokenSelection

BLOCK_ELEMENTS = 2**19  # float32 elements of a block of scores
STAGES = 4  # in which causal selection takes its queries, so that 3/8 of the scores are not made
STAGE_QUERIES = 64  # fewer are not cut
ENCODE_TOKENS = 512  # tokens of a block when encoding
ENCODE_UNROLL = 16  # codewords compared in one pass over a block
MAX_UNROLLED = 32  # codewords of width 1 that one elementwise pass compares or looks up
ONE = np.float32(1)  # counts stay float32 whatever the default type


def encode(
    x: Float[Array, "B S N H"], codebooks: Float[Array, "K M E C"]
) -> UInt8[Array, "B S N M"]:
    """As `pq_encode`."""
    batch, length, heads, _ = x.shape
    kv_heads, spaces, num_codewords, width = codebooks.shape
    if width == 1 and num_codewords <= MAX_UNROLLED:
        return encode_scalars(x, codebooks)
    tokens, rows = batch * length, heads // kv_heads
    block = min(tokens, ENCODE_TOKENS)
    blocks = -(-tokens // block)
    passes = -(-num_codewords // ENCODE_UNROLL)
    codebooks = codebooks.astype(jnp.float32)
    norms = pad(jnp.sum(codebooks**2, -1), passes * ENCODE_UNROLL, 2, jnp.inf)
    doubles = pad(-2 * codebooks, passes * ENCODE_UNROLL, 2)
    stacked = [
        jnp.moveaxis(a.reshape(kv_heads, spaces, passes, ENCODE_UNROLL, -1), 2, 0)
        for a in (norms, doubles)
    ]
    stacked.append(jnp.arange(passes, dtype=jnp.int32) * ENCODE_UNROLL)
    parts = pad(x.reshape(tokens, kv_heads, rows, spaces, width), blocks * block, 0)

    def run(part: jax.Array) -> jax.Array:
        # Tokens last, so that a vector instruction serves several of them.
        part = part.astype(jnp.float32).transpose(1, 3, 4, 2, 0)
        part = part.reshape(kv_heads, spaces, width, -1)
        # With the codewords, which XLA may cut up and spread before the loop: five times slower.
        part, books = jax.lax.optimization_barrier((part, stacked))

        def step(
            best: tuple[jax.Array, jax.Array], codewords: tuple[jax.Array, ...]
        ) -> tuple[tuple[jax.Array, jax.Array], None]:
            (lowest, code), (norm, double, first) = best, codewords
            for e in range(ENCODE_UNROLL):
                distance = norm[:, :, e]
                for c in range(width):
                    distance = distance + double[:, :, e, c, None] * part[:, :, c]
                code = jnp.where(distance < lowest, first + e, code)
                lowest = jnp.minimum(distance, lowest)
            return (lowest, code), None

        shape = (kv_heads, spaces, part.shape[-1])
        start = jnp.full(shape, jnp.inf), jnp.zeros(shape, jnp.int32)
        code = jax.lax.scan(step, start, tuple(books))[0][1].astype(jnp.uint8)
        return code.reshape(kv_heads, spaces, rows, -1).transpose(3, 0, 2, 1)

    codes = jax.lax.map(run, parts.reshape(blocks, block, *parts.shape[1:]))
    return codes.reshape(-1, heads, spaces)[:tokens].reshape(batch, length, heads, spaces)


def encode_scalars(
    x: Float[Array, "B S N H"], codebooks: Float[Array, "K H E 1"]
) -> UInt8[Array, "B S N H"]:
    """As `pq_encode` with codewords of width 1, of which there are at most `MAX_UNROLLED`.

    One elementwise pass, which XLA fuses well on every device.
    """
    batch, length, heads, width = x.shape
    kv_heads = len(codebooks)
    parts = x.astype(jnp.float32).reshape(batch, length, kv_heads, heads // kv_heads, width)
    books = codebooks.astype(jnp.float32)
    lowest = jnp.full(parts.shape, jnp.inf)
    code = jnp.zeros(parts.shape, jnp.int32)
    for e in range(books.shape[2]):
        word = books[:, None, :, e, 0]
        distance = word**2 - 2 * word * parts
        code = jnp.where(distance < lowest, e, code)
        lowest = jnp.minimum(distance, lowest)
    return code.astype(jnp.uint8).reshape(x.shape)


def pad(a: jax.Array, size: int, axis: int, value: float = 0) -> jax.Array:
    """Pads one axis at its end to a size."""
    widths = [(0, 0)] * a.ndim
    widths[axis] = (0, size - a.shape[axis])
    return jnp.pad(a, widths, constant_values=value)


def per_pair(a: jax.Array | None, pairs: int) -> jax.Array | None:
    """Repeats what a sequence has for each of its key heads."""
    return None if a is None else jnp.repeat(a, pairs // a.shape[0], 0)


def decode(
    codes: UInt8[Array, "B S N M"], codewords: Int8[Array, "K M E W"]
) -> Float[Array, "BK R S MW"]:
    """Rows of codewords, float32, the heads of a key head side by side."""
    batch, length, heads, spaces = codes.shape
    kv_heads = codewords.shape[0]
    # Left to itself, XLA would encode and round anew for every element of the rows.
    codes, codewords = jax.lax.optimization_barrier((codes, codewords))
    codes = codes.reshape(batch, length, kv_heads, -1, spaces)
    if codewords.shape[3] == 1 and codewords.shape[2] <= MAX_UNROLLED:
        rows = jnp.zeros(codes.shape, jnp.int8)
        for e in range(codewords.shape[2]):  # a gather takes many times as long
            rows = jnp.where(codes == e, codewords[:, None, :, e, 0], rows)
        rows = rows.astype(jnp.float32)
    else:
        books, codes = codewords.astype(jnp.float32), codes.astype(jnp.int32)
        rows = books[jnp.arange(kv_heads)[:, None, None], jnp.arange(spaces), codes]
    rows = jnp.moveaxis(rows.reshape(batch, length, kv_heads, heads // kv_heads, -1), 1, 3)
    return jax.lax.optimization_barrier(
        rows.reshape(batch * kv_heads, heads // kv_heads, length, -1)
    )


class Stage(NamedTuple):
    """Consecutive queries, and how many keys from the first on they may see.

    Attributes:
      first: Position of the first query.
      queries: Their number.
      keys: Keys that any of them may see.
    """

    first: int
    queries: int
    keys: int

    def of_queries(self, a: jax.Array, axis: int) -> jax.Array:
        """What belongs to its queries."""
        return jax.lax.slice_in_dim(a, self.first, self.first + self.queries, axis=axis)

    def of_keys(self, a: jax.Array, axis: int) -> jax.Array:
        """What belongs to its keys."""
        return jax.lax.slice_in_dim(a, 0, self.keys, axis=axis)


def stages(length: int, causal: bool) -> list[Stage]:
    """Cuts causal queries, so that most meet fewer keys than there are.

    Example:
        >>> [stage.keys for stage in stages(1000, causal=True)]
        [256, 512, 768, 1000]
    """
    number = min(STAGES, -(-length // STAGE_QUERIES)) if causal else 1
    size = -(-length // (8 * number)) * 8
    starts = range(0, length, size)
    return [Stage(s, min(size, length - s), min(s + size, length)) for s in starts]


def block_shape(
    pairs: int, rows: int, queries: int, keys: int, limit: int = BLOCK_ELEMENTS
) -> tuple[int, int]:
    """Key heads and queries of a block whose scores have at most about `limit` elements.

    Args:
      pairs: Sequences times key heads.
      rows: Query heads of a key head.
      queries: Positions of queries.
      keys: Keys of each.
      limit: Elements.
    """
    block_q = min(queries, max(1, limit // (rows * keys)))
    if block_q < queries:
        return 1, max(8, block_q // 8 * 8)
    most = max(1, limit // (rows * queries * keys))
    return max(c for c in range(1, min(most, pairs) + 1) if pairs % c == 0), queries


def valid_block(
    query_position: Int[Array, "q"],
    length: int,
    causal: bool,
    key_mask: Bool[Array, "g S"] | None,
    segments: tuple[Int[Array, "g q"], Int[Array, "g S"]] | None,
) -> Bool[Array, "_ S 1 _"] | None:
    """Whether queries may see keys, keys first, ready to broadcast; None where all may.

    Args:
      query_position: Positions of the queries.
      length: Number of keys.
      causal: Whether a query sees only itself and earlier keys.
      key_mask: False where a key is padding.
      segments: Segment ids of the queries and of the keys.
    """
    valid = None
    if causal:
        valid = (jnp.arange(length)[:, None] <= query_position)[None]
    if key_mask is not None:
        valid = key_mask[:, :, None] if valid is None else valid & key_mask[:, :, None]
    if segments is not None:
        same = segments[1][:, :, None] == segments[0][:, None, :]
        valid = same if valid is None else valid & same
    return None if valid is None else valid[:, :, None]


def _search(
    enough: Callable[[jax.Array], jax.Array],
    values: Float[Array, "g S r q"],
    low: Float[Array, "g r q"],
    high: Float[Array, "g r q"],
) -> Float[Array, "g r q"]:
    """The largest integer t in [low, high] at which enough(number of values >= t) holds.

    It must hold at `low`. A pass over the values counts for three integers at once: the counts are
    the digits, to the base S + 1, of one int32 sum, as long as that does not overflow, and else for
    one.
    """
    base = values.shape[1] + 1
    digits = 3 if base**3 < 2**31 else 1
    widths = np.exp2(np.arange(0, 24, digits // 2 + 1), dtype=np.float32)
    passes = jnp.sum(widths <= jnp.max(high - low))
    weights = [np.int32(sum(base**i for i in range(n))) for n in range(digits + 1)]

    def counts(marks: list[jax.Array]) -> list[jax.Array]:
        weight = jnp.int32(0)
        for number, mark in enumerate(marks, start=1):
            weight = jnp.where(values >= mark[:, None], weights[number], weight)
        total = jnp.sum(weight, 1, dtype=jnp.int32)
        return [total // np.int32(base**i) % np.int32(base) for i in range(digits)]

    def step(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, width = state
        found = counts([low + i * width for i in range(1, digits + 1)])
        rise = sum(jnp.where(enough(count), ONE, 0) for count in found)
        return low + rise * width, width / (digits + 1)

    start = jnp.where(passes > 0, jnp.asarray(widths)[passes - 1], 0)
    return jax.lax.while_loop(lambda state: state[1] >= 1, step, (low, start))[0]


def threshold(
    score: Float[Array, "g S r q"], distance: Int[Array, "S q"], count: int
) -> tuple[Float[Array, "g r q"], Float[Array, "g r q"]]:
    """Threshold and tie radius of the `count` highest scores; invalid keys score -inf."""
    valid = score > -jnp.inf
    number = jnp.sum(jnp.where(valid, ONE, 0), 1)
    kept = jnp.minimum(number, count)
    some = number > 0
    high = jnp.where(some, score.max(1), 0)
    low = jnp.where(some, jnp.where(valid, score, jnp.inf).min(1), 0)
    level = _search(lambda n: n >= kept, score, low, high)
    missing = kept - jnp.sum(jnp.where(score > level[:, None], ONE, 0), 1)
    near = -distance[:, None, :].astype(jnp.float32)
    ties = jnp.where(score == level[:, None], near, -jnp.inf)
    furthest = jnp.full_like(level, -2.0 * distance.max())
    radius = -_search(lambda n: n >= missing, ties, furthest, jnp.zeros_like(level))
    return jnp.where(some, level, 0), jnp.where(some, radius, -1)


def tie_distance(query_position: Int[Array, "q"], length: int) -> Int[Array, "S q"]:
    """2 |d| - (d < 0) for d = key - query."""
    d = jnp.arange(length, dtype=jnp.int32)[:, None] - query_position
    return 2 * jnp.abs(d) - (d < 0)


def select(
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
    batch, length, heads, _ = query_codes.shape
    queries, keys = decode(query_codes, query_codewords), decode(key_codes, key_codewords)[:, 0]
    if granularity == "tile":
        groups, counts = _select_tiles(
            queries,
            keys,
            score_unit,
            num_keys,
            block_q,
            key_group,
            share_heads,
            causal,
            key_mask,
            segment_ids,
        )
        lists = key_codes.shape[2] if share_heads else heads
        return TileSelection(
            groups=groups.reshape(batch, lists, *groups.shape[2:]),
            counts=counts.reshape(batch, lists, -1),
            block_q=block_q,
            key_group=key_group,
            heads=heads // lists,
        )
    threshold, radius, kept = _select_tokens(queries, keys, num_keys, causal, key_mask, segment_ids)
    return TokenSelection(
        query_codes=query_codes,
        key_codes=key_codes,
        query_codewords=query_codewords,
        key_codewords=key_codewords,
        threshold=threshold.reshape(batch, heads, length),
        tie_radius=radius.reshape(batch, heads, length),
        kept=kept,
    )


def _select_tokens(
    queries: Float[Array, "g r S w"],
    keys: Float[Array, "g S w"],
    num_keys: int,
    causal: bool,
    key_mask: Bool[Array, "B S"] | None,
    segment_ids: Int[Array, "B S"] | None,
) -> tuple[Int32[Array, "g r S"], Int32[Array, "g r S"], Bool[Array, "g S r S"] | None]:
    """Thresholds, tie radii and, of short sequences, the mask, keys first."""
    pairs, _, length, width = queries.shape
    masks = per_pair(key_mask, pairs), per_pair(segment_ids, pairs)
    short = length <= 4 * width  # a byte a key, against a float32 query
    found = [
        _select_stage(stage, queries, keys, num_keys, causal, *masks, short)
        for stage in stages(length, causal)
    ]
    levels, radii, kept = zip(*found, strict=True)
    mask = jnp.concatenate([pad(a, length, 1) for a in kept], -1) if short else None
    return jnp.concatenate(levels, -1), jnp.concatenate(radii, -1), mask


def _select_stage(
    stage: Stage,
    queries: Float[Array, "g r S w"],
    keys: Float[Array, "g S w"],
    num_keys: int,
    causal: bool,
    key_mask: Bool[Array, "g S"] | None,
    segments: Int[Array, "g S"] | None,
    with_mask: bool,
) -> tuple[Int32[Array, "g r q"], Int32[Array, "g r q"], Bool[Array, "g k r q"] | None]:
    """Thresholds, tie radii and, if asked for, the mask of a stage's queries."""
    pairs, rows = queries.shape[:2]
    chunk, block = block_shape(pairs, rows, stage.queries, stage.keys)
    blocks = -(-stage.queries // block)
    queries = pad(stage.of_queries(queries, 2), blocks * block, 2)
    keys = stage.of_keys(keys, 1)
    if key_mask is not None:
        key_mask = stage.of_keys(key_mask, 1)
    sides = None
    if segments is not None:
        own = pad(stage.of_queries(segments, 1), blocks * block, 1)
        sides = own, stage.of_keys(segments, 1)

    def run(index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        pair, first = index // blocks * chunk, index % blocks * block

        def here(a: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(a, pair, chunk)

        def mine(a: jax.Array, axis: int) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(here(a), first, block, axis)

        position = stage.first + first + jnp.arange(block, dtype=jnp.int32)
        valid = valid_block(
            position,
            stage.keys,
            causal,
            None if key_mask is None else here(key_mask),
            None if sides is None else (mine(sides[0], 1), here(sides[1])),
        )
        score = jnp.einsum("gkw,grqw->gkrq", here(keys), mine(queries, 2), precision="highest")
        if valid is not None:
            score = jnp.where(valid, score, -jnp.inf)
        distance = tie_distance(position, stage.keys)
        level, radius = threshold(score, distance, num_keys)
        kept = _kept(score, distance, level, radius) if with_mask else None
        return level.astype(jnp.int32), radius.astype(jnp.int32), kept

    def join(a: jax.Array) -> jax.Array:
        a = a.reshape(pairs // chunk, blocks, chunk, -1, rows, block)
        a = jnp.moveaxis(a, 1, 4).reshape(pairs, -1, rows, blocks * block)
        return a[..., : stage.queries]

    level, radius, kept = jax.lax.map(run, jnp.arange(pairs // chunk * blocks))
    return join(level)[:, 0], join(radius)[:, 0], None if kept is None else join(kept)


def _kept(
    score: Float[Array, "g S r q"],
    distance: Int[Array, "S q"],
    level: Float[Array, "g r q"],
    radius: Float[Array, "g r q"],
) -> Bool[Array, "g S r q"]:
    """The keys that a threshold and a tie radius keep; invalid ones score -inf."""
    near = distance[:, None].astype(jnp.float32) <= radius[:, None]
    return (score > level[:, None]) | (score == level[:, None]) & near


def _select_tiles(
    queries: Float[Array, "g r S w"],
    keys: Float[Array, "g S w"],
    score_unit: Float[Array, "K"],
    num_keys: int,
    block_q: int,
    key_group: int,
    share_heads: bool,
    causal: bool,
    key_mask: Bool[Array, "B S"] | None,
    segment_ids: Int[Array, "B S"] | None,
) -> tuple[Int32[Array, "g t Q P"], Int32[Array, "g t Q"]]:
    """Lists of key groups and their lengths."""
    pairs, _, length, _ = queries.shape
    own, away = tile_groups(length, block_q, key_group)
    (tiles, count), distance = own.shape, away.T
    size = tile_list_length(
        length,
        num_keys,
        block_q=block_q,
        key_group=key_group,
        causal=causal,
        segments=segment_ids is not None,
    )
    first = own if causal or segment_ids is not None else None
    keys = pad(keys, count * key_group, 1)
    queries = pad(queries, tiles * block_q, 2)
    masks = per_pair(key_mask, pairs), per_pair(segment_ids, pairs)
    steps = jnp.tile(exponent_step(score_unit), pairs // len(score_unit))
    parts = [
        _tile_scores(
            stage, queries, keys, steps, length, block_q, key_group, share_heads, causal, *masks
        )
        for stage in _tile_stages(tiles, block_q, count, key_group, causal)
    ]
    shares, seen = (
        jnp.concatenate([pad(part[i], count, 1) for part in parts], -1) for i in range(2)
    )

    def run(pair: jax.Array) -> tuple[jax.Array, jax.Array]:
        score = tile_score(shares[pair], seen[pair], None if first is None else first.T[:, None])
        level, radius = threshold(score[None], distance, size)
        kept = _kept(score[None], distance, level, radius)[0]
        rank = jnp.cumsum(kept, 0)
        counts = rank[-1]
        place = jnp.arange(1, size + 1)[:, None, None]
        nth = jnp.minimum(place, counts)
        groups = jnp.sum(rank[None] < nth[:, None], 1)
        return jnp.moveaxis(groups, 0, -1).astype(jnp.int32), counts.astype(jnp.int32)

    return jax.lax.map(run, jnp.arange(pairs))


class TileStage(NamedTuple):
    """Consecutive tiles, and how many key groups from the first on they may see."""

    first: int
    tiles: int
    groups: int


def _tile_stages(
    tiles: int, block_q: int, count: int, key_group: int, causal: bool
) -> list[TileStage]:
    """Cuts causal tiles as `stages` cuts queries."""
    size = -(-tiles // (STAGES if causal else 1))
    return [
        TileStage(
            first,
            min(size, tiles - first),
            min(count, -(-(first + size) * block_q // key_group)) if causal else count,
        )
        for first in range(0, tiles, size)
    ]


def _tile_scores(
    stage: TileStage,
    queries: Float[Array, "g r U w"],
    keys: Float[Array, "g k w"],
    steps: Float[Array, "g"],
    length: int,
    block_q: int,
    key_group: int,
    share_heads: bool,
    causal: bool,
    key_mask: Bool[Array, "g S"] | None,
    segments: Int[Array, "g S"] | None,
) -> tuple[Int32[Array, "g G t Q"], Bool[Array, "g G t Q"]]:
    """Sums of the shares of groups over the queries of tiles, and whether any sees the group."""
    pairs, rows, _, _ = queries.shape
    span = stage.groups * key_group
    _, block = block_shape(pairs, rows, stage.tiles * block_q, span)
    step = min(stage.tiles, max(1, block // block_q))  # tiles of a block
    blocks, block = -(-stage.tiles // step), step * block_q
    start = stage.first * block_q
    queries = queries[:, :, start : start + stage.tiles * block_q]
    queries, keys = pad(queries, blocks * block, 2), keys[:, :span]
    key_position = jnp.arange(span, dtype=jnp.int32)

    def run(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        pair, offset = index // blocks, index % blocks * block
        position = start + offset + jnp.arange(block, dtype=jnp.int32)
        mine = jax.lax.dynamic_slice_in_dim(queries[pair], offset, block, 1)
        product = jnp.einsum("kw,rqw->krq", keys[pair], mine, precision="highest")
        # Made once: it would be made again for every key of a group.
        product = jax.lax.optimization_barrier(product)
        product = product.reshape(stage.groups, key_group, rows, block)

        valid = (position < length)[None]
        if span > length:
            valid = valid & (key_position < length)[:, None]
        if causal:
            valid = valid & (key_position[:, None] <= position)
        if key_mask is not None:
            valid = valid & pad(key_mask[:, :span], span, 1)[pair][:, None]
        if segments is not None:
            own = segments[pair][jnp.minimum(position, length - 1)]
            valid = valid & (pad(segments[:, :span], span, 1)[pair][:, None] == own)
        valid = jnp.broadcast_to(valid, (span, block)).reshape(stage.groups, key_group, 1, block)
        weights = jnp.zeros((stage.groups, rows, block), jnp.float32)
        for key in range(key_group):
            bits = bits_of_power(steps[pair], product[:, key])
            power = jax.lax.bitcast_convert_type(bits, jnp.float32)
            weights = weights + jnp.where(valid[:, key], power, 0)
        weights = jax.lax.optimization_barrier(cut_weight(weights))
        share = group_shares(weights, 0)
        if key_mask is not None:
            share = jnp.where(key_mask[pair][jnp.minimum(position, length - 1)], share, 0)
        of_tiles = stage.groups, lists, rows // lists, step, block_q
        seen = (weights > 0).reshape(of_tiles).any((2, 4))
        return share.reshape(of_tiles).sum((2, 4), dtype=jnp.int32), seen

    lists = 1 if share_heads else rows

    def join(a: jax.Array) -> jax.Array:
        a = a.reshape(pairs, blocks, stage.groups, lists, step).transpose(0, 2, 3, 1, 4)
        return a.reshape(pairs, stage.groups, lists, -1)[..., : stage.tiles]

    share, seen = jax.lax.map(run, jnp.arange(pairs * blocks))
    return join(share), join(seen)
