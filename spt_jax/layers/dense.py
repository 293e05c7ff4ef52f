"""Attention to all keys: cuDNN's kernel, or plain JAX, block by block where sequences are long.

By blocks, no array has an axis of queries and one of keys that are as long as the sequence: the
output and each query's log-sum-exp are kept, and the backward pass computes the weights again, as
in Dao et al., "FlashAttention", arXiv 2205.14135.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial, reduce
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from pallas_kernels import devices, dispatch
from pallas_kernels.arguments import checked
from spt_jax import sharding

DenseImplementation = Literal["xla", "cudnn"]
"""How `dense_attention` is computed."""

#: Longest sequences whose logits are formed at once, which takes no longer there.
_WHOLE_LENGTH = 192
_BLOCK = 256  # most positions of a block of queries, or of keys
_BLOCK_ROWS = 768  # most rows of logits: queries of a block times query heads of a key head
#: Elements of a step's logits on an accelerator, whose steps take several heads at once.
_STEP_ELEMENTS = 2**25
_LEAST = -1e30  # below every logit, and finite, so that differences are


@checked()
def dense_attention(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    causal: bool = False,
    window: int | None = None,
    key_mask: Bool[Array, "B S"] | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    implementation: DenseImplementation | None = None,
) -> Float[Array, "B S N H"]:
    """Softmax attention over all valid keys; a query without one gets zeros.

    Under a mesh, each device attends from its sequences; and from its heads, where the mesh divides
    the key heads.

    Args:
        q: queries.
        k: keys; query head n attends to key head `n // (N / K)`.
        v: values.
        causal: whether a query sees only itself and earlier keys.
        window: keys that a query of causal attention sees, itself included; None for all.
        key_mask: False where a key is padding.
        segment_ids: tokens see only tokens with their own id.
        implementation: "xla" in plain JAX, in memory linear in S; "cudnn" for the kernel of GPUs,
            for which a key mask or segments become an array `[B, S, S]`; None for "cudnn" where it
            can run, else "xla".

    Raises:
        ValueError: shapes or types do not fit together, there is no such implementation, or a
            window without causal attention.
        NotImplementedError: the implementation cannot run.
    """
    check_heads(q.shape[2], k.shape[2])
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"dense_attention: q is {q.dtype}, k {k.dtype} and v {v.dtype}; cast them to one type"
        )
    check_window(window, causal=causal)
    masked = key_mask is not None or segment_ids is not None
    run = partial(
        dispatch.call, "dense_attention", _resolve(implementation, q, masked=masked),
        causal=causal, window=window,
    )  # fmt: skip

    def attend(*arrays: Any) -> jax.Array:
        names = ("q", "k", "v", "key_mask", "segment_ids")
        return run(dict(zip(names, arrays, strict=True)))

    batch = sharding.fitting(k.shape, sharding.BATCH)
    heads = sharding.fitting(k.shape, sharding.BATCH, None, sharding.TENSOR)
    specs = heads, heads, heads, batch, batch
    return sharding.locally(attend, specs, heads)(q, k, v, key_mask, segment_ids)


@checked()
def dense_decode(
    q: Float[Array, "B N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    key_mask: Bool[Array, "B S"],
) -> Float[Array, "B N H"]:
    """Softmax attention of one query a sequence, which has a valid key, over a cache."""
    batch, kv_heads, _, width = k.shape
    check_heads(q.shape[1], kv_heads)
    queries = q.reshape(batch, kv_heads, -1, width)
    logits = jnp.einsum("bkrh,bksh->bkrs", queries, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(key_mask[:, None, None], width**-0.5 * logits, -jnp.inf))
    out = jnp.einsum(
        "bkrs,bksh->bkrh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return out.reshape(q.shape).astype(q.dtype)


def check_heads(num_heads: int, num_kv_heads: int) -> None:
    """Raises a ValueError unless key heads serve equal numbers of query heads."""
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"{num_heads} query heads cannot be shared evenly by {num_kv_heads} key/value heads"
        )


def check_window(window: int | None, *, causal: bool) -> None:
    """Raises a ValueError unless a window holds a key, and attention is causal."""
    if window is None:
        return
    if window < 1:
        raise ValueError(f"a window must hold at least 1 key, got {window}")
    if not causal:
        raise ValueError(f"a window of {window} keys needs causal attention")


def why_not_cudnn(q: jax.Array | jax.ShapeDtypeStruct, *, masked: bool) -> str | None:
    """Why cuDNN cannot attend from these queries on the default device; None if it can.

    Args:
        q: queries `[B, S, N, H]`.
        masked: whether there is a key mask, or segments.
    """
    capability = devices.compute_capability()
    if capability is None or capability < (8, 0):
        return (
            f"it needs a GPU of compute capability 8.0 or later; the device is {devices.describe()}"
        )
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 or float16, and got {q.dtype}"
    length, width = q.shape[1], q.shape[3]
    widest = 128 if capability < (9, 0) else 256
    if width % 8 or width > widest:
        return f"it takes heads whose width is a multiple of 8 up to {widest}, and got {width}"
    if masked and length % 2:
        return f"with a key mask or segments it takes sequences of even length, and got {length}"
    return None


def _resolve(implementation: str | None, q: jax.Array, *, masked: bool) -> Callable[..., jax.Array]:
    """The function that attends."""
    choices = get_args(DenseImplementation)
    if implementation not in (None, *choices):
        raise ValueError(
            f"dense_attention: unknown implementation {implementation!r}; choose one of "
            f"{', '.join(choices)}, or None for the best that can run"
        )
    if implementation == "xla":
        return _plain
    reason = why_not_cudnn(q, masked=masked)
    if reason is None:
        return _cudnn
    if implementation == "cudnn":
        raise NotImplementedError(
            f"dense_attention: implementation 'cudnn' cannot run: {reason}. Take 'xla', or None "
            "for the best that can"
        )
    return _plain


def _at_once(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    key_mask: Bool[Array, "B S"] | None,
    segment_ids: Int[Array, "B S"] | None,
    *,
    causal: bool,
    window: int | None,
    implementation: DenseImplementation,
) -> Float[Array, "B S N H"]:
    """Attention by `jax.nn.dot_product_attention`, whose rows without a valid key are not zeros."""
    mask = None
    if key_mask is not None:
        mask = key_mask[:, None, None, :]
    if segment_ids is not None:
        same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        mask = same if mask is None else mask & same
    if mask is not None:  # cuDNN broadcasts over heads alone
        mask = jnp.broadcast_to(mask, (len(q), 1, q.shape[1], k.shape[1]))
    out = jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=causal, implementation=implementation,
        local_window_size=None if window is None else (window - 1, 0),
    )  # fmt: skip
    if mask is None:
        return out
    if causal:
        reach = jnp.tri(q.shape[1], dtype=bool)
        if window is not None:
            reach &= ~jnp.tri(q.shape[1], k=-window, dtype=bool)
        mask = mask & reach
    return jnp.where(mask.any(-1)[:, 0, :, None, None], out, 0)


def _cudnn(**arguments: Any) -> jax.Array:
    return _at_once(**arguments, implementation="cudnn")


def _plain(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    key_mask: Bool[Array, "B S"] | None,
    segment_ids: Int[Array, "B S"] | None,
    *,
    causal: bool,
    window: int | None,
) -> Float[Array, "B S N H"]:
    """Attention in plain JAX, at once or by blocks."""
    length = q.shape[1]
    # CPUs lack the products in float16 that `jax.nn.dot_product_attention` asks for.
    if length <= _WHOLE_LENGTH and q.dtype != jnp.float16:
        return _at_once(
            q, k, v, key_mask, segment_ids, causal=causal, window=window, implementation="xla"
        )
    tiling = _tiling(q.shape, k.shape[2], causal=causal, window=window)
    if not causal and key_mask is None and length % tiling.keys:
        key_mask = jnp.ones(q.shape[:2], bool)
    return _blockwise(tiling, q, k, v, key_mask, segment_ids)


# By blocks


class Tiling(NamedTuple):
    """How queries and keys are cut into blocks, and which of them meet.

    Attributes:
        batch: sequences B.
        length: positions S.
        kv_heads: key heads K.
        heads: sequences times key heads of a step, which divide B K.
        queries: positions of a block of queries.
        keys: of a block of keys.
        causal: whether a query sees only itself and earlier keys.
        window: keys that it sees at most; None for all.
    """

    batch: int
    length: int
    kv_heads: int
    heads: int
    queries: int
    keys: int
    causal: bool
    window: int | None

    @property
    def meetings(self) -> Int[np.ndarray, "P 2"]:
        """Numbers of a block of queries and one of keys, wherever one sees the other."""
        first_q, first_k = (np.arange(0, self.length, block) for block in (self.queries, self.keys))
        ahead = first_q[:, None] - first_k  # of the first query before the first key
        met = np.ones(ahead.shape, bool)
        if self.causal:
            met &= ahead > -self.queries
        if self.window is not None:
            met &= ahead - (self.keys - 1) < self.window
        return np.argwhere(met).astype(np.int32)


def _tiling(shape: tuple[int, ...], kv_heads: int, *, causal: bool, window: int | None) -> Tiling:
    """Blocks that a CPU's caches hold, of a head each; on an accelerator, of many heads."""
    batch, length, heads, _ = shape
    rows, pairs = heads // kv_heads, batch * kv_heads

    def even(most: int) -> int:  # blocks of like size, so that little is padded
        return -(-length // (16 * -(-length // most))) * 16

    queries, keys = even(min(_BLOCK, max(32, _BLOCK_ROWS // rows))), even(_BLOCK)
    together = 1
    if devices.default_device().platform != "cpu":
        most = max(1, _STEP_ELEMENTS // (queries * rows * keys))
        together = max(n for n in range(1, min(most, pairs) + 1) if pairs % n == 0)
    return Tiling(batch, length, kv_heads, together, queries, keys, causal, window)


def _blocks(
    a: Shaped[Array, "B S N ..."], tiling: Tiling, block: int
) -> Shaped[Array, "C T g m ..."]:
    """Cuts an array with heads into blocks of positions; those past the end are zeros.

    C steps' worth of g sequences times key heads, T blocks of positions, m = N / K * block rows.
    """
    batch, length, heads, *rest = a.shape
    number = -(-length // block)
    a = jnp.pad(a, ((0, 0), (0, number * block - length), *((0, 0),) * (a.ndim - 2)))
    a = a.reshape(batch, number, block, tiling.kv_heads, heads // tiling.kv_heads, *rest)
    a = jnp.moveaxis(a, (3, 1, 4, 2), (1, 2, 3, 4))
    return a.reshape(-1, tiling.heads, number, a.shape[3] * block, *rest).swapaxes(1, 2)


def _joined(
    a: Shaped[Array, "C T g m ..."], tiling: Tiling, block: int
) -> Shaped[Array, "B S N ..."]:
    """The inverse of `_blocks`."""
    number, rest = a.shape[1], a.shape[4:]
    a = a.swapaxes(1, 2).reshape(tiling.batch, tiling.kv_heads, number, -1, block, *rest)
    a = jnp.moveaxis(a, (1, 2, 3, 4), (3, 1, 4, 2))
    return a.reshape(tiling.batch, number * block, -1, *rest)[:, : tiling.length]


class Masks(NamedTuple):
    """What says which keys a query sees, but for its own position; None where it does not matter.

    Attributes:
        keys: False where a key is padding, `[C, Tk, g, keys]`.
        query_segments: `[C, Tq, g, queries]`.
        key_segments: `[C, Tk, g, keys]`.
    """

    keys: jax.Array | None
    query_segments: jax.Array | None
    key_segments: jax.Array | None


def _masks(
    tiling: Tiling, key_mask: Bool[Array, "B S"] | None, segment_ids: Int[Array, "B S"] | None
) -> Masks:
    def blocks(a: jax.Array | None, block: int) -> jax.Array | None:
        if a is None:
            return None
        return _blocks(jnp.repeat(a[:, :, None], tiling.kv_heads, 2), tiling, block)

    return Masks(
        blocks(key_mask, tiling.keys),
        blocks(segment_ids, tiling.queries),
        blocks(segment_ids, tiling.keys),
    )


def _steps(tiling: Tiling, masks: Masks) -> tuple[Int[Array, "P 3"], Int[Array, ""] | int]:
    """Heads, block of queries and block of keys of each step; and how many steps there are.

    Blocks that padding or segments keep apart have no step: theirs are at the end.
    """
    meetings = tiling.meetings
    chunks = tiling.batch * tiling.kv_heads // tiling.heads
    first = np.repeat(np.arange(chunks, dtype=np.int32), len(meetings))
    steps = jnp.asarray(np.column_stack([first, np.tile(meetings, (chunks, 1))]))
    if masks.keys is None and masks.key_segments is None:
        return steps, len(steps)
    heads, queries, keys = steps.T
    seen = jnp.ones(len(steps), bool)
    if masks.keys is not None:
        seen &= masks.keys.any((2, 3))[heads, keys]
    if masks.query_segments is not None and masks.key_segments is not None:
        ours, theirs = masks.query_segments, masks.key_segments
        kept = True if masks.keys is None else masks.keys
        limits = jnp.iinfo(theirs.dtype)
        least = jnp.min(theirs, (2, 3), where=kept, initial=limits.max)[heads, keys]
        largest = jnp.max(theirs, (2, 3), where=kept, initial=limits.min)[heads, keys]
        seen &= ours.max((2, 3))[heads, queries] >= least
        seen &= ours.min((2, 3))[heads, queries] <= largest
    return steps[jnp.argsort(~seen)], seen.sum()


def _at(a: jax.Array, heads: jax.Array, block: jax.Array) -> jax.Array:
    """One block, `[g, ...]`, of `[C, T, g, ...]`."""
    return jax.lax.dynamic_slice(a, _start(a, heads, block), (1, 1, *a.shape[2:]))[0, 0]


def _put(a: jax.Array, x: jax.Array, heads: jax.Array, block: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(a, x[None, None], _start(a, heads, block))


def _start(a: jax.Array, heads: jax.Array, block: jax.Array) -> list[jax.Array | int]:
    return [heads, block, *[0] * (a.ndim - 2)]


_dot = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _logits(
    tiling: Tiling,
    masks: Masks,
    step: Int[Array, "3"],
    q: Float[Array, "g m H"],
    k_transposed: Float[Array, "g H keys"],
) -> Float[Array, "g m keys"]:
    """Scaled inner products of a block of queries and one of keys; -inf where a key is not seen."""
    heads, i, j = step
    logits = q.shape[-1] ** -0.5 * _dot("gmh,ghk->gmk", q, k_transposed)
    query = i * tiling.queries + jnp.arange(tiling.queries)
    distance = query[:, None] - (j * tiling.keys + jnp.arange(tiling.keys))
    seen = []
    if tiling.causal:
        seen.append(distance >= 0)
    if tiling.window is not None:
        seen.append(distance < tiling.window)
    if masks.keys is not None:
        seen.append(_at(masks.keys, heads, j)[:, None, None])
    if masks.query_segments is not None and masks.key_segments is not None:
        ours, theirs = _at(masks.query_segments, heads, i), _at(masks.key_segments, heads, j)
        seen.append((ours[:, :, None] == theirs[:, None])[:, None])
    if not seen:
        return logits
    by_row = logits.reshape(len(q), -1, tiling.queries, tiling.keys)
    return jnp.where(reduce(operator.and_, seen), by_row, -jnp.inf).reshape(logits.shape)


# What the backward pass needs: arguments, output and log-sum-exp.
Saved = tuple[
    jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array | None, jax.Array, jax.Array
]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(
    tiling: Tiling,
    q: Float[Array, "B S N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    key_mask: Bool[Array, "B S"] | None,
    segment_ids: Int[Array, "B S"] | None,
) -> Float[Array, "B S N H"]:
    return _forward(tiling, q, k, v, key_mask, segment_ids)[0]


def _forward(
    tiling: Tiling,
    q: Float[Array, "B S N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    key_mask: Bool[Array, "B S"] | None,
    segment_ids: Int[Array, "B S"] | None,
) -> tuple[Float[Array, "B S N H"], Saved]:
    masks = _masks(tiling, key_mask, segment_ids)
    steps, number = _steps(tiling, masks)
    queries = _blocks(q, tiling, tiling.queries)
    keys = _blocks(k, tiling, tiling.keys).swapaxes(-1, -2)
    values = _blocks(v, tiling, tiling.keys)

    def run(index: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        out, top, total = sums
        heads, i, j = steps[index]
        logits = _logits(tiling, masks, steps[index], _at(queries, heads, i), _at(keys, heads, j))
        before = _at(top, heads, i)
        after = jnp.maximum(before, logits.max(-1))
        # Serves a sum and a product; XLA would compute it again for either.
        weights = jax.lax.optimization_barrier(jnp.exp(logits - after[..., None]))
        shrunk = jnp.exp(before - after)
        added = _dot("gmk,gkh->gmh", weights.astype(v.dtype), _at(values, heads, j))
        return (
            _put(out, shrunk[..., None] * _at(out, heads, i) + added, heads, i),
            _put(top, after, heads, i),
            _put(total, shrunk * _at(total, heads, i) + weights.sum(-1), heads, i),
        )

    zeros = jnp.zeros(queries.shape[:-1], jnp.float32)
    start = jnp.zeros(queries.shape, jnp.float32), zeros + _LEAST, zeros
    out, top, total = jax.lax.fori_loop(0, number, run, start)
    lse = jnp.where(total > 0, top + jnp.log(total), jnp.inf)
    out = out / jnp.where(total > 0, total, 1)[..., None]
    out = _joined(out.astype(q.dtype), tiling, tiling.queries)
    return out, (q, k, v, key_mask, segment_ids, out, lse)


def _backward(
    tiling: Tiling, saved: Saved, grad: Float[Array, "B S N H"]
) -> tuple[jax.Array, jax.Array, jax.Array, None, None]:
    q, k, v, key_mask, segment_ids, out, lse = saved
    # Else XLA would turn queries and keys in the forward pass, and keep them both ways.
    q, k, v, grad = jax.lax.optimization_barrier((q, k, v, grad))
    masks = _masks(tiling, key_mask, segment_ids)
    steps, number = _steps(tiling, masks)
    delta = jnp.sum(out.astype(jnp.float32) * grad.astype(jnp.float32), -1)
    delta, queries, grads = (_blocks(a, tiling, tiling.queries) for a in (delta, q, grad))
    keys, values = (_blocks(a, tiling, tiling.keys) for a in (k, v))
    # Products are fastest along rows of logits, so that gradients of keys and values come about
    # transposed, from queries and gradients that are.
    transposed = [a.swapaxes(-1, -2) for a in (queries, grads, keys, values)]

    def run(index: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        dq, dk, dv = sums
        heads, i, j = steps[index]
        q_turned, grad_turned = (_at(a, heads, i) for a in transposed[:2])
        k_turned, v_turned = (_at(a, heads, j) for a in transposed[2:])
        logits = _logits(tiling, masks, steps[index], _at(queries, heads, i), k_turned)
        # Each serves two products; XLA would compute it again for either.
        weights = jax.lax.optimization_barrier(jnp.exp(logits - _at(lse, heads, i)[..., None]))
        slopes = _dot("gmh,ghk->gmk", _at(grads, heads, i), v_turned)
        slopes = weights * (slopes - _at(delta, heads, i)[..., None])
        slopes = jax.lax.optimization_barrier(slopes.astype(q.dtype))
        from_keys = _dot("gmk,gkh->gmh", slopes, _at(keys, heads, j))
        from_queries = _dot("ghm,gmk->ghk", q_turned, slopes)
        from_grads = _dot("ghm,gmk->ghk", grad_turned, weights.astype(q.dtype))
        return (
            _put(dq, _at(dq, heads, i) + from_keys, heads, i),
            _put(dk, _at(dk, heads, j) + from_queries, heads, j),
            _put(dv, _at(dv, heads, j) + from_grads, heads, j),
        )

    shapes = queries.shape, transposed[2].shape, transposed[3].shape
    start = tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)
    dq, dk, dv = jax.lax.fori_loop(0, number, run, start)
    scale = q.shape[-1] ** -0.5
    return (
        _joined((scale * dq).astype(q.dtype), tiling, tiling.queries),
        _joined((scale * dk).swapaxes(-1, -2).astype(k.dtype), tiling, tiling.keys),
        _joined(dv.swapaxes(-1, -2).astype(v.dtype), tiling, tiling.keys),
        None,
        None,
    )


_blockwise.defvjp(_forward, _backward)
