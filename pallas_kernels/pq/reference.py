"""Specification of product-quantized key selection: whole matrices and explicit sorts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int8, Int32, UInt8

from pallas_kernels.arguments import checked
from pallas_kernels.pq.types import Selection, TileSelection, TokenSelection, check_selection

MANTISSA_BITS = 23  # of float32
EXPONENT_BIAS = 127
MAX_EXPONENT = 100  # sums of powers up to 2^100 stay finite, and the least stay normal
WEIGHT_BITS = 15  # of a group's weight beside the largest of a query: 2^16 of them add up in int32
SHARE_BITS = 14  # of a group's share of a query: those of 512 queries add up in float32
RECIPROCAL = np.int32(0x7EF311C7)  # less the bit pattern of x it is that of 1 / x, within an eighth
DROPPED_BITS = 8  # of the sum of shares, which leaves scores below TILE_SCORES
TILE_SCORES = 2**20


def encode(
    x: Float[Array, "B S N H"], codebooks: Float[Array, "K M E C"]
) -> UInt8[Array, "B S N M"]:
    """Index of the nearest codeword by |c|^2 - 2 x.c, the lowest of equals."""
    batch, length, heads, _ = x.shape
    kv_heads, spaces, _, width = codebooks.shape
    parts = x.astype(jnp.float32).reshape(batch, length, heads, spaces, width)
    books = jnp.repeat(codebooks.astype(jnp.float32), heads // kv_heads, axis=0)
    products = jnp.einsum("bsnmc,nmec->bsnme", parts, books, precision="highest")
    return jnp.argmin(jnp.sum(books**2, -1) - 2 * products, -1).astype(jnp.uint8)


def decode(
    codes: UInt8[Array, "B S N M"], codewords: Int8[Array, "K M E W"]
) -> Float[Array, "B N S MW"]:
    """Rows of codewords, float32."""
    batch, length, heads, spaces = codes.shape
    books = jnp.repeat(codewords, heads // codewords.shape[0], axis=0)
    rows = books[jnp.arange(heads)[:, None], jnp.arange(spaces), codes]
    return jnp.moveaxis(rows.astype(jnp.float32).reshape(batch, length, heads, -1), 2, 1)


def scores(
    query_codes: UInt8[Array, "B S N M"],
    key_codes: UInt8[Array, "B S K M"],
    query_codewords: Int8[Array, "K M E W"],
    key_codewords: Int8[Array, "K M E W"],
) -> Int32[Array, "B N S S"]:
    """Score of every key for every query. Every partial sum is an integer below 2**24."""
    queries, keys = decode(query_codes, query_codewords), decode(key_codes, key_codewords)
    keys = jnp.repeat(keys, queries.shape[1] // keys.shape[1], axis=1)
    return jnp.einsum("bnqw,bnkw->bnqk", queries, keys, precision="highest").astype(jnp.int32)


@checked(S="length")
def valid_keys(
    length: int,
    causal: bool = False,
    key_mask: Bool[Array, "B S"] | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
) -> Bool[Array, "b S S"]:
    """Whether a query may see a key; b is 1 where neither mask nor segments are given.

    Args:
      length: Positions S.
      causal: Whether a query sees only itself and earlier keys.
      key_mask: False where a key is padding.
      segment_ids: Tokens see only tokens with their own id.

    Raises:
      ValueError: Shapes or types do not fit together.
    """
    position = jnp.arange(length)
    valid = position <= position[:, None] if causal else jnp.ones((length, length), bool)
    valid = valid[None]
    if key_mask is not None:
        valid = valid & key_mask[:, None, :]
    if segment_ids is not None:
        valid = valid & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return valid


def tie_distance(length: int) -> Int32[Array, "S S"]:
    """2 |d| - (d < 0) for d = key - query: the nearest first, of two the left one."""
    d = jnp.arange(length, dtype=jnp.int32) - jnp.arange(length, dtype=jnp.int32)[:, None]
    return 2 * jnp.abs(d) - (d < 0)


def exponent_step(score_unit: Float[Array, "K"]) -> Float[Array, "K"]:
    """What a score adds to the bit pattern of 2^x."""
    return score_unit * np.float32(2**MANTISSA_BITS / np.log(2))


def bits_of_power(step: Float[Array, "*#n"], score: Float[Array, "*n"]) -> Int32[Array, "*n"]:
    """Bit pattern of the float32 2^i (1 + f), i + f = step * score / 2^23 in -100..100."""
    limit = np.float32(MAX_EXPONENT * 2**MANTISSA_BITS)
    away = jnp.clip(step * score, -limit, limit).astype(jnp.int32)
    return away + (EXPONENT_BIAS << MANTISSA_BITS)


def cut_weight(weight: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """A positive float32 without the lower half of its bits, which bfloat16 holds."""
    bits = jax.lax.bitcast_convert_type(weight, jnp.int32) & np.int32(-(2**16))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def group_shares(weights: Float[Array, "*n"], axis: int) -> Int32[Array, "*n"]:
    """Share of each key group in a query's weights, of about 2^14 in all.

    Weights are cut to 15 bits beside the largest, so that their sum is one of integers, and divided
    by it through `RECIPROCAL`: to within an eighth, and alike on every device.

    Args:
      weights: Of a query and a group, the sum of 2^x over its keys, cut by `cut_weight`; 0 where
        none is seen.
      axis: The groups, at most 2^16.
    """

    def bits(a: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(a, jnp.int32)

    def power(exponent: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(exponent << MANTISSA_BITS, jnp.float32)

    top = bits(weights.max(axis, keepdims=True)) >> MANTISSA_BITS
    top = jnp.maximum(top, EXPONENT_BIAS - MAX_EXPONENT)  # a query that sees nothing
    cut = (weights * power(2 * EXPONENT_BIAS + WEIGHT_BITS - 1 - top)).astype(jnp.int32)
    total = jnp.maximum(cut.sum(axis, keepdims=True, dtype=jnp.int32), 1).astype(jnp.float32)
    inverse = jax.lax.bitcast_convert_type(RECIPROCAL - bits(total), jnp.float32)
    return (cut.astype(jnp.float32) * (inverse * np.float32(2**SHARE_BITS))).astype(jnp.int32)


def tile_score(
    share: Int32[Array, "*n"], seen: Bool[Array, "*n"], first: Bool[Array, "*#n"] | None
) -> Float[Array, "*n"]:
    """Integer score of a group for a tile, -inf where its queries see no key.

    Args:
      share: Sum of `group_shares` over the queries that count; below 2^24.
      seen: Whether any query sees a key of the group.
      first: Groups that come before all others.
    """
    bits = jax.lax.bitcast_convert_type(share.astype(jnp.float32), jnp.int32)
    above = (bits - (EXPONENT_BIAS << MANTISSA_BITS)) >> DROPPED_BITS
    score = jnp.where(share > 0, above + 1, 0)
    if first is not None:
        score = jnp.where(first, TILE_SCORES - 1, score)
    return jnp.where(seen, score.astype(jnp.float32), -jnp.inf)


def tile_list_length(
    length: int, num_keys: int, *, block_q: int, key_group: int, causal: bool, segments: bool
) -> int:
    """Groups that a tile keeps at most."""
    first = np.arange(0, length, block_q)
    last = np.minimum(first + block_q, length) - 1
    own = int((last // key_group - first // key_group).max()) + 1
    others = -(-num_keys // key_group)
    return min(-(-length // key_group), others + (own if causal or segments else 0))


def tile_groups(
    length: int, block_q: int, key_group: int
) -> tuple[Bool[Array, "Q G"], Int32[Array, "Q G"]]:
    """Whether a key group overlaps a tile of queries, and its tie distance from the tile.

    Made on the device: of a long sequence they would be large constants of the program.
    """
    first = jnp.arange(0, length, block_q, dtype=jnp.int32)[:, None]
    last = jnp.minimum(first + block_q, length) - 1
    group = jnp.arange(-(-length // key_group), dtype=jnp.int32)
    d = group - first // key_group
    own = (group >= first // key_group) & (group <= last // key_group)
    return own, 2 * jnp.abs(d) - (d < 0)


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
    valid = valid_keys(length, causal, key_mask, segment_ids)
    valid = jnp.broadcast_to(valid[:, None], (batch, heads, length, length))
    if granularity == "token":
        score = scores(query_codes, key_codes, query_codewords, key_codewords)
        distance = jnp.broadcast_to(tie_distance(length), score.shape)
        order = jnp.lexsort((distance, -score, ~valid))
        kept = jnp.minimum(num_keys, valid.sum(-1))
        last = jnp.take_along_axis(order, jnp.maximum(kept - 1, 0)[..., None], -1)
        threshold, radius = (jnp.take_along_axis(a, last, -1)[..., 0] for a in (score, distance))
        return TokenSelection(
            query_codes=query_codes,
            key_codes=key_codes,
            query_codewords=query_codewords,
            key_codewords=key_codewords,
            threshold=jnp.where(kept > 0, threshold, 0),
            tie_radius=jnp.where(kept > 0, radius, -1),
        )
    tiles, count = -(-length // block_q), -(-length // key_group)
    rows, keys = tiles * block_q - length, count * key_group - length
    score = scores(query_codes, key_codes, query_codewords, key_codewords).astype(jnp.float32)
    step = jnp.repeat(exponent_step(score_unit), heads // key_codes.shape[2])
    bits = bits_of_power(step[:, None, None], score)
    power = jnp.where(valid, jax.lax.bitcast_convert_type(bits, jnp.float32), 0)
    power = jnp.pad(power, ((0, 0), (0, 0), (0, 0), (0, keys)))
    power = power.reshape(batch, heads, length, count, key_group)
    weights = power[..., 0]
    for key in range(1, key_group):
        weights = weights + power[..., key]
    weights = cut_weight(weights)
    counted = jnp.ones((1, length), bool) if key_mask is None else key_mask
    shares = jnp.where(counted[:, None, :, None], group_shares(weights, -1), 0)
    lists = key_codes.shape[2] if share_heads else heads
    shares, weights = (
        jnp.pad(a, ((0, 0), (0, 0), (0, rows), (0, 0))).reshape(
            batch, lists, -1, tiles, block_q, count
        )
        for a in (shares, weights)
    )
    own, away = tile_groups(length, block_q, key_group)
    own_first = causal or segment_ids is not None
    group_score = tile_score(
        shares.sum((2, 4)), (weights > 0).any((2, 4)), own if own_first else None
    )
    listed = group_score > -jnp.inf
    list_length = tile_list_length(
        length,
        num_keys,
        block_q=block_q,
        key_group=key_group,
        causal=causal,
        segments=segment_ids is not None,
    )
    order = jnp.lexsort(
        tuple(jnp.broadcast_to(a, listed.shape) for a in (away, -group_score, ~listed))
    )
    counts = jnp.minimum(list_length, listed.sum(-1))
    chosen = jnp.arange(list_length) < counts[..., None]
    groups = jnp.sort(jnp.where(chosen, order[..., :list_length], -1), -1)
    rotated = jnp.take_along_axis(
        groups, (jnp.arange(list_length) - counts[..., None]) % list_length, -1
    )
    last = jnp.maximum(groups[..., -1:], 0)
    return TileSelection(
        groups=jnp.where(chosen, rotated, last).astype(jnp.int32),
        counts=counts.astype(jnp.int32),
        block_q=block_q,
        key_group=key_group,
        heads=heads // lists,
    )


def kept_keys(selection: Selection, length: int) -> Bool[Array, "B N S S"]:
    """The selection as a mask in memory quadratic in S, for tests and figures.

    Args:
      selection: What `pq_select` returned. Validity is on top: `& valid_keys(...)`.
      length: Positions S.

    Returns:
      Whether a query keeps a key.

    Raises:
      ValueError: It is no selection, or one for another length.
    """
    check_selection("kept_keys", selection, length)
    if isinstance(selection, TokenSelection):
        score = scores(
            selection.query_codes,
            selection.key_codes,
            selection.query_codewords,
            selection.key_codewords,
        )
        threshold, radius = selection.threshold[..., None], selection.tie_radius[..., None]
        near = tie_distance(length) <= radius
        return (radius >= 0) & ((score > threshold) | (score == threshold) & near)
    chosen = jnp.arange(selection.groups.shape[-1]) < selection.counts[..., None]
    number = -(-length // selection.key_group)
    hits = selection.groups[..., None] == jnp.arange(number)
    kept = jnp.any(hits & chosen[..., None], -2)
    kept = jnp.repeat(jnp.repeat(kept, selection.block_q, 2), selection.key_group, 3)
    return jnp.repeat(kept[:, :, :length, :length], selection.heads, 1)
