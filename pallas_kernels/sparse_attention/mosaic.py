"""Sparse attention on Hopper GPUs: flash attention over listed key groups, or masked by codes.

A warpgroup owns 64 queries (64 keys where it makes the gradients of keys and values) and a memory
warpgroup feeds two of them through rings of buffers. With `tile`, a step gathers the key groups
that come next in the tile's list, so that small groups fill whole tensor-core tiles; with `token`,
it takes the next keys in order and computes their scores again from the codewords. Gradients of
keys and values walk transposed lists: nothing is added with atomics, and results repeat exactly.

Inside, matrices are `[B S, N H]`: the heads of a position side by side, S padded to whole tiles.
Where heads share a list, the queries of a tile are those of the first head at all its positions,
then those of the second, and so on.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import mosaic, tuning
from pallas_kernels.pq.selection import codeword_rows, row_width
from pallas_kernels.pq.types import Selection, TileSelection, TokenSelection

ROWS = mosaic.WARPGROUP_ROWS
WARPGROUPS = 2  # that compute, of a grid cell
CELL = WARPGROUPS * ROWS
BITS = 8  # groups of 64 keys, at most
LEAST_RUN = 8  # rows that a copy into shared memory takes together
HIDDEN = -(2**31)  # tag of a key that no query may see
SHARED_BYTES = 227 * 1024  # a block's share of a Hopper multiprocessor
GROUPS = (8, 16, 32, 64, 128)
WIDTHS = (32, 64, 80, 96, 128)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tile sizes.

    Attributes:
      block_k: Keys of a step of the forward kernel, 64 or 128.
      stages: Steps in flight, forward.
      stages_dq: Steps in flight in the kernel of the queries' gradient.
      stages_dkv: Steps in flight in the kernel of the keys' and values' gradients.
    """

    block_k: int = 64
    stages: int = 2
    stages_dq: int = 2
    stages_dkv: int = 2

    def __post_init__(self) -> None:
        if self.block_k not in (64, 128):
            raise ValueError(f"block_k must be 64 or 128, got {self.block_k}")
        if min(self.stages, self.stages_dq, self.stages_dkv) < 1:
            raise ValueError(f"stages must be at least 1, got {self}")


class Problem(NamedTuple):
    """What is known when tracing.

    Attributes:
      batch: B.
      length: Positions.
      padded: Positions, padded to whole tiles.
      heads: Query heads N.
      kv_heads: Key heads K.
      fold: Query heads that share a list.
      width: H.
      block_q: Queries that share a list; those of a grid cell with `token`.
      group: Keys of a group; those of a step with `token`.
      code_width: Width of a codeword row with `token`, 0 with `tile`.
      scale: Factor on the inner products.
      causal: Whether a query sees only itself and earlier keys.
      tagged: Whether keys are hidden by a mask or by segments.
      dtype: Type of queries, keys and values.
      config: Tile sizes.
    """

    batch: int
    length: int
    padded: int
    heads: int
    kv_heads: int
    fold: int
    width: int
    block_q: int
    group: int
    code_width: int
    scale: float
    causal: bool
    tagged: bool
    dtype: Any
    config: Config

    @property
    def token(self) -> bool:
        """Whether every query has keys of its own."""
        return self.code_width > 0

    @property
    def streams(self) -> int:
        """Rings of keys and values in a grid cell: one, or one for each warpgroup."""
        return 1 if self.block_q % (CELL) == 0 else WARPGROUPS

    @property
    def lists(self) -> int:
        """Lists at a position."""
        return self.heads // self.fold

    @property
    def lists_per_key_head(self) -> int:
        """Lists at a position that one key head serves."""
        return self.lists // self.kv_heads

    @property
    def queries(self) -> int:
        """Queries of the heads of a list, at all positions, padded to whole tiles."""
        return self.padded * self.fold

    @property
    def tile_positions(self) -> int:
        """Positions of a tile."""
        return self.block_q // self.fold

    @property
    def tiles(self) -> int:
        """Tiles along the positions."""
        return self.padded // self.tile_positions

    @property
    def run(self) -> int:
        """Queries, of 64, at consecutive positions of one head."""
        return math.gcd(ROWS, self.tile_positions)

    def position(self, start: jax.Array, query: jax.Array) -> jax.Array:
        """Positions of queries, numbered within the 64 from `start` on."""
        if self.fold == 1:
            return start + query
        tile = lax.div(start, jnp.int32(self.block_q))
        within = query + (start - tile * self.block_q)
        return tile * self.tile_positions + lax.rem(within, jnp.int32(self.tile_positions))


class Tags(NamedTuple):
    """Who sees whom: a query sees the keys that have its own tag. `[B S]` int32."""

    queries: jax.Array
    keys: jax.Array


class Lists(NamedTuple):
    """Key groups of the tiles; T is N, or K where the heads of a key head share lists.

    Attributes:
      groups: `[B, T, Q, P]` int32, group indices.
      counts: `[B, T, Q]` int32, groups in each list.
      clear: `[B, T, Q]` int32, leading groups of which every query of the tile sees every key.
    """

    groups: jax.Array
    counts: jax.Array
    clear: jax.Array


class Codes(NamedTuple):
    """What decides which keys a query keeps.

    Attributes:
      queries: `[B S, N W]`, codeword rows, integers in the type of the queries.
      keys: `[B S, K W]`.
      threshold: `[B N, S]` float32, lowest score kept; infinite for a query without keys.
      radius: `[B N, S]` int32, largest tie distance kept at that score.
    """

    queries: jax.Array
    keys: jax.Array
    threshold: jax.Array
    radius: jax.Array


def shared_bytes(problem: Problem) -> int:
    """Shared memory of the largest kernel."""
    config = problem.config
    matrix, codes = 2 * problem.width, 2 * problem.code_width
    keys, queries = 2 * matrix + codes + 4, 2 * matrix + codes + 20
    streams = 1 if problem.token else WARPGROUPS
    return 1024 + max(
        CELL * queries + problem.streams * config.stages * config.block_k * keys,
        CELL * queries + problem.streams * config.stages_dq * ROWS * keys,
        CELL * keys + streams * config.stages_dkv * ROWS * queries,
    )


