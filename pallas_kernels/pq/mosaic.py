"""Product quantization on Hopper GPUs, in Pallas' Mosaic GPU dialect.

A gather does not lower there, nor an argmin, so codewords meet vectors and each other on the tensor
core, and what is nearest or highest is found by elementwise comparisons of accumulators.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8, Int32, UInt8

from pallas_kernels import mosaic as m
from pallas_kernels import tuning
from pallas_kernels.pq import selection
from pallas_kernels.pq.reference import TILE_SCORES, bits_of_power, cut_weight
from pallas_kernels.pq.selection import WORD, row_width
from pallas_kernels.pq.xla import MAX_UNROLLED, encode_scalars

ROWS = m.WARPGROUP_ROWS
SMS = 132  # multiprocessors of an H100 or H200
SHARED_BYTES = 227_000  # of a thread block, beside barriers and what it writes
MAX_REGISTERS = {1: 240, 2: 232, 3: 152}  # of a computing thread, by their warpgroups
SLICE = 8  # columns of an accumulator that lie alike in every thread
COPY_BYTES = 16  # the least that a bulk copy moves of a row
MAX_ROW_WIDTH = 256  # elements of a token's row of codewords
KEY_GROUPS = (8, 16, 32, 64, 128)
SCORE_LIMIT = 2**13  # above the magnitude of any score of one query and one key
ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)

# (first item of the ring, f, state) -> (state, next item): folds f(state, item, block, whether to
# mask the block) over the blocks of columns.
Visit = Callable[[Any, Callable[..., Any], Any], Any]


@dataclass(frozen=True)
class EncodeConfig:
    """Tiles of `pq_encode`.

    Attributes:
      subspaces: Subspaces of a slab, the columns of x in one product: 1, 2, 4 or 8.
      slabs: Slabs of a block of columns, whose codewords stay in shared memory.
      slices: Accumulator slices of one product.
      chunks: Products that cover the codewords of a slab.
      warpgroups: Warpgroups that compute.
      stages: Tiles of x in shared memory for each of them.
      ctas: Thread blocks for a block of columns.
    """

    subspaces: int
    slabs: int
    slices: int
    chunks: int
    warpgroups: int
    stages: int
    ctas: int


def encode_config(tokens: int, spaces: int, num_codewords: int, width: int) -> EncodeConfig:
    """Tiles for x of `spaces` subspaces a token.

    Eight subspaces to a slab leave nothing to reduce across threads, but of the product only one
    part in eight is of use; with many codewords the reduction costs less than that.
    """
    most = max(1, (128 if num_codewords <= 32 else 16) // width)
    subspaces = max(p for p in (1, 2, 4, 8) if p <= most or p * width <= 16)
    while subspaces * width % 16:
        subspaces *= 2
    slices = -(-num_codewords * subspaces // SLICE)
    chunks = -(-slices // 16)
    slices = -(-slices // chunks)
    slab = subspaces * width
    slab_bytes = 2 * chunks * slices * SLICE * slab
    count = -(-spaces // subspaces)
    limit = max(1, min(128 // slab, 112 * 1024 // slab_bytes))
    slabs = max(
        n
        for n in range(1, limit + 1)
        if count % n == 0 and (n * subspaces % SLICE == 0 or n * subspaces < SLICE)
    )
    tiles = -(-tokens // ROWS)
    warpgroups = min(3, tiles) if slab * slabs <= 128 else 1
    ctas = min(max(1, SMS // (count // slabs)), -(-tiles // warpgroups))
    return EncodeConfig(subspaces, slabs, slices, chunks, warpgroups, 2, ctas)


def _encode_kernel(
    x_ref: Any,
    books_ref: Any,
    norms_ref: Any,
    codes_ref: Any,
    x_s: Any,
    books_s: Any,
    norms_s: Any,
    codes_s: Any,
    x_bar: Any,
    x_free: Any,
    books_bar: Any,
    *,
    config: EncodeConfig,
) -> None:
    """Codes of tiles of 64 tokens and one block of columns; see `encode`."""
    wgs, stages, spaces = config.warpgroups, config.stages, config.subspaces
    wg, block = m.axis_index("wg"), m.axis_index("block")
    copies, slab = codes_s.shape[1], x_s.shape[-1]
    tiles, step = x_ref.shape[0] // ROWS, config.ctas * wgs
    products, size = books_s.shape[0], books_s.shape[1]
    first = m.axis_index("cta") * wgs

    def tiles_of(wg: Any) -> Any:
        return lax.div(tiles - 1 - first - wg + step, jnp.int32(step))

    @pl.when(wg == wgs)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")

        @pl.loop(0, products)
        def _(i: Any) -> None:
            rows = pl.ds((block * products + i) * size, size)
            plgpu.copy_gmem_to_smem(books_ref.at[rows], books_s.at[i], books_bar)

        rows = pl.ds(block * norms_s.shape[0], norms_s.shape[0])
        plgpu.copy_gmem_to_smem(norms_ref.at[rows], norms_s, books_bar)

        def copy(i: Any, w: int) -> None:
            stage, row = lax.rem(i, jnp.int32(stages)), (first + w + i * step) * ROWS
            for s in range(config.slabs):
                column = (block * config.slabs + s) * slab
                where = pl.ds(row, ROWS), pl.ds(column, slab)
                bar = x_bar.at[w * stages + stage]
                plgpu.copy_gmem_to_smem(x_ref.at[where], x_s.at[w, stage, s], bar)

        def wait(i: Any, w: int) -> None:
            plgpu.barrier_wait(x_free.at[w * stages + lax.rem(i, jnp.int32(stages))])

        @pl.loop(0, tiles_of(0) + stages)
        def _(i: Any) -> None:
            for w in range(wgs):
                read = (i >= stages) & (i - stages < tiles_of(w))
                pl.when(read)(functools.partial(wait, i, w))
                pl.when(i < tiles_of(w))(functools.partial(copy, i, w))

    @pl.when(wg < wgs)
    def _() -> None:
        plgpu.set_max_registers(MAX_REGISTERS[wgs], action="increase")
        plgpu.barrier_wait(books_bar)
        shape, group_slabs = (ROWS, SLICE), min(config.slabs, SLICE // spaces)
        column = m.iota(shape, 1)
        space, part = column & (spaces - 1), lax.div(column, jnp.int32(spaces))

        def nearest(x: Any, s: Any) -> tuple[jax.Array, jax.Array]:
            """The least distance in every column, and the number of its slice."""

            def compare(chunk: Any, carry: Any) -> Any:
                best, index = carry
                which = s * config.chunks + chunk

                distance = m.dot(x, books_s.at[which].T)
                norm = plgpu.load(norms_s.at[which], layout=plgpu.Layout.WGMMA.reduce(0))
                distance = distance + m.columns(norm, distance.shape)
                for j in range(config.slices):
                    here = distance[:, j * SLICE : (j + 1) * SLICE]
                    index = jnp.where(here < best, chunk * config.slices + j, index)
                    best = jnp.minimum(here, best)
                return best, index

            best = plgpu.layout_cast(jnp.full(shape, jnp.inf, jnp.float32), plgpu.Layout.WGMMA)
            index = plgpu.layout_cast(jnp.zeros(shape, jnp.int32), plgpu.Layout.WGMMA)
            if config.chunks == 1:
                return compare(0, (best, index))
            return lax.fori_loop(0, config.chunks, compare, (best, index))

        def group_codes(x_tile: Any, group: Any) -> jax.Array:
            """Codes of the slabs that share a slice of the output."""
            out = plgpu.layout_cast(jnp.zeros(shape, jnp.int32), plgpu.Layout.WGMMA)
            for i in range(group_slabs):
                s = group * group_slabs + i
                best, index = nearest(x_tile.at[s], s)
                if spaces == SLICE:
                    return index
                index = index * (SLICE // spaces) + part
                for p in range(spaces):
                    mine = jnp.where(space == p, best, jnp.inf)
                    least = m.rows(mine.min(1), shape)
                    code = jnp.where((space == p) & (best == least), index, 256).min(1)
                    out = jnp.where(column == i * spaces + p, m.rows(code, shape), out)
            return out

        @pl.loop(0, tiles_of(wg))
        def _(i: Any) -> None:
            stage = lax.rem(i, jnp.int32(stages))
            slot = wg * stages + stage
            plgpu.barrier_wait(x_bar.at[slot])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            @pl.loop(0, config.slabs // group_slabs)
            def _(group: Any) -> None:
                copy, half = lax.div(group, jnp.int32(2)), lax.rem(group, jnp.int32(2))
                where = wg, copy, slice(None), pl.ds(half * SLICE, SLICE)
                codes_s[where] = group_codes(x_s.at[wg, stage], group).astype(jnp.uint8)

            plgpu.barrier_arrive(x_free.at[slot])
            plgpu.commit_smem()
            rows = pl.ds((first + wg + i * step) * ROWS, ROWS)
            for copy in range(copies):
                where = rows, pl.ds((block * copies + copy) * COPY_BYTES, COPY_BYTES)
                plgpu.copy_smem_to_gmem(codes_s.at[wg, copy], codes_ref.at[where])

        plgpu.wait_smem_to_gmem(0)


def encode_unfit(x: Float[Array, "B S N H"], codebooks: Float[Array, "K M E C"]) -> str | None:
    """Why `encode` cannot take the arguments; None if it can."""
    reason = m.unfit_dtype(x)
    if reason is not None:
        return reason
    (batch, length, heads, _), (_, spaces, num_codewords, width) = x.shape, codebooks.shape
    if width == 1 and num_codewords <= MAX_UNROLLED:
        return None
    if width % 2:
        return f"it takes codewords of even width, and got width {width}"
    config = encode_config(batch * length, heads * spaces, num_codewords, width)
    size = config.chunks * config.slices * SLICE
    tiles = config.warpgroups * config.stages * ROWS
    columns = config.slabs * config.subspaces * width
    needed = 2 * columns * (tiles + size) + 4 * config.slabs * size
    if needed > SHARED_BYTES:
        return (
            f"{num_codewords} codewords of width {width} and their vectors take {needed} bytes of "
            f"shared memory, of {SHARED_BYTES}"
        )
    return None


def _encode_operands(
    codebooks: Float[Array, "K M E C"], rows: int, config: EncodeConfig
) -> tuple[Float[Array, "R V"], Float[Array, "U n"]]:
    """Codewords as right sides of products with slabs of x, and their squared norms.

    Column c of slice j stands for subspace c % P of the slab and codeword j (8 / P) + c // P, with
    zeros on the columns of x of the other subspaces. Codewords are doubled, negated and, with their
    norms, scaled by a power of two into the middle of float16's range, which rounds nothing.
    """
    num_codewords, width = codebooks.shape[2:]
    spaces, slices = config.subspaces, config.slices * config.chunks
    books = jnp.repeat(codebooks.astype(jnp.float32), rows, 0).reshape(-1, num_codewords, width)
    block = spaces * config.slabs
    pad = -len(books) % block, slices * SLICE // spaces - num_codewords
    exponent = jnp.frexp(jnp.max(jnp.abs(books), (1, 2), keepdims=True))[1]
    scale = jnp.ldexp(jnp.float32(1), jnp.clip(12 - exponent, -100, 100))
    norms = jnp.sum(books**2, -1) * scale[..., 0]
    norms = jnp.pad(norms, ((0, pad[0]), (0, pad[1])), constant_values=jnp.inf)
    books = jnp.pad(-2 * scale * books, ((0, pad[0]), (0, pad[1]), (0, 0)))
    norms = norms.reshape(-1, spaces, slices, SLICE // spaces).transpose(0, 2, 3, 1)
    books = books.reshape(-1, spaces, slices, SLICE // spaces, width).transpose(0, 2, 3, 1, 4)
    books = books[..., None, :] * jnp.eye(spaces, dtype=jnp.float32)[:, :, None]
    books = books.reshape(-1, config.chunks, config.slices * SLICE, spaces * width)
    books = books.reshape(-1, spaces * width).astype(codebooks.dtype)
    return books, norms.reshape(-1, config.slices * SLICE)


def encode(
    x: Float[Array, "B S N H"],
    codebooks: Float[Array, "K M E C"],
    config: EncodeConfig | None = None,
) -> UInt8[Array, "B S N M"]:
    """As `pq_encode`; codewords have the type of x."""
    batch, length, heads, _ = x.shape
    kv_heads, spaces, num_codewords, width = codebooks.shape
    if width == 1:
        return encode_scalars(x, codebooks)
    dtype, tokens = x.dtype, batch * length
    if config is None:
        sizes = tokens, heads * spaces, num_codewords, width
        best = encode_config(*sizes)
        fewer = [replace(best, ctas=n) for n in (best.ctas // 2, best.ctas // 4) if n]
        config = tuning.choose("pq_encode", f"{dtype.name}, {sizes}", best, fewer)
    wgs, stages = config.warpgroups, config.stages
    books, norms = _encode_operands(codebooks, heads // kv_heads, config)
    size, norm_rows = config.slices * SLICE, config.slabs * config.chunks
    blocks = len(norms) // norm_rows
    used = config.slabs * config.subspaces
    columns, copies = used * width, -(-used // COPY_BYTES)
    pad = -tokens % ROWS, blocks * columns - heads * spaces * width
    flat = jnp.pad(x.reshape(tokens, -1), ((0, pad[0]), (0, pad[1])))
    products, slab = config.slabs * config.chunks, config.subspaces * width

    def body(*refs: Any) -> None:
        _encode_kernel(*refs, config=config)

    codes = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((len(flat), blocks * copies * COPY_BYTES), jnp.uint8),
        scratch_types=[
            m.matrix((wgs, stages, config.slabs, ROWS, slab), dtype),
            m.matrix((products, size, slab), dtype),
            plgpu.SMEM((norm_rows, size), jnp.float32),
            plgpu.SMEM((wgs, copies, ROWS, COPY_BYTES), jnp.uint8),
            plgpu.Barrier(num_arrivals=config.slabs, num_barriers=wgs * stages),
            plgpu.Barrier(num_barriers=wgs * stages),
            plgpu.Barrier(num_arrivals=products + 1),
        ],
        grid=(blocks, config.ctas),
        grid_names=m.axes("block", "cta"),
        num_threads=wgs + 1,
        thread_name=m.axis("wg"),
        kernel_name="pq_encode",
    )(flat, books, norms)
    codes = codes.reshape(-1, blocks, copies * COPY_BYTES)[:tokens, :, :used].reshape(tokens, -1)
    return codes[:, : heads * spaces].reshape(batch, length, heads, spaces)


def _produce(items: Any, stages: int, free: Any, copy: Callable[[Any, Any], None]) -> None:
    """Copies items into a ring of `stages`, and waits until all of them have been read.

    Args:
      items: Their number.
      stages: Slots of the ring.
      free: Barriers of the slots; None if there are slots for all items.
      copy: Copies an item into a slot.
    """

    @pl.loop(0, items if free is None else items + stages)
    def _(item: Any) -> None:
        slot = lax.rem(item, jnp.int32(stages))
        if free is not None:

            @pl.when(item >= stages)
            def _() -> None:
                plgpu.barrier_wait(free.at[slot])

        pl.when(item < items)(functools.partial(copy, item, slot))


@dataclass(frozen=True)
class TileScoresConfig:
    """Tiles of `pq_tile_scores`.

    Attributes:
      warpgroups: Warpgroups that compute, each for 64 queries.
      groups: Key groups of a thread block.
      stages: Blocks of keys in shared memory.
    """

    warpgroups: int
    groups: int
    stages: int


def tile_scores_config(queries: int, groups: int, width: int) -> TileScoresConfig:
    """Tiles for so many queries a head and key groups, and rows of `width`."""
    warpgroups = 2 if queries > ROWS and width <= 192 else 1
    groups = 32 if groups <= 32 else 64  # keys are padded to whole blocks of groups
    used = warpgroups * ROWS * (2 * width + 6 * groups)
    return TileScoresConfig(
        warpgroups, groups, min(6, (SHARED_BYTES - used) // (2 * groups * width))
    )


def _tile_scores_kernel(
    queries_ref: Any,
    first_ref: Any,
    keys_ref: Any,
    steps_ref: Any,
    *refs: Any,
    heads: int,
    kv_heads: int,
    length: int,
    key_group: int,
    causal: bool,
    config: TileScoresConfig,
) -> None:
    """Weights of a block of key groups for 64 queries a warpgroup; see `_tile_scores`.

    Product u scores the u-th key of every group, so the weight of a group is an elementwise sum.
    """
    *seen_refs, weights_ref, queries_s, keys_s, weights_s, seen_s = refs[:-4]
    queries_bar, seen_bar, keys_bar, free = refs[-4:]
    wgs, groups, stages = config.warpgroups, config.groups, config.stages
    width, wg = keys_s.shape[-1], m.axis_index("wg")
    sequence, head = m.axis_index("sequence"), m.axis_index("head")
    first_group = m.axis_index("groups") * groups
    first_row = m.axis_index("queries") * (wgs * ROWS)
    first_key = first_group * key_group
    position = first_ref[0]
    kv_head = lax.div(head, jnp.int32(heads // kv_heads))

    def end(row: Any) -> Any:
        """The first key that the query of a row does not see, by the order of positions alone."""
        return jnp.minimum(position + row + 1, length) if causal else length

    def products(last_row: Any) -> Any:
        return jnp.where(first_key < end(last_row), key_group, 0)

    steps = products(first_row + (wgs * ROWS - 1))

    @pl.when(wg == wgs)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")
        row = sequence * weights_ref.shape[1] + first_group

        def copy(u: Any, slot: Any) -> None:
            where = pl.ds(row, groups), pl.ds((u * kv_heads + kv_head) * width, width)
            plgpu.copy_gmem_to_smem(keys_ref.at[where], keys_s.at[slot], keys_bar.at[slot])

        _produce(steps, stages, free, copy)

    @pl.when(wg < wgs)
    def _() -> None:
        plgpu.set_max_registers(MAX_REGISTERS[wgs], action="increase")
        shape = ROWS, groups
        step = steps_ref[kv_head]
        own_row, rows = first_row + wg * ROWS, pl.num_programs(2) * (wgs * ROWS)
        row, columns = (sequence * heads + head) * rows + own_row, pl.ds(first_group, groups)
        source = queries_ref.at[pl.ds(row, ROWS)]
        plgpu.copy_gmem_to_smem(source, queries_s.at[wg], queries_bar.at[wg])
        plgpu.barrier_wait(queries_bar.at[wg])
        mine = products(own_row + (ROWS - 1))

        def power(u: Any) -> jax.Array:
            slot = lax.rem(u, jnp.int32(stages))
            plgpu.barrier_wait(keys_bar.at[slot])
            score = m.dot(queries_s.at[wg], keys_s.at[slot].T)
            plgpu.barrier_arrive(free.at[slot])
            return lax.bitcast_convert_type(bits_of_power(step, score), jnp.float32)

        total = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
        if seen_refs:
            (seen_ref,) = seen_refs
            words = seen_ref.shape[0] // -(-key_group // WORD)
            for first_bit in range(0, key_group, WORD):
                seen_row = first_bit // WORD * words + sequence * rows + own_row
                where = pl.ds(seen_row, ROWS), columns
                plgpu.copy_gmem_to_smem(seen_ref.at[where], seen_s.at[wg], seen_bar.at[wg])
                plgpu.barrier_wait(seen_bar.at[wg])
                word = plgpu.load(seen_s.at[wg], layout=plgpu.Layout.WGMMA)
                plgpu.commit_smem()

                def seen(u: Any, carry: Any) -> tuple[jax.Array, jax.Array]:
                    total, word = carry
                    total = total + jnp.where((word & 1) == 1, power(u), 0.0)
                    return total, lax.shift_right_logical(word, 1)

                lower, upper = (jnp.minimum(first_bit + n, mine) for n in (0, WORD))
                total = lax.fori_loop(lower, upper, seen, (total, word))[0]
        else:
            each_end = end(m.iota(shape, 0) + own_row)
            each_key = m.iota(shape, 1) * key_group + first_key

            def masked(u: Any, total: jax.Array) -> jax.Array:
                return total + jnp.where(each_key + u < each_end, power(u), 0.0)

            clear = jnp.where(first_key + groups * key_group <= end(own_row), mine, 0)
            total = lax.fori_loop(0, clear, lambda u, total: total + power(u), total)
            total = lax.fori_loop(clear, mine, masked, total)

        @pl.loop(mine, steps)
        def _(u: Any) -> None:
            slot = lax.rem(u, jnp.int32(stages))
            plgpu.barrier_wait(keys_bar.at[slot])
            plgpu.barrier_arrive(free.at[slot])

        weights_s[wg] = cut_weight(total).astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(weights_s.at[wg], weights_ref.at[pl.ds(row, ROWS), columns])
        plgpu.wait_smem_to_gmem(0)


def _tile_scores(
    queries: Float[Array, "B N U V"],
    first: Int32[Array, ""],
    keys: Float[Array, "B S K V"],
    steps: Float[Array, "K"],
    seen: Int32[Array, "words B U G"] | None,
    *,
    key_group: int,
    causal: bool,
    config: TileScoresConfig | None = None,
) -> Float[Array, "B N u g"]:
    """Sum of 2^x over the keys of every group for every query, padded to whole blocks of both.

    Keys that a query does not see add nothing. Sums are cut to bfloat16's bits.

    Args:
      queries: Codeword rows of the queries, bfloat16.
      first: Position of the first of them.
      keys: Codeword rows of the keys.
      steps: `exponent_step` of each key head.
      seen: Keys of a group that a query sees, a bit each in words; None where `causal` decides.
      key_group: Keys of a group.
      causal: Whether a query sees nothing after itself.
      config: Tile sizes.
    """
    batch, heads, rows, width = queries.shape
    length, kv_heads = keys.shape[1:3]
    if config is None:
        best = tile_scores_config(rows, -(-length // key_group), width)
        fewer = [replace(best, stages=n) for n in range(2, best.stages)]
        sizes = batch, heads, kv_heads, rows, length, width, key_group
        config = tuning.choose("pq_tile_scores", str(sizes), best, fewer)
    wgs, groups = config.warpgroups, config.groups
    row_blocks = -(-rows // (wgs * ROWS))
    group_blocks = -(-length // (key_group * groups))
    pad_rows, all_groups = row_blocks * wgs * ROWS - rows, group_blocks * groups
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, pad_rows), (0, 0)))
    keys = jnp.pad(keys, ((0, 0), (0, all_groups * key_group - length), (0, 0), (0, 0)))
    operands = [
        queries.reshape(-1, width),
        first.reshape(1),
        keys.reshape(batch * all_groups, key_group * kv_heads * width),
        steps,
    ]
    if seen is not None:
        pad = (0, pad_rows), (0, all_groups - seen.shape[-1])
        operands.append(jnp.pad(seen, ((0, 0), (0, 0), *pad)).reshape(-1, all_groups))

    def body(*refs: Any) -> None:
        _tile_scores_kernel(
            *refs,
            heads=heads,
            kv_heads=kv_heads,
            length=length,
            key_group=key_group,
            causal=causal,
            config=config,
        )

    dtype = jnp.bfloat16
    weights = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((len(operands[0]), all_groups), dtype),
        scratch_types=[
            m.matrix((wgs, ROWS, width), dtype),
            m.matrix((config.stages, groups, width), dtype),
            m.matrix((wgs, ROWS, groups), dtype),
            m.matrix((wgs, ROWS, groups), jnp.int32),
            plgpu.Barrier(num_barriers=wgs),
            plgpu.Barrier(num_barriers=wgs),
            plgpu.Barrier(num_barriers=config.stages),
            plgpu.Barrier(num_arrivals=wgs, num_barriers=config.stages),
        ],
        grid=(group_blocks, heads, row_blocks, batch),
        grid_names=m.axes("groups", "head", "queries", "sequence"),
        num_threads=wgs + 1,
        thread_name=m.axis("wg"),
        kernel_name="pq_tile_scores",
    )(*operands)
    return weights.reshape(batch, heads, -1, all_groups)


@dataclass(frozen=True)
class ThresholdConfig:
    """Tiles of `pq_tile_threshold` and `pq_token_threshold`.

    Attributes:
      warpgroups: Warpgroups that compute, each for 64 rows.
      columns: Columns of a block.
      stages: Blocks in shared memory; where all fit, they are copied once.
    """

    warpgroups: int
    columns: int
    stages: int


def tile_threshold_config(groups: int) -> ThresholdConfig:
    """Tiles for rows of so many groups, a multiple of 64."""
    columns = 128 if groups % 128 == 0 else 64
    return ThresholdConfig(1, columns, min(groups // columns, 768 // columns))


def token_threshold_config(length: int, width: int) -> ThresholdConfig:
    """Tiles for so many keys, and rows of `width`."""
    columns = 128 if length > 64 else 64
    warpgroups = min(2, -(-length // ROWS))
    room = (SHARED_BYTES - 2 * warpgroups * ROWS * width) // (columns * (2 * width + 4))
    return ThresholdConfig(warpgroups, columns, min(-(-length // columns), room))


def _passes(values: int) -> int:
    """Passes of `_highest` over an interval of so many integers."""
    return max(1, ((values - 1).bit_length() + 1) // 2)


def _highest(
    visit: Visit,
    value: Callable[..., jax.Array],
    low: float,
    passes: int,
    need: jax.Array,
    start: Any,
) -> tuple[jax.Array, jax.Array, Any]:
    """Where the count of values reaches `need`, for rows of integers in low + [0, 4 ** passes).

    Args:
      visit: Folds over the blocks.
      value: Makes a block of values, of an item, its block and whether to mask it.
      low: Least value.
      passes: Base-4 digits of the interval.
      need: Values that the level must reach, for each row.
      start: First item of the ring.

    Returns:
      The highest integer that at least `need` values reach, the number of values above it, and the
      next item of the ring.
    """

    def step(_: Any, carry: Any) -> Any:
        level, above, width, start = carry
        marks = [level + width * i for i in (1.0, 2.0, 3.0)]

        def count(found: Any, *block: Any) -> Any:
            values = value(*block)
            return tuple(
                f + jnp.where(values >= m.rows(mark, values.shape), 1.0, 0.0).sum(1)
                for f, mark in zip(found, marks, strict=True)
            )

        found, start = visit(start, count, (jnp.zeros_like(need),) * 3)
        for n in reversed(found):
            above = jnp.where(n < need, n, above)
        rise = sum(jnp.where(n >= need, width, 0.0) for n in found)
        return level + rise, above, width * 0.25, start

    first = jnp.full_like(need, low), jnp.zeros_like(need), jnp.float32(4.0 ** (passes - 1)), start
    level, above, _, start = lax.fori_loop(0, passes, step, first)
    return level, above, start


def _rows_search(
    visit: Visit,
    score: Callable[..., jax.Array],
    *,
    origin: jax.Array,
    number: jax.Array | None,
    count: int,
    low: int,
    values: int,
    columns: int,
    block: tuple[int, int],
) -> tuple[jax.Array, jax.Array]:
    """Thresholds and tie radii of the rows of blocks of scores.

    Args:
      visit: Folds over the blocks.
      score: Makes a block of scores, -inf where invalid.
      origin: Column from which each row measures distances.
      number: Valid columns of each row; None to count them.
      count: Columns that a row keeps, if it has so many.
      low: Least score.
      values: Number of possible scores.
      columns: Columns of a row.
      block: Rows and columns of a block.
    """
    start = jnp.int32(0)
    zero = jnp.zeros_like(origin)
    if number is None:

        def valid(found: Any, *args: Any) -> Any:
            return found + jnp.where(score(*args) > -jnp.inf, 1.0, 0.0).sum(1)

        number, start = visit(start, valid, zero)
    kept = jnp.minimum(number, float(count))
    level, above, start = _highest(visit, score, low, _passes(values), kept, start)
    at_level = m.rows(level, block)
    offset = m.rows(origin - 0.25, block)
    column = m.iota(block, 1).astype(jnp.float32)

    def nearness(item: Any, j: Any, masked: bool) -> jax.Array:
        away = jnp.abs(column + (j * block[1]).astype(jnp.float32) - offset)
        return jnp.where(score(item, j, masked) == at_level, 0.5 - 2.0 * away, -jnp.inf)

    passes = _passes(2 * columns)
    nearest = float(1 - 4**passes)
    radius, _, _ = _highest(visit, nearness, nearest, passes, kept - above, start)
    some = number > 0.0
    return jnp.where(some, level, zero), jnp.where(some, -radius, zero - 1.0)


def _visit(steps: Any, clear: Any, resident: bool) -> Visit:
    """Folds over blocks [0, steps), of which those from `clear` on need their masks."""

    def visit(start: Any, fold: Callable[..., Any], found: Any) -> Any:
        for lower, upper, masked in ((0, clear, False), (clear, steps, True)):

            def step(j: Any, found: Any, masked: bool = masked) -> Any:
                return fold(found, start + j, j, masked)

            found = lax.fori_loop(lower, upper, step, found)
        return found, start if resident else start + steps

    return visit


def _store_rows(out_s: Any, found: tuple[jax.Array, ...], out_refs: tuple[Any, ...]) -> None:
    """Writes a value of each row to every output."""
    for i, values in enumerate(found):
        out_s[i] = values.astype(jnp.int32)
    plgpu.commit_smem()
    for i, out_ref in enumerate(out_refs):
        plgpu.copy_smem_to_gmem(out_s.at[i], out_ref)
    plgpu.wait_smem_to_gmem(0)


def _tile_threshold_kernel(
    scores_ref: Any,
    origin_ref: Any,
    level_ref: Any,
    radius_ref: Any,
    scores_s: Any,
    origin_s: Any,
    out_s: Any,
    origin_bar: Any,
    bar: Any,
    free: Any,
    *,
    count: int,
    config: ThresholdConfig,
) -> None:
    """Thresholds of 64 tiles; see `_tile_thresholds`."""
    size, stages = config.columns, config.stages
    groups = scores_ref.shape[1]
    wg, first = m.axis_index("wg"), m.axis_index("rows") * ROWS
    row = m.axis_index("head") * (pl.num_programs(0) * ROWS) + first
    steps, resident = groups // size, groups // size <= stages
    passes = 1 + _passes(TILE_SCORES) + _passes(2 * groups)
    items = steps if resident else steps * passes

    @pl.when(wg == 1)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")

        def copy(item: Any, slot: Any) -> None:
            where = pl.ds(row, ROWS), pl.ds(lax.rem(item, jnp.int32(steps)) * size, size)
            plgpu.copy_gmem_to_smem(scores_ref.at[where], scores_s.at[slot], bar.at[slot])

        _produce(items, stages, None if resident else free, copy)

    @pl.when(wg == 0)
    def _() -> None:
        plgpu.set_max_registers(MAX_REGISTERS[1], action="increase")
        plgpu.copy_gmem_to_smem(origin_ref.at[pl.ds(first, ROWS)], origin_s, origin_bar)
        plgpu.barrier_wait(origin_bar)
        if resident:
            for j in range(steps):
                plgpu.barrier_wait(bar.at[j])

        def score(item: Any, j: Any, masked: bool) -> jax.Array:
            del j, masked
            slot = lax.rem(item, jnp.int32(stages))
            if resident:
                return plgpu.load(scores_s.at[slot], layout=plgpu.Layout.WGMMA)
            plgpu.barrier_wait(bar.at[slot])
            out = plgpu.load(scores_s.at[slot], layout=plgpu.Layout.WGMMA)
            plgpu.commit_smem()  # every thread has loaded
            plgpu.barrier_arrive(free.at[slot])
            return out

        found = _rows_search(
            _visit(jnp.int32(steps), jnp.int32(steps), resident),
            score,
            origin=plgpu.load(origin_s, layout=ROW_LAYOUT),
            number=None,
            count=count,
            low=0,
            values=TILE_SCORES,
            columns=groups,
            block=(ROWS, size),
        )
        where = pl.ds(row, ROWS)
        _store_rows(out_s, found, (level_ref.at[where], radius_ref.at[where]))


def _tile_thresholds(
    scores: Float[Array, "B N t g"],
    origin: Int32[Array, "t"],
    *,
    count: int,
    config: ThresholdConfig | None = None,
) -> tuple[Int32[Array, "B N t"], Int32[Array, "B N t"]]:
    """Lowest score and largest tie distance of the `count` groups that every tile keeps.

    A tile that sees no group has score 0 and distance -1. Distances are from the group `origin`.
    """
    pad = (0, 0), (0, 0), (0, -scores.shape[2] % ROWS), (0, -scores.shape[3] % 64)
    wanted = scores.shape[2]
    scores = jnp.pad(scores, pad, constant_values=-jnp.inf)
    batch, heads, tiles, groups = scores.shape
    config = config or tile_threshold_config(groups)

    origin = jnp.pad(origin, (0, tiles - wanted)).astype(jnp.float32)

    def body(*refs: Any) -> None:
        _tile_threshold_kernel(*refs, count=count, config=config)

    out = jax.ShapeDtypeStruct((batch * heads * tiles,), jnp.int32)
    found = plgpu.kernel(
        body,
        out_type=[out, out],
        scratch_types=[
            m.matrix((config.stages, ROWS, config.columns), jnp.float32),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.SMEM((2, ROWS), jnp.int32),
            plgpu.Barrier(),
            plgpu.Barrier(num_barriers=config.stages),
            plgpu.Barrier(num_barriers=config.stages),
        ],
        grid=(tiles // ROWS, batch * heads),
        grid_names=m.axes("rows", "head"),
        num_threads=2,
        thread_name=m.axis("wg"),
        kernel_name="pq_tile_threshold",
    )(scores.reshape(-1, groups), origin)
    level, radius = (a.reshape(batch, heads, tiles)[..., :wanted] for a in found)
    return level, radius


def _token_threshold_kernel(
    queries_ref: Any,
    keys_ref: Any,
    *refs: Any,
    count: int,
    length: int,
    causal: bool,
    config: ThresholdConfig,
) -> None:
    """Thresholds of 64 queries a warpgroup; see `_token_thresholds`."""
    *tags_refs, level_ref, radius_ref, queries_s, keys_s, tags_s, own_s, out_s = refs[:-3]
    queries_bar, bar, free = refs[-3:]
    wgs, size, stages = config.warpgroups, config.columns, config.stages
    width, wg = keys_s.shape[-1], m.axis_index("wg")
    sequence, head = m.axis_index("sequence"), m.axis_index("head")
    rows = pl.num_programs(0) * (wgs * ROWS)
    kv_heads, heads = keys_ref.shape[1] // width, queries_ref.shape[1] // width
    first = m.axis_index("rows") * (wgs * ROWS)
    blocks = -(-length // size)
    steps = jnp.int32(blocks)
    if causal:
        steps = jnp.minimum(steps, lax.div(first + (wgs * ROWS + size - 1), jnp.int32(size)))
    resident = blocks <= stages
    passes = len(tags_refs[:1]) + _passes(2 * SCORE_LIMIT) + _passes(2 * length)
    items = steps if resident else steps * passes

    @pl.when(wg == wgs)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")
        kv_head = lax.div(head, jnp.int32(heads // kv_heads))

        def copy(item: Any, slot: Any) -> None:
            key = lax.rem(item, steps) * size
            where = pl.ds(sequence * rows + key, size), pl.ds(kv_head * width, width)
            plgpu.copy_gmem_to_smem(keys_ref.at[where], keys_s.at[slot], bar.at[slot])
            if tags_refs:
                tags = tags_refs[1].at[pl.ds(sequence * rows + key, size)]
                plgpu.copy_gmem_to_smem(tags, tags_s.at[slot], bar.at[slot])

        _produce(items, stages, None if resident else free, copy)

    @pl.when(wg < wgs)
    def _() -> None:
        plgpu.set_max_registers(MAX_REGISTERS[wgs], action="increase")
        block, mine = (ROWS, size), first + wg * ROWS
        where = pl.ds(sequence * rows + mine, ROWS), pl.ds(head * width, width)
        plgpu.copy_gmem_to_smem(queries_ref.at[where], queries_s.at[wg], queries_bar.at[wg])
        if tags_refs:
            tags = tags_refs[0].at[pl.ds(sequence * rows + mine, ROWS)]
            plgpu.copy_gmem_to_smem(tags, own_s.at[wg], queries_bar.at[wg])
        plgpu.barrier_wait(queries_bar.at[wg])
        if resident:

            @pl.loop(0, steps)
            def _(j: Any) -> None:
                plgpu.barrier_wait(bar.at[j])

        position = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW_LAYOUT) + mine
        if tags_refs:
            own = m.rows(plgpu.load(own_s.at[wg], layout=ROW_LAYOUT), block)

        def score(item: Any, j: Any, masked: bool) -> jax.Array:
            slot = lax.rem(item, jnp.int32(stages))
            if not resident:
                plgpu.barrier_wait(bar.at[slot])
            out = m.dot(queries_s.at[wg], keys_s.at[slot].T)
            if tags_refs:
                tags = plgpu.load(tags_s.at[slot], layout=plgpu.Layout.WGMMA.reduce(0))
                out = jnp.where(m.columns(tags, block) == own, out, -jnp.inf)
            if not resident:
                if tags_refs:
                    plgpu.commit_smem()  # every thread has loaded its tags
                plgpu.barrier_arrive(free.at[slot])
            if masked:
                last = (position - j * size).astype(jnp.float32)
                later = m.iota(block, 1).astype(jnp.float32) > m.rows(last, block)
                out = jnp.where(later, -jnp.inf, out)
            return out

        number = None
        if not tags_refs:
            number = (
                jnp.minimum(position + 1, length) if causal else jnp.full_like(position, length)
            )
            number = number.astype(jnp.float32)
        clear = jnp.minimum(lax.div(mine + 1, jnp.int32(size)), steps) if causal else steps
        found = _rows_search(
            _visit(steps, clear, resident),
            score,
            origin=position.astype(jnp.float32),
            number=number,
            count=count,
            low=-SCORE_LIMIT,
            values=2 * SCORE_LIMIT,
            columns=length,
            block=block,
        )
        here = sequence, head, pl.ds(mine, ROWS)
        _store_rows(out_s.at[wg], found, (level_ref.at[here], radius_ref.at[here]))


def _token_thresholds(
    queries: Float[Array, "B S N V"],
    keys: Float[Array, "B S K V"],
    tags: tuple[Int32[Array, "B S"], Int32[Array, "B S"]] | None,
    *,
    count: int,
    causal: bool,
    config: ThresholdConfig | None = None,
) -> tuple[Int32[Array, "B N S"], Int32[Array, "B N S"]]:
    """Threshold and tie radius of every query.

    Args:
      queries: Codeword rows of the queries.
      keys: Codeword rows of the keys.
      tags: Numbers of queries and of keys; a key is valid where they agree. None if all do.
      count: Keys that a query keeps, if it has so many.
      causal: Whether a query sees only itself and earlier keys.
      config: Tile sizes.
    """
    batch, length, heads, width = queries.shape
    if config is None:
        best = token_threshold_config(length, width)
        fewer = [replace(best, stages=n) for n in range(2, best.stages)]
        sizes = batch, heads, keys.shape[2], length, width
        config = tuning.choose("pq_token_threshold", str(sizes), best, fewer)
    wgs, size, stages = config.warpgroups, config.columns, config.stages
    padded = -(-length // max(wgs * ROWS, size)) * max(wgs * ROWS, size)
    pad = (0, 0), (0, padded - length)
    if tags is None and not causal and padded > length:
        tags = (jnp.zeros((batch, length), jnp.int32),) * 2
    operands = [
        jnp.pad(a, (*pad, (0, 0), (0, 0))).reshape(batch * padded, -1) for a in (queries, keys)
    ]
    if tags is not None:
        outside = tags[0].max(1, keepdims=True) + 1
        filler = jnp.broadcast_to(outside, (batch, padded - length))
        operands.append(jnp.pad(tags[0], pad).reshape(-1))
        operands.append(jnp.concatenate([tags[1], filler], 1).reshape(-1))

    def body(*refs: Any) -> None:
        _token_threshold_kernel(*refs, count=count, length=length, causal=causal, config=config)

    out = jax.ShapeDtypeStruct((batch, heads, padded), jnp.int32)
    copies = 1 if tags is None else 2
    level, radius = plgpu.kernel(
        body,
        out_type=[out, out],
        scratch_types=[
            m.matrix((wgs, ROWS, width), queries.dtype),
            m.matrix((stages, size, width), keys.dtype),
            plgpu.SMEM((stages, size), jnp.int32),
            plgpu.SMEM((wgs, ROWS), jnp.int32),
            plgpu.SMEM((wgs, 2, ROWS), jnp.int32),
            plgpu.Barrier(num_arrivals=copies, num_barriers=wgs),
            plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
        ],
        grid=(padded // (wgs * ROWS), heads, batch),
        grid_names=m.axes("rows", "head", "sequence"),
        num_threads=wgs + 1,
        thread_name=m.axis("wg"),
        kernel_name="pq_token_threshold",
    )(*operands)
    return level[..., :length], radius[..., :length]


def select_unfit(codewords: Int8[Array, "K M E W"], granularity: str, key_group: int) -> str | None:
    """Why `select` cannot take the arguments; None if it can."""
    width = row_width(codewords)
    if width > MAX_ROW_WIDTH:
        return (
            f"it takes rows of at most {MAX_ROW_WIDTH} codeword elements a token, and got {width}"
        )
    if granularity == "tile" and key_group not in KEY_GROUPS:
        return f"it takes key groups of {', '.join(map(str, KEY_GROUPS))} keys, and got {key_group}"
    return None


#: As `pq_select`.
select = functools.partial(
    selection.select,
    selection.Kernels(
        dtype=jnp.bfloat16,
        tile_scores=_tile_scores,
        tile_thresholds=_tile_thresholds,
        token_thresholds=_token_thresholds,
    ),
)
