"""Sparse attention against its specification: the output and every gradient."""

import dataclasses
import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from pallas_kernels import pq_select, scoring_codewords, sparse_attention
from pallas_kernels.pq import xla as pq_xla
from pallas_kernels.pq.reference import valid_keys
from pallas_kernels.sparse_attention import xla as attention_xla
from tests.tolerance import assert_close

IMPLEMENTATIONS = "reference", "xla"


@dataclasses.dataclass(frozen=True)
class Case:
    length: int
    heads: int = 2
    kv_heads: int = 2
    width: int = 8
    num_keys: int = 5
    causal: bool = False
    key_mask: bool = False
    segments: bool = False
    block_q: int = 8
    key_group: int = 4
    share_heads: bool = False
    batch: int = 2
    limit: int | None = None  # elements of a block, small enough to give several


CASES = {
    "one_position": Case(1, causal=True),
    # two chunks of two key heads, two steps of tiles
    "grouped_heads": Case(17, 4, causal=True, key_mask=True, segments=True, limit=1200),
    # three blocks of eight queries, whose selection comes with a mask
    "mask_in_blocks": Case(17, 4, 1, causal=True, limit=600),
    "every_key": Case(67, heads=3, kv_heads=1, num_keys=67, block_q=24, key_group=16),
    "packed": Case(70, num_keys=16, key_mask=True, segments=True, block_q=16, key_group=1),
    # three blocks of 24 queries, three steps of tiles
    "several_blocks": Case(70, 2, 1, num_keys=9, causal=True, key_mask=True, limit=3400),
    # one list for three heads
    "shared_lists": Case(70, 6, 2, 8, 9, True, True, True, share_heads=True, limit=9000),
    "groups_across_tiles": Case(70, num_keys=9, causal=True, block_q=24, key_group=16, batch=4),
}


@functools.cache
def inputs(case):
    """q, k, v and the output's cotangent, which bfloat16 holds, codes with codewords, and masks."""
    rng = np.random.default_rng(0)
    shape = case.batch, case.length
    arrays = [
        rng.normal(size=(*shape, heads, case.width)).astype(jnp.bfloat16).astype(np.float32)
        for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)
    ]
    codes = [rng.integers(0, 6, (*shape, n, 2), np.uint8) for n in (case.heads, case.kv_heads)]
    books = rng.normal(size=(2, case.kv_heads, 2, 6, 3)).astype(np.float32)
    mask = segments = None
    if case.key_mask:
        mask = rng.random(shape) < 0.7
        mask[0, :2] = False
        mask[-1, case.length // 4 :] = False
    if case.segments:
        segments = np.sort(rng.integers(0, 3, shape, np.int32), -1)
    codewords = jax.jit(scoring_codewords)(*books)
    return (*jax.tree.map(jnp.asarray, (arrays, [*codes, *codewords], (mask, segments))),)


def options(case, masks):
    """The masks as keyword arguments."""
    return {"causal": case.causal, "key_mask": masks[0], "segment_ids": masks[1]}


def select(case, codes, masks, granularity):
    """The keys that the queries keep."""
    return pq_select(
        *codes,
        num_keys=case.num_keys,
        granularity=granularity,
        block_q=case.block_q,
        key_group=case.key_group,
        share_heads=case.share_heads,
        implementation="xla",
        **options(case, masks),
    )


def compiled(case, f, *args):
    """The result of the compiled function, in blocks of at most the elements of the case."""
    if case.limit is None:
        return jax.jit(f)(*args)
    block_shape = functools.partial(pq_xla.block_shape, limit=case.limit)
    with (
        mock.patch.object(pq_xla, "block_shape", block_shape),
        mock.patch.object(attention_xla, "block_shape", block_shape),
        mock.patch.object(attention_xla, "TILE_ELEMENTS", case.limit // 4),
    ):
        return jax.jit(f)(*args)


@functools.cache
def selected(case, granularity):
    """The selection, computed once."""
    _, codes, masks = inputs(case)
    return compiled(
        case, lambda codes, masks: select(case, codes, masks, granularity), codes, masks
    )


@functools.cache
def results(case, granularity, implementation, dtype=jnp.float32):
    """Output and gradients of q, k and v, computed once."""

    def run(q, k, v, grad, selection, masks):
        def attend(q, k, v):
            return sparse_attention(
                q, k, v, selection, implementation=implementation, **options(case, masks)
            )

        out, pullback = jax.vjp(attend, q, k, v)
        return out, *pullback(grad)

    arrays, _, masks = inputs(case)
    arrays = [a.astype(dtype) for a in arrays]
    return compiled(case, run, *arrays, selected(case, granularity), masks)


@pytest.mark.parametrize("granularity", ["token", "tile"])
@pytest.mark.parametrize("name", [name for name in CASES if name != "groups_across_tiles"])
def test_xla_equals_the_reference(name, granularity):
    case = CASES[name]
    expected, actual = (results(case, granularity, i) for i in IMPLEMENTATIONS)
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, case.length)


@pytest.mark.parametrize("granularity", ["token", "tile"])
@pytest.mark.parametrize("name", ["grouped_heads", "packed", "several_blocks"])
def test_a_query_without_keys_gives_zeros(name, granularity):
    case = CASES[name]
    _, _, masks = inputs(case)
    valid = np.asarray(valid_keys(case.length, case.causal, *masks))
    blind, unseen = ~valid.any(2), ~valid.any(1)
    assert blind.any()
    assert unseen.any()
    for implementation in IMPLEMENTATIONS:
        out, dq, dk, dv = (np.asarray(a) for a in results(case, granularity, implementation))
        for a, empty in ((out, blind), (dq, blind), (dk, unseen), (dv, unseen)):
            np.testing.assert_array_equal(a[empty], 0)
            assert (a[~empty] != 0).any()


@pytest.mark.parametrize("granularity", ["token", "tile"])
def test_one_position_attends_to_itself(granularity):
    case = CASES["one_position"]
    arrays, _, _ = inputs(case)
    for implementation in IMPLEMENTATIONS:
        out, dq, dk, dv = results(case, granularity, implementation)
        np.testing.assert_allclose(out, arrays[2], rtol=1e-6)
        np.testing.assert_allclose(dv, arrays[3], rtol=1e-6)
        np.testing.assert_allclose(np.stack([dq, dk]), 0, atol=1e-6)


@pytest.mark.parametrize("granularity", ["token", "tile"])
def test_bfloat16_accumulates_in_float32(granularity):
    case = CASES["packed"]
    expected = results(case, granularity, "reference")
    actual = results(case, granularity, "xla", jnp.bfloat16)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        assert_close(a, b, case.length)


def test_keeping_every_key_is_dense_attention():
    case = CASES["every_key"]

    @jax.jit
    def dense(q, k, v, grad):
        out, pullback = jax.vjp(jax.nn.dot_product_attention, q, k, v)
        return out, *pullback(grad)

    expected = dense(*inputs(case)[0])
    for granularity in ("token", "tile"):
        for implementation in IMPLEMENTATIONS:
            actual = results(case, granularity, implementation)
            for a, b in zip(actual, expected, strict=True):
                assert_close(a, b, case.length)


@pytest.mark.parametrize("granularity", ["token", "tile"])
def test_reference_gradients_match_finite_differences(granularity):
    case = CASES["grouped_heads"]
    arrays, _, masks = inputs(case)
    selection = selected(case, granularity)
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(np.asarray(a), jnp.float64) for a in arrays[:3])
        f = jax.jit(
            lambda *a: sparse_attention(
                *a, selection, implementation="reference", **options(case, masks)
            )
        )
        assert f(q, k, v).dtype == jnp.float64
        check_grads(f, (q, k, v), order=1, modes=["rev"], eps=1e-5, atol=1e-7, rtol=1e-7)


