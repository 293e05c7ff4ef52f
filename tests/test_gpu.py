"""The ops on a GPU give what the reference gives on the CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    RoutedFFNWeights,
    pq_encode,
    pq_select,
    routed_ffn,
    scoring_codewords,
    sparse_attention,
)
from tests.tolerance import assert_close

pytestmark = pytest.mark.gpu


CPU = jax.devices("cpu")[0]
DTYPES = [jnp.float32, jnp.bfloat16]  # the latter takes the Mosaic kernels where there are any


def _gradients(function, arguments, cotangent):
    with jax.default_matmul_precision("highest"):
        out, pullback = jax.jit(lambda *a: jax.vjp(function, *a))(*arguments)
        return out, *pullback(cotangent)


def _compare(function, dtype, cotangent, *arguments):
    """Compares `function(implementation, *arguments)` on the GPU with the reference on the CPU."""
    held = [a.astype(jnp.bfloat16).astype(jnp.float32) for a in (cotangent, *arguments)]
    expected = _gradients(lambda *a: function("reference", *a), held[1:], held[0])
    gpu = jax.device_put([a.astype(dtype) for a in held], jax.devices("gpu")[0])
    got = _gradients(lambda *a: function(None, *a), gpu[1:], gpu[0])
    for ours, theirs in zip(got, expected, strict=True):
        assert_close(jax.device_get(ours), jax.device_get(theirs), 4096, sums=3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", ["token", "tile"])
def test_sparse_attention(granularity, dtype):
    with jax.default_device(CPU):
        keys = jax.random.split(jax.random.key(0), 6)
        q, k, v, grad = (jax.random.normal(key, (2, 1000, 4, 64)) for key in keys[:4])
        books = tuple(jax.random.normal(key, (4, 16, 16, 4)) for key in keys[4:])
        codes = [pq_encode(x, b, implementation="xla") for x, b in zip((q, k), books, strict=True)]
        options = {"num_keys": 128, "granularity": granularity, "causal": True}
        codewords = scoring_codewords(*books)
        expected = pq_select(*codes, *codewords, **options, implementation="reference")

        def attention(implementation, q, k, v):
            return sparse_attention(q, k, v, expected, causal=True, implementation=implementation)

    on_gpu = jax.device_put((*codes, *codewords), jax.devices("gpu")[0])
    found = jax.jit(lambda *a: pq_select(*a, **options))(*on_gpu)
    for name in ("groups", "counts") if granularity == "tile" else ("threshold", "tie_radius"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    with jax.default_device(CPU):
        _compare(attention, dtype, grad, q, k, v)


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_are_of_the_nearest_codewords(dtype):
    with jax.default_device(CPU):
        keys = jax.random.split(jax.random.key(0))
        x = jax.random.normal(keys[0], (2, 1000, 4, 64)).astype(jnp.bfloat16)
        books = jax.random.normal(keys[1], (4, 16, 16, 4)).astype(jnp.bfloat16).astype(jnp.float32)
        expected = pq_encode(x.astype(jnp.float32), books, implementation="reference")
    on_gpu = jax.device_put((x.astype(dtype), books), jax.devices("gpu")[0])
    found = jax.jit(pq_encode)(*on_gpu)
    assert np.mean(np.asarray(found) == np.asarray(expected)) > 0.999  # all but rounding ties


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_routed_ffn(gated, dtype):
    with jax.default_device(CPU):
        keys = iter(jax.random.split(jax.random.key(0), 7))
        x, grad = (jax.random.normal(next(keys), (1000, 256)) for _ in range(2))
        ups = [0.06 * jax.random.normal(next(keys), (4, 256, 192)) for _ in range(1 + gated)]
        w_out = 0.06 * jax.random.normal(next(keys), (4, 192, 256))
        index = jax.lax.top_k(jax.random.normal(next(keys), (1000, 4)), 2)[1].astype(jnp.int32)
        coefficients = jax.random.uniform(next(keys), (1000, 2))

        def ffn(implementation, x, coefficients, w_out, *ups):
            w_in, w_gate = (*ups, None)[:2]
            weights = RoutedFFNWeights(w_in=w_in, w_gate=w_gate, w_out=w_out)
            return routed_ffn(
                x, index, coefficients, weights, activation="silu", implementation=implementation
            )

        _compare(ffn, dtype, grad, x, coefficients, w_out, *ups)
