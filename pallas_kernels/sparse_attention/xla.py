"""Sparse attention in plain XLA, by blocks, with a backward pass that recomputes the weights.

Logits are laid out keys first, queries last, so that sums over keys are sums of vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.pq.types import Selection, TileSelection, TokenSelection
from pallas_kernels.pq.xla import block_shape, decode, pad, per_pair, tie_distance, valid_block

TILE_ELEMENTS = 2**19  # float32 elements of the logits of a step over tiles


class Options(NamedTuple):
    """What is known when tracing."""

    scale: float
    causal: bool


class Block(NamedTuple):
    """Queries of one step and the keys that they choose from.

    Attributes:
      q: `[g, r, q, H]`.
      k: `[g, S, H]`.
      v: `[g, S, H]`.
      kept: Whether a query keeps a key, `[g, S, r, q]`.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    kept: jax.Array


class Given(NamedTuple):
    """The arguments of an attention but its selection, heads before positions.

    Attributes:
      q: `[g, r, S, H]`, g sequences times key heads, r query heads of a key head.
      k: `[g, S, H]`.
      v: `[g, S, H]`.
      key_mask: `[B, S]`.
      segment_ids: `[B, S]`.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    key_mask: jax.Array | None
    segment_ids: jax.Array | None


# What the backward pass needs: arguments, output and log-sum-exp.
TokenSaved = tuple[Given, TokenSelection, jax.Array, jax.Array]
TileSaved = tuple[Given, TileSelection, jax.Array, jax.Array]

# Gradients of the arguments of an attention.
Gradients = tuple[jax.Array, jax.Array, jax.Array, None, None, None]


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
    """As `sparse_attention`."""
    batch, length, heads, width = q.shape
    kv_heads = k.shape[2]
    pairs, rows = batch * kv_heads, heads // kv_heads
    queries = q.reshape(batch, length, kv_heads, rows, width)
    queries = jnp.moveaxis(queries, 1, 3).reshape(pairs, rows, length, width)
    keys, values = (jnp.moveaxis(a, 1, 2).reshape(pairs, length, width) for a in (k, v))
    options = Options(float(scale), causal)
    if isinstance(selection, TileSelection):
        out = _tile_attention(options, queries, keys, values, selection, key_mask, segment_ids)
    else:
        out = _token_attention(options, queries, keys, values, selection, key_mask, segment_ids)
    out = jnp.moveaxis(out.reshape(batch, kv_heads, rows, length, width), 3, 1)
    return out.reshape(q.shape)


def _weights(
    logits: Float[Array, "g S r q"],
) -> tuple[Float[Array, "g S r q"], Float[Array, "g r q"], Float[Array, "g r q"]]:
    """exp(logits - max), their sum (1 if all are -inf), and lse (inf if all are -inf)."""
    top = logits.max(1)
    some = top > -jnp.inf
    weights = jnp.exp(logits - jnp.where(some, top, 0)[:, None])
    total = jnp.where(some, weights.sum(1), 1)
    return weights, total, jnp.where(some, top + jnp.log(total), jnp.inf)


def _forward_block(
    given: Block, scale: float
) -> tuple[Float[Array, "g r q H"], Float[Array, "g r q"]]:
    """Output and log-sum-exp of a block of queries."""
    q, k, v, kept = given
    logits = jnp.einsum("gkh,grqh->gkrq", k, q * scale, preferred_element_type=jnp.float32)
    weights, total, lse = _weights(jnp.where(kept, logits, -jnp.inf))
    out = jnp.einsum("gkrq,gkh->grqh", weights, v, preferred_element_type=jnp.float32)
    return out / total[..., None], lse


def _backward_block(
    given: Block,
    scale: float,
    lse: Float[Array, "g r q"],
    delta: Float[Array, "g r q"],
    grad: Float[Array, "g r q H"],
) -> tuple[Float[Array, "g r q H"], Float[Array, "g S H"], Float[Array, "g S H"]]:
    """Gradients of a block's queries, and its share of those of keys and values."""
    q, k, v, kept = given
    dot = partial(jnp.einsum, preferred_element_type=jnp.float32)
    logits = dot("gkh,grqh->gkrq", k, q * scale)
    weights = jnp.exp(jnp.where(kept, logits, -jnp.inf) - lse[:, None])
    slopes = weights * (dot("gkh,grqh->gkrq", v, grad) - delta[:, None])
    # Each serves two products; XLA would compute it again for either.
    slopes, weights = jax.lax.optimization_barrier((slopes, weights))
    dq = dot("gkrq,gkh->grqh", slopes, k) * scale
    dk = dot("gkrq,grqh->gkh", slopes, q * scale)
    return dq, dk, dot("gkrq,grqh->gkh", weights, grad)