def configs_for(problem: Problem) -> list[Config]:
    """Tile sizes that fit a problem, the likely fastest first.

    Steps of 128 keys where one ring serves both warpgroups of a list, and as many steps in flight
    as there is shared memory for, up to 4.
    """
    shared = problem.streams == 1 and not problem.token
    configs = [
        Config(block_k=block_k, stages=stages, stages_dq=stages, stages_dkv=stages)
        for block_k in ((128, 64) if shared else (64,))
        for stages in (4, 3, 2, 1)
    ]
    return [
        config
        for config in configs
        if shared_bytes(problem._replace(config=config)) <= SHARED_BYTES
    ]


def unfit(q: jax.Array, k: jax.Array, v: jax.Array, selection: Selection) -> str | None:
    """Why these kernels cannot take the arguments; None if they can."""
    reason = mosaic.unfit_dtype(q, k, v)
    if reason is not None:
        return reason
    if q.shape[3] not in WIDTHS:
        return f"it takes heads of width {', '.join(map(str, WIDTHS))}, and got {q.shape[3]}"
    if isinstance(selection, TileSelection):
        if selection.key_group not in GROUPS:
            return (
                f"it takes key groups of {', '.join(map(str, GROUPS))}, and got "
                f"{selection.key_group}"
            )
        queries = selection.block_q * selection.heads
        if queries % ROWS:
            return f"it takes tiles of a multiple of {ROWS} queries, and got {queries}"
        if selection.block_q % LEAST_RUN:
            return (
                f"it takes tiles of a multiple of {LEAST_RUN} positions, and got "
                f"{selection.block_q}"
            )
        return None
    if q.shape[1] > 2**16:
        return f"with token selection it takes up to {2**16} positions, and got {q.shape[1]}"
    problem = _problem(q, k, selection, scale=1.0, causal=False, tagged=True)
    if not configs_for(problem):
        return (
            f"codewords of {problem.code_width} numbers a head beside heads of width {q.shape[3]} "
            f"need more than the {SHARED_BYTES} bytes of shared memory"
        )
    return None


