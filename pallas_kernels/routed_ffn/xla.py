"""Routed FFN in plain JAX: rows sorted by block, and tiles of them multiplied.

Every pair of a token and one of its blocks is a row. Rows are sorted by block, so the rows of a
block are contiguous, and each block multiplies only as many tiles of rows as it was given: the
trip count of the loop is data, which reverse mode cannot differentiate, hence the hand-written
backward pass. A tile may reach into the rows of the next block: forward, what it wrote there is
overwritten by the next block; backward, such rows also count for nothing in sums.

Low-rank factors stay apart from the weights, `x w + (x a) b`: the sum would cost a pass over each
weight, and lose small updates in 16 bits. Products with the factors that all blocks share are
taken once for a token.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from pallas_kernels.routed_ffn.differentiation import Arrays, differentiable
from pallas_kernels.routed_ffn.types import (
    Activation,
    activation_function,
)

# Arrays with a leading axis of blocks, by their names in `_named`.
_BY_BLOCK = frozenset(
    ("w_in", "b_in", "w_gate", "b_gate", "w_out", "lora_b_in", "lora_b_gate", "lora_a_out")
)


_REACH = 63  # Rows of the next block that a large tile may reach into; fewer than the padding.


def _tile_rows(rows: int, num_blocks: int) -> tuple[int, ...]:
    """Returns the rows of a tile, large ones first and then those that end a block.

    A tile of few rows takes longer to read a weight than to multiply with it.
    """
    share = rows // num_blocks
    if share >= 128:
        return (512 if share >= 512 else 256, 64)
    return (min(64, 8 << (share // 32).bit_length()),)


class _Plan(NamedTuple):
    order: Int32[Array, " R"]  # Entry of block_index.ravel() in each row; padded by a tail tile.
    rank: Int32[Array, "T A"]  # Row of each entry.
    start: Int32[Array, " G"]
    stop: Int32[Array, " G"]


def _plan(block_index: Array, num_blocks: int, pad: int) -> _Plan:
    flat = block_index.ravel()
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(flat.size, dtype=jnp.int32))
    counts = (flat[:, None] == jnp.arange(num_blocks)).sum(axis=0, dtype=jnp.int32)
    stop = jnp.cumsum(counts, dtype=jnp.int32)
    return _Plan(jnp.pad(order, (0, pad)), rank.reshape(block_index.shape), stop - counts, stop)


def _for_tiles(
    tiles: tuple[int, ...],
    start: Array,
    stop: Array,
    body: Callable[[Any, Array, int], Any],
    carry: Any,
) -> Any:
    """Runs `body(carry, row, size)` over tiles that cover the rows from start to stop."""
    for size in tiles:
        rounding = size - 1 if size == tiles[-1] else min(_REACH, size // 8)
        count = jnp.maximum(stop - start + rounding, 0) // size
        step = functools.partial(
            lambda i, carry, start, size: body(carry, start + i * size, size),
            start=start,
            size=size,
        )
        carry = lax.fori_loop(0, count, step, carry)
        start = start + count * size
    return carry


def _dot(a: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _put(buffer: Array, tile: Array, row: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(buffer, tile.astype(buffer.dtype), row, axis=0)


def _narrow(p: Arrays, names: Sequence[str]) -> Arrays:
    """What x gives with the first factors of these projections, `[T, r]`."""
    x = p["x"]
    return {
        f"xa_{name}": _dot(x, p[f"lora_a_{name}"]).astype(x.dtype)
        for name in names
        if f"lora_a_{name}" in p
    }


def _scan_blocks(
    step: Callable[[Arrays, Arrays, Array, Array], tuple[Arrays, Any]],
    buffers: Arrays,
    p: Arrays,
    plan: _Plan,
) -> tuple[Arrays, Any]:
    """Runs `step(buffers, arrays of one block, start, stop)` over the blocks."""
    blocks = {name: array for name, array in p.items() if name in _BY_BLOCK}
    # A dense weight cut into blocks of columns is read where it lies, not moved in memory.
    side_by_side = {n: jnp.moveaxis(blocks.pop(n), 0, 1) for n in ("w_in", "w_gate") if n in blocks}

    def of_block(buffers: Arrays, item: Any) -> tuple[Arrays, Any]:
        number, block, start, stop = item
        cut = {n: lax.dynamic_index_in_dim(w, number, 1, False) for n, w in side_by_side.items()}
        return step(buffers, p | block | cut, start, stop)

    numbers = jnp.arange(plan.start.size, dtype=jnp.int32)
    return lax.scan(of_block, buffers, (numbers, blocks, plan.start, plan.stop))


def _forward(
    activation: Activation, p: Arrays, block_index: Array, save: bool
) -> tuple[Array, tuple[_Plan, Arrays, Array | None]]:
    del save  # what is not used is not kept
    x, (num_blocks, width, units) = p["x"], p["w_in"].shape
    active = block_index.shape[1]
    tiles = _tile_rows(block_index.size, num_blocks)
    plan = _plan(block_index, num_blocks, tiles[-1])
    act = activation_function(activation)
    ups = ("in", "gate") if "w_gate" in p else ("in",)
    rows = plan.order.size
    inputs = {"x": x, **_narrow(p, ups)}
    inputs = {name: value[plan.order // active] for name, value in inputs.items()}

    def step(buffers: Arrays, q: Arrays, start: Array, stop: Array) -> tuple[Arrays, Any]:
        def body(buffers: Arrays, row: Array, size: int) -> Arrays:
            tile = {k: lax.dynamic_slice_in_dim(v, row, size) for k, v in inputs.items()}
            hidden = {name: _dot(tile["x"], q[f"w_{name}"]) + q.get(f"b_{name}", 0) for name in ups}
            for name in ups:
                if f"lora_b_{name}" in q:
                    hidden[name] += _dot(tile[f"xa_{name}"], q[f"lora_b_{name}"])
            inner = act(hidden["gate"]) * hidden["in"] if "gate" in ups else act(hidden["in"])
            inner = inner.astype(x.dtype)
            hidden["out"] = _dot(inner, q["w_out"])
            if "ha" in buffers:
                hidden["ha"] = _dot(inner, q["lora_a_out"])
            return {name: _put(buffers[name], hidden[name], row) for name in buffers}

        return _for_tiles(tiles, start, stop, body, buffers), None

    buffers = {name: jnp.zeros((rows, units), x.dtype) for name in ups}
    buffers["out"] = jnp.zeros((rows, width), x.dtype)
    if "lora_a_out" in p:
        buffers["ha"] = jnp.zeros((rows, p["lora_a_out"].shape[-1]), x.dtype)
    hidden, _ = _scan_blocks(step, buffers, p, plan)

    def of_tokens(name: str) -> Array:
        values = hidden.pop(name)[plan.rank].astype(jnp.float32)
        return (p["coefficients"].astype(jnp.float32)[:, :, None] * values).sum(axis=1)

    y, ha = of_tokens("out"), None
    if "lora_a_out" in p:
        ha = of_tokens("ha").astype(x.dtype)
        y += _dot(ha, p["lora_b_out"])
    return (y + p.get("b_out", 0)).astype(x.dtype), (plan, hidden, ha)


def _backward(
    activation: Activation,
    wanted: frozenset[str],
    p: Arrays,
    plan: _Plan,
    hidden: Arrays,
    ha: Array | None,
    dy: Array,
) -> Arrays:
    """Gradients of the arrays named in `wanted`; nothing else is computed."""
    x, coefficients = p["x"], p["coefficients"]
    num_blocks, width, _ = p["w_in"].shape
    active = plan.rank.shape[1]
    tiles = _tile_rows(plan.rank.size, num_blocks)
    act = activation_function(activation)
    ups = ("in", "gate") if "w_gate" in p else ("in",)
    token = plan.order // active
    rows = plan.order.size

    into_hidden = {"x"} | {
        f"{kind}_{name}" for name in ups for kind in ("w", "b", "lora_a", "lora_b")
    }
    needs_dh = bool(wanted & into_hidden)
    # Inputs of the loops, by row.
    inputs = {"dy": dy[token], "c": coefficients.ravel()[plan.order].astype(jnp.float32), **hidden}
    if wanted & {"w_in", "w_gate"}:
        inputs["x"] = x[token]
    narrow = _narrow(p, [name for name in ups if f"lora_b_{name}" in wanted])
    inputs |= {name: value[token] for name, value in narrow.items()}
    if "lora_b_out" in p:
        inputs["dyb"] = _dot(dy, p["lora_b_out"], (1, 1)).astype(x.dtype)[token]
    # Results by row, summed over the rows of a token afterwards.
    buffers = {}
    if "x" in wanted:
        buffers["x"] = jnp.zeros((rows, width), x.dtype)
    if "coefficients" in wanted:
        buffers["coefficients"] = jnp.zeros(rows, jnp.float32)
    for name in ups:
        if f"lora_a_{name}" in p and wanted & {"x", f"lora_a_{name}"}:
            rank = p[f"lora_a_{name}"].shape[-1]
            buffers[f"dhb_{name}"] = jnp.zeros((rows, rank), x.dtype)

    def step(buffers: Arrays, q: Arrays, start: Array, stop: Array) -> tuple[Arrays, Any]:
        def body(carry: tuple[Arrays, Arrays], row: Array, size: int) -> tuple[Arrays, Arrays]:
            buffers, sums = carry
            tile = {k: lax.dynamic_slice_in_dim(v, row, size) for k, v in inputs.items()}
            c = jnp.where(row + jnp.arange(size) < stop, tile["c"], 0)[:, None]
            pre = tile["gate" if "gate" in ups else "in"].astype(jnp.float32)
            inner, slope = jax.jvp(act, (pre,), (jnp.ones_like(pre),))
            by_row, by_block = {}, {}
            if "gate" in ups:
                linear = tile["in"].astype(jnp.float32)
                slopes = {"in": inner, "gate": slope * linear}
                inner = inner * linear
            else:
                slopes = {"in": slope}
            if needs_dh or "coefficients" in wanted:
                d_inner = _dot(tile["dy"], q["w_out"], (1, 1))
                if "dyb" in tile:
                    d_inner += _dot(tile["dyb"], q["lora_a_out"], (1, 1))
                by_row["coefficients"] = (inner * d_inner).sum(axis=1)
            if needs_dh:
                dh = {k: (c * d_inner * slopes[k]).astype(x.dtype) for k in ups}
                if "x" in wanted:
                    by_row["x"] = sum(_dot(dh[k], q[f"w_{k}"], (1, 1)) for k in ups)
                for k in ups:
                    by_block[f"b_{k}"] = dh[k].astype(jnp.float32).sum(axis=0)
                    if f"w_{k}" in wanted:
                        by_block[f"w_{k}"] = _dot(tile["x"], dh[k], (0, 0))
                    if f"dhb_{k}" in buffers:
                        by_row[f"dhb_{k}"] = _dot(dh[k], q[f"lora_b_{k}"], (1, 1))
                    if f"lora_b_{k}" in wanted:
                        by_block[f"lora_b_{k}"] = _dot(tile[f"xa_{k}"], dh[k], (0, 0))
            inner = (c * inner).astype(x.dtype)
            if "w_out" in wanted:
                by_block["w_out"] = _dot(inner, tile["dy"], (0, 0))
            if "lora_a_out" in wanted:
                by_block["lora_a_out"] = _dot(inner, tile["dyb"], (0, 0))
            buffers = {k: _put(v, by_row[k], row) for k, v in buffers.items()}
            sums = {k: v + by_block[k] for k, v in sums.items()}
            return buffers, sums

        sums = {k: jnp.zeros(q[k].shape, jnp.float32) for k in wanted & _BY_BLOCK}
        buffers, sums = _for_tiles(tiles, start, stop, body, (buffers, sums))
        return buffers, {k: v.astype(p[k].dtype) for k, v in sums.items()}

    buffers, grads = _scan_blocks(step, buffers, p, plan)
    by_token = {k: v[plan.rank].astype(jnp.float32) for k, v in buffers.items()}
    if "coefficients" in wanted:
        grads["coefficients"] = by_token.pop("coefficients")
    by_token = {k: v.sum(axis=1) for k, v in by_token.items()}
    narrow = {k: v.astype(x.dtype) for k, v in by_token.items() if k != "x"}
    if "x" in wanted:
        lows = (
            _dot(narrow[f"dhb_{k}"], p[f"lora_a_{k}"], (1, 1)) for k in ups if f"dhb_{k}" in narrow
        )
        grads["x"] = sum(lows, by_token["x"]).astype(x.dtype)
    for k in ups:
        if f"lora_a_{k}" in wanted:
            grads[f"lora_a_{k}"] = _dot(x, narrow[f"dhb_{k}"], (0, 0))
    if "lora_b_out" in wanted:
        assert ha is not None
        grads["lora_b_out"] = _dot(ha, dy, (0, 0))
    if "b_out" in wanted:
        grads["b_out"] = dy.astype(jnp.float32).sum(axis=0)
    return grads


# Keeps the rows' hidden pre-activations, `T * A * Fb`, for the backward pass.
routed_ffn_xla = differentiable(_forward, _backward)
