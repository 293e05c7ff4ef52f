"""The ops on a GPU give what the reference gives on the CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
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


def _gradients(function, *arguments, device):
    arguments = jax.device_put(arguments, device)
    with jax.default_matmul_precision("highest"):
        return jax.jit(jax.value_and_grad(function, range(len(arguments))))(*arguments)


def _compare(function, *arguments):
    cpu, gpu = jax.devices("cpu")[0], jax.devices("gpu")[0]
    expected = _gradients(lambda *a: function("reference", *a), *arguments, device=cpu)
    got = _gradients(lambda *a: function(None, *a), *arguments, device=gpu)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_close(jax.device_get(ours), jax.device_get(theirs), 4096)


@pytest.mark.parametrize("granularity", ["token", "tile"])
def test_sparse_attention(granularity):
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v = (jax.random.normal(key, (2, 300, 4, 32)) for key in keys[:3])
    books = tuple(jax.random.normal(key, (4, 8, 16, 4)) for key in keys[3:])

    def loss(implementation, q, k, v):
        codes = [pq_encode(x, b, implementation="xla") for x, b in zip((q, k), books, strict=True)]
        selection = pq_select(
            *codes,
            *scoring_codewords(*books, "inner_product"),
            num_keys=128,
            granularity=granularity,
            implementation=implementation,
        )
        out = sparse_attention(q, k, v, selection, implementation=implementation)
        return jnp.square(out).sum()

    _compare(loss, q, k, v)


def test_routed_ffn():
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (300, 64))
    w_in, w_out = (
        0.1 * jax.random.normal(k, s) for k, s in ((keys[1], (4, 64, 32)), (keys[2], (4, 32, 64)))
    )
    index = jax.lax.top_k(jax.random.normal(keys[3], (300, 4)), 2)[1].astype(jnp.int32)
    coefficients = jax.random.uniform(keys[4], (300, 2))

    def loss(implementation, x, coefficients, w_in, w_out):
        weights = RoutedFFNWeights(w_in=w_in, w_out=w_out)
        y = routed_ffn(x, index, coefficients, weights, implementation=implementation)
        return jnp.square(y).sum()

    _compare(loss, x, coefficients, w_in, w_out)
