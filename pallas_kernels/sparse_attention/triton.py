"""Sparse attention in Triton: flash attention over keys that are gathered one by one.

A program owns some queries of a tile, or, for the gradients of keys and values, some keys of one
group or of several small ones. With `tile`, a step gathers the keys that come next in the tile's
list, so groups of any size fill whole steps; with `token`, it takes the next keys in order and
computes their scores again from the codewords. Gradients of keys and values walk lists that are
sorted by key: nothing is added with atomics, and results repeat exactly.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import triton as t
from pallas_kernels.pq.selection import codeword_rows, row_width
from pallas_kernels.pq.triton import load_codes
from pallas_kernels.pq.types import Selection, TileSelection

CODE_TYPE = jnp.float16  # of codewords, integers of at most 127
LOG2_E: tl.constexpr = tl.constexpr(t.LOG2_E)
LEAST_KEYS = 16  # of a block of keys: smaller groups share one
MOST_KEYS = 64  # of a block of keys that one program takes


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tile sizes.

    Attributes:
      block_q: Queries of a program or a step.
      block_k: Keys of a step of the kernels over the keys of a query.
      stages: Steps whose operands are in shared memory at once.
      num_warps: Warps of a program.
    """

    block_q: int
    block_k: int
    stages: int
    num_warps: int = 4


