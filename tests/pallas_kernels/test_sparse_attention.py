"""Sparse attention against its specification: the output and every gradient."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.test_util import check_grads

from pallas_kernels import pq_select, scoring_codewords, sparse_attention
from tests.tolerance import assert_close


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
    batch: int = 2


CASES = {
    "grouped_heads": Case(17, heads=4, causal=True, key_mask=True, segments=True),
    "odd": Case(130, heads=3, kv_heads=1, num_keys=17, block_q=64, key_group=32),
    "padded": Case(130, num_keys=16, key_mask=True, block_q=64, key_group=16),
    "groups_across_tiles": Case(70, num_keys=9, causal=True, block_q=24, key_group=16),
    "packed": Case(70, segments=True, block_q=16, key_group=1),
    "several_blocks": Case(900, 2, 1, num_keys=40, causal=True, key_mask=True, batch=1),
}


def inputs(case, seed=0, dtype=jnp.float32):
    """q, k, v, the output's cotangent, codes with codewords, and masks."""
    keys = jax.random.split(jax.random.key(seed), 10)
    shape = case.batch, case.length
    q, k, v, grad = (
        jax.random.normal(key, (*shape, heads, case.width), jnp.float32).astype(dtype)
        for key, heads in zip(
            keys, (case.heads, case.kv_heads, case.kv_heads, case.heads), strict=False
        )
    )
    codes = [
        jax.random.randint(key, (*shape, heads, 2), 0, 6).astype(jnp.uint8)
        for key, heads in zip(keys[4:], (case.heads, case.kv_heads), strict=False)
    ]
    books = [jax.random.normal(key, (case.kv_heads, 2, 6, 3)) for key in keys[6:8]]
    mask = segments = None
    if case.key_mask:
        mask = jax.random.bernoulli(keys[8], 0.7, shape).at[-1, case.length // 4 :].set(False)
    if case.segments:
        segments = jnp.sort(jax.random.randint(keys[9], shape, 0, 3), -1)
    return (q, k, v, grad), (*codes, *scoring_codewords(*books)), (mask, segments)


def attend(case, q, k, v, codes, masks, granularity, implementation):
    """Selection and attention."""
    masks = {"causal": case.causal, "key_mask": masks[0], "segment_ids": masks[1]}
    selection = pq_select(
        *codes,
        num_keys=case.num_keys,
        granularity=granularity,
        block_q=case.block_q,
        key_group=case.key_group,
        **masks,
    )
    return sparse_attention(q, k, v, selection, implementation=implementation, **masks)


def results(case, arrays, codes, masks, granularity, implementation):
    """Output and gradients of q, k and v, compiled."""

    @jax.jit
    def run(q, k, v, grad, codes, masks):
        f = lambda *a: attend(case, *a, codes, masks, granularity, implementation)  # noqa: E731
        out, pullback = jax.vjp(f, q, k, v)
        return out, *pullback(grad)

    return run(*arrays, codes, masks)


@pytest.mark.parametrize("granularity", ["token", "tile"])
@pytest.mark.parametrize("name", CASES)
def test_xla_equals_the_reference(name, granularity):
    case = CASES[name]
    given = inputs(case)
    expected, actual = (
        results(case, *given, granularity, implementation)
        for implementation in ("reference", "xla")
    )
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, case.length)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("granularity", ["token", "tile"])
def test_one_position_attends_to_itself(granularity, implementation):
    case = Case(1, causal=True)
    arrays, codes, masks = inputs(case)
    out, dq, dk, dv = results(case, arrays, codes, masks, granularity, implementation)
    np.testing.assert_allclose(out, arrays[2], rtol=1e-6)
    np.testing.assert_allclose(dv, arrays[3], rtol=1e-6)
    np.testing.assert_allclose(jnp.stack([dq, dk]), 0, atol=1e-6)


