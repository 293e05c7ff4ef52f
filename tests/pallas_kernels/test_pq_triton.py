"""Product quantization's Triton kernels against the specification, bit for bit."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import pq_encode
from pallas_kernels.pq import reference, selection
from tests.pallas_kernels import test_pq, triton
from tests.pallas_kernels.test_pq import assert_equal
from tests.pallas_kernels.test_pq_mosaic import TILE, TOKEN, Encode, Select, inputs, selecting

pytestmark = [pytest.mark.triton, triton.needs_triton]

ENCODE = {
    "width_2": Encode(2, 16, 16, tokens=70, dtype=triton.half()),
    "width_3": Encode(3, 5, 7, tokens=70, kv_heads=1, dtype="float32"),
    "across_steps": Encode(40, 16, 1, tokens=130, dtype="float32"),
    "256_codewords": Encode(8, 256, 4, heads=1, kv_heads=1, integers=True, dtype=triton.half()),
    "ties": Encode(4, 7, 5, integers=True, dtype="float32"),
}
CASES = [
    ("token", "everything"),
    ("token", "grouped_heads"),
    ("tile", "packed"),  # groups of one key
    ("tile", "several_blocks"),
    ("tile", "everything"),
]
HOPPER = [("token", name) for name in TOKEN] + [("tile", name) for name in TILE]


@pytest.mark.parametrize("name", ENCODE)
def test_encode_finds_the_nearest_and_lowest(name):
    case = ENCODE[name]
    rng = np.random.default_rng(0)
    x_shape = 2, case.tokens // 2, case.heads, case.spaces * case.width
    shape = case.kv_heads, case.spaces, case.num_codewords, case.width
    if case.integers:  # every distance is exact, and many are equal
        x, books = rng.integers(-2, 3, x_shape), rng.integers(-1, 2, shape)
    else:
        x, books = rng.normal(size=x_shape), 0.01 * rng.normal(size=shape)
    x, books = jnp.asarray(x, case.dtype), jnp.asarray(books, case.dtype)
    codes = jax.jit(functools.partial(pq_encode, implementation="triton"))(x, books)
    assert codes.dtype == jnp.uint8
    parts = np.asarray(x, np.float64).reshape(*x.shape[:3], case.spaces, 1, case.width)
    exact = np.repeat(np.asarray(books, np.float64), case.heads // case.kv_heads, 0)
    distance = (exact**2).sum(-1) - 2 * (parts * exact).sum(-1)
    nearest = np.sort(distance, -1)[..., :2]
    clear = nearest[..., 1] - nearest[..., 0] > 2.0**-22 * np.abs(parts * exact).sum(-1).max(-1)
    assert clear.mean() > 0.99 or case.integers
    tie = ~clear & (not case.integers)
    expected = np.asarray(reference.encode(x, books))
    np.testing.assert_array_equal(np.where(tie, 0, codes), np.where(tie, 0, expected))


@pytest.mark.parametrize(("granularity", "name"), CASES)
def test_select_equals_the_specification(granularity, name):
    case = test_pq.CASES[name]
    actual, expected = (
        test_pq.selected(case, granularity, implementation)
        for implementation in ("triton", "reference")
    )
    assert_equal(actual, expected)


@pytest.mark.parametrize(("granularity", "name"), HOPPER)
def test_select_at_the_sizes_of_hopper(granularity, name):
    case = {"token": TOKEN, "tile": TILE}[granularity][name]
    expected = jax.jit(selecting(case, granularity, "reference"))(*inputs(case))
    assert_equal(jax.jit(selecting(case, granularity, "triton"))(*inputs(case)), expected)


def test_heads_in_chunks():
    case = Select(130, heads=2, kv_heads=2, causal=True, key_mask=True, num_keys=40, key_group=3)
    with mock.patch.object(selection, "CHUNK_BYTES", 1):
        expected = jax.jit(selecting(case, "tile", "reference"))(*inputs(case))
        assert_equal(jax.jit(selecting(case, "tile", "triton"))(*inputs(case)), expected)


@pytest.mark.parametrize("granularity", ["token", "tile"])
def test_selection_under_vmap(granularity):
    case = Select(40, causal=True, num_keys=20, key_group=8, block_q=16)
    batches = [inputs(case, seed) for seed in (1, 2)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *batches)
    found = jax.jit(jax.vmap(selecting(case, granularity, "triton")))(*stacked)
    for i, each in enumerate(batches):
        expected = selecting(case, granularity, "reference")(*each)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a[i], b)


def test_every_kernel_is_launched_once():
    case = Select(64)
    x, books = jnp.zeros((1, 64, 1, 32)), jnp.zeros((1, 8, 16, 4))
    encode = functools.partial(pq_encode, implementation="triton")
    assert triton.launches(encode, x, books) == {"pq_encode": 1}
    token = triton.launches(selecting(case, "token", "triton"), *inputs(case))
    assert token == {"pq_token_threshold": 1}
    tile = triton.launches(selecting(case, "tile", "triton"), *inputs(case))
    assert tile == {"pq_tile_scores": 1, "pq_tile_threshold": 1}


def test_unfit_arguments_are_named():
    arrays, *_ = inputs(Select(64))
    rows = jnp.zeros((1, 3, 128, 128), jnp.int8)
    with pytest.raises(NotImplementedError, match=r"at most 256 codeword elements.* got 384"):
        selecting(Select(64), "token", "triton")((*arrays[:2], rows, rows), None, None)