class Problem(NamedTuple):
    """What is known when tracing.

    Attributes:
      batch: B.
      length: Positions S.
      heads: Query heads N.
      kv_heads: Key heads K.
      fold: Query heads that share a list.
      width: H.
      block_q: Queries that share a list; those of a program with `token`.
      group: Keys of a group; 0 with `token`.
      listed: Groups of a list, at most; 0 with `token`.
      code_width: Width of a codeword row with `token`, 0 with `tile`.
      scale: Factor on the inner products.
      causal: Whether a query sees only itself and earlier keys.
      precision: How float32 is multiplied.
      config: Tile sizes.
    """

    batch: int
    length: int
    heads: int
    kv_heads: int
    fold: int
    width: int
    block_q: int
    group: int
    listed: int
    code_width: int
    scale: float
    causal: bool
    precision: str
    config: Config

    @property
    def token(self) -> bool:
        """Whether every query has keys of its own."""
        return self.group == 0

    @property
    def lists(self) -> int:
        """Lists at a position."""
        return self.heads // self.fold

    @property
    def tiles(self) -> int:
        """Tiles along the positions."""
        return triton.cdiv(self.length * self.fold, self.block_q)

    @property
    def parts(self) -> int:
        """Programs, or steps, of a tile."""
        return triton.cdiv(self.block_q, self.config.block_q)

    @property
    def per_block(self) -> int:
        """Groups of a block of keys."""
        return 1 if self.token else max(1, LEAST_KEYS // self.group)

    @property
    def block_keys(self) -> int:
        """Keys of a block."""
        return MOST_KEYS if self.token else self.per_block * self.group

    @property
    def key_blocks(self) -> int:
        """Blocks of keys of a key head."""
        return triton.cdiv(self.length, self.block_keys)

    def constants(self) -> dict[str, Any]:
        """What all kernels are compiled for."""
        return {
            "LENGTH": self.length,
            "HEADS": self.heads,
            "KV_HEADS": self.kv_heads,
            "FOLD": self.fold,
            "WIDTH": self.width,
            "TILE": self.block_q,
            "TILES": self.tiles,
            "PARTS": self.parts,
            "GROUP": self.group,
            "LISTED": self.listed,
            "CODES": self.code_width,
            "SCALE": self.scale,
            "CAUSAL": self.causal,
            "PRECISION": self.precision,
            "BLOCK_Q": self.config.block_q,
            "BLOCK_H": t.power_of_two(self.width),
            "num_warps": self.config.num_warps,
            "num_stages": self.config.stages,
        }


def config_for(dtype: Any, width: int, block_q: int) -> Config:
    """Tile sizes that fit the shared memory of every GPU of compute capability 8 and later, 99 KiB.

    Args:
      dtype: Type of queries, keys and values.
      width: Head width.
      block_q: Queries that share a list.
    """
    row_bytes = t.power_of_two(width) * jnp.dtype(dtype).itemsize
    # Products of float32 hold their operands in registers; the interpreter has as many as it likes,
    # and takes as long for small steps as for large ones.
    if jnp.dtype(dtype).itemsize > 2 and not t.interpreting():
        queries, keys, num_warps = 16, 16, 8
    else:
        queries, keys = 64 if row_bytes <= 256 else 32, 64 if row_bytes <= 128 else 32
        num_warps = 4
    queries = min(queries, t.power_of_two(block_q))
    return Config(block_q=queries, block_k=keys, stages=2, num_warps=num_warps)


# Kernels: what they share


@triton.jit
@no_type_check
def _load_rows(array, rows, valid, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of a matrix; zeros where they are not valid, and beyond their width."""
    column = tl.arange(0, BLOCK)
    where = array + rows.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(where, mask=valid[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
@no_type_check
def _store_rows(array, value, rows, valid, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Writes the rows that are valid."""
    column = tl.arange(0, BLOCK)
    where = array + rows.to(tl.int64)[:, None] * stride + column[None, :]
    mask = valid[:, None] & (column < WIDTH)[None, :]
    tl.store(where, value.to(array.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def _kept(
    batch,
    head,
    queries,
    q_valid,
    keys,
    k_valid,
    key_mask,
    segment_ids,
    q_codes,
    k_codes,
    threshold,
    radius,
    LENGTH: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    CODES: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Which keys queries keep, `[queries, keys]`."""
    first = batch.to(tl.int64) * LENGTH
    kept = q_valid[:, None] & k_valid[None, :]
    if CAUSAL:
        kept &= keys[None, :] <= queries[:, None]
    if key_mask is not None:
        shown = tl.load(key_mask + first + keys, mask=k_valid, other=0)
        kept &= (shown != 0)[None, :]
    if segment_ids is not None:
        own = tl.load(segment_ids + first + queries, mask=q_valid, other=0)
        theirs = tl.load(segment_ids + first + keys, mask=k_valid, other=0)
        kept &= own[:, None] == theirs[None, :]
    if threshold is not None:
        kv_head = head // (HEADS // KV_HEADS)
        of_queries = q_codes + (first * HEADS + head) * CODES
        of_keys = k_codes + (first * KV_HEADS + kv_head) * CODES
        block: tl.constexpr = triton.next_power_of_2(CODES)
        left = load_codes(of_queries, queries, q_valid, HEADS * CODES, CODES, block)
        right = load_codes(of_keys, keys, k_valid, KV_HEADS * CODES, CODES, block)
        score = tl.dot(left, tl.trans(right))
        line = (batch * HEADS + head).to(tl.int64) * LENGTH
        level = tl.load(threshold + line + queries, mask=q_valid, other=0).to(tl.float32)[:, None]
        reach = tl.load(radius + line + queries, mask=q_valid, other=-1)[:, None]
        d = keys[None, :] - queries[:, None]
        near = 2 * tl.abs(d) - (d < 0).to(tl.int32) <= reach
        kept &= (reach >= 0) & ((score > level) | ((score == level) & near))
    return kept


@triton.jit
@no_type_check
def _queries_of(
    block,
    list_head,
    LENGTH: tl.constexpr,
    HEADS: tl.constexpr,
    FOLD: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """The tile of a part of one, and that part's queries.

    Returns the tile, and of its queries the positions, which of them are the tile's, the rows
    among `[S, N]` and the places among `[N, S]`. With one head a list, rows and places are the
    positions, since the head is the same for all: `_of_head` gives what comes before.
    """
    tile = block // PARTS
    local = (block % PARTS) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    queries = tile * (TILE // FOLD) + local // FOLD
    valid = (local < TILE) & (queries < LENGTH)
    rows = queries
    places = queries
    if FOLD > 1:
        head = list_head * FOLD + local % FOLD
        rows = queries * HEADS + head
        places = head * LENGTH + queries
    return tile, queries, valid, rows, places


@triton.jit
@no_type_check
def _of_head(
    batch,
    list_head,
    LENGTH: tl.constexpr,
    HEADS: tl.constexpr,
    FOLD: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """First elements of `[S, N, H]` and of `[N, S]` of a sequence, and of a head that is alone."""
    of_queries = batch.to(tl.int64) * LENGTH * HEADS * WIDTH
    of_line = batch.to(tl.int64) * LENGTH * HEADS
    if FOLD == 1:
        of_queries += list_head * WIDTH
        of_line += list_head * LENGTH
    return of_queries, of_line


@triton.jit
@no_type_check
def _keys_of(
    step,
    groups,
    number,
    line,
    LENGTH: tl.constexpr,
    GROUP: tl.constexpr,
    LISTED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Keys of a step, and which of them are there: those of a list, or the next in order."""
    place = step * BLOCK_K + tl.arange(0, BLOCK_K)
    if groups is None:
        keys = place
        valid = place < number
    else:
        valid = place < number
        group = tl.load(groups + line * LISTED + place // GROUP, mask=valid, other=0)
        keys = group * GROUP + place % GROUP
        valid &= keys < LENGTH
    return keys, valid


@triton.jit
@no_type_check
def _number_of_keys(
    counts, line, queries, LENGTH: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr
):
    """Keys that the queries of a program walk over."""
    if counts is not None:
        number = tl.load(counts + line) * GROUP
    elif CAUSAL:
        number = tl.minimum(tl.max(queries, 0) + 1, LENGTH)
    else:
        number = LENGTH
    return number


# Kernels


@triton.jit
@no_type_check
def sparse_attention_forward_kernel(
    q,
    k,
    v,
    groups,
    counts,
    key_mask,
    segment_ids,
    q_codes,
    k_codes,
    threshold,
    radius,
    out,
    lse,
    LENGTH: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    FOLD: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    LISTED: tl.constexpr,
    CODES: tl.constexpr,
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Output and log-sum-exp of some queries of a tile."""
    head, batch = tl.program_id(1), tl.program_id(2)
    tile, queries, q_valid, rows, places = _queries_of(
        tl.program_id(0), head, LENGTH, HEADS, FOLD, TILE, PARTS, BLOCK_Q
    )
    lists: tl.constexpr = HEADS // FOLD
    kv_head = head // (lists // KV_HEADS)
    line = ((batch * lists + head) * TILES + tile).to(tl.int64)
    first = batch.to(tl.int64) * LENGTH
    of_queries, of_line = _of_head(batch, head, LENGTH, HEADS, FOLD, WIDTH)
    stride: tl.constexpr = HEADS * WIDTH if FOLD == 1 else WIDTH
    of_keys = (first * KV_HEADS + kv_head) * WIDTH
    own = _load_rows(q + of_queries, rows, q_valid, stride, WIDTH, BLOCK_H)
    top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, BLOCK_H), tl.float32)
    number = _number_of_keys(counts, line, queries, LENGTH, GROUP, CAUSAL)
    for step in range(tl.cdiv(number, BLOCK_K)):
        keys, k_valid = _keys_of(step, groups, number, line, LENGTH, GROUP, LISTED, BLOCK_K)
        key = _load_rows(k + of_keys, keys, k_valid, KV_HEADS * WIDTH, WIDTH, BLOCK_H)
        value = _load_rows(v + of_keys, keys, k_valid, KV_HEADS * WIDTH, WIDTH, BLOCK_H)
        kept = _kept(
            batch, head, queries, q_valid, keys, k_valid, key_mask, segment_ids,
            q_codes, k_codes, threshold, radius, LENGTH, HEADS, KV_HEADS, CODES, CAUSAL,
        )  # fmt: skip
        logits = tl.dot(own, tl.trans(key), input_precision=PRECISION) * (SCALE * LOG2_E)
        logits = tl.where(kept, logits, float("-inf"))
        new = tl.maximum(top, tl.max(logits, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        shrink = tl.exp2(top - base)
        weights = tl.exp2(logits - base[:, None])
        total = total * shrink + tl.sum(weights, 1)
        acc *= shrink[:, None]
        acc = tl.dot(weights.to(value.dtype), value, acc, input_precision=PRECISION)
        top = new
    some = total > 0
    total = tl.where(some, total, 1.0)
    acc = tl.where(some[:, None], acc / total[:, None], 0.0)
    _store_rows(out + of_queries, acc, rows, q_valid, stride, WIDTH, BLOCK_H)
    sums = tl.where(some, top + tl.log2(total), float("inf"))
    tl.store(lse + of_line + places, sums, mask=q_valid)


@triton.jit
@no_type_check
def sparse_attention_dq_kernel(
    q,
    k,
    v,
    groups,
    counts,
    key_mask,
    segment_ids,
    q_codes,
    k_codes,
    threshold,
    radius,
    dout,
    lse,
    delta,
    dq,
    LENGTH: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    FOLD: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    LISTED: tl.constexpr,
    CODES: tl.constexpr,
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Gradient of some queries of a tile."""
    head, batch = tl.program_id(1), tl.program_id(2)
    tile, queries, q_valid, rows, places = _queries_of(
        tl.program_id(0), head, LENGTH, HEADS, FOLD, TILE, PARTS, BLOCK_Q
    )
    lists: tl.constexpr = HEADS // FOLD
    kv_head = head // (lists // KV_HEADS)
    line = ((batch * lists + head) * TILES + tile).to(tl.int64)
    first = batch.to(tl.int64) * LENGTH
    of_queries, of_line = _of_head(batch, head, LENGTH, HEADS, FOLD, WIDTH)
    stride: tl.constexpr = HEADS * WIDTH if FOLD == 1 else WIDTH
    of_keys = (first * KV_HEADS + kv_head) * WIDTH
    own = _load_rows(q + of_queries, rows, q_valid, stride, WIDTH, BLOCK_H)
    grad = _load_rows(dout + of_queries, rows, q_valid, stride, WIDTH, BLOCK_H)
    sums = tl.load(lse + of_line + places, mask=q_valid, other=float("inf"))
    shift = tl.load(delta + of_line + places, mask=q_valid, other=0.0)
    acc = tl.zeros((BLOCK_Q, BLOCK_H), tl.float32)
    number = _number_of_keys(counts, line, queries, LENGTH, GROUP, CAUSAL)
    for step in range(tl.cdiv(number, BLOCK_K)):
        keys, k_valid = _keys_of(step, groups, number, line, LENGTH, GROUP, LISTED, BLOCK_K)
        key = _load_rows(k + of_keys, keys, k_valid, KV_HEADS * WIDTH, WIDTH, BLOCK_H)
        value = _load_rows(v + of_keys, keys, k_valid, KV_HEADS * WIDTH, WIDTH, BLOCK_H)
        kept = _kept(
            batch, head, queries, q_valid, keys, k_valid, key_mask, segment_ids,
            q_codes, k_codes, threshold, radius, LENGTH, HEADS, KV_HEADS, CODES, CAUSAL,
        )  # fmt: skip
        logits = tl.dot(own, tl.trans(key), input_precision=PRECISION) * (SCALE * LOG2_E)
        weights = tl.where(kept, tl.exp2(logits - sums[:, None]), 0.0)
        slopes = tl.dot(grad, tl.trans(value), input_precision=PRECISION) - shift[:, None]
        slopes = (weights * slopes).to(key.dtype)
        acc = tl.dot(slopes, key, acc, input_precision=PRECISION)
    _store_rows(dq + of_queries, acc * SCALE, rows, q_valid, stride, WIDTH, BLOCK_H)


@triton.jit
@no_type_check
def sparse_attention_dkv_kernel(
    q,
    k,
    v,
    entries,
    starts,
    bits,
    key_mask,
    segment_ids,
    q_codes,
    k_codes,
    threshold,
    radius,
    dout,
    lse,
    delta,
    dk,
    dv,
    LENGTH: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    FOLD: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    LISTED: tl.constexpr,
    CODES: tl.constexpr,
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    KEY_PARTS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Gradients of some keys of a block, and of their values."""
    kv_head, batch = tl.program_id(1), tl.program_id(2)
    block = tl.program_id(0) // KEY_PARTS
    local = (tl.program_id(0) % KEY_PARTS) * BLOCK_K + tl.arange(0, BLOCK_K)
    keys = block * BLOCK_KEYS + local
    k_valid = (local < BLOCK_KEYS) & (keys < LENGTH)
    first = batch.to(tl.int64) * LENGTH
    of_keys = (first * KV_HEADS + kv_head) * WIDTH
    key = _load_rows(k + of_keys, keys, k_valid, KV_HEADS * WIDTH, WIDTH, BLOCK_H)
    value = _load_rows(v + of_keys, keys, k_valid, KV_HEADS * WIDTH, WIDTH, BLOCK_H)
    d_key = tl.zeros((BLOCK_K, BLOCK_H), tl.float32)
    d_value = tl.zeros((BLOCK_K, BLOCK_H), tl.float32)
    lists: tl.constexpr = HEADS // FOLD
    each: tl.constexpr = lists // KV_HEADS
    stride: tl.constexpr = HEADS * WIDTH if FOLD == 1 else WIDTH
    if entries is None:  # every tile of queries that is not before the keys
        skipped = 0
        if CAUSAL:
            skipped = (block * BLOCK_KEYS // TILE) * PARTS
        walked = TILES * PARTS - skipped
        begin = 0
        end = each * walked
    else:
        list_of = starts + (batch * KV_HEADS + kv_head) * (tl.num_programs(0) // KEY_PARTS) + block
        begin = tl.load(list_of) * PARTS
        end = tl.load(list_of + 1) * PARTS
    for step in range(begin, end):
        if entries is None:
            head = kv_head * each + step // walked
            part = skipped + step % walked
        else:
            entry = tl.load(entries + step // PARTS)
            list_number = entry // LISTED
            head = (list_number // TILES) % lists
            part = (list_number % TILES) * PARTS + step % PARTS
        _, queries, q_valid, rows, places = _queries_of(
            part, head, LENGTH, HEADS, FOLD, TILE, PARTS, BLOCK_Q
        )
        of_queries, of_line = _of_head(batch, head, LENGTH, HEADS, FOLD, WIDTH)
        own = _load_rows(q + of_queries, rows, q_valid, stride, WIDTH, BLOCK_H)
        grad = _load_rows(dout + of_queries, rows, q_valid, stride, WIDTH, BLOCK_H)
        sums = tl.load(lse + of_line + places, mask=q_valid, other=float("inf"))
        shift = tl.load(delta + of_line + places, mask=q_valid, other=0.0)
        kept = _kept(
            batch, head, queries, q_valid, keys, k_valid, key_mask, segment_ids,
            q_codes, k_codes, threshold, radius, LENGTH, HEADS, KV_HEADS, CODES, CAUSAL,
        )  # fmt: skip
        if bits is not None:
            kept &= ((tl.load(bits + entry) >> (local // GROUP)) & 1)[None, :] == 1
        logits = tl.dot(own, tl.trans(key), input_precision=PRECISION) * (SCALE * LOG2_E)
        weights = tl.where(kept, tl.exp2(logits - sums[:, None]), 0.0)
        d_value = tl.dot(tl.trans(weights.to(grad.dtype)), grad, d_value, input_precision=PRECISION)
        slopes = tl.dot(grad, tl.trans(value), input_precision=PRECISION) - shift[:, None]
        slopes = (weights * slopes).to(own.dtype)
        d_key = tl.dot(tl.trans(slopes), own, d_key, input_precision=PRECISION)
    _store_rows(dk + of_keys, d_key * SCALE, keys, k_valid, KV_HEADS * WIDTH, WIDTH, BLOCK_H)
    _store_rows(dv + of_keys, d_value, keys, k_valid, KV_HEADS * WIDTH, WIDTH, BLOCK_H)


# Launchers

Inputs = dict[str, jax.Array | None]


def _inputs(
    problem: Problem,
    selection: Selection,
    key_mask: Bool[Array, "B S"] | None,
    segment_ids: Int[Array, "B S"] | None,
) -> Inputs:
    """What decides which keys are kept, beside the lists."""
    inputs: Inputs = {
        "key_mask": None if key_mask is None else key_mask.astype(jnp.int8),
        "segment_ids": None if segment_ids is None else segment_ids.astype(jnp.int32),
        **dict.fromkeys(("q_codes", "k_codes", "threshold", "radius")),
    }
    if not isinstance(selection, TileSelection):
        inputs |= {
            "q_codes": codeword_rows(selection.query_codes, selection.query_codewords, CODE_TYPE),
            "k_codes": codeword_rows(selection.key_codes, selection.key_codewords, CODE_TYPE),
            "threshold": selection.threshold,
            "radius": selection.tie_radius,
        }
    return inputs


def _lists(selection: Selection) -> Inputs:
    if isinstance(selection, TileSelection):
        return {"groups": selection.groups, "counts": selection.counts}
    return {"groups": None, "counts": None}


def _forward(
    problem: Problem, arrays: Inputs, lists: Inputs, inputs: Inputs
) -> tuple[Float[Array, "B S N H"], Float[Array, "B N S"]]:
    """Output, and base-2 log-sum-exp, infinite for a query without keys."""
    q = arrays["q"]
    assert q is not None
    found = t.launch(
        sparse_attention_forward_kernel,
        {**arrays, **lists, **inputs},
        {
            "out": jax.ShapeDtypeStruct(q.shape, q.dtype),
            "lse": jax.ShapeDtypeStruct(
                (problem.batch, problem.heads, problem.length), jnp.float32
            ),
        },
        name="sparse_attention_forward",
        grid=(problem.tiles * problem.parts, problem.lists, problem.batch),
        BLOCK_K=problem.config.block_k,
        **problem.constants(),
    )
    return found["out"], found["lse"]


def _dq(
    problem: Problem, arrays: Inputs, lists: Inputs, inputs: Inputs, grads: Inputs
) -> Float[Array, "B S N H"]:
    q = arrays["q"]
    assert q is not None
    found = t.launch(
        sparse_attention_dq_kernel,
        {**arrays, **lists, **inputs, **grads},
        {"dq": jax.ShapeDtypeStruct(q.shape, q.dtype)},
        name="sparse_attention_dq",
        grid=(problem.tiles * problem.parts, problem.lists, problem.batch),
        BLOCK_K=problem.config.block_k,
        **problem.constants(),
    )
    return found["dq"]


def _dkv(
    problem: Problem, arrays: Inputs, lists: Inputs, inputs: Inputs, grads: Inputs
) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    k = arrays["k"]
    assert k is not None
    out = jax.ShapeDtypeStruct(k.shape, k.dtype)
    block_k = min(t.power_of_two(problem.block_keys), problem.config.block_k)
    parts = triton.cdiv(problem.block_keys, block_k)
    found = t.launch(
        sparse_attention_dkv_kernel,
        {**arrays, **lists, **inputs, **grads},
        {"dk": out, "dv": out},
        name="sparse_attention_dkv",
        grid=(problem.key_blocks * parts, problem.kv_heads, problem.batch),
        BLOCK_KEYS=problem.block_keys,
        KEY_PARTS=parts,
        BLOCK_K=block_k,
        **problem.constants(),
    )
    return found["dk"], found["dv"]


# Lists by key


def _transposed(problem: Problem, selection: Selection) -> Inputs:
    """For every block of keys the entries of lists that keep any of it, in order.

    Returns:
      `entries`: int32, numbers of entries `[B, T, Q, P]`, those of a sequence's key head and block
        side by side; `starts`: int32 `[B K blocks + 1]`, where each begins; `bits`: int32
        `[B, T, Q, P]`, a bit for each group of its block that an entry keeps, None where a block is
        one group. None of them with `token`.
    """
    if not isinstance(selection, TileSelection):
        return {"entries": None, "starts": None, "bits": None}
    groups, counts, per = selection.groups, selection.counts, problem.per_block
    valid = jnp.arange(problem.listed) < counts[..., None]
    blocks, bits = groups, None
    if per > 1:
        # Groups ascend, so those of one block follow each other: the first of them stands for all.
        line = jnp.arange(counts.size, dtype=jnp.int32)[:, None]
        block = (groups // per).reshape(-1, problem.listed)
        there = valid.reshape(block.shape)
        changed = jnp.pad(block[:, 1:] != block[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        run = jnp.cumsum(there & changed, 1, dtype=jnp.int32) - 1
        place = jnp.where(there, run, problem.listed)
        bit = jnp.left_shift(1, groups.reshape(block.shape) % per)
        nothing = jnp.zeros_like(block)
        bits = nothing.at[line, place].add(bit, mode="drop").reshape(groups.shape)
        blocks = nothing.at[line, place].set(block, mode="drop").reshape(groups.shape)
        valid = bits > 0
    pairs = problem.batch * problem.kv_heads
    pair = jnp.arange(pairs, dtype=jnp.int32).reshape(problem.batch, problem.kv_heads)
    pair = jnp.repeat(pair, problem.lists // problem.kv_heads, 1)[:, :, None, None]
    last = pairs * problem.key_blocks
    key = jnp.where(valid, pair * problem.key_blocks + blocks, last).ravel()
    entries = jnp.argsort(key, stable=True).astype(jnp.int32)
    number = jnp.zeros(last + 1, jnp.int32).at[key].add(1)
    starts = jnp.cumsum(number, dtype=jnp.int32) - number
    return {"entries": entries, "starts": starts, "bits": bits}


# Differentiation

# What the backward pass needs: arguments, output and log-sum-exp.
Saved = tuple[jax.Array, jax.Array, jax.Array, Selection, Any, Any, jax.Array, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    problem: Problem,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    selection: Selection,
    key_mask: jax.Array | None,
    segment_ids: jax.Array | None,
) -> jax.Array:
    return _vjp_forward(problem, q, k, v, selection, key_mask, segment_ids)[0]


def _vjp_forward(
    problem: Problem,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    selection: Selection,
    key_mask: jax.Array | None,
    segment_ids: jax.Array | None,
) -> tuple[jax.Array, Saved]:
    arrays: Inputs = {"q": q, "k": k, "v": v}
    inputs = _inputs(problem, selection, key_mask, segment_ids)
    out, lse = _forward(problem, arrays, _lists(selection), inputs)
    return out, (q, k, v, selection, key_mask, segment_ids, out, lse)


def _vjp_backward(
    problem: Problem, saved: Saved, dout: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None, None, None]:
    q, k, v, selection, key_mask, segment_ids, out, lse = saved
    # Without the barrier, XLA would make what the kernels need of the selection long before.
    selection, dout = lax.optimization_barrier((selection, dout))
    inputs = _inputs(problem, selection, key_mask, segment_ids)
    delta = jnp.einsum(
        "bsnh,bsnh->bns",
        out,
        dout,
        precision=t.xla_precision(q.dtype),
        preferred_element_type=jnp.float32,
    )
    arrays: Inputs = {"q": q, "k": k, "v": v}
    grads: Inputs = {"dout": dout, "lse": lse, "delta": delta}
    dq = _dq(problem, arrays, _lists(selection), inputs, grads)
    dk, dv = _dkv(problem, arrays, _transposed(problem, selection), inputs, grads)
    return dq, dk, dv, None, None, None


_attention.defvjp(_vjp_forward, _vjp_backward)


def problem_of(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B S K H"],
    selection: Selection,
    scale: float,
    causal: bool,
) -> Problem:
    """Sizes and tile sizes."""
    batch, length, heads, width = q.shape
    fold = 1
    if isinstance(selection, TileSelection):
        fold = selection.heads
        block_q, group, code_width = selection.block_q * fold, selection.key_group, 0
        config = config_for(q.dtype, width, block_q)
        listed = selection.groups.shape[3]
    else:
        config = config_for(q.dtype, width, MOST_KEYS)
        block_q, group, listed = config.block_q, 0, 0
        code_width = row_width(selection.query_codewords)
    return Problem(
        batch=batch,
        length=length,
        heads=heads,
        kv_heads=k.shape[2],
        fold=fold,
        width=width,
        block_q=block_q,
        group=group,
        listed=listed,
        code_width=code_width,
        scale=float(scale),
        causal=causal,
        precision=t.precision(),
        config=config,
    )


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
    problem = problem_of(q, k, selection, scale, causal)
    return _attention(problem, q, k, v, selection, key_mask, segment_ids)