@pytest.mark.parametrize("granularity", ["token", "tile"])
def test_bfloat16_accumulates_in_float32(granularity):
    case = CASES["padded"]
    arrays, codes, masks = inputs(case, dtype=jnp.bfloat16)
    exact = [a.astype(jnp.float32) for a in arrays]
    expected = results(case, exact, codes, masks, granularity, "reference")
    actual = results(case, arrays, codes, masks, granularity, "xla")
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        assert_close(a, b, case.length)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("granularity", ["token", "tile"])
def test_keeping_every_key_is_dense_attention(granularity, implementation):
    case = Case(67, heads=4, num_keys=67, causal=True, block_q=16, key_group=8)
    arrays, codes, masks = inputs(case)
    actual = results(case, arrays, codes, masks, granularity, implementation)
    dense = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    out, pullback = jax.vjp(dense, *arrays[:3])
    for a, b in zip(actual, (out, *pullback(arrays[3])), strict=True):
        assert_close(a, b, case.length)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("granularity", ["token", "tile"])
def test_a_query_without_keys_gives_zeros(granularity, implementation):
    case = Case(20)
    arrays, codes, _ = inputs(case)
    mask = jnp.ones((2, 20), bool).at[1].set(False)
    found = results(case, arrays, codes, (mask, None), granularity, implementation)
    for a in found:
        assert np.isfinite(a).all()
        np.testing.assert_array_equal(a[1], 0)
        assert (np.abs(a[0]).sum(-1) > 0).any()


@pytest.mark.parametrize("granularity", ["token", "tile"])
def test_reference_gradients_match_finite_differences(granularity):
    case = CASES["grouped_heads"]
    arrays, codes, masks = inputs(case)
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(np.asarray(a), jnp.float64) for a in arrays[:3])
        f = jax.jit(lambda *a: attend(case, *a, codes, masks, granularity, "reference"))
        assert f(q, k, v).dtype == jnp.float64
        check_grads(f, (q, k, v), order=1, modes=["rev"], eps=1e-5, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("granularity", ["token", "tile"])
def test_under_vmap_checkpoint_and_scan(granularity):
    case = CASES["groups_across_tiles"]
    arrays, codes, masks = inputs(case)

    def gradients(f):
        return jax.jit(jax.grad(lambda *a: jnp.sum(f(*a) * arrays[3]), (0, 1, 2)))(*arrays[:3])

    plain = lambda *a: attend(case, *a, codes, masks, granularity, "xla")  # noqa: E731
    expected = gradients(plain)

    def scanned(*a):
        return jax.lax.scan(lambda _, x: (None, jax.checkpoint(plain)(*x)), None,
                            jax.tree.map(lambda x: x[None], a))[1][0]  # fmt: skip

    def mapped(*a):
        one = lambda q, k, v, codes: attend(  # noqa: E731
            case, q[None], k[None], v[None], (codes[0][None], codes[1][None], *codes_of_heads),
            masks, granularity, "xla",
        )[0]  # fmt: skip
        codes_of_heads = codes[2:]
        return jax.vmap(one)(*a, codes[:2])

    for f in (scanned, mapped):
        for a, b in zip(gradients(f), expected, strict=True):
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


@pytest.fixture
def unhooked():
    """Switches the import hook's own checks off, so that those of the op speak."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("unhooked")
def test_errors_name_the_value():
    case = CASES["odd"]
    (q, k, v, _), codes, _ = inputs(case)
    pick = functools.partial(pq_select, *codes, num_keys=4)
    token, tile = pick(granularity="token"), pick(granularity="tile")
    with pytest.raises(ValueError, match="differ in shape"):
        sparse_attention(q, k, v[:, :9], token)
    with pytest.raises(ValueError, match="do not serve queries"):
        sparse_attention(q[:, :9], k, v, token)
    for selection in (token, tile):
        with pytest.raises(ValueError, match="the selection was made for"):
            sparse_attention(q[:, :9], k[:, :9], v[:, :9], selection)
    with pytest.raises(NotImplementedError, match="'mosaic' is not available"):
        sparse_attention(q, k, v, token, implementation="mosaic")