def _problem(
    q: jax.Array, k: jax.Array, selection: Selection, scale: float, causal: bool, tagged: bool
) -> Problem:
    batch, length, heads, width = q.shape
    positions, fold = CELL, 1
    if isinstance(selection, TileSelection):
        positions, fold = selection.block_q, selection.heads
        group, code_width = min(ROWS, selection.key_group), 0
    else:
        group, code_width = ROWS, row_width(selection.query_codewords)
    whole = math.lcm(CELL, positions)
    return Problem(
        batch=batch,
        length=length,
        padded=-(-length // whole) * whole,
        heads=heads,
        kv_heads=k.shape[2],
        fold=fold,
        width=width,
        block_q=positions * fold,
        group=group,
        code_width=code_width,
        scale=scale,
        causal=causal,
        tagged=tagged,
        dtype=q.dtype,
        config=Config(),
    )


def _tuned(problem: Problem) -> Problem:
    """The problem with its tile sizes."""
    best, *others = configs_for(problem)
    shapes = ", ".join(f"{k}={v}" for k, v in problem._asdict().items() if k != "config")
    return problem._replace(config=tuning.choose("sparse_attention", shapes, best, others))


# Kernels: what they share


class Given(NamedTuple):
    """Inputs of a kernel, in global memory.

    Attributes:
      q: `[B S, N H]`.
      k: `[B S, K H]`.
      v: `[B S, K H]`.
      kept: Which keys the queries keep.
      tags: Who sees whom; None where nothing but causality hides keys.
      dout: Gradient of the output, `[B S, N H]`; None forward, like what follows.
      lse: Base-2 logarithm of the sum of the exponentials of a query, `[B N, S]`.
      delta: Inner product of output and gradient, `[B N, S]`.
    """

    q: Any
    k: Any
    v: Any
    kept: Any
    tags: Tags | None
    dout: Any = None
    lse: Any = None
    delta: Any = None


class Buffers(NamedTuple):
    """Rows of one side, queries or keys, in shared memory; leading axis warpgroups or steps.

    Attributes:
      first: q or k.
      second: dout or v; None for the queries of the forward kernel.
      codes: Codeword rows; None with `tile`.
      vectors: int32 and float32 vectors: tags, threshold, radius, lse, delta, as far as needed.
    """

    first: Any
    second: Any
    codes: Any
    vectors: dict[str, Any]

    @property
    def copies(self) -> int:
        """Copies that fill the buffers of one step, were they not gathered."""
        return 1 + (self.second is not None) + (self.codes is not None) + len(self.vectors)

    def at(self, index: Any) -> Buffers:
        """The buffers of one warpgroup or step."""
        return jax.tree.map(lambda ref: ref.at[index], self, is_leaf=_is_ref)


class Scratch(NamedTuple):
    """Shared memory and barriers of a kernel.

    Attributes:
      own: Rows that stay.
      ready: Barriers of `own`.
      ring: Rows that pass.
      full: Barriers at which the copies into a buffer of the ring arrive.
      free: Barriers at which the warpgroups arrive that are done with a buffer.
    """

    own: Buffers
    ready: Any
    ring: Buffers
    full: Any
    free: Any


def _is_ref(x: Any) -> bool:
    return hasattr(x, "at") and not isinstance(x, Buffers)


def _buffers(
    problem: Problem, number: int, rows: int, second: bool, vectors: dict[str, Any]
) -> Buffers:
    """Shared memory for `number` times `rows` rows."""
    matrix = functools.partial(mosaic.matrix, dtype=problem.dtype)
    shape = number, rows
    return Buffers(
        first=matrix((*shape, problem.width)),
        second=matrix((*shape, problem.width)) if second else None,
        codes=matrix((*shape, problem.code_width)) if problem.token else None,
        vectors={name: plgpu.SMEM(shape, dtype) for name, dtype in vectors.items()},
    )


def _vectors(problem: Problem, side: str, backward: bool) -> dict[str, Any]:
    """Types of the vectors that a kernel needs of the queries or the keys."""
    vectors: dict[str, Any] = {"tags": jnp.int32} if problem.tagged else {}
    if side == "queries":
        if problem.token:
            vectors |= {"threshold": jnp.float32, "radius": jnp.int32}
        if backward:
            vectors |= {"lse": jnp.float32, "delta": jnp.float32}
    return vectors


def _runs(
    problem: Problem, head: jax.Array, start: jax.Array
) -> list[tuple[int, jax.Array, jax.Array]]:
    """First row, head and position of each run of queries at consecutive positions of one head.

    Args:
      problem: The problem.
      head: The list's at a position.
      start: First of 64 queries that the lists of `head` serve.
    """
    if problem.fold == 1:
        return [(0, head, start)]
    tile = lax.div(start, jnp.int32(problem.block_q))
    runs = []
    for first in range(0, ROWS, problem.run):
        within = start - tile * problem.block_q + first
        positions = jnp.int32(problem.tile_positions)
        own = head * problem.fold + lax.div(within, positions)
        runs.append((first, own, tile * problem.tile_positions + lax.rem(within, positions)))
    return runs


def _copy_queries(
    problem: Problem,
    given: Given,
    batch: jax.Array,
    head: jax.Array,
    start: jax.Array,
    target: Buffers,
    barrier: Any,
) -> None:
    """Starts the copies of the 64 queries of a list from `start` on."""
    for first, own, position in _runs(problem, head, start):
        source = _query_rows(problem, given, batch, own, position, problem.run)
        _copy(source, target.at(pl.ds(first, problem.run)), barrier)


def _query_rows(
    problem: Problem, given: Given, batch: jax.Array, head: jax.Array, start: jax.Array, number: int
) -> Buffers:
    """Where rows of the queries' side lie in global memory, of one head at some positions."""
    rows, positions = pl.ds(batch * problem.padded + start, number), pl.ds(start, number)
    line = batch * problem.heads + head
    vectors = {}
    if given.tags is not None:
        vectors["tags"] = given.tags.queries.at[rows]
    if problem.token:
        vectors["threshold"] = given.kept.threshold.at[line, positions]
        vectors["radius"] = given.kept.radius.at[line, positions]
    if given.dout is not None:
        vectors["lse"] = given.lse.at[line, positions]
        vectors["delta"] = given.delta.at[line, positions]
    columns = pl.ds(head * problem.width, problem.width)
    return Buffers(
        first=given.q.at[rows, columns],
        second=None if given.dout is None else given.dout.at[rows, columns],
        codes=given.kept.queries.at[rows, pl.ds(head * problem.code_width, problem.code_width)]
        if problem.token
        else None,
        vectors=vectors,
    )


def _key_rows(
    problem: Problem, given: Given, batch: jax.Array, head: jax.Array, start: jax.Array, number: int
) -> Buffers:
    """Where rows of the keys' side lie in global memory; `head` is that of a list."""
    kv_head = lax.div(head, jnp.int32(problem.lists_per_key_head))
    rows = pl.ds(batch * problem.padded + start, number)
    columns = pl.ds(kv_head * problem.width, problem.width)
    return Buffers(
        first=given.k.at[rows, columns],
        second=given.v.at[rows, columns],
        codes=given.kept.keys.at[rows, pl.ds(kv_head * problem.code_width, problem.code_width)]
        if problem.token
        else None,
        vectors={} if given.tags is None else {"tags": given.tags.keys.at[rows]},
    )


def _copy(source: Buffers, target: Buffers, barrier: Any) -> None:
    """Starts copies into shared memory, each of which arrives at the barrier."""
    for a, b in zip(
        jax.tree.leaves(source, is_leaf=_is_ref),
        jax.tree.leaves(target, is_leaf=_is_ref),
        strict=True,
    ):
        plgpu.copy_gmem_to_smem(a, b, barrier)


def _row_vector(ref: Any, shape: tuple[int, int]) -> jax.Array:
    return mosaic.rows(plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1)), shape)


def _column_vector(ref: Any, shape: tuple[int, int]) -> jax.Array:
    return mosaic.columns(plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0)), shape)


def _keeps(
    score: jax.Array, threshold: jax.Array, radius: jax.Array, query: jax.Array, key: jax.Array
) -> jax.Array:
    """Whether queries keep keys: above the threshold, or at it and within the tie radius."""
    doubled = 2 * key - 2 * query
    near = (doubled <= radius) & (doubled >= -1 - radius)
    return (score > threshold) | ((score == threshold) & near)


# Kernels over the keys of a query: forward, and the gradient of the queries


