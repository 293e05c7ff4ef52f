"""Public functions of sparse attention: validate, dispatch, delegate."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int8, UInt8

from pallas_kernels import triton
from pallas_kernels.arguments import checked
from pallas_kernels.dispatch import Implementation, call, resolve
from pallas_kernels.pq.types import Selection, TileSelection, check_selection
from pallas_kernels.sparse_attention import decode, mosaic, reference, xla


def _triton_unfit(q: Array, k: Array, v: Array) -> str | None:
    if q.shape[3] > MAX_TRITON_WIDTH:
        return f"it takes heads of width {MAX_TRITON_WIDTH} at most, and got {q.shape[3]}"
    return triton.unfit_dtype(q, k, v)


_BACKENDS: dict[str, Callable[..., Array]] = {
    "mosaic": mosaic.attention,
    "triton": triton.imported("pallas_kernels.sparse_attention.triton", "attention"),
    "xla": xla.attention,
    "reference": reference.attention,
}
MAX_TRITON_WIDTH = 256  # of a head
_DECODE = {"xla": decode.decode, "reference": reference.decode}


@checked()
def sparse_attention(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    selection: Selection,
    *,
    causal: bool = False,
    key_mask: Bool[Array, "B S"] | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B S N H"]:
    """Softmax attention of each query over the valid keys that the selection keeps.

    out[q] = sum_j softmax_j(scale <q, k_j>) v_j over the keys j kept for q, of which those hidden
    by `causal`, `key_mask` or `segment_ids` are dropped: give the same masks as to `pq_select`. A
    query without a key gets zeros and passes no gradient. Query head n reads key head
    n // (N // K). Accumulates in float32. Differentiable in q, k and v; the selection is constant.
    Between forward and backward only q, k, v, the selection, the output and one float32 a query
    and head are kept.

    Args:
      q: Queries.
      k: Keys.
      v: Values.
      selection: Result of `pq_select`.
      causal: Whether a query sees only itself and earlier keys.
      key_mask: False where a key is padding.
      segment_ids: Tokens see only tokens with their own id.
      scale: Factor on the inner products; None for 1 / sqrt(H).
      implementation: The kernel; None for the best supported one.

    Returns:
      The attention output, of q's dtype.

    Raises:
      ValueError: Shapes or types do not fit together.
      NotImplementedError: The implementation does not exist for this op, or cannot run here.
    """
    (batch, length, heads, width), kv_heads = q.shape, k.shape[2]
    if heads % kv_heads:
        raise ValueError(
            f"sparse_attention: {heads} query heads are not a multiple of {kv_heads} key heads."
        )
    if isinstance(selection, TileSelection) and (heads // kv_heads) % selection.heads:
        raise ValueError(
            f"sparse_attention: a list of the selection serves {selection.heads} query heads, "
            f"which is no part of the {heads // kv_heads} of a key head."
        )
    check_selection("sparse_attention", selection, length, B=batch, N=heads, K=kv_heads)
    why_not = {
        "mosaic": functools.partial(mosaic.unfit, q, k, v, selection),
        "triton": functools.partial(_triton_unfit, q, k, v),
    }
    arrays = {
        "q": q,
        "k": k,
        "v": v,
        "selection": selection,
        "key_mask": key_mask,
        "segment_ids": segment_ids,
    }
    return call(
        "sparse_attention",
        resolve("sparse_attention", implementation, _BACKENDS, why_not),
        arrays,
        scale=float(width**-0.5 if scale is None else scale),
        causal=causal,
    )


@checked()
def sparse_decode(
    q: Float[Array, "B N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    query_codes: UInt8[Array, "B N M"],
    key_codes: UInt8[Array, "B K M S"],
    query_codewords: Int8[Array, "K M E W"],
    key_codewords: Int8[Array, "K M E W"],
    *,
    num_keys: int,
    key_mask: Bool[Array, "B S"],
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B N H"]:
    """Selection and attention of one query a sequence, over a cache of keys.

    The same as causal `pq_select` with the token rule and `sparse_attention` at the position of the
    last valid key: the query keeps its min(num_keys, valid) valid keys of highest score, among
    equals the last ones, and takes the softmax over them. Of keys and values only those kept are
    read; the others cost their codes. A query without a valid key gets zeros. Accumulates in
    float32. Not differentiated.

    Args:
      q: Queries.
      k: Cached keys, heads before positions.
      v: Cached values.
      query_codes: Codes of the queries.
      key_codes: Codes of the keys, positions last.
      query_codewords: As `scoring_codewords` returns them.
      key_codewords: As `scoring_codewords` returns them.
      num_keys: Keys that a query keeps; at least 1.
      key_mask: False where a key is padding or not there yet.
      scale: Factor on the inner products; None for 1 / sqrt(H).
      implementation: The kernel; None for the best supported one.

    Returns:
      The attention output, of q's dtype.

    Raises:
      ValueError: Shapes or types do not fit together, or `num_keys` is below 1.
      NotImplementedError: The implementation does not exist for this op.
    """
    (_, heads, width), (_, kv_heads, length, _) = q.shape, k.shape
    if heads % kv_heads:
        raise ValueError(
            f"sparse_decode: {heads} query heads are not a multiple of {kv_heads} key heads."
        )
    if num_keys < 1:
        raise ValueError(f"sparse_decode: num_keys must be at least 1, got {num_keys}.")
    if implementation in ("mosaic", "triton"):
        raise NotImplementedError(
            "sparse_decode: one query a sequence is bound by memory, which leaves a kernel of "
            f"implementation {implementation!r} nothing to gain. Take 'xla', or None."
        )
    return resolve("sparse_decode", implementation, _DECODE)(
        q,
        jnp.asarray(k),
        jnp.asarray(v),
        query_codes,
        key_codes,
        query_codewords,
        key_codewords,
        num_keys=min(num_keys, length),
        key_mask=key_mask,
        scale=width**-0.5 if scale is None else scale,
    )
