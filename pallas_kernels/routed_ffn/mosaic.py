"""Routed FFN for Hopper GPUs: products of sorted tokens with the blocks they activate.

Rows, that is tokens sorted by the blocks they activate (see `plan.py`), come in tiles whose rows
share their blocks. Four kernels multiply them; R rows, S blocks a row:

* `routed_ffn_up`: `inner[r, s] = c[r, s] * act(x[r] w_in[g_s])`, `[R, S * Fb]`;
* `routed_ffn_down`: `y[r] = sum_s inner[r, s] w_out[g_s]`, and the sums of the same form that lead
  back to x and to the inner sides of the low-rank factors;
* `routed_ffn_down_backward`: `dy[r] w_out[g_s]^T` and what follows from it element by element;
* `routed_ffn_weight_gradient`: sums over the rows of a block.

Each is persistent and warp-specialised: one warpgroup copies tiles of operands into a ring of
stages in shared memory, one or two others multiply them. Sums are float32, in a fixed order.

Biases and low-rank factors add columns to the depth of a product: `x w + (x a) b + bias` is
`[x, x a, 1] [w; b; bias]`, where the columns after x are computed once for all blocks.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import mosaic, tuning
from pallas_kernels.mosaic import WARPGROUP_ROWS
from pallas_kernels.routed_ffn import plan as plans
from pallas_kernels.routed_ffn.differentiation import Arrays, differentiable
from pallas_kernels.routed_ffn.plan import Plan
from pallas_kernels.routed_ffn.types import (
    Activation,
    RoutedFFNWeights,
)

CHUNK = 64  # Columns that an epilogue handles at a time; sizes are multiples of it.
_SHARED_BYTES = 224 * 1024  # For operands and results; the rest of 227 KiB has the barriers.
# Sums over columns stay within a warp, so they need no shared memory.
_COMPILER_PARAMS = plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0)
_ROW = plgpu.Layout.WGMMA.reduce(1)  # A value for each row of an accumulator.


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes of a launch.

    Attributes:
      block_m: Rows of a tile; 64 for each warpgroup that multiplies.
      block_n: Columns of a tile, a multiple of 64, at most 256 over all accumulators.
      block_k: Depth of a stage.
      stages: Stages of the ring.
      panel: Row tiles that are walked together, so that they share columns in the L2 cache.
      num_sms: Thread blocks that share the tiles.
    """

    block_m: int
    block_n: int
    block_k: int = 64
    stages: int = 4
    panel: int = 16
    num_sms: int = 132

    @property
    def warpgroups(self) -> int:
        """Warpgroups that multiply."""
        return self.block_m // WARPGROUP_ROWS


