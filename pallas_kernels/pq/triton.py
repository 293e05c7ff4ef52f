"""Product quantization in Triton: nearest codewords, and the last keys that are kept.

Codeword rows meet each other on the tensor core, in float16, which holds their integers exactly.
What is highest of many integers is found by bisection, so nothing is sorted or stored: each pass
computes the scores of a query's keys again, or reads those of a tile's groups from registers.
"""

from __future__ import annotations

import functools
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int32, UInt8

from pallas_kernels import triton as t
from pallas_kernels.pq import selection
from pallas_kernels.pq.reference import EXPONENT_BIAS, MANTISSA_BITS, MAX_EXPONENT, TILE_SCORES
from pallas_kernels.pq.xla import MAX_UNROLLED, encode_scalars

ENCODE_ELEMENTS = 2**13  # distances that a program of `pq_encode` holds
THRESHOLD_ELEMENTS = 2**12  # scores that a program of `pq_tile_threshold` holds, at least a row
BLOCK = 64  # queries, keys, sub-tiles or groups of a program

SCORE_DIGITS = 7  # to the base 4, of a score of one query and one key
HIDDEN = tl.constexpr(-(2**30))  # below any score

# Kernels


@triton.jit
@no_type_check
def pq_encode_kernel(
    x,
    codebooks,
    norms,
    codes,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SPACES: tl.constexpr,
    CODEWORDS: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Codes of some tokens of a head, one subspace after the other."""
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    head = tl.program_id(1)
    there = tokens < TOKENS
    line = tokens.to(tl.int64) * HEADS + head
    codeword = tl.arange(0, BLOCK_E)
    column = tl.arange(0, BLOCK_C)
    for space in range(SPACES):
        book = (head // (HEADS // KV_HEADS)) * SPACES + space
        products = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
        for start in range(0, WIDTH, BLOCK_C):
            c = start + column
            where = x + line[:, None] * (SPACES * WIDTH) + space * WIDTH + c[None, :]
            part = tl.load(where, mask=there[:, None] & (c < WIDTH)[None, :], other=0.0)
            where = codebooks + (book * CODEWORDS + codeword)[None, :] * WIDTH + c[:, None]
            mask = (codeword < CODEWORDS)[None, :] & (c < WIDTH)[:, None]
            words = tl.load(where, mask=mask, other=0.0)
            products = tl.dot(part, words, products, input_precision=PRECISION)
        where = norms + book * CODEWORDS + codeword
        norm = tl.load(where, mask=codeword < CODEWORDS, other=float("inf"))
        distance = norm[None, :] - 2 * products
        nearest = distance == tl.min(distance, 1)[:, None]
        code = tl.min(tl.where(nearest, codeword[None, :], BLOCK_E), 1)
        tl.store(codes + line * SPACES + space, code.to(tl.uint8), mask=there)


@triton.jit
@no_type_check
def load_codes(rows, number, valid, stride, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr):
    """Codeword rows; zeros where they are not valid, and beyond their width."""
    column = tl.arange(0, BLOCK_W)
    where = rows + number.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(where, mask=valid[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
@no_type_check
def pq_tile_scores_kernel(
    queries,
    first,
    keys,
    steps,
    seen,
    out,
    LENGTH: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    GROUPS: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    CODES: tl.constexpr,
    CAUSAL: tl.constexpr,
    WORD: tl.constexpr,
    ONE: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Weights of some groups for some queries, key after key of the groups."""
    head, batch = tl.program_id(2) % HEADS, tl.program_id(2) // HEADS
    batches = tl.num_programs(2) // HEADS
    kv_head = head // (HEADS // KV_HEADS)
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    groups = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row_there, group_there = rows < QUERIES, groups < GROUPS
    there = row_there[:, None] & group_there[None, :]
    line = (batch * HEADS + head).to(tl.int64) * QUERIES
    query = load_codes(queries + line * CODES, rows, row_there, CODES, CODES, BLOCK_W)
    step = tl.load(steps + kv_head)
    of_keys = keys + (batch.to(tl.int64) * LENGTH * KV_HEADS + kv_head) * CODES
    end = tl.full((BLOCK,), LENGTH, tl.int32)  # the first key that a query does not see
    if CAUSAL:
        end = tl.minimum(tl.load(first) + rows + 1, LENGTH)
    number = tl.where(tl.program_id(0) * BLOCK * KEY_GROUP < tl.max(end, 0), KEY_GROUP, 0)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for u in range(number):
        key = groups * KEY_GROUP + u
        codes = load_codes(of_keys, key, key < LENGTH, KV_HEADS * CODES, CODES, BLOCK_W)
        score = tl.dot(query, tl.trans(codes))
        away = tl.minimum(tl.maximum(step * score, -LIMIT), LIMIT).to(tl.int32)
        power = (away + ONE).to(tl.float32, bitcast=True)
        visible = key[None, :] < end[:, None]
        if seen is not None:
            word = ((u // WORD) * batches + batch) * QUERIES + rows
            where = seen + word.to(tl.int64)[:, None] * GROUPS + groups[None, :]
            visible &= ((tl.load(where, mask=there, other=0) >> (u % WORD)) & 1) == 1
        total += tl.where(visible, power, 0.0)
    cut = (total.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    where = out + (line + rows)[:, None] * GROUPS + groups[None, :]
    tl.store(where, cut.to(tl.bfloat16), mask=there)


@triton.jit
@no_type_check
def pq_tile_threshold_kernel(
    scores,
    origin,
    level,
    radius,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    GROUPS: tl.constexpr,
    COUNT: tl.constexpr,
    SCORE_BITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Thresholds and tie radii of some rows."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    group = tl.arange(0, BLOCK_G)
    there = rows < ROWS
    where = scores + rows.to(tl.int64)[:, None] * GROUPS + group[None, :]
    mask = there[:, None] & (group < GROUPS)[None, :]
    score = tl.load(where, mask=mask, other=float("-inf"))
    score = tl.where(score >= 0, score, -1.0).to(tl.int32)
    number = tl.sum((score >= 0).to(tl.int32), 1)
    kept = tl.minimum(number, COUNT)
    lowest = tl.zeros((BLOCK_R,), tl.int32)
    for i in range(SCORE_BITS):
        mark = lowest + (1 << (SCORE_BITS - 1 - i))
        enough = tl.sum((score >= mark[:, None]).to(tl.int32), 1) >= kept
        lowest = tl.where(enough, mark, lowest)
    above = tl.sum((score > lowest[:, None]).to(tl.int32), 1)
    d = group[None, :] - tl.load(origin + rows % TILES, mask=there, other=0)[:, None]
    distance = 2 * tl.abs(d) - (d < 0).to(tl.int32)
    distance = tl.where(score == lowest[:, None], distance, 2 * BLOCK_G)
    reach = tl.zeros((BLOCK_R,), tl.int32)  # the most below which there are too few ties
    step: tl.constexpr = BLOCK_G
    width = step
    while width > 0:
        mark = reach + width
        few = tl.sum((distance < mark[:, None]).to(tl.int32), 1) < kept - above
        reach = tl.where(few, mark, reach)
        width = width // 2
    some = number > 0
    tl.store(level + rows, tl.where(some, lowest, 0), mask=there)
    tl.store(radius + rows, tl.where(some, reach, -1), mask=there)


@triton.jit
@no_type_check
def _token_scores(
    step,
    query,
    queries,
    own,
    keys,
    key_tags,
    stride,
    LENGTH: tl.constexpr,
    CODES: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Scores of the keys of a step, and twice their tie distance's size; HIDDEN if not valid."""
    key = step * BLOCK + tl.arange(0, BLOCK)
    rows = load_codes(keys, key, key < LENGTH, stride, CODES, BLOCK_W)
    score = tl.dot(query, tl.trans(rows)).to(tl.int32)
    valid = (key < LENGTH)[None, :]
    d = key[None, :] - queries[:, None]
    if CAUSAL:
        valid = valid & (d <= 0)
    if key_tags is not None:
        tags = tl.load(key_tags + key, mask=key < LENGTH, other=0)
        valid = valid & (tags[None, :] == own[:, None])
    return tl.where(valid, score, HIDDEN), 2 * tl.abs(d) - (d < 0).to(tl.int32)


@triton.jit
@no_type_check
def pq_token_threshold_kernel(
    q_codes,
    k_codes,
    q_tags,
    k_tags,
    level,
    radius,
    LENGTH: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    COUNT: tl.constexpr,
    CODES: tl.constexpr,
    CAUSAL: tl.constexpr,
    SCORE_DIGITS: tl.constexpr,
    DISTANCE_DIGITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Thresholds and tie radii of some queries: four times finer with every pass over the keys."""
    head, batch = tl.program_id(1), tl.program_id(2)
    queries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = queries < LENGTH
    first = batch.to(tl.int64) * LENGTH
    query = load_codes(
        q_codes + (first * HEADS + head) * CODES, queries, there, HEADS * CODES, CODES, BLOCK_W
    )
    keys = k_codes + (first * KV_HEADS + head // (HEADS // KV_HEADS)) * CODES
    stride: tl.constexpr = KV_HEADS * CODES
    own = queries
    key_tags = k_tags
    if k_tags is not None:
        own = tl.load(q_tags + first + queries, mask=there, other=0)
        key_tags = k_tags + first
    steps = tl.cdiv(LENGTH, BLOCK)
    if CAUSAL:
        steps = tl.minimum(steps, tl.program_id(0) + 1)

    number = tl.zeros((BLOCK,), tl.int32)
    for step in range(steps):
        score, _distance = _token_scores(
            step, query, queries, own, keys, key_tags, stride, LENGTH, CODES, CAUSAL, BLOCK,
            BLOCK_W,
        )  # fmt: skip
        number += tl.sum((score > HIDDEN).to(tl.int32), 1)
    kept = tl.minimum(number, COUNT)

    lowest = tl.full((BLOCK,), -(1 << (2 * SCORE_DIGITS - 1)), tl.int32)
    width = 1 << (2 * (SCORE_DIGITS - 1))
    for _digit in range(SCORE_DIGITS):
        one = tl.zeros((BLOCK,), tl.int32)
        two = tl.zeros((BLOCK,), tl.int32)
        three = tl.zeros((BLOCK,), tl.int32)
        for step in range(steps):
            score, _distance = _token_scores(
                step, query, queries, own, keys, key_tags, stride, LENGTH, CODES, CAUSAL, BLOCK,
                BLOCK_W,
            )  # fmt: skip
            rise = score - lowest[:, None]
            one += tl.sum((rise >= width).to(tl.int32), 1)
            two += tl.sum((rise >= 2 * width).to(tl.int32), 1)
            three += tl.sum((rise >= 3 * width).to(tl.int32), 1)
        digit = (one >= kept).to(tl.int32) + (two >= kept).to(tl.int32)
        lowest += (digit + (three >= kept).to(tl.int32)) * width
        width = width // 4

    above = tl.zeros((BLOCK,), tl.int32)
    for step in range(steps):
        score, _distance = _token_scores(
            step, query, queries, own, keys, key_tags, stride, LENGTH, CODES, CAUSAL, BLOCK,
            BLOCK_W,
        )  # fmt: skip
        above += tl.sum((score > lowest[:, None]).to(tl.int32), 1)
    missing = kept - above

    reach = tl.zeros((BLOCK,), tl.int32)  # the most below which there are too few ties
    width = 1 << (2 * (DISTANCE_DIGITS - 1))
    for _digit in range(DISTANCE_DIGITS):
        one = tl.zeros((BLOCK,), tl.int32)
        two = tl.zeros((BLOCK,), tl.int32)
        three = tl.zeros((BLOCK,), tl.int32)
        for step in range(steps):
            score, distance = _token_scores(
                step, query, queries, own, keys, key_tags, stride, LENGTH, CODES, CAUSAL, BLOCK,
                BLOCK_W,
            )  # fmt: skip
            tie = score == lowest[:, None]
            rise = distance - reach[:, None]
            one += tl.sum((tie & (rise < width)).to(tl.int32), 1)
            two += tl.sum((tie & (rise < 2 * width)).to(tl.int32), 1)
            three += tl.sum((tie & (rise < 3 * width)).to(tl.int32), 1)
        digit = (one < missing).to(tl.int32) + (two < missing).to(tl.int32)
        reach += (digit + (three < missing).to(tl.int32)) * width
        width = width // 4

    some = number > 0
    line = (batch * HEADS + head).to(tl.int64) * LENGTH + queries
    tl.store(level + line, tl.where(some, lowest, 0), mask=there)
    tl.store(radius + line, tl.where(some, reach, -1), mask=there)


# Launchers


def encode(
    x: Float[Array, "B S N H"], codebooks: Float[Array, "K M E C"]
) -> UInt8[Array, "B S N M"]:
    """As `pq_encode`; codewords have the type of x."""
    batch, length, heads, _ = x.shape
    kv_heads, spaces, num_codewords, width = codebooks.shape
    if width == 1 and num_codewords <= MAX_UNROLLED:
        return encode_scalars(x, codebooks)
    tokens, block_e = batch * length, t.power_of_two(num_codewords)
    block_t = min(128, ENCODE_ELEMENTS // block_e)
    found = t.launch(
        pq_encode_kernel,
        {"x": x, "codebooks": codebooks, "norms": jnp.sum(codebooks.astype(jnp.float32) ** 2, -1)},
        {"codes": jax.ShapeDtypeStruct((batch, length, heads, spaces), jnp.uint8)},
        name="pq_encode",
        grid=(triton.cdiv(tokens, block_t), heads),
        TOKENS=tokens,
        HEADS=heads,
        KV_HEADS=kv_heads,
        SPACES=spaces,
        CODEWORDS=num_codewords,
        WIDTH=width,
        PRECISION=t.precision(),
        BLOCK_T=block_t,
        BLOCK_E=block_e,
        BLOCK_C=min(32, t.power_of_two(width)),
    )
    return found["codes"]


def _tile_scores(
    queries: Float[Array, "B N U V"],
    first: Int32[Array, ""],
    keys: Float[Array, "B S K V"],
    steps: Float[Array, "K"],
    seen: Int32[Array, "words B U G"] | None,
    *,
    key_group: int,
    causal: bool,
) -> Float[Array, "B N U G"]:
    """See `selection.Kernels`."""
    (batch, heads, rows, width), (_, length, kv_heads, _) = queries.shape, keys.shape
    groups = triton.cdiv(length, key_group)
    found = t.launch(
        pq_tile_scores_kernel,
        {
            "queries": queries,
            "first": first.reshape(1),
            "keys": keys,
            "steps": steps,
            "seen": seen,
        },
        {"out": jax.ShapeDtypeStruct((batch, heads, rows, groups), jnp.bfloat16)},
        name="pq_tile_scores",
        grid=(triton.cdiv(groups, BLOCK), triton.cdiv(rows, BLOCK), batch * heads),
        LENGTH=length,
        HEADS=heads,
        KV_HEADS=kv_heads,
        QUERIES=rows,
        GROUPS=groups,
        KEY_GROUP=key_group,
        CODES=width,
        CAUSAL=causal,
        WORD=selection.WORD,
        ONE=EXPONENT_BIAS << MANTISSA_BITS,
        LIMIT=float(MAX_EXPONENT * 2**MANTISSA_BITS),
        BLOCK=BLOCK,
        BLOCK_W=t.power_of_two(width),
    )
    return found["out"]


def _tile_thresholds(
    scores: Float[Array, "B N Q G"], origin: Int32[Array, "Q"], *, count: int
) -> tuple[Int32[Array, "B N Q"], Int32[Array, "B N Q"]]:
    """See `selection.Kernels`."""
    batch, heads, tiles, groups = scores.shape
    rows, block_g = batch * heads * tiles, t.power_of_two(groups)
    block_r = max(1, THRESHOLD_ELEMENTS // block_g)
    out = jax.ShapeDtypeStruct((batch, heads, tiles), jnp.int32)
    found = t.launch(
        pq_tile_threshold_kernel,
        {"scores": scores, "origin": origin},
        {"level": out, "radius": out},
        name="pq_tile_threshold",
        grid=(triton.cdiv(rows, block_r),),
        num_warps=min(32, max(4, block_r * block_g // 2**10)),
        ROWS=rows,
        TILES=tiles,
        GROUPS=groups,
        COUNT=count,
        SCORE_BITS=(TILE_SCORES - 1).bit_length(),
        BLOCK_R=block_r,
        BLOCK_G=block_g,
    )
    return found["level"], found["radius"]


def _token_thresholds(
    queries: Float[Array, "B S N V"],
    keys: Float[Array, "B S K V"],
    tags: tuple[Int32[Array, "B S"], Int32[Array, "B S"]] | None,
    *,
    count: int,
    causal: bool,
) -> tuple[Int32[Array, "B N S"], Int32[Array, "B N S"]]:
    """See `selection.Kernels`."""
    batch, length, heads, width = queries.shape
    q_tags, k_tags = tags or (None, None)
    out = jax.ShapeDtypeStruct((batch, heads, length), jnp.int32)
    found = t.launch(
        pq_token_threshold_kernel,
        {"q_codes": queries, "k_codes": keys, "q_tags": q_tags, "k_tags": k_tags},
        {"level": out, "radius": out},
        name="pq_token_threshold",
        grid=(triton.cdiv(length, BLOCK), heads, batch),
        LENGTH=length,
        HEADS=heads,
        KV_HEADS=keys.shape[2],
        COUNT=count,
        CODES=width,
        CAUSAL=causal,
        SCORE_DIGITS=SCORE_DIGITS,
        DISTANCE_DIGITS=((2 * length).bit_length() + 1) // 2,
        BLOCK=BLOCK,
        BLOCK_W=t.power_of_two(width),
    )
    return found["level"], found["radius"]


#: As `pq_select`.
select: Any = functools.partial(
    selection.select,
    selection.Kernels(
        dtype=jnp.float16,
        tile_scores=_tile_scores,
        tile_thresholds=_tile_thresholds,
        token_thresholds=_token_thresholds,
    ),
)
