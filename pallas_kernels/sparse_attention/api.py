"""Public function of sparse attention: validate, dispatch, delegate."""

from __future__ import annotations

import functools

from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dispatch import Implementation, resolve
from pallas_kernels.pq.types import Selection, TileSelection
from pallas_kernels.sparse_attention import mosaic, reference, xla

_BACKENDS = {"mosaic": mosaic.attention, "xla": xla.attention, "reference": reference.attention}


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
      ValueError: The shapes do not fit together.
      NotImplementedError: The implementation does not exist for this op, or cannot run here.
    """
    batch, length, heads, width = q.shape
    if k.shape != v.shape:
        raise ValueError(f"sparse_attention: keys {k.shape} and values {v.shape} differ in shape.")
    if k.shape[:2] != (batch, length) or k.shape[3] != width or heads % k.shape[2]:
        raise ValueError(
            f"sparse_attention: keys {k.shape} do not serve queries {q.shape}: batch, length and "
            "head width must agree and query heads be a multiple of key heads."
        )
    if isinstance(selection, TileSelection):
        expected = (batch, heads, -(-length // selection.block_q))
        found = selection.counts.shape
    else:
        expected, found = (batch, heads, length), selection.threshold.shape
    if found != expected:
        raise ValueError(
            f"sparse_attention: the selection was made for [B, N, ...] = {found}, but queries "
            f"{q.shape} need {expected}."
        )
    unfit = functools.partial(mosaic.unfit, q, k, v, selection)
    return resolve("sparse_attention", implementation, _BACKENDS, unfit)(
        q,
        k,
        v,
        selection,
        scale=width**-0.5 if scale is None else scale,
        causal=causal,
        key_mask=key_mask,
        segment_ids=segment_ids,
    )
