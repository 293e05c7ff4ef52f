"""Specification of product-quantized key selection: whole matrices and explicit sorts."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int8, Int32, UInt8

from pallas_kernels.pq.types import Selection, TileSelection, TokenSelection


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


def valid_keys(
    length: int,
    causal: bool,
    key_mask: Bool[Array, "B S"] | None,
    segment_ids: Int[Array, "B S"] | None,
) -> Bool[Array, "b S S"]:
    """Whether a query may see a key; b is 1 where neither mask nor segments are given."""
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


def tile_groups(
    length: int, block_q: int, key_group: int
) -> tuple[Bool[np.ndarray, "Q G"], Int32[np.ndarray, "Q G"]]:
    """Whether a key group overlaps a tile of queries, and its tie distance from the tile."""
    first = np.arange(0, length, block_q)[:, None]
    last = np.minimum(first + block_q, length) - 1
    group = np.arange(-(-length // key_group))
    d = group - first // key_group
    own = (group >= first // key_group) & (group <= last // key_group)
    return own, (2 * np.abs(d) - (d < 0)).astype(np.int32)


def select(
    query_codes: UInt8[Array, "B S N M"],
    key_codes: UInt8[Array, "B S K M"],
    query_codewords: Int8[Array, "K M E W"],
    key_codewords: Int8[Array, "K M E W"],
    *,
    num_keys: int,
    granularity: str,
    causal: bool,
    key_mask: Bool[Array, "B S"] | None,
    segment_ids: Int[Array, "B S"] | None,
    block_q: int,
    key_group: int,
) -> Selection:
    """As `pq_select`."""
    score = scores(query_codes, key_codes, query_codewords, key_codewords)
    batch, heads, length, _ = score.shape
    valid = valid_keys(length, causal, key_mask, segment_ids)
    valid = jnp.broadcast_to(valid[:, None], score.shape)
    if granularity == "token":
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
    counted = jnp.ones((1, length), bool) if key_mask is None else key_mask
    total = jnp.where(counted[:, None, :, None], score, 0)
    total = jnp.pad(total, ((0, 0), (0, 0), (0, rows), (0, keys)))
    total = total.reshape(batch, heads, tiles, block_q, count, key_group).sum(3)
    visible = jnp.pad(valid, ((0, 0), (0, 0), (0, rows), (0, keys)))
    visible = visible.reshape(batch, heads, tiles, block_q, count, key_group).any(3)
    group_score = jnp.max(total, -1, where=visible, initial=jnp.iinfo(jnp.int32).min)
    listed = visible.any(-1)
    own, away = tile_groups(length, block_q, key_group)
    list_length = min(count, max(-(-num_keys // key_group), int(own.sum(-1).max())))
    order = jnp.lexsort(
        tuple(jnp.broadcast_to(a, listed.shape) for a in (away, -group_score, ~own, ~listed))
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
    )


def kept_keys(selection: Selection, length: int) -> Bool[Array, "B N S S"]:
    """The selection as a mask, before validity."""
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
    return kept[:, :, :length, :length]