def attend(case, q, k, v, codes, masks, granularity, implementation="xla"):
    """Selection and attention."""
    selection = select(case, codes, masks, granularity)
    return sparse_attention(
        q, k, v, selection, implementation=implementation, **options(case, masks)
    )


@pytest.mark.parametrize("granularity", ["token", "tile"])
def test_under_vmap_checkpoint_and_scan(granularity):
    case = CASES["groups_across_tiles"]
    arrays, codes, masks = inputs(case)

    @jax.checkpoint
    def one(q, k, v, *codes_of_tokens):
        given = [a[None] for a in (q, k, v)], [a[None] for a in codes_of_tokens]
        return attend(case, *given[0], [*given[1], *codes[2:]], masks, granularity)[0]

    def scanned(*a):
        steps = [x.reshape(2, 2, *x.shape[1:]) for x in a]
        out = jax.lax.scan(lambda _, x: (None, jax.vmap(one)(*x)), None, steps)[1]
        return out.reshape(4, *out.shape[2:])

    @jax.jit
    def run(q, k, v, grad):
        out, pullback = jax.vjp(lambda q, k, v: scanned(q, k, v, *codes[:2]), q, k, v)
        return out, *pullback(grad)

    for a, b in zip(run(*arrays), results(case, granularity, "reference"), strict=True):
        assert_close(a, b, case.length)


def test_tile_forms_no_square_array():
    case = Case(4096, heads=1, kv_heads=1, num_keys=512, block_q=64, key_group=16, batch=1,
                causal=True, key_mask=True, segments=True)  # fmt: skip
    arrays, codes, masks = inputs(case)

    def gradients(implementation):
        def loss(q, k, v):
            return attend(case, q, k, v, codes, masks, "tile", implementation).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays[:3])

    def largest(text):
        shapes = re.findall(r"(?:f32|s32|pred|u8|s8)\[([\d,]+)\]", text)
        return max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)

    lowered = gradients("xla")
    assert largest(lowered.compile().as_text()) < case.length**2 // 8
    tensors = re.findall(r"tensor<([\dx]+)x(?:f32|i32|i1|ui8|i8)>", lowered.as_text())
    assert max(int(np.prod([int(n) for n in t.split("x")])) for t in tensors) < case.length**2 // 8
    square = f"{case.length}x{case.length}"
    assert square in gradients("reference").as_text()  # the search would find one


@pytest.mark.usefixtures("unhooked")
def test_errors_name_the_value():
    case = CASES["every_key"]
    (q, k, v, _), _, _ = inputs(case)
    token, tile = selected(case, "token"), selected(case, "tile")
    with pytest.raises(ValueError, match=r"v is float32.*; expected float \[B, S, K, H\] = "):
        sparse_attention(q, k, v[:, :9], token)
    with pytest.raises(ValueError, match=r"k is float32.*; expected float \[B, S, K, H\] = "):
        sparse_attention(q[:, :9], k, v, token)
    for selection in (token, tile):
        with pytest.raises(ValueError, match=r"selection\.(threshold|counts) is int32.*; expected"):
            sparse_attention(q[:, :9], k[:, :9], v[:, :9], selection)
    with pytest.raises(ValueError, match="serves 2 query heads, which is no part of the 3"):
        sparse_attention(q, k, v, dataclasses.replace(tile, heads=2))