class Walk(NamedTuple):
    """The key groups that a warpgroup walks over, `block_k` keys a step.

    Attributes:
      problem: The problem.
      given: The inputs.
      block_k: Keys of a step.
      batch: The sequence.
      head: The list at a position: a query head, or those that share it.
      start: First of the warpgroup's 64 queries, of those that the lists serve.
      tile: The list of those queries.
      entries: Groups in it.
    """

    problem: Problem
    given: Given
    block_k: int
    batch: jax.Array
    head: jax.Array
    start: jax.Array
    tile: jax.Array
    entries: jax.Array

    @classmethod
    def of(cls, problem: Problem, given: Given, block_k: int, warpgroup: Any) -> Walk:
        """The walk of a warpgroup of this grid cell."""
        batch, head = mosaic.axis_index("batch"), mosaic.axis_index("head")
        cell = mosaic.axis_index("cell")
        if problem.causal:  # those with the most keys first
            cell = problem.queries // CELL - 1 - cell
        start = cell * CELL + warpgroup * ROWS
        tile = lax.div(start, jnp.int32(problem.block_q))
        if not problem.token:
            entries = given.kept.counts[batch, head, tile]
        elif problem.causal:
            entries = (cell + 1) * (CELL // problem.group)
        else:
            entries = jnp.int32(problem.padded // problem.group)
        return cls(problem, given, block_k, batch, head, start, tile, entries)

    @property
    def per_step(self) -> int:
        """Groups of a step."""
        return self.block_k // self.problem.group

    @property
    def steps(self) -> jax.Array:
        """Steps until the list ends."""
        return lax.div(self.entries + (self.per_step - 1), jnp.int32(self.per_step))

    @property
    def clear_steps(self) -> jax.Array:
        """Leading steps of which every query sees every key."""
        if not self.problem.token:
            clear = self.given.kept.clear[self.batch, self.head, self.tile]
            return lax.div(clear, jnp.int32(self.per_step))
        if self.problem.tagged:
            return jnp.int32(0)
        clear = jnp.int32(self.problem.length // self.block_k)
        if self.problem.causal:
            clear = jnp.minimum(clear, lax.div(self.start, jnp.int32(self.block_k)))
        return clear

    def group(self, entry: jax.Array) -> jax.Array:
        """The group at an entry of the list; past its end, its last one."""
        if self.problem.token:
            return entry
        entry = jnp.minimum(entry, self.entries - 1)
        return self.given.kept.groups[self.batch, self.head, self.tile, entry]

    def feed(self, scratch: Scratch, slot: jax.Array, step: jax.Array) -> None:
        """Starts the copies of a step's keys and values."""
        size = self.problem.group
        for i in range(self.per_step):
            start = self.group(step * self.per_step + i) * size
            source = _key_rows(self.problem, self.given, self.batch, self.head, start, size)
            target = scratch.ring.at((slot, pl.ds(i * size, size)))
            _copy(source, target, scratch.full.at[slot])

    def kept(self, step: jax.Array, own: Buffers, ring: Buffers, clear: bool) -> jax.Array | None:
        """Which keys of a step the queries keep, `[64, block_k]`; None for all of them."""
        problem, shape = self.problem, (ROWS, self.block_k)
        if clear and not problem.token:
            return None
        column = mosaic.iota(shape, 1)
        query = problem.position(self.start, mosaic.iota(shape, 0))
        size = problem.group
        key = self.group(step * self.per_step) * size + column
        for i in range(1, self.per_step):
            here = self.group(step * self.per_step + i) * size + (column - i * size)
            key = jnp.where(column >= i * size, here, key)
        kept = None
        if problem.token:
            score = mosaic.dot(own.codes, ring.codes.T)
            threshold = _row_vector(own.vectors["threshold"], shape)
            radius = _row_vector(own.vectors["radius"], shape)
            kept = _keeps(score, threshold, radius, query, key)
        if clear:
            return kept
        seen = key < problem.length
        if not problem.token:
            seen = seen & (column < (self.entries - step * self.per_step) * size)
        if problem.causal:
            seen = seen & (key <= query)
        if problem.tagged:
            tags = _column_vector(ring.vectors["tags"], shape)
            seen = seen & (tags == _row_vector(own.vectors["tags"], shape))
        return seen if kept is None else kept & seen

    def target(self, ref: Any, head: jax.Array, position: jax.Array) -> Any:
        """Where a run of queries lies in `[B S, N H]`."""
        width = self.problem.width
        rows = pl.ds(self.batch * self.problem.padded + position, self.problem.run)
        return ref.at[rows, pl.ds(head * width, width)]

    def run(
        self,
        own: Buffers,
        scratch: Scratch,
        base: jax.Array,
        stages: int,
        body: Callable[[Any, Buffers, Callable[[], jax.Array | None]], Any],
        carry: Any,
    ) -> Any:
        """Runs `body(carry, keys and values, kept)` over the steps, from the ring at `base`."""

        def step(index: jax.Array, carry: Any, clear: bool) -> Any:
            slot = base + lax.rem(index, jnp.int32(stages))
            plgpu.barrier_wait(scratch.full.at[slot])
            ring = scratch.ring.at(slot)
            kept = functools.partial(self.kept, index, own, ring, clear)
            carry = body(carry, ring, kept)
            plgpu.barrier_arrive(scratch.free.at[slot])
            return carry

        clear = self.clear_steps
        carry = lax.fori_loop(0, clear, functools.partial(step, clear=True), carry)
        return lax.fori_loop(clear, self.steps, functools.partial(step, clear=False), carry)


def _feed(
    scratch: Scratch, stages: int, walks: Sequence[tuple[jax.Array, Callable[..., None]]]
) -> None:
    """Keeps the rings full; each has its number of steps and `feed(scratch, slot, step)`.

    Goes on until every buffer is free again, so that no barrier is left with an arrival.
    """

    @pl.loop(0, functools.reduce(jnp.maximum, [steps for steps, _ in walks]) + stages)
    def _(step: jax.Array) -> None:
        for ring, (steps, feed) in enumerate(walks):
            slot = ring * stages + lax.rem(step, jnp.int32(stages))
            taken = (step >= stages) & (step - stages < steps)
            pl.when(taken)(functools.partial(plgpu.barrier_wait, scratch.free.at[slot]))
            pl.when(step < steps)(functools.partial(feed, scratch, slot, step))


def _query_scratch(problem: Problem, block_k: int, stages: int, backward: bool) -> Scratch:
    own = _buffers(problem, WARPGROUPS, ROWS, backward, _vectors(problem, "queries", backward))
    number = problem.streams * stages
    ring = _buffers(problem, number, block_k, True, _vectors(problem, "keys", backward))
    return Scratch(
        own=own,
        ready=plgpu.Barrier(
            num_arrivals=own.copies * (ROWS // problem.run), num_barriers=WARPGROUPS
        ),
        ring=ring,
        full=plgpu.Barrier(
            num_arrivals=ring.copies * (block_k // problem.group), num_barriers=number
        ),
        free=plgpu.Barrier(num_arrivals=WARPGROUPS // problem.streams, num_barriers=number),
    )


def _launch(
    body: Callable[..., None],
    name: str,
    problem: Problem,
    heads: int,
    rows: int,
    out_type: Any,
    scratch: Any,
    *operands: Any,
) -> Any:
    """Runs a kernel on a grid of sequences, heads and pairs of 64 of their rows."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=(problem.batch, heads, rows // CELL),
        grid_names=mosaic.axes("batch", "head", "cell"),
        num_threads=WARPGROUPS + 1,
        thread_name=mosaic.axis("warpgroup"),
        # Where shared memory is first read and then written, `commit_smem` stands between.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name=name,
    )(*operands)


def _ring(streams: int, warpgroup: jax.Array, stages: int) -> jax.Array:
    """First buffer of the ring that serves a warpgroup."""
    return jnp.int32(0) if streams == 1 else warpgroup * stages


def _split(compute: Callable[[jax.Array], None], feed: Callable[[], None]) -> None:
    """Runs `compute` on the warpgroups that compute and `feed` on the one that copies."""
    warpgroup = mosaic.axis_index("warpgroup")

    @pl.when(warpgroup < WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(240, action="increase")
        compute(warpgroup)

    @pl.when(warpgroup == WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(24, action="decrease")
        feed()


def _forward_kernel(
    given: Given,
    out_ref: Any,
    lse_ref: Any,
    scratch: Scratch,
    sums_ref: Any,
    *,
    problem: Problem,
) -> None:
    """Output and log-sum-exp of 128 queries."""
    stages, scale = problem.config.stages, problem.scale * mosaic.LOG2_E
    walk_of = functools.partial(Walk.of, problem, given, problem.config.block_k)

    def compute(warpgroup: jax.Array) -> None:
        walk, own = walk_of(warpgroup), scratch.own.at(warpgroup)
        place = walk.batch, walk.head, walk.start
        _copy_queries(problem, given, *place, own, scratch.ready.at[warpgroup])
        plgpu.barrier_wait(scratch.ready.at[warpgroup])

        def body(carry: Any, keys: Buffers, find_kept: Callable[[], Any]) -> Any:
            out, top, total = carry
            logits = mosaic.dot(own.first, keys.first.T)
            kept = find_kept()
            if kept is not None:
                logits = jnp.where(kept, logits, -jnp.inf)
            # Scaled late, where multiplication and subtraction are one instruction.
            new = jnp.maximum(top, logits.max(axis=1) * scale)
            base = new if kept is None else jnp.where(new == -jnp.inf, 0.0, new)
            shrink = jnp.exp2(top - base)
            weights = jnp.exp2(logits * scale - mosaic.rows(base, logits.shape))
            total = total * shrink + weights.sum(axis=1)
            out = out * mosaic.rows(shrink, out.shape)
            return mosaic.dot_add(out, weights.astype(problem.dtype), keys.second), new, total

        def vector(value: float) -> jax.Array:
            full = jnp.full((ROWS,), value, jnp.float32)
            return plgpu.layout_cast(full, plgpu.Layout.WGMMA.reduce(1))

        carry = mosaic.zeros((ROWS, problem.width)), vector(-jnp.inf), vector(0.0)
        base = _ring(problem.streams, warpgroup, stages)
        out, top, total = walk.run(own, scratch, base, stages, body, carry)
        some = total > 0
        total = jnp.where(some, total, 1.0)
        inverse = jnp.where(some, 1 / total, 0.0)
        plgpu.commit_smem()
        own.first[...] = (out * mosaic.rows(inverse, out.shape)).astype(problem.dtype)
        sums_ref[warpgroup] = jnp.where(some, top + jnp.log2(total), jnp.inf)
        plgpu.commit_smem()
        for first, head, position in _runs(problem, walk.head, walk.start):
            rows = pl.ds(first, problem.run)
            plgpu.copy_smem_to_gmem(own.first.at[rows], walk.target(out_ref, head, position))
            line = lse_ref.at[walk.batch * problem.heads + head, pl.ds(position, problem.run)]
            plgpu.copy_smem_to_gmem(sums_ref.at[warpgroup].at[rows], line)
        plgpu.wait_smem_to_gmem(0)

    def feed() -> None:
        walks = [walk_of(stream) for stream in range(problem.streams)]
        _feed(scratch, stages, [(walk.steps, walk.feed) for walk in walks])

    _split(compute, feed)


def _forward(problem: Problem, given: Given) -> tuple[jax.Array, jax.Array]:
    """Output `[B S, N H]` and base-2 log-sum-exp `[B N, S]`; infinite for a query without keys."""
    config = problem.config
    scratch = _query_scratch(problem, config.block_k, config.stages, backward=False)
    out, lse = _launch(
        functools.partial(_forward_kernel, problem=problem),
        "sparse_attention_forward",
        problem,
        problem.lists,
        problem.queries,
        [
            jax.ShapeDtypeStruct(given.q.shape, problem.dtype),
            jax.ShapeDtypeStruct((problem.batch * problem.heads, problem.padded), jnp.float32),
        ],
        [scratch, plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32)],
        given,
    )
    return out, lse


def _dq_kernel(given: Given, dq_ref: Any, scratch: Scratch, *, problem: Problem) -> None:
    """Gradient of 128 queries."""
    stages, scale = problem.config.stages_dq, problem.scale * mosaic.LOG2_E
    walk_of = functools.partial(Walk.of, problem, given, ROWS)

    def compute(warpgroup: jax.Array) -> None:
        walk, own = walk_of(warpgroup), scratch.own.at(warpgroup)
        place = walk.batch, walk.head, walk.start
        _copy_queries(problem, given, *place, own, scratch.ready.at[warpgroup])
        plgpu.barrier_wait(scratch.ready.at[warpgroup])
        shape = ROWS, ROWS

        def body(dq: Any, keys: Buffers, find_kept: Callable[[], Any]) -> Any:
            logits, slopes = mosaic.dots((own.first, keys.first.T), (own.second, keys.second.T))
            weights = jnp.exp2(logits * scale - _row_vector(own.vectors["lse"], shape))
            kept = find_kept()
            if kept is not None:
                weights = jnp.where(kept, weights, 0.0)
            slopes = weights * (slopes - _row_vector(own.vectors["delta"], shape))
            return mosaic.dot_add(dq, slopes.astype(problem.dtype), keys.first)

        base = _ring(problem.streams, warpgroup, stages)
        dq = mosaic.zeros((ROWS, problem.width))
        dq = walk.run(own, scratch, base, stages, body, dq)
        plgpu.commit_smem()
        own.first[...] = (dq * problem.scale).astype(problem.dtype)
        plgpu.commit_smem()
        for first, head, position in _runs(problem, walk.head, walk.start):
            rows = pl.ds(first, problem.run)
            plgpu.copy_smem_to_gmem(own.first.at[rows], walk.target(dq_ref, head, position))
        plgpu.wait_smem_to_gmem(0)

    def feed() -> None:
        walks = [walk_of(stream) for stream in range(problem.streams)]
        _feed(scratch, stages, [(walk.steps, walk.feed) for walk in walks])

    _split(compute, feed)


def _dq(problem: Problem, given: Given) -> jax.Array:
    return _launch(
        functools.partial(_dq_kernel, problem=problem),
        "sparse_attention_dq",
        problem,
        problem.lists,
        problem.queries,
        jax.ShapeDtypeStruct(given.q.shape, problem.dtype),
        [_query_scratch(problem, ROWS, problem.config.stages_dq, backward=True)],
        given,
    )


# The kernel over the queries of a key: gradients of keys and values


class Transposed(NamedTuple):
    """The tiles of queries that keep anything of 64 keys.

    Attributes:
      entries: `[B, K, S / 64, R Q]` int32, `(r Q + t) << BITS | bits`: tile t of the r-th list of
        the key head, and a bit for each group of the keys that it keeps.
      counts: `[B, K, S / 64]` int32, entries in each list.
    """

    entries: jax.Array
    counts: jax.Array


class Share(NamedTuple):
    """The 64 keys of a warpgroup, and the queries that it walks over.

    Attributes:
      problem: The problem.
      lists: The tiles that keep any of the keys; None with `token`: all of them.
      batch: The sequence.
      kv_head: The key head.
      block: The 64 keys.
      first: First query that may see them, with `token`.
      steps: Steps.
    """

    problem: Problem
    lists: Transposed | None
    batch: jax.Array
    kv_head: jax.Array
    block: jax.Array
    first: jax.Array
    steps: jax.Array

    @classmethod
    def of(cls, problem: Problem, lists: Transposed | None, warpgroup: Any) -> Share:
        """The share of a warpgroup of this grid cell."""
        batch, kv_head = mosaic.axis_index("batch"), mosaic.axis_index("head")
        cell = mosaic.axis_index("cell")
        block = cell * WARPGROUPS + warpgroup
        first = cell * CELL if problem.causal else jnp.int32(0)
        if lists is None:
            steps = lax.div(problem.padded - first, jnp.int32(ROWS)) * problem.lists_per_key_head
        else:
            steps = lists.counts[batch, kv_head, block] * (problem.block_q // ROWS)
        return cls(problem, lists, batch, kv_head, block, first, steps)

    def locate(self, step: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The list's head, first query, and a bit for each group of the keys that is kept."""
        problem = self.problem
        heads = self.kv_head * problem.lists_per_key_head
        if self.lists is None:
            blocks = lax.div(problem.padded - self.first, jnp.int32(ROWS))
            start = self.first + lax.rem(step, blocks) * ROWS
            return heads + lax.div(step, blocks), start, jnp.int32(0)
        parts, tiles = jnp.int32(problem.block_q // ROWS), jnp.int32(problem.tiles)
        entry = self.lists.entries[self.batch, self.kv_head, self.block, lax.div(step, parts)]
        item = entry >> BITS
        start = lax.rem(item, tiles) * problem.block_q + lax.rem(step, parts) * ROWS
        return heads + lax.div(item, tiles), start, entry

    def feed(self, given: Given, scratch: Scratch, slot: jax.Array, step: jax.Array) -> None:
        """Starts the copies of a step's queries."""
        head, start, _ = self.locate(step)
        place, ring = (self.batch, head, start), scratch.ring.at(slot)
        _copy_queries(self.problem, given, *place, ring, scratch.full.at[slot])

    def kept(self, step: jax.Array, own: Buffers, ring: Buffers) -> jax.Array:
        """Which keys the queries of a step keep, keys in rows."""
        problem, shape = self.problem, (ROWS, ROWS)
        _, start, bits = self.locate(step)
        row = mosaic.iota(shape, 0)
        key = row + self.block * ROWS
        query = problem.position(start, mosaic.iota(shape, 1))
        seen = key < problem.length
        if problem.token:
            score = mosaic.dot(own.codes, ring.codes.T)
            threshold = _column_vector(ring.vectors["threshold"], shape)
            radius = _column_vector(ring.vectors["radius"], shape)
            seen = seen & _keeps(score, threshold, radius, query, key)
        elif problem.group < ROWS:
            group = row >> (problem.group.bit_length() - 1)
            seen = seen & (((bits >> group) & 1) == 1)
        if problem.causal:
            seen = seen & (key <= query)
        if problem.tagged:
            tags = _column_vector(ring.vectors["tags"], shape)
            seen = seen & (tags == _row_vector(own.vectors["tags"], shape))
        return seen


def _dkv_kernel(
    given: Given,
    lists: Transposed | None,
    dk_ref: Any,
    dv_ref: Any,
    scratch: Scratch,
    *,
    problem: Problem,
) -> None:
    """Gradients of 128 keys and values."""
    stages, scale = problem.config.stages_dkv, problem.scale * mosaic.LOG2_E
    streams = 1 if lists is None else WARPGROUPS

    def compute(warpgroup: jax.Array) -> None:
        share, own = Share.of(problem, lists, warpgroup), scratch.own.at(warpgroup)
        head = share.kv_head * problem.lists_per_key_head
        rows = _key_rows(problem, given, share.batch, head, share.block * ROWS, ROWS)
        _copy(rows, own, scratch.ready.at[warpgroup])
        plgpu.barrier_wait(scratch.ready.at[warpgroup])
        base = _ring(streams, warpgroup, stages)
        shape = ROWS, ROWS

        def step(index: jax.Array, carry: Any) -> Any:
            dk, dv = carry
            slot = base + lax.rem(index, jnp.int32(stages))
            plgpu.barrier_wait(scratch.full.at[slot])
            ring = scratch.ring.at(slot)
            # The mask as a number: it shares no registers with what makes it.
            bias = jnp.where(share.kept(index, own, ring), 0.0, -jnp.inf)
            bias = lax.optimization_barrier(bias)
            logits = mosaic.dot(own.first, ring.first.T)
            bias = bias - _column_vector(ring.vectors["lse"], shape)
            weights = jnp.exp2(logits * scale + bias)
            dv = mosaic.dot_add(dv, weights.astype(problem.dtype), ring.second)
            slopes = mosaic.dot(own.second, ring.second.T)
            slopes = weights * (slopes - _column_vector(ring.vectors["delta"], shape))
            dk = mosaic.dot_add(dk, slopes.astype(problem.dtype), ring.first)
            plgpu.barrier_arrive(scratch.free.at[slot])
            return dk, dv

        nothing = mosaic.zeros((ROWS, problem.width))
        dk, dv = lax.fori_loop(0, share.steps, step, (nothing, nothing))
        plgpu.commit_smem()
        own.first[...] = (dk * problem.scale).astype(problem.dtype)
        own.second[...] = dv.astype(problem.dtype)
        plgpu.commit_smem()
        target = (
            pl.ds(share.batch * problem.padded + share.block * ROWS, ROWS),
            pl.ds(share.kv_head * problem.width, problem.width),
        )
        plgpu.copy_smem_to_gmem(own.first, dk_ref.at[target])
        plgpu.copy_smem_to_gmem(own.second, dv_ref.at[target])
        plgpu.wait_smem_to_gmem(0)

    def feed() -> None:
        shares = [Share.of(problem, lists, stream) for stream in range(streams)]
        feeds = [(s.steps, functools.partial(s.feed, given)) for s in shares]
        _feed(scratch, stages, feeds)

    _split(compute, feed)


def _dkv(problem: Problem, given: Given, lists: Transposed | None) -> list[jax.Array]:
    """Gradients of keys and values, `[B S, K H]`."""
    own = _buffers(problem, WARPGROUPS, ROWS, True, _vectors(problem, "keys", True))
    streams = 1 if lists is None else WARPGROUPS
    number = streams * problem.config.stages_dkv
    vectors = _vectors(problem, "queries", True)
    ring = _buffers(problem, number, ROWS, True, vectors)
    scratch = Scratch(
        own=own,
        ready=plgpu.Barrier(num_arrivals=own.copies, num_barriers=WARPGROUPS),
        ring=ring,
        full=plgpu.Barrier(num_arrivals=ring.copies * (ROWS // problem.run), num_barriers=number),
        free=plgpu.Barrier(num_arrivals=WARPGROUPS // streams, num_barriers=number),
    )
    return _launch(
        functools.partial(_dkv_kernel, problem=problem),
        "sparse_attention_dkv",
        problem,
        problem.kv_heads,
        problem.padded,
        [jax.ShapeDtypeStruct(given.k.shape, problem.dtype)] * 2,
        [scratch],
        given,
        lists,
    )


# Lists


def _flat(problem: Problem, a: jax.Array) -> jax.Array:
    """`[B, S, ...]` to `[B S, ...]`, S padded, what follows side by side."""
    tail = problem.padded - problem.length
    if tail:
        a = jnp.pad(a, ((0, 0), (0, tail), *[(0, 0)] * (a.ndim - 2)))
    return a.reshape(problem.batch * problem.padded, *([-1] if a.ndim > 2 else []))


def _unflat(problem: Problem, a: jax.Array, heads: int) -> jax.Array:
    """`[B S, heads H]` to `[B, S, heads, H]`, S without padding."""
    a = a.reshape(problem.batch, problem.padded, heads, problem.width)
    return a[:, : problem.length]


def _tags(
    problem: Problem, key_mask: jax.Array | None, segment_ids: jax.Array | None
) -> Tags | None:
    """Tags of queries and keys, `[B, S]`."""
    if key_mask is None and segment_ids is None:
        return None
    shape = problem.batch, problem.length
    queries = jnp.zeros(shape, jnp.int32) if segment_ids is None else segment_ids.astype(jnp.int32)
    keys = queries if key_mask is None else jnp.where(key_mask, queries, HIDDEN)
    return Tags(queries, keys)


def _lists(problem: Problem, selection: TileSelection, tags: Tags | None) -> Lists:
    """The lists of a selection, of groups of at most 64 keys and for whole grid cells."""
    groups, counts = selection.groups, selection.counts
    split = selection.key_group // problem.group
    if split > 1:
        groups = (groups[..., None] * split + jnp.arange(split, dtype=jnp.int32)).reshape(
            *groups.shape[:-1], -1
        )
        counts = counts * split
    missing = problem.tiles - groups.shape[2]
    groups = jnp.pad(groups, ((0, 0), (0, 0), (0, missing), (0, 0)))
    counts = jnp.pad(counts, ((0, 0), (0, 0), (0, missing)))
    entry = jnp.arange(groups.shape[-1], dtype=jnp.int32)
    end = (groups + 1) * problem.group
    clear = (entry < counts[..., None]) & (end <= problem.length)
    if problem.causal:
        start = jnp.arange(problem.tiles, dtype=jnp.int32) * problem.tile_positions
        clear = clear & (end <= start[:, None] + 1)
    if tags is not None:
        clear = clear & _uniform(problem, tags, groups)
    leading = jnp.cumprod(clear.astype(jnp.int32), -1).sum(-1, dtype=jnp.int32)
    return Lists(groups, counts, leading)


def _uniform(problem: Problem, tags: Tags, groups: jax.Array) -> Bool[Array, "B T Q P"]:
    """Whether all queries of a tile and all keys of a listed group have one tag."""

    def ends(a: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        a = jnp.pad(a, ((0, 0), (0, problem.padded - problem.length)), mode="edge")
        a = a.reshape(problem.batch, -1, size)
        return a.min(-1), a.max(-1)

    low, high = ends(tags.queries, problem.tile_positions)
    key_low, key_high = (
        jnp.take_along_axis(a[:, None, None], groups, -1) for a in ends(tags.keys, problem.group)
    )
    low, high = low[:, None, :, None], high[:, None, :, None]
    return (low == high) & (key_low == low) & (key_high == low)


def _transposed(problem: Problem, lists: Lists) -> Transposed:
    """For each 64 keys, the tiles that keep any of them, in order."""
    batch, heads, tiles, listed = lists.groups.shape
    per_block = ROWS // problem.group
    blocks = problem.padded // ROWS
    # Bits of the groups that a tile keeps, by block of keys.
    block = jnp.where(
        jnp.arange(listed) < lists.counts[..., None], lists.groups // per_block, blocks
    )
    bit = jnp.int32(1) << (lists.groups % per_block)
    lines = jnp.arange(batch * heads * tiles, dtype=jnp.int32)[:, None]
    bits = jnp.zeros((batch * heads * tiles, blocks), jnp.int32)
    bits = bits.at[lines, block.reshape(-1, listed)].add(bit.reshape(-1, listed), mode="drop")
    # Those above zero, packed to the front of the list of a block of keys.
    items = problem.lists_per_key_head * tiles
    bits = bits.reshape(batch * problem.kv_heads, items, blocks).swapaxes(1, 2)
    bits = bits.reshape(-1, items)
    rank = jnp.cumsum(bits > 0, 1, dtype=jnp.int32)
    lines = jnp.arange(len(bits), dtype=jnp.int32)[:, None]
    entry = (jnp.arange(items, dtype=jnp.int32) << BITS) | bits
    place = jnp.where(bits > 0, rank - 1, items)
    entries = jnp.zeros_like(bits).at[lines, place].set(entry, mode="drop", unique_indices=True)
    shape = batch, problem.kv_heads, blocks
    return Transposed(entries.reshape(*shape, items), rank[:, -1].reshape(shape))


def _codes(problem: Problem, selection: TokenSelection) -> Codes:
    """Codeword rows, and the ranks of the last keys kept."""
    rows = [
        _flat(problem, codeword_rows(codes, codewords, problem.dtype))
        for codes, codewords in (
            (selection.query_codes, selection.query_codewords),
            (selection.key_codes, selection.key_codewords),
        )
    ]
    tail = (0, 0), (0, 0), (0, problem.padded - problem.length)
    threshold = jnp.where(selection.tie_radius < 0, jnp.inf, selection.threshold)
    threshold = jnp.pad(threshold.astype(jnp.float32), tail, constant_values=jnp.inf)
    radius = jnp.pad(selection.tie_radius, tail)
    return Codes(*rows, *(a.reshape(-1, problem.padded) for a in (threshold, radius)))


# Differentiation


def _given(
    problem: Problem,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    selection: Selection,
    tags: Tags | None,
) -> Given:
    """Lays the arguments out for the kernels."""
    if isinstance(selection, TileSelection):
        kept: Any = _lists(problem, selection, tags)
    else:
        kept = _codes(problem, selection)
    if tags is not None:
        keys = jnp.pad(
            tags.keys,
            ((0, 0), (0, problem.padded - problem.length)),
            constant_values=HIDDEN,
        )
        tags = Tags(_flat(problem, tags.queries), keys.reshape(-1))
    q, k, v = (_flat(problem, a) for a in (q, k, v))
    return Given(q, k, v, kept, tags)


# What the backward pass needs: arguments, output and log-sum-exp.
Saved = tuple[jax.Array, jax.Array, jax.Array, Selection, Tags | None, jax.Array, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    problem: Problem,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    selection: Selection,
    tags: Tags | None,
) -> jax.Array:
    return _vjp_forward(problem, q, k, v, selection, tags)[0]


def _vjp_forward(
    problem: Problem,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    selection: Selection,
    tags: Tags | None,
) -> tuple[jax.Array, Saved]:
    out, lse = _forward(problem, _given(problem, q, k, v, selection, tags))
    out = _unflat(problem, out, problem.heads)
    return out, (q, k, v, selection, tags, out, lse)


def _vjp_backward(
    problem: Problem, saved: Saved, dout: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None, None]:
    q, k, v, selection, tags, out, lse = saved
    # Without the barrier, XLA would make what the kernels need of the selection long before.
    selection, dout = lax.optimization_barrier((selection, dout))
    given = _given(problem, q, k, v, selection, tags)
    delta = jnp.einsum("bsnh,bsnh->bns", out, dout, preferred_element_type=jnp.float32)
    delta = jnp.pad(delta, ((0, 0), (0, 0), (0, problem.padded - problem.length)))
    given = given._replace(
        dout=_flat(problem, dout), lse=lse, delta=delta.reshape(-1, problem.padded)
    )
    dq = _dq(problem, given)
    lists = None if problem.token else _transposed(problem, given.kept)
    dk, dv = _dkv(problem, given, lists)
    return (
        _unflat(problem, dq, problem.heads),
        _unflat(problem, dk, problem.kv_heads),
        _unflat(problem, dv, problem.kv_heads),
        None,
        None,
    )


_attention.defvjp(_vjp_forward, _vjp_backward)


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
    tagged = key_mask is not None or segment_ids is not None
    if scale <= 0:  # the kernels scale the largest logit to get the largest scaled one
        q, scale = q * scale, 1.0
    problem = _tuned(_problem(q, k, selection, float(scale), causal, tagged))
    tags = _tags(problem, key_mask, segment_ids)
    return _attention(problem, q, k, v, selection, tags)
