"""Routed FFN in Triton: products of sorted tokens with the blocks they activate.

Rows, that is tokens sorted by the blocks they activate (see `plan.py`), come in tiles whose rows
share their blocks. Tokens are gathered where they are multiplied. R rows, S blocks a row:

* `routed_ffn_up`: `inner[r, s] = c[r, s] * act(x[r] w_in[g_s])`, `[R, S * Fb]`;
* `routed_ffn_down`: `y[r] = sum_s inner[r, s] w_out[g_s]`, and the sums of the same form that lead
  back to x and to the inner sides of the low-rank factors;
* `routed_ffn_down_backward`: `dy[r] w_out[g_s]^T` and what follows from it element by element;
* `routed_ffn_weight_gradient`: sums over the rows of a block.

Low-rank factors add a short product to a long one: `x w + (x a) b`, where `x a` is computed once
for all blocks. Sums are float32, in a fixed order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import triton as t
from pallas_kernels.routed_ffn import plan as plans
from pallas_kernels.routed_ffn.differentiation import Arrays, differentiable
from pallas_kernels.routed_ffn.plan import Plan
from pallas_kernels.routed_ffn.types import Activation


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes of a launch.

    Attributes:
      block_m: Rows of a tile.
      block_n: Columns of a tile.
      block_k: Depth of a step.
      num_warps: Warps of a program.
      num_stages: Steps whose operands are in shared memory at once.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @property
    def constants(self) -> dict[str, Any]:
        """The sizes as the kernels name them, and how float32 is multiplied."""
        sizes = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}
        launch = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return {**sizes, **launch, "PRECISION": t.precision()}


def config_for(dtype: Any, block_m: int, columns: int, depth: int, products: int = 1) -> Config:
    """Tile sizes that fit the shared memory of every GPU of compute capability 8 and later, 99 KiB.

    Args:
      dtype: Type of the operands.
      block_m: Rows of a tile.
      columns: Columns of the result.
      depth: Depth of the product.
      products: Accumulators of a tile.
    """
    wide = jnp.dtype(dtype).itemsize > 2
    most = 128 // (products * (2 if wide else 1))
    block_n = min(most, t.power_of_two(columns))
    block_k = min(16 if wide else 32, t.power_of_two(depth))
    num_warps = 8 if block_m * block_n * products > (64 * 64 if wide else 64 * 128) else 4
    return Config(block_m, block_n, block_k, num_warps, num_stages=2 if wide else 4)


# Kernels


@triton.jit
@no_type_check
def _add_product(
    acc,
    a,
    a_rows,
    a_valid,
    a_stride,
    b,
    b_columns,
    b_valid,
    b_depth_stride,
    b_column_stride,
    DEPTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`acc + a b` of rows of `a` and columns of `b`; rows and columns that are not valid are 0."""
    step = tl.arange(0, BLOCK_K)
    for start in range(0, DEPTH, BLOCK_K):
        depth = start + step
        of_a = a + a_rows[:, None] * a_stride + depth[None, :]
        of_b = b + depth[:, None] * b_depth_stride + b_columns[None, :] * b_column_stride
        left = tl.load(of_a, mask=a_valid[:, None] & (depth < DEPTH)[None, :], other=0.0)
        right = tl.load(of_b, mask=(depth < DEPTH)[:, None] & b_valid[None, :], other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    return acc


@triton.jit
@no_type_check
def _act_and_slope(h, NAME: tl.constexpr):
    """An activation and its derivative."""
    if NAME == "relu":
        value = tl.maximum(h, 0.0)
        slope = tl.where(h > 0, 1.0, 0.0)
    elif NAME == "gelu":
        share = 0.5 * (1 + tl.erf(h * 0.7071067811865476))
        value = h * share
        slope = share + h * (0.3989422804014327 * tl.exp(-0.5 * h * h))
    elif NAME == "gelu_tanh":
        root = 0.7978845608028654
        share = tl.sigmoid(2 * root * (h + 0.044715 * h * h * h))
        value = h * share
        slope = share * (1 + h * (1 - share) * (2 * root * (1 + 3 * 0.044715 * h * h)))
    elif NAME == "silu":
        share = tl.sigmoid(h)
        value = h * share
        slope = share * (1 + h * (1 - share))
    else:
        tl.static_assert(NAME == "identity")
        value = h
        slope = tl.full(h.shape, 1.0, tl.float32)
    return value, slope


@triton.jit
@no_type_check
def _rows_and_tokens(tile, order, TOKENS, EACH: tl.constexpr, BLOCK_M: tl.constexpr):
    """Rows of a tile, their tokens, and whether they have one."""
    rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    tokens = (tl.load(order + rows) // EACH).to(tl.int64)
    return rows, tokens, tokens < TOKENS


@triton.jit
@no_type_check
def routed_ffn_up_kernel(
    x,
    w_in,
    w_gate,
    low_in,
    low_gate,
    b_low_in,
    b_low_gate,
    b_in,
    b_gate,
    coefficients,
    order,
    blocks,
    tiles,
    inner,
    h_in,
    h_gate,
    TOKENS: tl.constexpr,
    EACH: tl.constexpr,
    WIDTH: tl.constexpr,
    UNITS: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    SLOTS: tl.constexpr,
    RANK_IN: tl.constexpr,
    RANK_GATE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of rows and of hidden units of one slot."""
    tile, slot, most = tl.program_id(0), tl.program_id(2), tl.num_programs(0)
    if tile >= tl.load(tiles):
        return
    rows, tokens, valid = _rows_and_tokens(tile, order, TOKENS, EACH, BLOCK_M)
    units = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = units < UNITS
    block = tl.load(blocks + slot * most + tile).to(tl.int64)
    # The weights of all blocks lie side by side, low-rank factors one after another.
    stride: tl.constexpr = NUM_BLOCKS * UNITS
    first = block * UNITS
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = _add_product(
        up, x, tokens, valid, WIDTH, w_in + first, units, inside, stride, 1,
        WIDTH, BLOCK_K, PRECISION,
    )  # fmt: skip
    if low_in is not None:
        up = _add_product(
            up, low_in, tokens, valid, RANK_IN, b_low_in + first * RANK_IN, units, inside,
            UNITS, 1, RANK_IN, BLOCK_K, PRECISION,
        )  # fmt: skip
    if b_in is not None:
        up += tl.load(b_in + first + units, mask=inside, other=0.0).to(tl.float32)[None, :]
    pre = up
    if w_gate is not None:
        pre = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        pre = _add_product(
            pre, x, tokens, valid, WIDTH, w_gate + first, units, inside, stride, 1,
            WIDTH, BLOCK_K, PRECISION,
        )  # fmt: skip
        if low_gate is not None:
            pre = _add_product(
                pre, low_gate, tokens, valid, RANK_GATE, b_low_gate + first * RANK_GATE, units,
                inside, UNITS, 1, RANK_GATE, BLOCK_K, PRECISION,
            )  # fmt: skip
        if b_gate is not None:
            pre += tl.load(b_gate + first + units, mask=inside, other=0.0).to(tl.float32)[None, :]
    value, _ = _act_and_slope(pre, ACTIVATION)
    if w_gate is not None:
        value *= up
    value *= tl.load(coefficients + slot * most * BLOCK_M + rows)[:, None]
    where = rows[:, None] * (SLOTS * UNITS) + slot * UNITS + units[None, :]
    tl.store(inner + where, value.to(inner.dtype.element_ty), mask=inside[None, :])
    if h_in is not None:
        tl.store(h_in + where, up.to(h_in.dtype.element_ty), mask=inside[None, :])
    if h_gate is not None:
        tl.store(h_gate + where, pre.to(h_gate.dtype.element_ty), mask=inside[None, :])


@triton.jit
@no_type_check
def routed_ffn_down_kernel(
    a,
    a_gate,
    b,
    b_gate,
    low,
    factor,
    blocks,
    tiles,
    out,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
    RANK: tl.constexpr,
    B_BLOCK: tl.constexpr,
    B_DEPTH: tl.constexpr,
    B_COLUMN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of rows and columns, summed over the slots."""
    tile, most = tl.program_id(0), tl.num_programs(0)
    if tile >= tl.load(tiles):
        return
    rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    every = rows >= 0
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < COLUMNS
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for slot in range(SLOTS):
        first = tl.load(blocks + slot * most + tile).to(tl.int64) * B_BLOCK
        acc = _add_product(
            acc, a + slot * DEPTH, rows, every, SLOTS * DEPTH, b + first, columns, inside,
            B_DEPTH, B_COLUMN, DEPTH, BLOCK_K, PRECISION,
        )  # fmt: skip
        if a_gate is not None:
            acc = _add_product(
                acc, a_gate + slot * DEPTH, rows, every, SLOTS * DEPTH, b_gate + first, columns,
                inside, B_DEPTH, B_COLUMN, DEPTH, BLOCK_K, PRECISION,
            )  # fmt: skip
    if low is not None:
        acc = _add_product(
            acc, low, rows, every, RANK, factor, columns, inside, COLUMNS, 1,
            RANK, BLOCK_K, PRECISION,
        )  # fmt: skip
    where = rows[:, None] * COLUMNS + columns[None, :]
    tl.store(out + where, acc.to(out.dtype.element_ty), mask=inside[None, :])


@triton.jit
@no_type_check
def routed_ffn_down_backward_kernel(
    dy,
    w_out,
    low,
    a_out,
    h_in,
    h_gate,
    coefficients,
    order,
    blocks,
    tiles,
    dh_in,
    dh_gate,
    d_coefficients,
    TOKENS: tl.constexpr,
    EACH: tl.constexpr,
    WIDTH: tl.constexpr,
    UNITS: tl.constexpr,
    SLOTS: tl.constexpr,
    RANK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of rows and of hidden units of one slot."""
    tile, slot, most = tl.program_id(0), tl.program_id(2), tl.num_programs(0)
    if tile >= tl.load(tiles):
        return
    rows, tokens, valid = _rows_and_tokens(tile, order, TOKENS, EACH, BLOCK_M)
    units = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = units < UNITS
    first = tl.load(blocks + slot * most + tile).to(tl.int64) * UNITS
    slope = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    slope = _add_product(
        slope, dy, tokens, valid, WIDTH, w_out + first * WIDTH, units, inside, 1, WIDTH,
        WIDTH, BLOCK_K, PRECISION,
    )  # fmt: skip
    if low is not None:
        slope = _add_product(
            slope, low, tokens, valid, RANK, a_out + first * RANK, units, inside, 1, RANK,
            RANK, BLOCK_K, PRECISION,
        )  # fmt: skip
    where = rows[:, None] * (SLOTS * UNITS) + slot * UNITS + units[None, :]
    up = tl.load(h_in + where, mask=inside[None, :], other=0.0).to(tl.float32)
    if h_gate is not None:
        pre = tl.load(h_gate + where, mask=inside[None, :], other=0.0).to(tl.float32)
        value, act_slope = _act_and_slope(pre, ACTIVATION)
        in_slope = value
        act_slope *= up
        value *= up
    else:
        value, in_slope = _act_and_slope(up, ACTIVATION)
    line = slot * most * BLOCK_M + rows
    if d_coefficients is not None:
        part = tl.program_id(1).to(tl.int64) * (SLOTS * most * BLOCK_M)
        total = tl.sum(tl.where(inside[None, :], value * slope, 0.0), 1)
        tl.store(d_coefficients + part + line, total)
    if dh_in is not None:
        slope *= tl.load(coefficients + line)[:, None]
        d_in = (slope * in_slope).to(dh_in.dtype.element_ty)
        tl.store(dh_in + where, d_in, mask=inside[None, :])
        if h_gate is not None:
            d_gate = (slope * act_slope).to(dh_gate.dtype.element_ty)
            tl.store(dh_gate + where, d_gate, mask=inside[None, :])


@triton.jit
@no_type_check
def routed_ffn_weight_gradient_kernel(
    a,
    b,
    order,
    lists,
    counts,
    out,
    TOKENS: tl.constexpr,
    EACH: tl.constexpr,
    TILES: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    A_COLUMNS: tl.constexpr,
    A_BY_TOKEN: tl.constexpr,
    B_COLUMNS: tl.constexpr,
    OUT_BLOCK: tl.constexpr,
    OUT_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of the gradient of a block: `a^T b` over the rows that compute the block."""
    block = tl.program_id(2)
    of_a = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    of_b = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    a_inside, b_inside = of_a < A_COLUMNS, of_b < B_COLUMNS
    step = tl.arange(0, BLOCK_K)
    each: tl.constexpr = TILE_ROWS // BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(tl.load(counts + block) * each):
        entry = tl.load(lists + block * TILES + i // each)
        rows = ((entry // SLOTS) * TILE_ROWS + (i % each) * BLOCK_K + step).to(tl.int64)
        tokens = (tl.load(order + rows) // EACH).to(tl.int64)
        valid = tokens < TOKENS
        in_slots = rows * SLOTS + entry % SLOTS
        a_rows = tokens * A_COLUMNS if A_BY_TOKEN else in_slots * A_COLUMNS
        b_rows = in_slots * B_COLUMNS if A_BY_TOKEN else tokens * B_COLUMNS
        a_mask, b_mask = valid[:, None] & a_inside[None, :], valid[:, None] & b_inside[None, :]
        left = tl.load(a + a_rows[:, None] + of_a[None, :], mask=a_mask, other=0.0)
        right = tl.load(b + b_rows[:, None] + of_b[None, :], mask=b_mask, other=0.0)
        acc = tl.dot(tl.trans(left), right, acc, input_precision=PRECISION)
    where = block.to(tl.int64) * OUT_BLOCK + of_a.to(tl.int64)[:, None] * OUT_ROW + of_b[None, :]
    mask = a_inside[:, None] & b_inside[None, :]
    tl.store(out + where, acc.to(out.dtype.element_ty), mask=mask)


# Launchers


class _Rows(NamedTuple):
    """A plan with the sizes that follow from it."""

    plan: Plan
    tokens: int

    @property
    def slots(self) -> int:
        """Blocks that a row computes."""
        return self.plan.blocks.shape[0]

    @property
    def tiles(self) -> int:
        """Tiles, at most."""
        return self.plan.blocks.shape[1]

    @property
    def tile_rows(self) -> int:
        """Rows of a tile."""
        return self.plan.order.size // self.tiles

    @property
    def gather(self) -> dict[str, int]:
        """What the kernels need to find the tokens of rows."""
        return {"TOKENS": self.tokens, "EACH": self.plan.rank.shape[1]}

    def spec(self, columns: int, dtype: Any) -> jax.ShapeDtypeStruct:
        """A result with so many columns a row."""
        return jax.ShapeDtypeStruct((self.plan.order.size, columns), dtype)


def _side_by_side(w: Array) -> Array:
    """`[G, D, Fb]` to `[D, G * Fb]`: a dense weight, cut into blocks, is not moved for that."""
    return jnp.moveaxis(w, 0, 1).reshape(w.shape[1], -1)


def _product(a: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    precision = t.xla_precision(a.dtype)
    return lax.dot_general(a, b, dims, precision, preferred_element_type=jnp.float32)


def _low(p: Arrays, name: str) -> Array | None:
    """Tokens times the first low-rank factor, `[T, r]`."""
    a = p.get(f"lora_a_{name}")
    return None if a is None else _product(p["x"], a).astype(p["x"].dtype)


def _rank(array: Array | None) -> int:
    return 0 if array is None else array.shape[1]


def routed_ffn_up(
    p: Arrays,
    coefficients: Float[Array, "S R"],
    rows: _Rows,
    activation: Activation,
    *,
    save: bool,
) -> tuple[Array, list[Array]]:
    """`inner`, and with `save` the products before the activation: linear ones first."""
    x, (num_blocks, width, units) = p["x"], p["w_in"].shape
    gated = "w_gate" in p
    config = config_for(x.dtype, rows.tile_rows, units, width, products=1 + gated)
    low_in, low_gate = _low(p, "in"), _low(p, "gate")
    out = rows.spec(rows.slots * units, x.dtype)
    found = t.launch(
        routed_ffn_up_kernel,
        {
            "x": x,
            "w_in": _side_by_side(p["w_in"]),
            "w_gate": _side_by_side(p["w_gate"]) if gated else None,
            "low_in": low_in,
            "low_gate": low_gate,
            "b_low_in": p.get("lora_b_in"),
            "b_low_gate": p.get("lora_b_gate"),
            "b_in": p.get("b_in"),
            "b_gate": p.get("b_gate"),
            "coefficients": coefficients,
            "order": rows.plan.order,
            "blocks": rows.plan.blocks,
            "tiles": rows.plan.tiles,
        },
        {
            "inner": out,
            "h_in": out if save else None,
            "h_gate": out if save and gated else None,
        },
        name="routed_ffn_up",
        grid=(rows.tiles, triton.cdiv(units, config.block_n), rows.slots),
        **rows.gather,
        **config.constants,
        WIDTH=width,
        UNITS=units,
        NUM_BLOCKS=num_blocks,
        SLOTS=rows.slots,
        RANK_IN=_rank(low_in),
        RANK_GATE=_rank(low_gate),
        ACTIVATION=activation,
    )
    inner, *hidden = found.values()
    return inner, hidden


def routed_ffn_down(
    operands: Sequence[tuple[Array, Array]],
    rows: _Rows,
    low: tuple[Array, Array] | None = None,
    *,
    columns: int,
    block: int,
    strides: tuple[int, int],
) -> Float[Array, "R N"]:
    """`sum_s a[r, s] b[g_s]`, of one pair or two, plus the product of a low-rank pair.

    Args:
      operands: Rows `[R, S * depth]` with the matrices of all blocks.
      rows: Blocks of the rows.
      low: `[R, r]` and `[r, N]`.
      columns: N.
      block: Elements from one block's matrix to the next.
      strides: Elements from one matrix row, and column, to the next.
    """
    (a, b), (a_gate, b_gate) = operands[0], operands[1] if len(operands) > 1 else (None, None)
    depth = a.shape[1] // rows.slots
    config = config_for(a.dtype, rows.tile_rows, columns, depth)
    found = t.launch(
        routed_ffn_down_kernel,
        {
            "a": a,
            "a_gate": a_gate,
            "b": b,
            "b_gate": b_gate,
            "low": None if low is None else low[0],
            "factor": None if low is None else low[1],
            "blocks": rows.plan.blocks,
            "tiles": rows.plan.tiles,
        },
        {"out": rows.spec(columns, a.dtype)},
        name="routed_ffn_down",
        grid=(rows.tiles, triton.cdiv(columns, config.block_n)),
        **config.constants,
        DEPTH=depth,
        COLUMNS=columns,
        SLOTS=rows.slots,
        RANK=0 if low is None else low[0].shape[1],
        B_BLOCK=block,
        B_DEPTH=strides[0],
        B_COLUMN=strides[1],
    )
    return found["out"]


def routed_ffn_down_backward(
    p: Arrays,
    dy: Array,
    low: Array | None,
    hidden: Sequence[Array],
    coefficients: Float[Array, "S R"],
    rows: _Rows,
    activation: Activation,
    *,
    wanted: frozenset[str],
) -> tuple[list[Array], Array | None]:
    """Gradients of the saved products, and of the coefficients, `[S, R]`, as far as wanted."""
    _, units, width = p["w_out"].shape
    # Half as wide: the hidden units of the tile take registers beside the accumulator.
    config = config_for(dy.dtype, rows.tile_rows, units, width, products=2)
    parts = triton.cdiv(units, config.block_n)
    out = rows.spec(rows.slots * units, dy.dtype) if "hidden" in wanted else None
    d_coefficients = jax.ShapeDtypeStruct((parts, *coefficients.shape), jnp.float32)
    found = t.launch(
        routed_ffn_down_backward_kernel,
        {
            "dy": dy,
            "w_out": p["w_out"],
            "low": low,
            "a_out": p.get("lora_a_out"),
            "h_in": hidden[0],
            "h_gate": hidden[1] if len(hidden) > 1 else None,
            "coefficients": coefficients,
            "order": rows.plan.order,
            "blocks": rows.plan.blocks,
            "tiles": rows.plan.tiles,
        },
        {
            "dh_in": out,
            "dh_gate": out if len(hidden) > 1 else None,
            "d_coefficients": d_coefficients if "coefficients" in wanted else None,
        },
        name="routed_ffn_down_backward",
        grid=(rows.tiles, parts, rows.slots),
        **rows.gather,
        **config.constants,
        WIDTH=width,
        UNITS=units,
        SLOTS=rows.slots,
        RANK=_rank(low),
        ACTIVATION=activation,
    )
    total = found.pop("d_coefficients", None)
    return list(found.values()), None if total is None else total.sum(0)


def routed_ffn_weight_gradient(
    a: Array,
    b: Array,
    rows: _Rows,
    lists: tuple[Array, Array],
    *,
    columns: tuple[int, int],
    a_by_token: bool = True,
    side_by_side: bool = False,
) -> Float[Array, "G I J"]:
    """For each block `a^T b`, summed over the rows that compute it.

    Args:
      a: `[T, I]`, or, if not `a_by_token`, `[R, S * I]`, columns of each slot's own.
      b: `[R, S * J]`, or `[T, J]`.
      rows: Blocks of the rows.
      lists: What `plan.tiles_by_block` returned.
      columns: I and J.
      a_by_token: Whether `a` is by token and `b` by row, or the other way round.
      side_by_side: The result is laid out as `[I, G * J]`.
    """
    num_blocks, (rows_of_out, columns_of_out) = len(lists[1]), columns
    block_m = min(64 if a.dtype.itemsize > 2 else 128, t.power_of_two(rows_of_out))
    config = config_for(a.dtype, block_m, columns_of_out, rows.tile_rows)
    shape = num_blocks, rows_of_out, columns_of_out
    block, row = rows_of_out * columns_of_out, columns_of_out
    if side_by_side:
        shape = rows_of_out, num_blocks, columns_of_out
        block, row = columns_of_out, num_blocks * columns_of_out
    found = t.launch(
        routed_ffn_weight_gradient_kernel,
        {"a": a, "b": b, "order": rows.plan.order, "lists": lists[0], "counts": lists[1]},
        {"out": jax.ShapeDtypeStruct(shape, a.dtype)},
        name="routed_ffn_weight_gradient",
        grid=(
            triton.cdiv(rows_of_out, config.block_m),
            triton.cdiv(columns_of_out, config.block_n),
            num_blocks,
        ),
        **rows.gather,
        **config.constants,
        TILES=rows.tiles,
        TILE_ROWS=rows.tile_rows,
        SLOTS=rows.slots,
        A_COLUMNS=rows_of_out,
        A_BY_TOKEN=a_by_token,
        B_COLUMNS=columns_of_out,
        OUT_BLOCK=block,
        OUT_ROW=row,
    )
    return jnp.moveaxis(found["out"], 1, 0) if side_by_side else found["out"]


# Differentiation


def _projections(p: Arrays) -> tuple[str, ...]:
    return ("in", "gate") if "w_gate" in p else ("in",)


def _down(p: Arrays, inner: Array, rows: _Rows, low: Any) -> Array:
    """Rows of the result from what the hidden units pass on."""
    _, units, width = p["w_out"].shape
    return routed_ffn_down(
        [(inner, p["w_out"])],
        rows,
        low,
        columns=width,
        block=units * width,
        strides=(width, 1),
    )


def _forward(
    activation: Activation, p: Arrays, block_index: Array, save: bool
) -> tuple[Array, tuple[Any, ...]]:
    num_blocks, _, units = p["w_in"].shape
    plan = plans.make_plan(block_index, num_blocks)
    rows = _Rows(plan, len(p["x"]))
    coefficients = plans.rows_of_choices(p["coefficients"], plan)
    inner, hidden = routed_ffn_up(p, coefficients, rows, activation, save=save)
    low, ha = None, None
    if (a := p.get("lora_a_out")) is not None:
        rank = a.shape[2]
        ha = routed_ffn_down(
            [(inner, a)], rows, columns=rank, block=units * rank, strides=(rank, 1)
        )
        low = ha, p["lora_b_out"]
        ha = plans.tokens_of_rows(ha, plan) if save else None
    ys = _down(p, inner, rows, low)
    return plans.tokens_of_rows(ys, plan, p.get("b_out")), (plan, hidden, ha)


def _backward(
    activation: Activation,
    wanted: frozenset[str],
    p: Arrays,
    plan: Plan,
    hidden: Sequence[Array],
    ha: Any,
    dy: Array,
) -> Arrays:
    """Gradients of the arrays named in `wanted`; nothing else is computed."""
    x, names, (num_blocks, width, units) = p["x"], _projections(p), p["w_in"].shape
    rows = _Rows(plan, len(x))
    into_hidden = {f"{kind}_{name}" for name in names for kind in ("w", "b", "lora_a", "lora_b")}
    results = set()
    if wanted & ({"x"} | into_hidden):
        results.add("hidden")
    if "coefficients" in wanted:
        results.add("coefficients")
    grads: Arrays = {}
    if "b_out" in wanted:
        grads["b_out"] = dy.astype(jnp.float32).sum(axis=0)
    if "lora_b_out" in wanted:
        grads["lora_b_out"] = _product(ha, dy, (0, 0))
    if not results | (wanted & {"w_out", "lora_a_out"}):
        return grads
    low = None
    if (b := p.get("lora_b_out")) is not None:
        low = _product(dy, b, (1, 1)).astype(dy.dtype)
    coefficients = plans.rows_of_choices(p["coefficients"], plan)
    lists = plans.tiles_by_block(plan, num_blocks)

    if wanted & {"w_out", "lora_a_out"}:
        inner = plans.inner_of_rows(activation, hidden, coefficients)
        for name, other in (("w_out", dy), ("lora_a_out", low)):
            if name in wanted and other is not None:
                grads[name] = routed_ffn_weight_gradient(
                    inner,
                    other,
                    rows,
                    lists,
                    columns=(units, other.shape[1]),
                    a_by_token=False,
                )
        # The memory of `inner` is free again before the gradients of `hidden` are made.
        hidden, dy, grads = lax.optimization_barrier((hidden, dy, grads))
    if not results:
        return grads
    d_hidden, d_coefficients = routed_ffn_down_backward(
        p, dy, low, hidden, coefficients, rows, activation, wanted=frozenset(results)
    )
    if d_coefficients is not None:
        grads["coefficients"] = plans.choices_of_rows(d_coefficients, plan)
    if not d_hidden:
        return grads

    dh = dict(zip(names, d_hidden, strict=True))
    for name in names:
        grads |= _projection_gradients(name, wanted, p, dh[name], rows, lists)
    # Else XLA puts these gradients off, and the largest array lives on until then.
    dh, grads = lax.optimization_barrier((dh, grads))
    lows = {}
    for name in names:
        if (b := p.get(f"lora_b_{name}")) is None or not wanted & {"x", f"lora_a_{name}"}:
            continue
        rank = b.shape[1]
        lows[name] = routed_ffn_down(
            [(dh[name], b)], rows, columns=rank, block=rank * units, strides=(1, units)
        )
        if f"lora_a_{name}" in wanted:
            by_token = plans.tokens_of_rows(lows[name], plan)
            grads[f"lora_a_{name}"] = _product(x, by_token, (0, 0))
    if "x" in wanted:
        factors = [p[f"lora_a_{name}"].T for name in lows]
        pair = None
        if lows:
            pair = jnp.concatenate(list(lows.values()), 1), jnp.concatenate(factors, 0)
        dxs = routed_ffn_down(
            [(dh[name], _side_by_side(p[f"w_{name}"])) for name in names],
            rows,
            pair,
            columns=width,
            block=units,
            strides=(1, num_blocks * units),
        )
        grads["x"] = plans.tokens_of_rows(dxs, plan)
    return grads


def _projection_gradients(
    name: str,
    wanted: frozenset[str],
    p: Arrays,
    dh: Array,
    rows: _Rows,
    lists: tuple[Array, Array],
) -> Arrays:
    """Gradients of the weight, the bias and the second low-rank factor of a projection."""
    x, (_, width, units) = p["x"], p["w_in"].shape
    grads = {}
    if f"w_{name}" in wanted:
        grads[f"w_{name}"] = routed_ffn_weight_gradient(
            x, dh, rows, lists, columns=(width, units), side_by_side=True
        )
    if f"b_{name}" in wanted:
        ones = jnp.ones((rows.tokens, 1), x.dtype)
        sums = routed_ffn_weight_gradient(ones, dh, rows, lists, columns=(1, units))
        grads[f"b_{name}"] = sums[:, 0]
    if f"lora_b_{name}" in wanted:
        low = _low(p, name)
        assert low is not None
        grads[f"lora_b_{name}"] = routed_ffn_weight_gradient(
            low, dh, rows, lists, columns=(low.shape[1], units)
        )
    return grads


# Keeps the rows' hidden pre-activations, `T * A * Fb`, for the backward pass.
routed_ffn_triton = differentiable(_forward, _backward)
