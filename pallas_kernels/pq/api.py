"""Public functions of product quantization: validate, dispatch, delegate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int8, UInt8

from pallas_kernels import triton
from pallas_kernels.arguments import checked
from pallas_kernels.dispatch import Implementation, call, resolve
from pallas_kernels.pq import mosaic, reference, xla
from pallas_kernels.pq.types import Selection

Granularity = Literal["token", "tile"]
Rule = Literal["inner_product", "match_count"]

MAX_TRITON_ROW = 256  # codeword elements of a token that the kernels take
MAX_GROUPS = 2**16  # key groups of a tile
MAX_QUERIES = 512  # of a list


def _triton_select_unfit(codewords: Array) -> str | None:
    width = codewords.shape[1] * codewords.shape[3]
    if width > MAX_TRITON_ROW:
        return f"it takes at most {MAX_TRITON_ROW} codeword elements a token, and got {width}"
    return None


_ENCODE: dict[str, Callable[..., Array]] = {
    "mosaic": mosaic.encode,
    "triton": triton.imported("pallas_kernels.pq.triton", "encode"),
    "xla": xla.encode,
    "reference": reference.encode,
}
_SELECT: dict[str, Callable[..., Selection]] = {
    "mosaic": mosaic.select,
    "triton": triton.imported("pallas_kernels.pq.triton", "select"),
    "xla": xla.select,
    "reference": reference.select,
}

MAX_SCORE = 2**13 - 1  # of one query and one key
DEFAULT_SCORE_UNIT = 2.0**-8


@checked()
def pq_encode(
    x: Float[Array, "B S N H"],
    codebooks: Float[Array, "K M E C"],
    *,
    implementation: Implementation | None = None,
) -> UInt8[Array, "B S N M"]:
    """Codes of vectors: for each subspace, the index of the nearest codeword.

    code[b, s, n, m] = argmin_e |x[b, s, n, m C : (m + 1) C] - codebooks[n // (N // K), m, e]|^2,
    the lowest index among equals, for codewords rounded to the type of x. Distances are accumulated
    in float32. Not differentiated.

    Args:
      x: Queries or keys.
      codebooks: Codewords, E at most 256 and M C = H; N is a multiple of K.
      implementation: The kernel; None for the best supported one.

    Returns:
      Codes.

    Raises:
      ValueError: Shapes or types do not fit together.
      NotImplementedError: The implementation does not exist for this op, or cannot run here.

    Example:
      >>> import jax.numpy as jnp
      >>> codebooks = jnp.array([0.0, 1.0]).reshape(1, 1, 2, 1)
      >>> pq_encode(jnp.array([0.2, 0.9]).reshape(1, 2, 1, 1), codebooks).ravel().tolist()
      [0, 1]
    """
    check_codebooks("pq_encode", codebooks, *x.shape[2:])
    num_codewords = codebooks.shape[2]
    if not 1 <= num_codewords <= 256:
        raise ValueError(f"pq_encode: codes are uint8, so E must be 1..256, got {num_codewords}.")
    codebooks = codebooks.astype(x.dtype)
    why_not = {
        "mosaic": lambda: mosaic.encode_unfit(x, codebooks),
        "triton": lambda: triton.unfit_dtype(x),
    }
    run = resolve("pq_encode", implementation, _ENCODE, why_not)
    x, codebooks = jax.lax.stop_gradient((x, codebooks))
    return call("pq_encode", run, {"x": x, "codebooks": codebooks})


def check_codebooks(
    op: str, codebooks: Float[Array, "K M E C"], num_heads: int, head_width: int
) -> None:
    """Raises a ValueError unless codebooks serve that many heads of that width."""
    kv_heads, spaces, _, width = codebooks.shape
    if kv_heads < 1 or num_heads % kv_heads:
        raise ValueError(
            f"{op}: {num_heads} heads are not a multiple of the {kv_heads} of the codebooks."
        )
    if spaces * width != head_width:
        raise ValueError(
            f"{op}: {spaces} subspaces of width {width} do not cover the head width {head_width}."
        )


@checked()
def scoring_codewords(
    query_codebooks: Float[Array, "K M E C"],
    key_codebooks: Float[Array, "K M E C"],
    rule: Rule = "inner_product",
) -> tuple[Int8[Array, "K M E W"], Int8[Array, "K M E W"]]:
    """Integer codewords, whose inner products score a key for a query alike on every device.

    `inner_product`: W = C. Dimension j of a head has a_j = max_e |query codeword|, b_j likewise of
    the keys; both sides are brought to r_j = sqrt(a_j b_j), which changes no product, then scaled
    by one factor s a head and rounded, where s sqrt(sum_j r_j^2) = sqrt(8191) - sqrt(H) / 2. By the
    triangle inequality no score then exceeds 8191.
    `match_count`: W = E, one-hot rows; the score is the number of subspaces whose codes agree.

    Args:
      query_codebooks: Codewords of the queries.
      key_codebooks: Codewords of the keys; of the same shape.
      rule: How codes score a key.

    Returns:
      Query and key codewords for `pq_select`.

    Raises:
      ValueError: Shapes or types do not fit together, or the rule is unknown.
    """
    _check_rule("scoring_codewords", rule)
    if rule == "match_count":
        kv_heads, spaces, num_codewords, _ = query_codebooks.shape
        rows = jnp.broadcast_to(
            jnp.eye(num_codewords, dtype=jnp.int8),
            (kv_heads, spaces, num_codewords, num_codewords),
        )
        return rows, rows
    books = [
        jax.lax.stop_gradient(book).astype(jnp.float32) for book in (query_codebooks, key_codebooks)
    ]
    factor, balance = _factors(*books)
    scaled = books[0] * (factor * balance), books[1] * (factor / balance)
    query, key = (jnp.clip(jnp.round(book), -127, 127).astype(jnp.int8) for book in scaled)
    return query, key


@checked()
def score_unit(
    query_codebooks: Float[Array, "K M E C"],
    key_codebooks: Float[Array, "K M E C"],
    rule: Rule = "inner_product",
) -> Float[Array, "K"]:
    """What a score of 1 adds to the exponent of softmax, where that is <q, k> / sqrt(H).

    `inner_product`: 1 / (s^2 sqrt(H)), s as for `scoring_codewords`. `match_count`: 1.

    Args:
      query_codebooks: As given to `scoring_codewords`.
      key_codebooks: As given to `scoring_codewords`.
      rule: How codes score a key.

    Returns:
      A float32 a key head, for `pq_select`.

    Raises:
      ValueError: Shapes or types do not fit together, or the rule is unknown.
    """
    _check_rule("score_unit", rule)
    kv_heads, spaces, _, width = query_codebooks.shape
    if rule == "match_count":
        return jnp.ones(kv_heads, jnp.float32)
    books = jax.lax.stop_gradient((query_codebooks, key_codebooks))
    factor, _ = _factors(*(book.astype(jnp.float32) for book in books))
    return 1 / (factor.reshape(kv_heads) ** 2 * (spaces * width) ** 0.5)


def _check_rule(op: str, rule: str) -> None:
    if rule not in get_args(Rule):
        raise ValueError(f"{op}: unknown rule {rule!r}; choose one of {', '.join(get_args(Rule))}.")


def _factors(
    query_codebooks: Float[Array, "K M E C"], key_codebooks: Float[Array, "K M E C"]
) -> tuple[Float[Array, "K 1 1 1"], Float[Array, "K M 1 C"]]:
    """The factor of both sides of a head, and what moves size from keys to queries."""
    a, b = (
        jnp.max(jnp.abs(book), 2, keepdims=True) + 1e-30
        for book in (query_codebooks, key_codebooks)
    )
    norm = jnp.sqrt(jnp.sum(a * b, (1, 3), keepdims=True))
    width = a.shape[1] * a.shape[3]
    return (MAX_SCORE**0.5 - width**0.5 / 2) / norm, jnp.sqrt(b / a)


@checked()
def pq_select(
    query_codes: UInt8[Array, "B S N M"],
    key_codes: UInt8[Array, "B S K M"],
    query_codewords: Int8[Array, "K M E W"],
    key_codewords: Int8[Array, "K M E W"],
    *,
    num_keys: int,
    granularity: Granularity,
    score_unit: Float[Array, "K"] | None = None,
    causal: bool = False,
    key_mask: Bool[Array, "B S"] | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    block_q: int = 64,
    key_group: int = 16,
    share_heads: bool = False,
    implementation: Implementation | None = None,
) -> Selection:
    """Chooses the keys that each query keeps, from codes alone.

    score(q, k) = sum_m <query_codewords[m, code_q[m]], key_codewords[m, code_k[m]]>, an integer.
    A key is valid for a query if `key_mask` holds there, both have one segment id and, with
    `causal`, it does not come later. Query head n reads key head n // (N // K).

    `token`: each query keeps its min(num_keys, valid) valid keys of highest score; among equals
    those of least tie distance 2 |d| - (d < 0), d = key position - query position. Memory O(S).

    `tile`: tile t of queries t block_q, ... keeps groups of `key_group` consecutive keys, those to
    which its queries are estimated to give most attention. Query q of the tile gives group g

        p(q, g) = sum_k exp(score_unit score(q, k)) / sum_k' exp(score_unit score(q, k'))

    k running over the keys of the group, k' over all keys, that are valid for q; a group's score is
    the sum of p(q, g) over the tile's queries, those that `key_mask` hides left out. A group
    without a valid key is never kept. Among groups of equal score those of least 2 |d| - (d < 0)
    come first, d = g - t block_q // key_group. ceil(num_keys / key_group) groups are kept and, with
    `causal` or `segment_ids`, those that overlap the tile on top, so that no query is without a
    key. A tile of one query reads no later token; one of several does, through the scores of its
    later queries. With `share_heads` the queries of a tile are those of all N / K heads of a key
    head at its positions: they keep one list.

    Every device comes to the same score: 2^x is taken as 2^i (1 + f) for x = i + f, clipped to
    -100..100, which is float32's own bit pattern, and summed over a group's keys in their order, to
    16 bits; from there on shares are integers, whose sums know no order
    (`pallas_kernels.pq.reference.group_shares`); and of a tile's sum the 15 highest bits of the
    mantissa count.

    Not differentiated.

    Args:
      query_codes: Codes of the queries.
      key_codes: Codes of the keys.
      query_codewords: As `scoring_codewords` returns them.
      key_codewords: As `scoring_codewords` returns them.
      num_keys: Keys L that a query keeps; at least 1.
      granularity: "token" or "tile".
      score_unit: What a score of 1 adds to the exponent of softmax, as `score_unit` returns it;
        unused with "token". None for 1/256.
      causal: Whether a query sees only itself and earlier keys.
      key_mask: False where a key is padding.
      segment_ids: Tokens see only tokens with their own id.
      block_q: Positions of a tile, which has at most 512 queries; unused with "token".
      key_group: Keys of a group, of which there are at most 2^16; unused with "token".
      share_heads: Whether the query heads of a key head share a list; unused with "token".
      implementation: The kernel; None for the best supported one.

    Returns:
      A `TokenSelection` or a `TileSelection`.

    Raises:
      ValueError: Shapes or types do not fit together, or an option is out of range.
      NotImplementedError: The implementation does not exist for this op, or cannot run here.
    """
    heads, kv_heads = query_codes.shape[2], key_codes.shape[2]
    if heads % kv_heads:
        raise ValueError(
            f"pq_select: {heads} query heads are not a multiple of {kv_heads} key heads."
        )
    if granularity not in get_args(Granularity):
        raise ValueError(
            f"pq_select: unknown granularity {granularity!r}; choose one of "
            f"{', '.join(get_args(Granularity))}."
        )
    if num_keys < 1:
        raise ValueError(f"pq_select: num_keys must be at least 1, got {num_keys}.")
    if granularity == "tile" and not 1 <= block_q <= MAX_QUERIES:
        raise ValueError(f"pq_select: block_q must be 1..{MAX_QUERIES}, got {block_q}.")
    if granularity == "tile" and share_heads and block_q * (heads // kv_heads) > MAX_QUERIES:
        raise ValueError(
            f"pq_select: a list shared by {heads // kv_heads} heads serves at most {MAX_QUERIES} "
            f"queries; take block_q of at most {MAX_QUERIES // (heads // kv_heads)}, got {block_q}."
        )
    if granularity == "tile" and key_group < 1:
        raise ValueError(f"pq_select: key_group must be at least 1, got {key_group}.")
    if granularity == "tile" and -(-key_codes.shape[1] // key_group) > MAX_GROUPS:
        raise ValueError(
            f"pq_select: {key_codes.shape[1]} keys are more than {MAX_GROUPS} groups of "
            f"key_group={key_group}; take larger groups."
        )
    if score_unit is None:
        score_unit = jnp.full(kv_heads, DEFAULT_SCORE_UNIT, jnp.float32)
    why_not = {
        "mosaic": lambda: mosaic.select_unfit(query_codewords, granularity, key_group),
        "triton": lambda: _triton_select_unfit(query_codewords),
    }
    run = resolve("pq_select", implementation, _SELECT, why_not)
    arrays = {
        "query_codes": query_codes,
        "key_codes": key_codes,
        "query_codewords": query_codewords,
        "key_codewords": key_codewords,
        "score_unit": score_unit.astype(jnp.float32),
        "key_mask": key_mask,
        "segment_ids": segment_ids,
    }
    return call(
        "pq_select",
        run,
        jax.lax.stop_gradient(arrays),
        num_keys=num_keys,
        granularity=granularity,
        causal=causal,
        block_q=block_q,
        key_group=key_group,
        share_heads=share_heads,
    )
