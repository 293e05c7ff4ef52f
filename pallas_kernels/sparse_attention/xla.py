"""Sparse attention in plain XLA, by blocks, with a backward pass that recomputes the weights.

Logits are laid out keys first, queries last, so that sums over keys are sums of vectors.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.pq.types import Selection, TileSelection
from pallas_kernels.pq.xla import block_shape, decode, tie_distance, valid_block

TILE_ELEMENTS = 2**19  # float32 elements of the logits of a step over tiles

Options = tuple[float, bool]  # scale, causal


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
    run = _tile_attention if isinstance(selection, TileSelection) else _token_attention
    out = run((float(scale), causal), queries, keys, values, selection, key_mask, segment_ids)
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
    q: Float[Array, "g r q H"],
    k: Float[Array, "g S H"],
    v: Float[Array, "g S H"],
    kept: Bool[Array, "g S r q"],
    scale: float,
) -> tuple[Float[Array, "g r q H"], Float[Array, "g r q"]]:
    """Output and log-sum-exp of a block of queries."""
    logits = jnp.einsum("gkh,grqh->gkrq", k, q * scale, preferred_element_type=jnp.float32)
    weights, total, lse = _weights(jnp.where(kept, logits, -jnp.inf))
    out = jnp.einsum("gkrq,gkh->grqh", weights, v, preferred_element_type=jnp.float32)
    return out / total[..., None], lse


def _backward_block(
    q: Float[Array, "g r q H"],
    k: Float[Array, "g S H"],
    v: Float[Array, "g S H"],
    kept: Bool[Array, "g S r q"],
    scale: float,
    lse: Float[Array, "g r q"],
    delta: Float[Array, "g r q"],
    grad: Float[Array, "g r q H"],
) -> tuple[Float[Array, "g r q H"], Float[Array, "g S H"], Float[Array, "g S H"]]:
    """Gradients of a block's queries, and its share of those of keys and values."""
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


def _slice(a: jax.Array | None, start: jax.Array, size: int, axis: int) -> jax.Array | None:
    return None if a is None else jax.lax.dynamic_slice_in_dim(a, start, size, axis)


