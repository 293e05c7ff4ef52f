"""Dense attention: against a masked softmax, at awkward sizes, in memory linear in the length."""

from __future__ import annotations

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import devices
from spt_jax.layers import dense, dense_attention
from tests.jaxprs import equations
from tests.tolerance import assert_close

BATCH = 2
BOTH = list(itertools.product([False, True], repeat=2))


def reference(q, k, v, *, causal=False, window=None, key_mask=None, segment_ids=None):
    """Softmax over all keys in float32; rows without a valid key are zeros."""
    q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
    length, rows = q.shape[1], q.shape[2] // k.shape[2]
    distance = np.arange(length)[:, None] - np.arange(length)
    valid = np.ones((1, length, length), bool)
    if causal:
        valid = valid & (distance >= 0)
    if window is not None:
        valid = valid & (distance < window)
    if key_mask is not None:
        valid = valid & key_mask[:, None]
    if segment_ids is not None:
        valid = valid & (segment_ids[:, :, None] == segment_ids[:, None])
    k, v = (jnp.repeat(a, rows, 2) for a in (k, v))
    logits = jnp.einsum("bqnh,bknh->bnqk", q, k, precision="highest") * q.shape[-1] ** -0.5
    some = jnp.any(valid, -1)[:, None, :, None]
    weights = jax.nn.softmax(jnp.where(valid[:, None] | ~some, logits, -jnp.inf))
    return jnp.einsum("bnqk,bknh->bqnh", jnp.where(some, weights, 0), v, precision="highest")


def inputs(length, heads, kv_heads, width=8, dtype=jnp.float32, seed=0):
    """Queries, keys, values, and a gradient of the output."""
    keys = jax.random.split(jax.random.key(seed), 4)
    return tuple(
        jax.random.normal(key, (BATCH, length, number, width), dtype)
        for key, number in zip(keys, (heads, kv_heads, kv_heads, heads), strict=True)
    )


def masks_of(length, *, padding=False, packed=False):
    """A mask with holes, whose second row begins with padding; and segments of random lengths."""
    rng = np.random.default_rng(length)
    masks = {}
    if padding:
        mask = rng.random((BATCH, length)) < 0.8
        mask[1, : length // 2] = False
        masks["key_mask"] = jnp.asarray(mask)
    if packed:
        starts = rng.random((BATCH, length)) < 6 / length
        masks["segment_ids"] = jnp.asarray(np.cumsum(starts, 1, dtype=np.int32))
    return masks


def results(attend, q, k, v, grad):
    """Output, and gradients of queries, keys and values."""

    @jax.jit
    def run(q, k, v, grad):
        out, pullback = jax.vjp(attend, q, k, v)
        return out, *pullback(grad.astype(out.dtype))

    return run(q, k, v, grad)


def blockwise(*, heads=1, queries=32, keys=16, **options):
    """Attention by blocks of these sizes, so that short sequences have many."""
    masks = {name: options.pop(name, None) for name in ("key_mask", "segment_ids")}

    def attend(q, k, v):
        tiling = dense.Tiling(
            len(q), q.shape[1], k.shape[2], heads, queries, keys,
            options.get("causal", False), options.get("window"),
        )  # fmt: skip
        if masks["key_mask"] is None and not tiling.causal:
            masks["key_mask"] = jnp.ones(q.shape[:2], bool)
        return dense._blockwise(tiling, q, k, v, *masks.values())

    return attend


@pytest.mark.parametrize(("padding", "packed"), BOTH)
@pytest.mark.parametrize(
    "sight", [{}, {"causal": True}, {"causal": True, "window": 21}, {"causal": True, "window": 1}]
)
def test_blocks_give_what_one_softmax_gives(sight, padding, packed):
    options = sight | masks_of(75, padding=padding, packed=packed)
    arrays = inputs(75, 6, 2)
    expected = results(partial(reference, **options), *arrays)
    for heads, queries, keys in ((1, 32, 16), (4, 16, 48)):
        attend = blockwise(heads=heads, queries=queries, keys=keys, **options)
        for a, b in zip(results(attend, *arrays), expected, strict=True):
            assert_close(a, b, 75, least=1)  # of one key, queries have no gradient


@pytest.mark.parametrize("length", [193, 256, 257, 530])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 1), (4, 4)])
@pytest.mark.parametrize("causal", [False, True])
def test_at_awkward_lengths(length, heads, kv_heads, causal):
    arrays = inputs(length, heads, kv_heads)
    options = {"causal": causal, **masks_of(length, padding=length == 530)}
    expected = results(partial(reference, **options), *arrays)
    found = results(partial(dense_attention, **options), *arrays)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, length)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("length", [40, 300])
