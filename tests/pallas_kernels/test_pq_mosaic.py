"""Product quantization's Mosaic GPU kernels in the interpreter, against the specification."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from pallas_kernels import mosaic as m
from pallas_kernels import pq_encode, pq_select, scoring_codewords
from pallas_kernels.pq import mosaic, reference, selection
from tests.pallas_kernels.mosaic import named


def interpret(function, *args):
    """Runs a function in the interpreter, free of races."""
    with m.interpreted(plgpu.InterpretGPUParams(detect_races=True)):
        found = jax.block_until_ready(jax.jit(function)(*args))
    assert not gpu_callbacks.get_races().races_found
    return found


@dataclasses.dataclass(frozen=True)
class Encode:
    width: int
    num_codewords: int
    spaces: int
    tokens: int = 64
    heads: int = 2
    kv_heads: int = 2
    dtype: str = "bfloat16"
    codebooks: str = "float32"
    integers: bool = False


ENCODE = {
    "two_slabs": Encode(4, 16, 8, tokens=70, kv_heads=1),
    "width_2": Encode(2, 16, 16, tokens=70),
    "float16": Encode(8, 16, 8, dtype="float16", heads=1, kv_heads=1),
    "two_products": Encode(16, 20, 2, dtype="float16"),
    "across_threads": Encode(32, 16, 1, tokens=256),
    "same_type": Encode(4, 16, 8, codebooks="bfloat16"),
    "256_codewords": Encode(8, 256, 4, heads=1, kv_heads=1, integers=True),
    "subspaces_of_two_heads": Encode(4, 7, 5, integers=True),
}


@pytest.mark.parametrize("name", named(ENCODE, "width_2"))
def test_encode_finds_the_nearest_and_lowest(name):
    case = ENCODE[name]
    rng = np.random.default_rng(0)
    x_shape = 2, case.tokens // 2, case.heads, case.spaces * case.width
    shape = case.kv_heads, case.spaces, case.num_codewords, case.width
    if case.integers:  # every distance is exact, and many are equal
        x, books = rng.integers(-2, 3, x_shape), rng.integers(-1, 2, shape)
    else:
        x, books = rng.normal(size=x_shape), 0.01 * rng.normal(size=shape)
    x, books = jnp.asarray(x, case.dtype), jnp.asarray(books, case.codebooks)
    codes = interpret(functools.partial(pq_encode, implementation="mosaic"), x, books)
    books = books.astype(x.dtype)
    expected = np.asarray(reference.encode(x, books))
    assert codes.dtype == jnp.uint8
    parts = np.asarray(x, np.float64).reshape(*x.shape[:3], case.spaces, 1, case.width)
    books = np.repeat(np.asarray(books, np.float64), case.heads // case.kv_heads, 0)
    distance = (books**2).sum(-1) - 2 * (parts * books).sum(-1)
    rounding = 2.0**-22 * np.abs(parts * books).sum(-1).max(-1)
    nearest = np.sort(distance, -1)[..., :2]
    clear = nearest[..., 1] - nearest[..., 0] > rounding
    assert clear.mean() > 0.99 or case.integers
    tie = ~clear & (not case.integers)
    np.testing.assert_array_equal(np.where(tie, 0, codes), np.where(tie, 0, expected))


def test_encode_under_vmap_and_checkpoint():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 1, 33, 1, 32)), jnp.bfloat16)
    books = jnp.asarray(rng.normal(size=(1, 4, 16, 8)), jnp.float32)
    run = functools.partial(pq_encode, implementation="mosaic")
    codes = interpret(jax.checkpoint(jax.vmap(run, (0, None))), x, books)
    books = books.astype(x.dtype)
    for found, each in zip(codes, x, strict=True):
        np.testing.assert_array_equal(found, reference.encode(each, books))


@dataclasses.dataclass(frozen=True)
class Select:
    length: int
    num_keys: int = 9
    heads: int = 1
    kv_heads: int = 1
    batch: int = 1
    causal: bool = False
    key_mask: bool = False
    segments: bool = False
    rule: str = "inner_product"
    block_q: int = 64
    key_group: int = 16
    share_heads: bool = False


TOKEN = {
    "one_position": Select(1, causal=True),
    "causal_grouped": Select(130, heads=2, causal=True),
    "padded": Select(70),
    "hidden_sequence": Select(64, batch=2, key_mask=True),
    "packed_ties": Select(64, segments=True, key_mask=True, causal=True, rule="match_count"),
}
TILE = {
    "one_position": Select(1, causal=True, key_group=8),
    "grouped": Select(130, heads=4, kv_heads=2, num_keys=40),
    "causal_8": Select(140, causal=True, key_group=8, num_keys=40),
    "causal_small_tiles": Select(200, causal=True, block_q=24, num_keys=40),
    "shared_heads": Select(
        130, heads=8, kv_heads=2, causal=True, block_q=16, num_keys=40, share_heads=True
    ),
    "packed_32": Select(130, batch=2, segments=True, causal=True, key_group=32, num_keys=40),
    "hidden_64": Select(130, batch=2, key_mask=True, key_group=64, num_keys=64),
    "ties_128": Select(
        300, key_mask=True, segments=True, rule="match_count", block_q=128, key_group=128
    ),
}


@functools.cache
def inputs(case, seed=0):
    """Codes and codewords at random; positions at random and the last sequence are hidden."""
    rng = np.random.default_rng(seed)
    shape = case.batch, case.length
    codes = [rng.integers(0, 6, (*shape, n, 3), np.uint8) for n in (case.heads, case.kv_heads)]
    books = rng.normal(size=(2, case.kv_heads, 3, 6, 2)).astype(np.float32)
    mask = segments = None
    if case.key_mask:
        mask = rng.random(shape) < 0.7
        if case.batch > 1:
            mask[-1] = False
    if case.segments:
        segments = np.sort(rng.integers(0, 3, shape, np.int32), -1)
    codewords = jax.jit(scoring_codewords, static_argnums=2)(*books, case.rule)
    return jax.tree.map(jnp.asarray, ((*codes, *codewords), mask, segments))


def selecting(case, granularity, implementation="mosaic"):
    def run(arrays, mask, segments):
        return pq_select(
            *arrays,
            num_keys=case.num_keys,
            granularity=granularity,
            causal=case.causal,
            key_mask=mask,
            segment_ids=segments,
            block_q=case.block_q,
            key_group=case.key_group,
            share_heads=case.share_heads,
            implementation=implementation,
        )

    return run


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", named(TOKEN, "padded"))
def test_token_equals_the_specification(name):
    case = TOKEN[name]
    expected = jax.jit(selecting(case, "token", "reference"))(*inputs(case))
    assert_equal(interpret(selecting(case, "token"), *inputs(case)), expected)


@pytest.mark.parametrize("name", named(TILE, "grouped"))
def test_tile_equals_the_specification(name):
    case = TILE[name]
    expected = jax.jit(selecting(case, "tile", "reference"))(*inputs(case))
    assert_equal(interpret(selecting(case, "tile"), *inputs(case)), expected)


def test_rings_shorter_than_the_row_and_heads_in_chunks():
    config = mosaic.ThresholdConfig(warpgroups=1, columns=64, stages=1)
    case = Select(130, heads=2, kv_heads=2, causal=True, key_mask=True, num_keys=40, key_group=8)
    with (
        mock.patch.object(mosaic, "token_threshold_config", return_value=config),
        mock.patch.object(mosaic, "tile_threshold_config", return_value=config),
        mock.patch.object(selection, "CHUNK_BYTES", 1),
    ):
        for granularity, each in (
            ("token", dataclasses.replace(case, heads=1, kv_heads=1)),
            ("tile", dataclasses.replace(case, length=520, block_q=512)),
        ):
            expected = jax.jit(selecting(each, granularity, "reference"))(*inputs(each))
            assert_equal(interpret(selecting(each, granularity), *inputs(each)), expected)


@pytest.mark.parametrize("granularity", ["token", "tile"])
def test_selection_under_vmap(granularity):
    case = Select(40, causal=True, num_keys=20, key_group=8, block_q=16)
    batches = [inputs(case, seed) for seed in (1, 2)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *batches)
    found = interpret(jax.vmap(selecting(case, granularity)), *stacked)
    for i, each in enumerate(batches):
        expected = selecting(case, granularity, "reference")(*each)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a[i], b)


@pytest.mark.versions
def test_every_kernel_is_launched_once():
    case = Select(64)
    x, books = jnp.zeros((1, 64, 1, 32), jnp.bfloat16), jnp.zeros((1, 8, 16, 4))
    with m.interpreted():
        jaxprs = {
            "pq_encode": jax.make_jaxpr(pq_encode)(x, books),
            **{
                granularity: jax.make_jaxpr(selecting(case, granularity, None))(*inputs(case))
                for granularity in ("token", "tile")
            },
        }
    for name, jaxpr in (
        ("pq_encode", "pq_encode"),
        ("pq_token_threshold", "token"),
        ("pq_tile_scores", "tile"),
        ("pq_tile_threshold", "tile"),
    ):
        assert str(jaxprs[jaxpr]).count(f" name={name}\n") == 1, name


def test_codeword_rows_are_the_codewords_side_by_side():
    (codes, _, codewords, _), _, _ = inputs(Select(5, heads=4, kv_heads=2))
    rows = np.asarray(selection.codeword_rows(codes, codewords, jnp.bfloat16), np.float32)
    assert rows.shape == (1, 5, 4, 32)
    expected = np.moveaxis(reference.decode(codes, codewords), 1, 2)
    np.testing.assert_array_equal(rows[..., :6], expected)
    np.testing.assert_array_equal(rows[..., 6:], 0)


def test_unfit_arguments_are_named():
    x, books = jnp.zeros((1, 64, 1, 32)), jnp.zeros((1, 8, 16, 4))
    encode = functools.partial(pq_encode, implementation="mosaic")
    arrays, *_ = inputs(Select(64))
    rows = jnp.zeros((1, 3, 128, 128), jnp.int8)
    with m.interpreted():
        with pytest.raises(NotImplementedError, match=r"bfloat16 or float16.* got float32"):
            encode(x, books)
        with pytest.raises(NotImplementedError, match="even width, and got width 3"):
            encode(x[..., :30].astype(jnp.bfloat16), jnp.zeros((1, 10, 16, 3)))
        with pytest.raises(NotImplementedError, match="take 394240 bytes of shared memory"):
            encode(jnp.zeros((1, 64, 1, 512), jnp.bfloat16), jnp.zeros((1, 1, 256, 512)))
        with pytest.raises(NotImplementedError, match=r"key groups of 8, .* and got 4"):
            selecting(Select(64, key_group=4), "tile")(arrays, None, None)
        with pytest.raises(NotImplementedError, match=r"at most 256 .* and got 384"):
            selecting(Select(64), "token")((*arrays[:2], rows, rows), None, None)
        assert "pq_" not in str(jax.make_jaxpr(pq_encode)(x, books))
    with pytest.raises(NotImplementedError, match="compute capability 9"):
        encode(x.astype(jnp.bfloat16), books)