def _per_pair(a: jax.Array | None, pairs: int) -> jax.Array | None:
    return None if a is None else jnp.repeat(a, pairs // a.shape[0], 0)


def _pad(a: jax.Array, size: int, axis: int, value: float = 0) -> jax.Array:
    widths = [(0, 0)] * a.ndim
    widths[axis] = (0, size - a.shape[axis])
    return jnp.pad(a, widths, constant_values=value)


# Token granularity


def _token_blocks(options, q, k, v, selection, key_mask, segment_ids):
    """The blocks of queries: their number, their shape, and a function that gives one's inputs."""
    causal = options[1]
    pairs, rows, length, _ = q.shape
    chunk, block = block_shape(pairs, rows, length)
    blocks = -(-length // block)
    padded = blocks * block
    query_rows = _pad(decode(selection.query_codes, selection.query_codewords), padded, 2)
    key_rows = decode(selection.key_codes, selection.key_codewords)[:, 0]
    threshold, radius = (
        _pad(a.reshape(pairs, rows, length), padded, 2)
        for a in (selection.threshold, selection.tie_radius)
    )
    key_mask, segments = _per_pair(key_mask, pairs), _per_pair(segment_ids, pairs)
    query_segments = None if segments is None else _pad(segments, padded, 1)
    queries = _pad(q, padded, 2)

    def inputs(pair, first):
        here = lambda a: _slice(a, pair, chunk, 0)  # noqa: E731
        mine = lambda a, axis: _slice(here(a), first, block, axis)  # noqa: E731
        if selection.kept is not None:
            return here(queries), here(k), here(v), here(selection.kept)
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
            position, length, causal, here(key_mask), mine(query_segments, 1), here(segments)
        )
        if valid is not None:
            kept = kept & valid
        kept = kept & (position < length)
        return mine(queries, 2), here(k), here(v), kept

    return chunk, block, blocks, inputs


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_attention(options, q, k, v, selection, key_mask, segment_ids):
    return _token_forward(options, q, k, v, selection, key_mask, segment_ids)[0]


def _token_forward(options, q, k, v, selection, key_mask, segment_ids):
    chunk, block, blocks, inputs = _token_blocks(options, q, k, v, selection, key_mask, segment_ids)
    pairs, rows, length, width = q.shape

    def run(index):
        out, lse = _forward_block(
            *inputs(index // blocks * chunk, index % blocks * block), options[0]
        )
        return out.astype(q.dtype), lse

    out, lse = jax.lax.map(run, jnp.arange(pairs // chunk * blocks))
    out = out.reshape(-1, blocks, chunk, rows, block, width).transpose(0, 2, 3, 1, 4, 5)
    out = out.reshape(pairs, rows, -1, width)[:, :, :length]
    lse = lse.reshape(-1, blocks, chunk, rows, block).transpose(0, 2, 3, 1, 4)
    lse = lse.reshape(pairs, rows, -1)[:, :, :length]
    return out, (q, k, v, out, lse, selection, key_mask, segment_ids)


def _token_backward(options, saved, grad):
    q, k, v, out, lse, selection, key_mask, segment_ids = saved
    chunk, block, blocks, inputs = _token_blocks(options, q, k, v, selection, key_mask, segment_ids)
    pairs, rows, length, width = q.shape
    padded = blocks * block
    delta = _pad(_delta(out, grad), padded, 2)
    lse, grad = _pad(lse, padded, 2, jnp.inf), _pad(grad, padded, 2)

    def chunk_gradients(pair):
        mine = lambda a, first: _slice(_slice(a, pair, chunk, 0), first, block, 2)  # noqa: E731

        def run(sums, first):
            dq, dk, dv = _backward_block(
                *inputs(pair, first),
                options[0],
                mine(lse, first),
                mine(delta, first),
                mine(grad, first),
            )
            return (sums[0] + dk, sums[1] + dv), dq.astype(q.dtype)

        zeros = jnp.zeros((chunk, length, width), jnp.float32)
        (dk, dv), dq = jax.lax.scan(run, (zeros, zeros), jnp.arange(blocks) * block)
        dq = jnp.moveaxis(dq, 0, 2).reshape(chunk, rows, padded, width)[:, :, :length]
        return dq, dk.astype(k.dtype), dv.astype(v.dtype)

    grads = jax.lax.map(chunk_gradients, jnp.arange(0, pairs, chunk))
    grads = [a.reshape(pairs, *a.shape[2:]) for a in grads]
    return *grads, None, None, None


_token_attention.defvjp(_token_forward, _token_backward)


# Tile granularity


def _tile_blocks(options, q, k, v, selection, key_mask, segment_ids):
    """The steps of a key head, each of several tiles, and functions that give a step's inputs."""
    causal = options[1]
    pairs, rows, length, _ = q.shape
    tiles, listed = selection.groups.shape[2:]
    block, size = selection.block_q, selection.key_group
    number = -(-length // size)
    step = max(1, min(rows * tiles, TILE_ELEMENTS // (block * listed * size)))
    steps = -(-rows * tiles // step)

    def tiled(a, value=0):
        a = _pad(a, tiles * block, 2, value).reshape(pairs, rows * tiles, 1, block, *a.shape[3:])
        return _pad(a, steps * step, 1, value)

    def grouped(a):
        return _pad(a, number * size, 1).reshape(pairs, number, size, *a.shape[2:])

    key_mask, segments = _per_pair(key_mask, pairs), _per_pair(segment_ids, pairs)
    keys_values = grouped(jnp.concatenate([k, v], -1))
    queries = tiled(q)
    lists = _pad(selection.groups.reshape(pairs, rows * tiles, listed), steps * step, 1)
    counts = _pad(selection.counts.reshape(pairs, rows * tiles), steps * step, 1)

    def inputs(pair, index):
        item = index * step + jnp.arange(step)
        here = lambda a: _slice(a[pair], index * step, step, 0)  # noqa: E731
        groups = here(lists)
        gather = lambda a: a[pair, groups].reshape(step, listed * size, *a.shape[3:])  # noqa: E731
        key = (groups[..., None] * size + jnp.arange(size)).reshape(step, -1, 1)
        query = (item % tiles * block)[:, None, None] + jnp.arange(block)
        seen = jnp.arange(listed) < here(counts)[:, None]
        kept = jnp.repeat(seen, size, 1)[..., None] & (key < length) & (query < length)
        if causal:
            kept = kept & (key <= query)
        if key_mask is not None:
            kept = kept & gather(grouped(key_mask))[..., None]
        if segments is not None:
            mine = segments[pair, jnp.minimum(query, length - 1)]
            kept = kept & (gather(grouped(segments))[..., None] == mine)
        keys, values = jnp.split(gather(keys_values), 2, -1)
        return here(queries), keys, values, kept[:, :, None]

    def untile(a):
        """`[pairs, steps, step, 1, block, ...]` back to `[pairs, rows, length, ...]`."""
        a = a.reshape(pairs, steps * step, block, *a.shape[5:])[:, : rows * tiles]
        return a.reshape(pairs, rows, tiles * block, *a.shape[3:])[:, :, :length]

    return inputs, (steps, step, number, size), lists, tiled, untile


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tile_attention(options, q, k, v, selection, key_mask, segment_ids):
    return _tile_forward(options, q, k, v, selection, key_mask, segment_ids)[0]


def _tile_forward(options, q, k, v, selection, key_mask, segment_ids):
    inputs, (steps, *_), _, _, untile = _tile_blocks(
        options, q, k, v, selection, key_mask, segment_ids
    )

    def run(index):
        out, lse = _forward_block(*inputs(index // steps, index % steps), options[0])
        return out.astype(q.dtype), lse

    out, lse = jax.lax.map(run, jnp.arange(len(q) * steps))
    out, lse = (untile(a.reshape(-1, steps, *a.shape[1:])) for a in (out, lse))
    return out, (q, k, v, out, lse, selection, key_mask, segment_ids)


def _tile_backward(options, saved, grad):
    q, k, v, out, lse, selection, key_mask, segment_ids = saved
    inputs, (steps, step, number, size), lists, tiled, untile = _tile_blocks(
        options, q, k, v, selection, key_mask, segment_ids
    )
    length, width = q.shape[2:]
    delta, lse, grad = tiled(_delta(out, grad)), tiled(lse, jnp.inf), tiled(grad)

    def pair_gradients(pair):
        def run(sums, index):
            here = lambda a: _slice(a[pair], index * step, step, 0)  # noqa: E731
            dq, dk, dv = _backward_block(
                *inputs(pair, index), options[0], here(lse), here(delta), here(grad)
            )
            shares = jnp.concatenate([dk, dv], -1).reshape(-1, size, 2 * width)
            return sums.at[here(lists).ravel()].add(shares), dq.astype(q.dtype)

        zeros = jnp.zeros((number, size, 2 * width), jnp.float32)
        sums, dq = jax.lax.scan(run, zeros, jnp.arange(steps))
        dk, dv = jnp.split(sums.reshape(-1, 2 * width)[:length], 2, -1)
        return dq, dk.astype(k.dtype), dv.astype(v.dtype)

    dq, dk, dv = jax.lax.map(pair_gradients, jnp.arange(len(q)))
    return untile(dq), dk, dv, None, None, None


_tile_attention.defvjp(_tile_forward, _tile_backward)