def test_in_sixteen_bits(dtype, length):
    arrays = inputs(length, 4, 2, dtype=dtype)
    options = {"causal": True, **masks_of(length, padding=True, packed=True)}
    expected = results(partial(reference, **options), *(a.astype(jnp.float32) for a in arrays))
    found = results(partial(dense_attention, **options), *arrays)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        assert_close(a, b, length)


@pytest.mark.parametrize("length", [40, 300])
def test_a_row_without_a_key_gives_zeros(length):
    q, k, v, grad = inputs(length, 4, 2)
    nothing = {"key_mask": jnp.zeros((BATCH, length), bool).at[0].set(True)}
    out, *gradients = results(partial(dense_attention, **nothing), q, k, v, grad)
    for a in (out, *gradients):
        assert np.isfinite(a).all()
        assert np.asarray(a[0]).any()
        assert not np.asarray(a[1]).any()


def test_large_logits_stay_finite():
    q, k, v, grad = inputs(300, 2, 1)
    found = results(partial(dense_attention, causal=True), 1e4 * q, k, v, grad)
    assert all(np.isfinite(a).all() for a in found)


def test_under_vmap_and_remat():
    arrays = inputs(300, 2, 1)
    attend = partial(dense_attention, causal=True)
    expected = results(attend, *arrays)
    one = jax.vmap(lambda *a: jax.checkpoint(attend)(*(x[None] for x in a))[0])
    for a, b in zip(results(one, *arrays), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 40)])
def test_blocks_that_never_meet_are_left_out(causal, window):
    tiling = dense.Tiling(1, 100, 1, 1, 16, 8, causal, window)
    distance = np.arange(100)[:, None] - np.arange(100)
    seen = (distance >= 0) | (not causal)
    if window is not None:
        seen &= distance < window
    seen = np.pad(seen, ((0, 12), (0, 4))).reshape(7, 16, 13, 8).any((1, 3))
    np.testing.assert_array_equal(tiling.meetings, np.argwhere(seen))