def _delta(out: jax.Array, grad: jax.Array) -> jax.Array:
    return jnp.sum(out.astype(jnp.float32) * grad.astype(jnp.float32), -1)


def _slice(a: jax.Array, start: jax.Array, size: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(a, start, size, axis)


# Token granularity


class TokenBlocks(NamedTuple):
    """The blocks of queries.

    Attributes:
      chunk: Sequences times key heads of a block.
      block: Queries of a block.
      blocks: Blocks along the positions.
      inputs: Gives a block from its first sequence and key head and its first position.
    """

    chunk: int
    block: int
    blocks: int
    inputs: Callable[[jax.Array, jax.Array], Block]


def _token_blocks(given: Given, selection: TokenSelection, causal: bool) -> TokenBlocks:
    """Cuts the queries into blocks."""
    q, k, v, key_mask, segment_ids = given
    pairs, rows, length, _ = q.shape
    chunk, block = block_shape(pairs, rows, length, length)
    blocks = -(-length // block)
    padded = blocks * block
    query_rows = pad(decode(selection.query_codes, selection.query_codewords), padded, 2)
    key_rows = decode(selection.key_codes, selection.key_codewords)[:, 0]
    threshold, radius = (
        pad(a.reshape(pairs, rows, length), padded, 2)
        for a in (selection.threshold, selection.tie_radius)
    )
    key_mask = per_pair(key_mask, pairs)
    key_segments = per_pair(segment_ids, pairs)
    segments = None if key_segments is None else (pad(key_segments, padded, 1), key_segments)
    queries = pad(q, padded, 2)
    mask = None if selection.kept is None else pad(selection.kept, padded, 3)

    def inputs(pair: jax.Array, first: jax.Array) -> Block:
        def here(a: jax.Array) -> jax.Array:
            return _slice(a, pair, chunk, 0)

        def mine(a: jax.Array, axis: int) -> jax.Array:
            return _slice(here(a), first, block, axis)

        if mask is not None:
            return Block(mine(queries, 2), here(k), here(v), mine(mask, 3))
        position = first + jnp.arange(block, dtype=jnp.int32)
        score = jnp.einsum(
            "gkw,grqw->gkrq", here(key_rows), mine(query_rows, 2), precision="highest"
        )
        level, reach = mine(threshold, 2)[:, None], mine(radius, 2)[:, None]
        level = level.astype(jnp.float32)
        near = tie_distance(position, length)[:, None] <= reach
        kept = (score > level) | (score == level) & near
        kept = kept & (reach >= 0)
        valid = valid_block(
            position,
            length,
            causal,
            None if key_mask is None else here(key_mask),
            None if segments is None else (mine(segments[0], 1), here(segments[1])),
        )
        if valid is not None:
            kept = kept & valid
        kept = kept & (position < length)
        return Block(mine(queries, 2), here(k), here(v), kept)

    return TokenBlocks(chunk, block, blocks, inputs)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_attention(
    options: Options,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    selection: TokenSelection,
    key_mask: jax.Array | None,
    segment_ids: jax.Array | None,
) -> jax.Array:
    return _token_forward(options, q, k, v, selection, key_mask, segment_ids)[0]


def _token_forward(
    options: Options,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    selection: TokenSelection,
    key_mask: jax.Array | None,
    segment_ids: jax.Array | None,
) -> tuple[jax.Array, TokenSaved]:
    given = Given(q, k, v, key_mask, segment_ids)
    chunk, block, blocks, inputs = _token_blocks(given, selection, options.causal)
    pairs, rows, length, width = q.shape

    def run(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        block_inputs = inputs(index // blocks * chunk, index % blocks * block)
        out, lse = _forward_block(block_inputs, options.scale)
        return out.astype(q.dtype), lse

    out, lse = jax.lax.map(run, jnp.arange(pairs // chunk * blocks))
    out = out.reshape(-1, blocks, chunk, rows, block, width).transpose(0, 2, 3, 1, 4, 5)
    out = out.reshape(pairs, rows, -1, width)[:, :, :length]
    lse = lse.reshape(-1, blocks, chunk, rows, block).transpose(0, 2, 3, 1, 4)
    lse = lse.reshape(pairs, rows, -1)[:, :, :length]
    return out, (given, selection, out, lse)


def _token_backward(options: Options, saved: TokenSaved, grad: jax.Array) -> Gradients:
    given, selection, out, lse = saved
    chunk, block, blocks, inputs = _token_blocks(given, selection, options.causal)
    pairs, rows, length, width = given.q.shape
    padded = blocks * block
    delta = pad(_delta(out, grad), padded, 2)
    lse, grad = pad(lse, padded, 2, jnp.inf), pad(grad, padded, 2)

    def chunk_gradients(pair: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        def run(
            sums: tuple[jax.Array, jax.Array], first: jax.Array
        ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            def mine(a: jax.Array) -> jax.Array:
                return _slice(_slice(a, pair, chunk, 0), first, block, 2)

            dq, dk, dv = _backward_block(
                inputs(pair, first), options.scale, mine(lse), mine(delta), mine(grad)
            )
            return (sums[0] + dk, sums[1] + dv), dq.astype(given.q.dtype)

        zeros = jnp.zeros((chunk, length, width), jnp.float32)
        (dk, dv), dq = jax.lax.scan(run, (zeros, zeros), jnp.arange(blocks) * block)
        dq = jnp.moveaxis(dq, 0, 2).reshape(chunk, rows, padded, width)[:, :, :length]
        return dq, dk.astype(given.k.dtype), dv.astype(given.v.dtype)

    grads = jax.lax.map(chunk_gradients, jnp.arange(0, pairs, chunk))
    dq, dk, dv = (a.reshape(pairs, *a.shape[2:]) for a in grads)
    return dq, dk, dv, None, None, None


_token_attention.defvjp(_token_forward, _token_backward)


# Tile granularity


class Tiling(NamedTuple):
    """How the tiles of a key head's queries are dealt out to steps, several to each.

    Attributes:
      pairs: Sequences times key heads.
      rows: Query heads of a key head.
      lists: Lists of a key head at a position: one for every query head, or one in all.
      length: Positions.
      tiles: Tiles along the positions.
      block: Positions of a tile.
      step: Tiles of a step.
      steps: Steps of a key head.
    """

    pairs: int
    rows: int
    lists: int
    length: int
    tiles: int
    block: int
    step: int
    steps: int

    @property
    def items(self) -> int:
        """Tiles of a key head."""
        return self.lists * self.tiles

    @property
    def heads(self) -> int:
        """Query heads of a list."""
        return self.rows // self.lists

    def deal(self, a: jax.Array, value: float = 0) -> jax.Array:
        """`[pairs, rows, length, ...]` to `[pairs, steps * step, heads, block, ...]`."""
        a = pad(a, self.tiles * self.block, 2, value)
        a = a.reshape(
            self.pairs, self.lists, self.heads, self.tiles, self.block, *a.shape[3:]
        ).swapaxes(2, 3)
        a = a.reshape(self.pairs, self.items, *a.shape[3:])
        return pad(a, self.steps * self.step, 1, value)

    def collect(self, a: jax.Array) -> jax.Array:
        """`[pairs, steps, step, heads, block, ...]` back to `[pairs, rows, length, ...]`."""
        a = a.reshape(self.pairs, self.steps * self.step, *a.shape[3:])[:, : self.items]
        a = a.reshape(self.pairs, self.lists, self.tiles, *a.shape[2:]).swapaxes(2, 3)
        a = a.reshape(self.pairs, self.rows, self.tiles * self.block, *a.shape[5:])
        return a[:, :, : self.length]

    def here(self, a: jax.Array, pair: jax.Array, index: jax.Array) -> jax.Array:
        """The rows of one step of a key head, of `[pairs, steps * step, ...]`."""
        return _slice(a[pair], index * self.step, self.step, 0)


class TileSteps(NamedTuple):
    """The steps of every key head.

    Attributes:
      tiling: Their number and shape.
      lists: Key groups of each tile, `[pairs, steps * step, P]`.
      inputs: Gives a step's tiles from the sequence and key head and the number of the step.
    """

    tiling: Tiling
    lists: jax.Array
    inputs: Callable[[jax.Array, jax.Array], Block]


def _tile_steps(given: Given, selection: TileSelection, causal: bool) -> TileSteps:
    """Deals the tiles of queries out to steps."""
    pairs, rows, length, _ = given.q.shape
    batch, heads, tiles, listed = selection.groups.shape
    block, size = selection.block_q, selection.key_group
    lists = batch * heads // pairs
    items, queries = lists * tiles, rows // lists * block
    number = -(-length // size)
    step = max(1, min(items, TILE_ELEMENTS // (queries * listed * size)))
    steps = -(-items // step)
    tiling = Tiling(pairs, rows, lists, length, tiles, block, step, steps)

    def grouped(a: jax.Array) -> jax.Array:
        return pad(a, number * size, 1).reshape(pairs, number, size, *a.shape[2:])

    key_mask, segments = per_pair(given.key_mask, pairs), per_pair(given.segment_ids, pairs)
    keys_values = grouped(jnp.concatenate([given.k, given.v], -1))
    queries = tiling.deal(given.q)
    groups_of = pad(selection.groups.reshape(pairs, items, listed), steps * step, 1)
    counts = pad(selection.counts.reshape(pairs, items), steps * step, 1)

    def inputs(pair: jax.Array, index: jax.Array) -> Block:
        item = index * step + jnp.arange(step)
        groups = tiling.here(groups_of, pair, index)

        def gather(a: jax.Array) -> jax.Array:
            return a[pair, groups].reshape(step, listed * size, *a.shape[3:])

        key = (groups[..., None] * size + jnp.arange(size)).reshape(step, -1, 1)
        query = (item % tiles * block)[:, None, None] + jnp.arange(block)
        seen = jnp.arange(listed) < tiling.here(counts, pair, index)[:, None]
        kept = jnp.repeat(seen, size, 1)[..., None] & (key < length) & (query < length)
        if causal:
            kept = kept & (key <= query)
        if key_mask is not None:
            kept = kept & gather(grouped(key_mask))[..., None]
        if segments is not None:
            mine = segments[pair, jnp.minimum(query, length - 1)]
            kept = kept & (gather(grouped(segments))[..., None] == mine)
        keys, values = jnp.split(gather(keys_values), 2, -1)
        return Block(tiling.here(queries, pair, index), keys, values, kept[:, :, None])

    return TileSteps(tiling, groups_of, inputs)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tile_attention(
    options: Options,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    selection: TileSelection,
    key_mask: jax.Array | None,
    segment_ids: jax.Array | None,
) -> jax.Array:
    return _tile_forward(options, q, k, v, selection, key_mask, segment_ids)[0]


def _tile_forward(
    options: Options,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    selection: TileSelection,
    key_mask: jax.Array | None,
    segment_ids: jax.Array | None,
) -> tuple[jax.Array, TileSaved]:
    given = Given(q, k, v, key_mask, segment_ids)
    tiling, _, inputs = _tile_steps(given, selection, options.causal)
    steps = tiling.steps

    def run(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        out, lse = _forward_block(inputs(index // steps, index % steps), options.scale)
        return out.astype(q.dtype), lse

    out, lse = jax.lax.map(run, jnp.arange(len(q) * steps))
    out, lse = (tiling.collect(a.reshape(-1, steps, *a.shape[1:])) for a in (out, lse))
    return out, (given, selection, out, lse)


def _tile_backward(options: Options, saved: TileSaved, grad: jax.Array) -> Gradients:
    given, selection, out, lse = saved
    tiling, lists, inputs = _tile_steps(given, selection, options.causal)
    length, width = given.q.shape[2:]
    size = selection.key_group
    number = -(-length // size)
    delta, lse = tiling.deal(_delta(out, grad)), tiling.deal(lse, jnp.inf)
    grad = tiling.deal(grad)

    def pair_gradients(pair: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        def run(sums: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
            def here(a: jax.Array) -> jax.Array:
                return tiling.here(a, pair, index)

            dq, dk, dv = _backward_block(
                inputs(pair, index), options.scale, here(lse), here(delta), here(grad)
            )
            shares = jnp.concatenate([dk, dv], -1).reshape(-1, size, 2 * width)
            return sums.at[here(lists).ravel()].add(shares), dq.astype(given.q.dtype)

        zeros = jnp.zeros((number, size, 2 * width), jnp.float32)
        sums, dq = jax.lax.scan(run, zeros, jnp.arange(tiling.steps))
        dk, dv = jnp.split(sums.reshape(-1, 2 * width)[:length], 2, -1)
        return dq, dk.astype(given.k.dtype), dv.astype(given.v.dtype)

    dq, dk, dv = jax.lax.map(pair_gradients, jnp.arange(len(given.q)))
    return tiling.collect(dq), dk, dv, None, None, None


_tile_attention.defvjp(_tile_forward, _tile_backward)