def configs_for(
    block_m: int, row_tiles: float, columns: int, *, products: int = 1, buffers: int = 2
) -> list[Config]:
    """Tile sizes, the likely fastest first: the least time for full waves of tiles.

    Args:
      block_m: Rows of a tile.
      row_tiles: Expected number of row tiles, times the column groups that cannot share a tile.
      columns: Columns of the result, of one such group.
      products: Accumulators of a tile.
      buffers: Chunks, 64 x 64, that a warpgroup's epilogue keeps in shared memory.
    """
    overhead = 24  # Columns that take as long as the start and the end of a tile.

    def order(block_n: int) -> tuple[int, int]:
        waves = math.ceil(row_tiles * math.ceil(columns / block_n) / Config.num_sms)
        return waves * (products * block_n + overhead), -block_n

    def config(block_n: int) -> Config:
        kept = block_m // WARPGROUP_ROWS * buffers * WARPGROUP_ROWS * CHUNK * 2
        stage = (block_m + products * block_n) * Config.block_k * 2
        return Config(block_m, block_n, stages=min(6, (_SHARED_BYTES - kept) // stage))

    widths = range(CHUNK, min(256 // products, columns) + 1, CHUNK)
    return [config(block_n) for block_n in sorted(widths, key=order)]


def config_for(
    kernel: str, dtype: Any, block_m: int, row_tiles: float, *args: int, **kwargs: int
) -> Config:
    """Tile sizes of a launch: the first of `configs_for`, or what `autotune` found better."""
    best, *others = configs_for(block_m, row_tiles, *args, **kwargs)
    shapes = f"{jnp.dtype(dtype).name}, block_m={block_m}, row_tiles={row_tiles}, {args}, {kwargs}"
    return tuning.choose(kernel, shapes, best, others)


@dataclasses.dataclass(frozen=True)
class _Ring:
    """Stages of operands in shared memory, handed from the copying to the multiplying warps."""

    stages: int
    full: Any
    free: Any

    def fill(self, step: Array, copy: Callable[[Array, Any], None]) -> None:
        """Runs `copy(stage, barrier)` once the stage of this step is free."""
        stage = self._free_stage(step)
        copy(stage, self.full.at[stage])

    def drain(self, steps: Array) -> None:
        """Waits until all stages are free, after so many steps."""
        for i in range(self.stages):
            self._free_stage(steps + i)

    def _free_stage(self, step: Array) -> Array:
        stage = lax.rem(step, jnp.int32(self.stages))

        @pl.when(step >= self.stages)
        def _() -> None:
            plgpu.barrier_wait(self.free.at[stage])

        return stage

    def multiply(
        self,
        first: Array,
        steps: Array | int,
        shape: tuple[int, int],
        products: int,
        operands: Callable[[Array], Sequence[tuple[Any, Any]]],
    ) -> tuple[Array, ...]:
        """Sums `a @ b` over steps, at least one, for each pair of `operands(stage)`."""

        def run(*accs: Any) -> tuple[Array, ...]:
            def start(step: Array) -> None:
                stage = lax.rem(step, jnp.int32(self.stages))
                plgpu.barrier_wait(self.full.at[stage])
                for acc, (a, b) in zip(accs, operands(stage), strict=True):
                    plgpu.wgmma(acc, a, b)

            def finish(step: Array, running: int) -> None:
                plgpu.wgmma_wait(running)
                plgpu.barrier_arrive(self.free.at[lax.rem(step, jnp.int32(self.stages))])

            start(first)

            @pl.loop(first + 1, first + steps)
            def _(step: Array) -> None:
                start(step)
                finish(step - 1, products)

            finish(first + steps - 1, 0)
            return tuple(acc[...] for acc in accs)

        return pl.run_scoped(run, *[plgpu.ACC(shape, jnp.float32)] * products)


def _walk(row_tiles: Array | int, column_tiles: int, panel: int, index: Array) -> tuple[Array, ...]:
    """Row and column of the index-th tile, panel after panel, columns outermost in a panel."""
    number = lax.div(index, jnp.int32(panel * column_tiles))
    start = number * panel
    width = jnp.minimum(jnp.int32(panel), row_tiles - start)
    rest = index - start * column_tiles
    return start + lax.rem(rest, width), lax.div(rest, width)


def _tiles_of_this(tiles: Array, sms: int) -> Array:
    """How many of the tiles, dealt in turn, this thread block computes."""
    return lax.div(tiles - mosaic.axis_index("sm") + (sms - 1), jnp.int32(sms))


def _chunk(offset: Any) -> Any:
    return pl.ds(offset, CHUNK)


class _Store:
    """Stores chunks of a result through a few buffers of this warpgroup."""

    def __init__(self, buffers: Any, count: int):
        self._buffers, self._count, self._next = buffers, count, 0
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def __call__(self, value: Array, destination: Any) -> None:
        buffer = self._buffers.at[self._next % self._count]
        self._next += 1
        value = value.astype(buffer.dtype)
        plgpu.wait_smem_to_gmem(self._count - 1, wait_read_only=True)
        buffer[...] = value
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, destination)


def _split(items: Sequence[Any], *sizes: int) -> list[Sequence[Any]]:
    """Parts of these sizes, and the rest."""
    stops = [0, *itertools.accumulate(sizes), len(items)]
    return [items[start:stop] for start, stop in itertools.pairwise(stops)]


def _when(condition: Array | bool, run: Callable[[], None]) -> None:
    if condition is True:
        run()
    else:
        pl.when(condition)(run)


@dataclasses.dataclass(frozen=True, eq=False)
class _Term:
    """A part of the depth of a product: columns of `a` times matrices of the tile's blocks.

    Attributes:
      a: Rows, `[R, slots * depth]`.
      bs: For each accumulator the matrices of all blocks, `[G, ...]`, or one for all of them.
      slots: Slots that are summed; each has its own columns of `a` and its own block.
      side_by_side: The matrices are read as the columns of one, `[rows, G * columns]`. A dense
        weight cut into blocks of columns is not moved in memory for that.
    """

    a: Array
    bs: tuple[Array, ...]
    slots: int = 1
    side_by_side: bool = False

    @property
    def depth(self) -> int:
        return self.a.shape[1] // self.slots

    @property
    def step(self) -> tuple[int, int]:
        """Rows and columns from one block's matrix to the next; none if all blocks share it."""
        if self.bs[0].ndim == 2:
            return 0, 0
        rows, columns = self.bs[0].shape[1:]
        return (0, columns) if self.side_by_side else (rows, 0)

    @property
    def operands(self) -> list[Array]:
        """`a`, and the matrices of every accumulator as one, of two axes."""
        bs = [jnp.moveaxis(b, 0, 1) if self.side_by_side else b for b in self.bs]
        if self.side_by_side:
            return [self.a, *(b.reshape(len(b), -1) for b in bs)]
        return [self.a, *(b.reshape(-1, b.shape[-1]) for b in bs)]


class _Tile(NamedTuple):
    """What a warpgroup multiplies: 64 rows from `row`, and a slot's columns from `column`.

    The last tile of the columns may reach back into the tile before, which stores the columns
    before `first`. `part` numbers the column tiles of all slots.
    """

    warpgroup: Array
    row: Array
    slot: Array | int
    column: Array
    first: Array | None
    part: Array

    @property
    def rows(self) -> Any:
        return pl.ds(self.row, WARPGROUP_ROWS)

    def stores(self, offset: int) -> Array | bool:
        """Whether the chunk of columns at this offset is this tile's to store."""
        return self.first is None or self.column + offset >= self.first


Compute = Callable[[_Tile, Callable[[], tuple[Array, ...]], Any, Any, Any], None]


def _multiply_rows(
    compute: Compute,
    terms: Sequence[_Term],
    plan: Plan,
    inputs: Sequence[Any],
    outputs: Sequence[jax.ShapeDtypeStruct],
    scratch: Sequence[Any],
    config: Config,
    *,
    columns: int,
    slots: int,
    transposed: bool,
    name: str,
) -> list[Array]:
    """Multiplies every row tile with matrices of its blocks.

    Args:
      compute: `compute(tile, multiply, input refs, output refs, scratch refs)` runs once for each
        tile and multiplying warpgroup, calls `multiply()` for the accumulators, and stores.
      terms: The depth of the product, of at least one term.
      plan: Blocks of the tiles.
      inputs: What `compute` reads besides; arrays, or `jax.new_ref`s that it also writes.
      outputs: Types of the results.
      scratch: Memory that `compute` has.
      config: Tile sizes.
      columns: Columns of the result that a slot has.
      slots: Slots whose columns the result has, one after another.
      transposed: The matrices are `[columns, depth]`, not `[depth, columns]`.
      name: Name of the launch.
    """
    bm, bn, bk = config.block_m, config.block_n, config.block_k
    dtype, products = terms[0].a.dtype, len(terms[0].bs)
    steps = sum(term.a.shape[1] // bk for term in terms)
    parts = pl.cdiv(columns, bn)
    most_tiles = plan.blocks.shape[1]
    sms = min(config.num_sms, most_tiles * slots * parts)
    wgs = config.warpgroups
    flat = [array for term in terms for array in term.operands]
    b_shape = (bn, bk) if transposed else (bk, bn)

    def body(tiles_ref: Any, blocks_ref: Any, *refs: Any) -> None:
        operand_refs, in_refs, out_refs, scratch_refs = _split(
            refs, len(flat), len(inputs), len(outputs)
        )
        a_s, b_s, full, free, *scratch_refs = scratch_refs
        ring = _Ring(config.stages, full, free)
        tiles = tiles_ref[0]
        mine = _tiles_of_this(tiles * (slots * parts), sms)
        wg = mosaic.axis_index("wg")

        def where(i: Array) -> tuple[Array, Array | int, Array, Array, Array]:
            index = mosaic.axis_index("sm") + i * sms
            tile, part = _walk(tiles, slots * parts, config.panel, index)
            slot = 0 if slots == 1 else lax.div(part, jnp.int32(parts))
            first = (part - slot * parts) * bn
            return tile, slot, jnp.minimum(first, columns - bn), first, part

        def load(
            term: _Term,
            a_ref: Any,
            b_refs: Sequence[Any],
            tile: Array,
            slot: Array | int,
            column: Array,
            step: Array,
        ) -> None:
            depth = term.depth // bk

            @pl.loop(0, term.slots)
            def _(s: Array) -> None:
                block = blocks_ref[s if term.slots > 1 else slot, tile]
                first_row, first_column = (block * step for step in term.step)

                @pl.loop(0, depth)
                def _(k: Array) -> None:
                    of_a = pl.ds(tile * bm, bm), pl.ds(s * term.depth + k * bk, bk)
                    if transposed:
                        spans = (first_row + column, bn), (first_column + k * bk, bk)
                    else:
                        spans = (first_row + k * bk, bk), (first_column + column, bn)
                    of_b = tuple(pl.ds(*span) for span in spans)

                    def copy(stage: Array, barrier: Any) -> None:
                        plgpu.copy_gmem_to_smem(a_ref.at[of_a], a_s.at[stage], barrier)
                        for p, b_ref in enumerate(b_refs):
                            plgpu.copy_gmem_to_smem(b_ref.at[of_b], b_s.at[stage, p], barrier)

                    ring.fill(step + s * depth + k, copy)

        @pl.when(wg < wgs)
        def _() -> None:
            plgpu.set_max_registers(232 if wgs == 2 else 240, action="increase")

            @pl.loop(0, mine)
            def _(i: Array) -> None:
                tile, slot, column, first, part = where(i)

                def pairs(stage: Array) -> list[tuple[Any, Any]]:
                    a = a_s.at[stage, pl.ds(wg * WARPGROUP_ROWS, WARPGROUP_ROWS)]
                    bs = [b_s.at[stage, p] for p in range(products)]
                    return [(a, b.T if transposed else b) for b in bs]

                def multiply() -> tuple[Array, ...]:
                    return ring.multiply(i * steps, steps, (WARPGROUP_ROWS, bn), products, pairs)

                row = tile * bm + wg * WARPGROUP_ROWS
                this = _Tile(wg, row, slot, column, first if columns % bn else None, part)
                compute(this, multiply, in_refs, out_refs, scratch_refs)

            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == wgs)
        def _() -> None:
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, mine)
            def _(i: Array) -> None:
                tile, slot, column, _, _ = where(i)
                step, remaining = i * steps, iter(operand_refs)
                for term in terms:
                    a_ref, *b_refs = (next(remaining) for _ in range(1 + products))
                    load(term, a_ref, b_refs, tile, slot, column, step)
                    step += term.slots * (term.depth // bk)

            ring.drain(mine * steps)

    return plgpu.kernel(
        body,
        out_type=list(outputs),
        scratch_types=[
            mosaic.matrix((config.stages, bm, bk), dtype),
            mosaic.matrix((config.stages, products, *b_shape), dtype),
            plgpu.Barrier(num_arrivals=1 + products, num_barriers=config.stages),
            plgpu.Barrier(num_arrivals=wgs, num_barriers=config.stages),
            *scratch,
        ],
        grid=(sms,),
        grid_names=mosaic.axes("sm"),
        num_threads=wgs + 1,
        thread_name=mosaic.axis("wg"),
        compiler_params=_COMPILER_PARAMS,
        kernel_name=name,
    )(plan.tiles, plan.blocks, *flat, *inputs)


def _gauss(h: Array) -> tuple[Array, Array]:
    """The standard normal distribution and sqrt(2 pi) times its density.

    Abramowitz and Stegun, formula 7.1.26: the error is below 1e-7.
    """
    bell = jnp.exp(-0.5 * h * h)
    t = 1 / (1 + (0.3275911 * math.sqrt(0.5)) * jnp.abs(h))
    series = (0.7107068705 + (-0.7265760135 + 0.5307027145 * t) * t) * t - 0.142248368
    tail = (0.127414796 + series * t) * t * bell
    return jnp.where(h < 0, tail, 1 - tail), bell


def _act_and_slope(name: Activation, h: Array) -> tuple[Array, Array]:
    """An activation and its derivative."""
    match name:
        case "relu":
            return jnp.maximum(h, 0.0), jnp.where(h > 0, 1.0, 0.0)
        case "gelu":
            share, bell = _gauss(h)
            return h * share, share + (1 / math.sqrt(2 * math.pi)) * h * bell
        case "gelu_tanh":
            root = math.sqrt(2 / math.pi)
            share = 0.5 + 0.5 * jnp.tanh(root * (h + 0.044715 * h * h * h))
            slope = 2 * root * (1 + 3 * 0.044715 * h * h)
            return h * share, share * (1 + h * (1 - share) * slope)
        case "silu":
            share = 1 / (1 + jnp.exp(-h))
            return h * share, share * (1 + h * (1 - share))
        case "identity":
            return h, jnp.ones_like(h)


def routed_ffn_up(
    terms: Sequence[_Term],
    coefficients: Float[Array, "S R"],
    plan: Plan,
    activation: Activation,
    config: Config,
    *,
    save: bool,
) -> list[Array]:
    """`c * act(x w_in)`, or `c * act(x w_gate) * (x w_in)`, of the blocks of each row.

    Args:
      terms: Depth of the products, with matrices for `in` and, if gated, `gate`.
      coefficients: What the results are multiplied by.
      plan: Blocks of the rows.
      activation: Name of the activation.
      config: Tile sizes.
      save: Also return the products, for the backward pass.

    Returns:
      `inner [R, S * Fb]`, and the saved products, likewise.
    """
    columns, slots = terms[0].bs[0].shape[2], plan.blocks.shape[0]
    products, dtype = len(terms[0].bs), terms[0].a.dtype
    shape = jax.ShapeDtypeStruct((terms[0].a.shape[0], slots * columns), dtype)
    buffers = 2

    def compute(tile: _Tile, multiply: Any, in_refs: Any, out_refs: Any, scratch: Any) -> None:
        c = plgpu.load(in_refs[0].at[tile.slot, tile.rows], layout=_ROW, optimized=False)
        accs = multiply()
        store = _Store(scratch[0].at[tile.warpgroup], buffers)
        base = tile.slot * columns + tile.column
        for n in range(0, config.block_n, CHUNK):
            hidden = [acc[:, n : n + CHUNK] for acc in accs]
            inner, _ = _act_and_slope(activation, hidden[-1])
            inner *= mosaic.rows(c, (WARPGROUP_ROWS, CHUNK))
            if products == 2:
                inner *= hidden[0]

            def put(values: Any = (inner, *hidden), n: int = n) -> None:
                for value, ref in zip(values, out_refs, strict=False):
                    store(value, ref.at[tile.rows, _chunk(base + n)])

            _when(tile.stores(n), put)

    return _multiply_rows(
        compute,
        terms,
        plan,
        [coefficients],
        [shape] * (1 + save * products),
        [mosaic.matrix((config.warpgroups, buffers, WARPGROUP_ROWS, CHUNK), dtype)],
        config,
        columns=columns,
        slots=slots,
        transposed=False,
        name="routed_ffn_up",
    )


def routed_ffn_down(
    terms: Sequence[_Term], plan: Plan, config: Config, *, columns: int, transposed: bool = False
) -> Float[Array, "R N"]:
    """Sums over terms, and the blocks of each row, of rows times matrices; `N` is `columns`."""
    dtype, buffers = terms[0].a.dtype, 2

    def compute(tile: _Tile, multiply: Any, _: Any, out_refs: Any, scratch: Any) -> None:
        (acc,) = multiply()
        store = _Store(scratch[0].at[tile.warpgroup], buffers)
        for n in range(0, config.block_n, CHUNK):

            def put(n: int = n) -> None:
                where = tile.rows, _chunk(tile.column + n)
                store(acc[:, n : n + CHUNK], out_refs[0].at[where])

            _when(tile.stores(n), put)

    return _multiply_rows(
        compute,
        terms,
        plan,
        [],
        [jax.ShapeDtypeStruct((terms[0].a.shape[0], columns), dtype)],
        [mosaic.matrix((config.warpgroups, buffers, WARPGROUP_ROWS, CHUNK), dtype)],
        config,
        columns=columns,
        slots=1,
        transposed=transposed,
        name="routed_ffn_down",
    )[0]


def routed_ffn_down_backward(
    terms: Sequence[_Term],
    hidden: Sequence[Float[Array, "R SFb"]],
    coefficients: Float[Array, "S R"],
    plan: Plan,
    activation: Activation,
    config: Config,
    *,
    wanted: frozenset[str],
) -> dict[str, Any]:
    """Gradients that follow from `dy w_out^T` element by element.

    Those of `hidden` are written over it, so that both never take memory at once.

    Args:
      terms: Depth of that product.
      hidden: What `routed_ffn_up` saved: products with `w_in` and, if gated, `w_gate`.
      coefficients: Coefficients of the rows.
      plan: Blocks of the rows.
      activation: Name of the activation.
      config: Tile sizes.
      wanted: Names of the results.

    Returns:
      Those of them that are wanted: "hidden", a list of gradients of `hidden`; "coefficients",
      `[S, R]`.
    """
    columns, slots, count = terms[0].bs[0].shape[1], plan.blocks.shape[0], len(hidden)
    dtype, wgs, parts = hidden[0].dtype, config.warpgroups, pl.cdiv(columns, config.block_n)
    sums_type = jax.ShapeDtypeStruct((slots * parts, hidden[0].shape[0]), jnp.float32)
    chunks, depth = config.block_n // CHUNK, 2

    def compute(tile: _Tile, multiply: Any, in_refs: Any, out_refs: Any, scratch: Any) -> None:
        *hidden_refs, c_ref = in_refs
        loaded, chunk_s, sums_s = scratch
        wg, base = tile.warpgroup, tile.slot * columns + tile.column

        def load(number: int) -> None:
            def copy() -> None:
                slot = number % depth
                for j, ref in enumerate(hidden_refs):
                    plgpu.copy_gmem_to_smem(
                        ref.at[tile.rows, _chunk(base + number * CHUNK)],
                        chunk_s.at[wg, slot, j],
                        loaded.at[wg * depth + slot],
                    )

            _when(tile.stores(number * CHUNK), copy)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for number in range(min(depth, chunks)):
            load(number)
        c = plgpu.load(c_ref.at[tile.slot, tile.rows], layout=_ROW, optimized=False)
        (acc,) = multiply()
        total = None
        for number in range(chunks):
            n = number * CHUNK
            mine, barrier = tile.stores(n), loaded.at[wg * depth + number % depth]
            _when(mine, functools.partial(plgpu.barrier_wait, barrier))
            buffers = [chunk_s.at[wg, number % depth, j] for j in range(count)]
            values = [plgpu.load(b, layout=plgpu.Layout.WGMMA).astype(jnp.float32) for b in buffers]
            c_rows = mosaic.rows(c, (WARPGROUP_ROWS, CHUNK))
            inner, slope = _act_and_slope(activation, values[-1])
            d_inner = acc[:, n : n + CHUNK]
            scaled = d_inner * c_rows
            if count == 2:
                slopes = [inner, slope * values[0]]
                inner *= values[0]
            else:
                slopes = [slope]
            if "coefficients" in wanted:
                sums = (inner * d_inner).sum(axis=1)
                if tile.first is not None:  # what is not its own was not loaded
                    own = jnp.full_like(sums, jnp.where(mine, 1.0, 0.0))
                    sums = jnp.where(own > 0, sums, 0.0)
                total = sums if total is None else total + sums
            results = [(scaled * slope).astype(dtype) for slope in slopes]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if 0 < number <= chunks - depth:
                load(number + depth - 1)
            if "hidden" not in wanted:
                continue
            for value, buffer in zip(results, buffers, strict=True):
                buffer[...] = value
            plgpu.commit_smem()

            def put(buffers: Any = buffers, n: int = n) -> None:
                for buffer, ref in zip(buffers, hidden_refs, strict=True):
                    plgpu.copy_smem_to_gmem(buffer, ref.at[tile.rows, _chunk(base + n)])

            _when(mine, put)
        if "coefficients" in wanted:
            sums_s[wg] = total
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(sums_s.at[wg], out_refs[0].at[tile.part, tile.rows])

    scratch = [
        plgpu.Barrier(num_arrivals=count, num_barriers=wgs * depth),
        mosaic.matrix((wgs, depth, count, WARPGROUP_ROWS, CHUNK), dtype),
        plgpu.SMEM((wgs, WARPGROUP_ROWS), jnp.float32),
    ]
    refs: list[Any] = [jax.new_ref(h) if "hidden" in wanted else h for h in hidden]
    sums = _multiply_rows(
        compute,
        terms,
        plan,
        [*refs, coefficients],
        [sums_type] if "coefficients" in wanted else [],
        scratch,
        config,
        columns=columns,
        slots=slots,
        transposed=True,
        name="routed_ffn_down_backward",
    )
    found: dict[str, Any] = {}
    if "hidden" in wanted:
        found["hidden"] = [jax.freeze(ref) for ref in refs]
    if "coefficients" in wanted:
        found["coefficients"] = sums[0].reshape(slots, parts, -1).sum(axis=1)
    return found


def routed_ffn_weight_gradient(
    a: Float[Array, "R Na"],
    b: Float[Array, "R Nb"],
    lists: tuple[Int[Array, "G M"], Int[Array, " G"]],
    slots: int,
    config: Config,
    *,
    columns_of_a: int,
    columns_of_b: int,
    side_by_side: bool = False,
) -> Float[Array, "G columns_of_a columns_of_b"]:
    """`sum_r a[r, s]^T b[r, s]` over the rows that compute a block, at its slot, for each block.

    Args:
      a: Rows, with `columns_of_a` for each slot, or for all of them.
      b: Likewise.
      lists: What `tiles_by_block` returns.
      slots: Number of slots.
      config: Tile sizes, of the result.
      columns_of_a: Rows of the result.
      columns_of_b: Columns of the result.
      side_by_side: Write the results as the columns of one matrix; see `_Term`.
    """
    num_blocks, dtype = lists[0].shape[0], a.dtype
    bm, bn, bk = config.block_m, config.block_n, config.block_k
    tile_rows = a.shape[0] // lists[0].shape[1]
    wgs, chunks, buffers = config.warpgroups, tile_rows // bk, 2
    a_tiles, b_tiles = pl.cdiv(columns_of_a, bm), pl.cdiv(columns_of_b, bn)
    tiles = num_blocks * a_tiles * b_tiles
    sms = min(config.num_sms, tiles)
    a_sliced, b_sliced = a.shape[1] > columns_of_a, b.shape[1] > columns_of_b

    def body(
        list_ref: Any, count_ref: Any, a_ref: Any, b_ref: Any, out_ref: Any, *scratch: Any
    ) -> None:
        a_s, b_s, full, free, out_s = scratch
        ring = _Ring(config.stages, full, free)
        wg = mosaic.axis_index("wg")

        def where(i: Array) -> tuple[Array, ...]:
            index = mosaic.axis_index("sm") + i * sms
            block = lax.div(index, jnp.int32(a_tiles * b_tiles))
            rest = index - block * (a_tiles * b_tiles)
            row, column = _walk(a_tiles, b_tiles, config.panel, rest)
            return block, row * bm, column * bn, jnp.maximum(count_ref[block], 1)

        def each_tile(run: Callable[..., None]) -> Array:
            """Runs `run(first step, block, row, column, tiles of rows)`; returns all steps."""

            def step(i: Array, done: Array) -> Array:
                block, row, column, count = where(i)
                run(done, block, row, column, count)
                return done + count * chunks

            return lax.fori_loop(0, _tiles_of_this(jnp.int32(tiles), sms), step, jnp.int32(0))

        @pl.when(wg < wgs)
        def _() -> None:
            plgpu.set_max_registers(232 if wgs == 2 else 240, action="increase")
            part = pl.ds(wg * WARPGROUP_ROWS, WARPGROUP_ROWS)

            def compute(done: Array, block: Array, row: Array, column: Array, count: Array) -> None:
                (acc,) = ring.multiply(
                    done,
                    count * chunks,
                    (WARPGROUP_ROWS, bn),
                    1,
                    lambda stage: [(a_s.at[stage, :, part].T, b_s.at[stage])],
                )
                # A block without rows went through some tile for the sake of its barriers.
                some = (count_ref[block] > 0).astype(jnp.float32)
                some = jnp.full((WARPGROUP_ROWS, CHUNK), some) > 0
                a_start = jnp.minimum(row, columns_of_a - bm) + wg * WARPGROUP_ROWS
                b_start = jnp.minimum(column, columns_of_b - bn)
                store = _Store(out_s.at[wg], buffers)
                for n in range(0, bn, CHUNK):
                    mine = True if columns_of_a % bm == 0 else a_start >= row
                    if columns_of_b % bn:
                        mine &= b_start + n >= column

                    def put(n: int = n) -> None:
                        value = jnp.where(some, acc[:, n : n + CHUNK], 0.0)
                        where_a, where_b = a_start, b_start + n
                        if side_by_side:
                            where_b += block * columns_of_b
                        else:
                            where_a += block * columns_of_a
                        store(value, out_ref.at[pl.ds(where_a, WARPGROUP_ROWS), _chunk(where_b)])

                    _when(mine, put)

            each_tile(compute)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == wgs)
        def _() -> None:
            plgpu.set_max_registers(40, action="decrease")

            def load(done: Array, block: Array, row: Array, column: Array, count: Array) -> None:
                a_start = jnp.minimum(row, columns_of_a - bm)
                b_start = jnp.minimum(column, columns_of_b - bn)

                @pl.loop(0, count)
                def _(j: Array) -> None:
                    entry = list_ref[block, j]
                    tile = lax.div(entry, jnp.int32(slots))
                    slot = entry - tile * slots
                    a_column = a_start + slot * columns_of_a if a_sliced else a_start
                    b_column = b_start + slot * columns_of_b if b_sliced else b_start
                    for k in range(chunks):
                        rows = pl.ds(tile * tile_rows + k * bk, bk)

                        def copy(stage: Array, barrier: Any, rows: Any = rows) -> None:
                            a_tile = a_ref.at[rows, pl.ds(a_column, bm)]
                            plgpu.copy_gmem_to_smem(a_tile, a_s.at[stage], barrier)
                            b_tile = b_ref.at[rows, pl.ds(b_column, bn)]
                            plgpu.copy_gmem_to_smem(b_tile, b_s.at[stage], barrier)

                        ring.fill(done + j * chunks + k, copy)

            ring.drain(each_tile(load))

    shape = num_blocks * columns_of_a, columns_of_b
    if side_by_side:
        shape = columns_of_a, num_blocks * columns_of_b
    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        scratch_types=[
            mosaic.matrix((config.stages, bk, bm), dtype),
            mosaic.matrix((config.stages, bk, bn), dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
            plgpu.Barrier(num_arrivals=wgs, num_barriers=config.stages),
            mosaic.matrix((wgs, buffers, WARPGROUP_ROWS, CHUNK), dtype),
        ],
        grid=(sms,),
        grid_names=mosaic.axes("sm"),
        num_threads=wgs + 1,
        thread_name=mosaic.axis("wg"),
        compiler_params=_COMPILER_PARAMS,
        kernel_name="routed_ffn_weight_gradient",
    )(*lists, a, b)
    if side_by_side:
        return jnp.moveaxis(out.reshape(columns_of_a, num_blocks, columns_of_b), 1, 0)
    return out.reshape(num_blocks, columns_of_a, columns_of_b)


class _Extra(NamedTuple):
    """Columns that low-rank factors and biases add to the depth of a product.

    Attributes:
      columns: The columns of each low-rank pair, by name.
      bias: The column of ones, if there are biases.
      width: Number of columns, padded to a stage.
    """

    columns: dict[str, slice]
    bias: int | None
    width: int


def _extra(p: Arrays, names: Sequence[str]) -> _Extra:
    columns, stop = {}, 0
    for name in names:
        if (a := p.get(f"lora_a_{name}")) is not None:
            columns[name] = slice(stop, stop + a.shape[-1])
            stop += a.shape[-1]
    bias = None
    if any(f"b_{name}" in p for name in names):
        bias, stop = stop, stop + 1
    return _Extra(columns, bias, pl.cdiv(stop, Config.block_k) * Config.block_k)


def _first_factor(p: Arrays, extra: _Extra) -> Array:
    """What x is multiplied by to give its extra columns, `[D, w]`."""
    width, dtype = p["x"].shape[1], p["x"].dtype
    factors = [p[f"lora_a_{name}"] for name in extra.columns]
    rest = extra.width - sum(factor.shape[1] for factor in factors)
    return jnp.concatenate([*factors, jnp.zeros((width, rest), dtype)], axis=1)


def _second_factor(p: Arrays, extra: _Extra, name: str) -> Array:
    """What the extra columns are multiplied by in one projection, `[G, w, Fb]`."""
    blocks, _, units = p["w_in"].shape
    parts, stop = [], 0

    def put(part: Array, start: int) -> None:
        nonlocal stop
        parts.extend([jnp.zeros((blocks, start - stop, units), part.dtype), part])
        stop = start + part.shape[1]

    if name in extra.columns:
        put(p[f"lora_b_{name}"], extra.columns[name].start)
    if extra.bias is not None and f"b_{name}" in p:
        put(p[f"b_{name}"][:, None], extra.bias)
    parts.append(jnp.zeros((blocks, extra.width - stop, units), p["x"].dtype))
    return jnp.concatenate(parts, axis=1)


def _product(a: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _out_factors(p: Arrays) -> tuple[Array, Array] | None:
    """The low-rank factors of the down projection, their rank padded to a stage."""
    if "lora_a_out" not in p:
        return None
    a, b = p["lora_a_out"], p["lora_b_out"]
    padding = (0, -a.shape[-1] % Config.block_k)
    return jnp.pad(a, ((0, 0), (0, 0), padding)), jnp.pad(b, (padding, (0, 0)))


def _extra_columns(p: Arrays, extra: _Extra, plan: Plan) -> Array | None:
    """The columns that follow those of x, `[R, w]`; None if there are none."""
    if not extra.width:
        return None
    columns = _product(p["x"], _first_factor(p, extra))
    if extra.bias is not None:
        columns += (jnp.arange(extra.width) == extra.bias).astype(columns.dtype)
    return plans.rows_of_tokens(columns.astype(p["x"].dtype), plan)


def _projections(p: Arrays) -> tuple[str, ...]:
    return ("in", "gate") if "w_gate" in p else ("in",)


def _config(
    kernel: str, dtype: Any, plan: Plan, columns: int, slots: int = 1, **kwargs: int
) -> Config:
    """Tile sizes of a product of all rows, with `columns` for each of `slots`."""
    most = plan.blocks.shape[1]
    block_m = plan.order.size // most
    expected = (plan.rank.size / block_m + most) / 2  # Half a tile of padding a group.
    return config_for(kernel, dtype, block_m, expected * slots, columns, **kwargs)


def _forward(
    activation: Activation, p: Arrays, block_index: Array, save: bool
) -> tuple[Array, tuple[Any, ...]]:
    x, names, (num_blocks, width, units) = p["x"], _projections(p), p["w_in"].shape
    plan = plans.make_plan(block_index, num_blocks)
    slots = plan.blocks.shape[0]
    ups = tuple(p[f"w_{name}"] for name in names)
    terms = [_Term(plans.rows_of_tokens(x, plan), ups, side_by_side=True)]
    extra = _extra(p, names)
    columns = _extra_columns(p, extra, plan)
    if columns is not None:
        terms.append(_Term(columns, tuple(_second_factor(p, extra, name) for name in names)))
    coefficients = plans.rows_of_choices(p["coefficients"], plan)
    config = _config("routed_ffn_up", x.dtype, plan, units, slots, products=len(names))
    inner, *hidden = routed_ffn_up(terms, coefficients, plan, activation, config, save=save)
    terms, ha = [_Term(inner, (p["w_out"],), slots)], None
    if (factors := _out_factors(p)) is not None:
        a, b = factors
        rank = b.shape[0]
        config = _config("routed_ffn_down", x.dtype, plan, rank)
        ha = routed_ffn_down([_Term(inner, (a,), slots)], plan, config, columns=rank)
        terms.append(_Term(ha, (b,)))
        ha = plans.tokens_of_rows(ha, plan) if save else None
    config = _config("routed_ffn_down", x.dtype, plan, width)
    ys = routed_ffn_down(terms, plan, config, columns=width)
    return plans.tokens_of_rows(ys, plan, p.get("b_out")), (plan, hidden, columns, ha)


def _backward(
    activation: Activation,
    wanted: frozenset[str],
    p: Arrays,
    plan: Plan,
    hidden: Sequence[Array],
    columns: Any,
    ha: Any,
    dy: Array,
) -> Arrays:
    """Gradients of the arrays named in `wanted`; nothing else is computed."""
    x, names, (num_blocks, width, units) = p["x"], _projections(p), p["w_in"].shape
    slots = plan.blocks.shape[0]
    extra, factors = _extra(p, names), _out_factors(p)

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
        grads["lora_b_out"] = _product(ha, dy, (0, 0))[: p["lora_b_out"].shape[0]]
    if not results | (wanted & {"w_out", "lora_a_out"}):
        return grads

    if factors is not None:
        dyb = _product(dy, factors[1], (1, 1)).astype(dy.dtype)
        dyb = plans.rows_of_tokens(dyb, plan)
    coefficients = plans.rows_of_choices(p["coefficients"], plan)

    @functools.cache
    def lists() -> tuple[Array, Array]:
        return plans.tiles_by_block(plan, num_blocks)

    def weight_gradient(
        a: Array, b: Array, columns_of_a: int, columns_of_b: int, side_by_side: bool = False
    ) -> Array:
        block_m = min(2 * WARPGROUP_ROWS, columns_of_a)
        tiles = num_blocks * pl.cdiv(columns_of_a, block_m)
        return routed_ffn_weight_gradient(
            a,
            b,
            lists(),
            slots,
            config_for("routed_ffn_weight_gradient", a.dtype, block_m, tiles, columns_of_b),
            columns_of_a=columns_of_a,
            columns_of_b=columns_of_b,
            side_by_side=side_by_side,
        )

    # The memory of `inner` is free again before the gradients of `hidden` are made.
    if "w_out" in wanted:
        inner = plans.inner_of_rows(activation, hidden, coefficients)
        grads["w_out"] = weight_gradient(inner, plans.rows_of_tokens(dy, plan), units, width)
        hidden, dy, grads = lax.optimization_barrier((hidden, dy, grads))
    if "lora_a_out" in wanted:
        parts = 2 if units % (2 * CHUNK) == 0 else 1
        found = []
        for part in range(parts):
            inner = plans.inner_of_rows(activation, hidden, coefficients, part, parts)
            found.append(weight_gradient(inner, dyb, units // parts, dyb.shape[1]))
            hidden, dy, found = lax.optimization_barrier((hidden, dy, found))
        rank = p["lora_a_out"].shape[-1]
        grads["lora_a_out"] = jnp.concatenate(found, axis=1)[..., :rank]
    if not results:
        return grads
    terms = [_Term(plans.rows_of_tokens(dy, plan), (p["w_out"],))]
    if factors is not None:
        terms.append(_Term(dyb, (factors[0],)))
    made = routed_ffn_down_backward(
        terms,
        hidden,
        coefficients,
        plan,
        activation,
        _config("routed_ffn_down_backward", x.dtype, plan, units, slots, buffers=2 * len(hidden)),
        wanted=frozenset(results),
    )
    if "coefficients" in wanted:
        grads["coefficients"] = plans.choices_of_rows(made["coefficients"], plan)
    if "hidden" not in made:
        return grads

    dh = dict(zip(names, made["hidden"], strict=True))
    for name in names:
        if wanted & {f"b_{name}", f"lora_b_{name}"}:
            d_second = weight_gradient(dh[name], columns, units, extra.width)
            if f"b_{name}" in wanted:
                grads[f"b_{name}"] = d_second[..., extra.bias]
            if f"lora_b_{name}" in wanted:
                grads[f"lora_b_{name}"] = d_second[..., extra.columns[name]].swapaxes(1, 2)
    if wanted & {"w_in", "w_gate"}:
        # Without the barrier, XLA would keep the rows of the forward pass instead.
        xs = plans.rows_of_tokens(lax.optimization_barrier(x), plan)
        for name in names:
            if f"w_{name}" in wanted:
                grads[f"w_{name}"] = weight_gradient(xs, dh[name], width, units, side_by_side=True)
    # Else XLA puts these gradients off, and the largest array lives on until then.
    dh, grads = lax.optimization_barrier((dh, grads))
    terms = [_Term(dh[name], (p[f"w_{name}"],), slots, side_by_side=True) for name in names]
    if extra.columns and wanted & {"x", "lora_a_in", "lora_a_gate"}:
        dhb = routed_ffn_down(
            [_Term(dh[name], (_second_factor(p, extra, name),), slots) for name in extra.columns],
            plan,
            _config("routed_ffn_down", x.dtype, plan, extra.width),
            columns=extra.width,
            transposed=True,
        )
        terms.append(_Term(dhb, (_first_factor(p, extra),)))
        if wanted & {"lora_a_in", "lora_a_gate"}:
            d_first = _product(x, plans.tokens_of_rows(dhb, plan), (0, 0))
            for name, where in extra.columns.items():
                if f"lora_a_{name}" in wanted:
                    grads[f"lora_a_{name}"] = d_first[:, where]
    if "x" in wanted:
        config = _config("routed_ffn_down", x.dtype, plan, width)
        dxs = routed_ffn_down(terms, plan, config, columns=width, transposed=True)
        grads["x"] = plans.tokens_of_rows(dxs, plan)
    return grads


def unfit(x: Float[Array, "T D"], weights: RoutedFFNWeights) -> str | None:
    """Why these kernels cannot take arguments of these sizes and types; None if they can."""
    width, units = weights.w_in.shape[1:]
    if reason := mosaic.unfit_dtype(x, weights.w_in):
        return reason
    if width % CHUNK or units % CHUNK:
        return (
            f"it takes multiples of {CHUNK} as the width of x and the units of a block, and got "
            f"{width} and {units}"
        )
    return None


# Keeps the rows' hidden pre-activations, `T * A * Fb`, for the backward pass.
routed_ffn_mosaic = differentiable(_forward, _backward)