def test_blocks_that_padding_or_segments_keep_apart_take_no_step():
    tiling = dense.Tiling(1, 64, 1, 1, 16, 16, False, None)
    key_mask = (jnp.arange(64) < 32)[None]
    segments = (jnp.arange(64) // 16)[None]

    def number(*masks):
        steps, number = dense._steps(tiling, dense._masks(tiling, *masks))
        return steps[:number, 1:].tolist()

    assert len(number(None, None)) == 16
    assert {key for _, key in number(key_mask, None)} == {0, 1}
    assert number(None, segments) == [[i, i] for i in range(4)]
    assert number(key_mask, segments) == [[0, 0], [1, 1]]


def gradient(q, k, v):
    return jax.grad(lambda *a: dense_attention(*a, causal=True).sum(), (0, 1, 2))(q, k, v)


def test_no_array_is_as_large_as_all_logits():
    length = 2048
    arrays = [jax.ShapeDtypeStruct((1, length, n, 8), jnp.float32) for n in (3, 1, 1)]
    closed = jax.make_jaxpr(gradient)(*arrays)
    sizes = [v.aval.size for e in equations(closed.jaxpr) for v in e.outvars]
    assert max(sizes) < length**2 // 8


@pytest.mark.usefixtures("compiled_anew")
def test_memory_grows_linearly():
    def temporaries(length):
        shapes = [jax.ShapeDtypeStruct((1, length, n, 64), jnp.float32) for n in (3, 1, 1)]
        compiled = jax.jit(gradient).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, middle, long = (temporaries(length) for length in (1024, 2048, 4096))
    assert long - middle < 2.2 * (middle - short)
    assert long < 24 * 4096 * 64 * 4 * 3


@pytest.fixture
def hopper(monkeypatch):
    """Pretends that the default device is one."""
    monkeypatch.setattr(devices, "compute_capability", lambda: (9, 0))


@pytest.fixture
def as_cudnn(monkeypatch):
    """Hands what cuDNN is asked for to XLA, and keeps the arguments."""
    asked = []
    attend = jax.nn.dot_product_attention

    def instead(*arrays, implementation, **options):
        asked.append({"implementation": implementation, **options})
        return attend(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    return asked


@pytest.mark.parametrize(("padding", "packed"), BOTH)
@pytest.mark.parametrize("sight", [{}, {"causal": True}, {"causal": True, "window": 9}])
def test_cudnn_is_asked_for_the_same(sight, padding, packed, hopper, as_cudnn):
    options = sight | masks_of(46, padding=padding, packed=packed)
    arrays = inputs(46, 4, 2, dtype=jnp.bfloat16)
    dense.dispatch._function.cache_clear()
    found = results(partial(dense_attention, **options), *arrays)
    dense.dispatch._function.cache_clear()
    assert {one["implementation"] for one in as_cudnn} == {"cudnn"}
    assert all(one["mask"] is None or one["mask"].shape == (2, 1, 46, 46) for one in as_cudnn)
    expected = results(partial(reference, **options), *(a.astype(jnp.float32) for a in arrays))
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, 46)


@pytest.mark.parametrize("masked", [False, True])
def test_cudnns_kernel_lowers_for_a_gpu(masked, hopper, monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91200)
    shapes = [jax.ShapeDtypeStruct((2, 64, n, 64), jnp.bfloat16) for n in (4, 2, 2)]
    masks = {"key_mask": jnp.ones((2, 64), bool)} if masked else {}

    def gradients(q, k, v):
        def loss(*a):
            return dense_attention(*a, causal=True, **masks).astype(jnp.float32).sum()

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    dense.dispatch._function.cache_clear()
    text = jax.jit(gradients).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    dense.dispatch._function.cache_clear()
    assert "__cudnn$fmha" in text
    assert "Backward" in text


def test_who_may_take_cudnn(hopper, monkeypatch):
    def why(dtype=jnp.bfloat16, length=64, width=64, masked=False):
        shape = jax.ShapeDtypeStruct((1, length, 2, width), dtype)
        return dense.why_not_cudnn(shape, masked=masked)

    assert why() is None
    assert why(jnp.float16, masked=True) is None
    assert "bfloat16 or float16, and got float32" in why(jnp.float32)
    assert "multiple of 8 up to 256, and got 20" in why(width=20)
    assert why(length=63) is None
    assert "even length, and got 63" in why(length=63, masked=True)
    monkeypatch.setattr(devices, "compute_capability", lambda: (8, 0))
    assert "up to 128, and got 256" in why(width=256)
    monkeypatch.setattr(devices, "compute_capability", lambda: (7, 5))
    assert "8.0 or later" in why()


@pytest.mark.usefixtures("unhooked")
def test_a_named_implementation_is_that_one_or_an_error():
    q, k, v, _ = inputs(16, 2, 1)
    with pytest.raises(NotImplementedError, match="'cudnn' cannot run: it needs a GPU"):
        dense_attention(q, k, v, implementation="cudnn")
    with pytest.raises(ValueError, match="a window of 4 keys needs causal attention"):
        dense_attention(q, k, v, window=4)
    with pytest.raises(ValueError, match="unknown implementation 'triton'; choose one of xla"):
        dense_attention(q, k, v, implementation="triton")


@pytest.mark.parametrize("length", [16, 256])
def test_wrong_arguments_are_named(length):
    q, k, v, _ = inputs(length, 4, 2)
    with pytest.raises(ValueError, match=r"q is float32, k float32 and v bfloat16; cast them"):
        dense_attention(q, k, v.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="3 query heads cannot be shared evenly by 2"):
        dense_attention(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match="a window must hold at least 1 key, got 0"):
        dense_attention(q, k, v, causal=True, window=0)
