from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spt_jax.training import linear_cross_entropy

WIDTH, VOCABULARY = 8, 37


def reference(hidden, kernel, labels, weights):
    logits = hidden.astype(jnp.float32) @ kernel.astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.sum(losses * weights), jnp.sum(weights)


def inputs(shape, *, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    return (
        jnp.asarray(rng.normal(size=(*shape, WIDTH)), dtype),
        jnp.asarray(rng.normal(size=(WIDTH, VOCABULARY)), dtype),
        jnp.asarray(rng.integers(0, VOCABULARY, shape), jnp.int32),
        jnp.asarray(rng.uniform(0.5, 2, shape) * (rng.uniform(size=shape) < 0.7), jnp.float32),
    )


@partial(jax.jit, static_argnums=0)
def gradients(loss, hidden, kernel, labels, weights):
    """Of a function of both sums, by everything that has a gradient."""

    def scalar(hidden, kernel, weights):
        total, weight = loss(hidden, kernel, labels, weights)
        return 3 * total / weight

    return jax.value_and_grad(scalar, argnums=(0, 1, 2))(hidden, kernel, weights)


@pytest.mark.parametrize(("shape", "chunk"), [((2, 7), 4), ((3, 5), None)])
def test_value_and_gradients_are_those_of_full_logits(shape, chunk):
    arrays = inputs(shape)
    arrays = (*arrays[:3], arrays[3].at[(0,) * len(shape)].set(1.5))
    loss = partial(linear_cross_entropy, chunk_tokens=chunk)
    value, found = gradients(loss, *arrays)
    expected_value, (d_hidden, d_kernel, d_weights) = gradients(reference, *arrays)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    np.testing.assert_allclose(found[0], d_hidden, atol=2e-6)
    np.testing.assert_allclose(found[1], d_kernel, atol=5e-6)
    # a token of weight 0 may hold anything, so its loss is not known
    counted = arrays[3] > 0
    np.testing.assert_allclose(found[2][counted], d_weights[counted], rtol=1e-5, atol=1e-6)


def test_bfloat16_products_and_float32_sums():
    hidden, kernel, labels, weights = inputs((50,), dtype=jnp.bfloat16)
    loss = partial(linear_cross_entropy, chunk_tokens=16)
    value, found = gradients(loss, hidden, kernel, labels, weights)
    expected, wanted = gradients(reference, hidden, kernel, labels, weights)
    assert value.dtype == jnp.float32
    assert [g.dtype for g in found] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for gradient, reference_gradient in zip(found[:2], wanted[:2], strict=True):
        reference_gradient = reference_gradient.astype(jnp.float32)
        error = jnp.abs(gradient.astype(jnp.float32) - reference_gradient).max()
        assert error < 1e-2 * jnp.abs(reference_gradient).max()
    # a float32 kernel gets a float32 gradient beside bfloat16 products
    wide = kernel.astype(jnp.float32)
    _, shapes = jax.eval_shape(partial(gradients, loss), hidden, wide, labels, weights)
    assert [g.dtype for g in shapes] == [jnp.bfloat16, jnp.float32, jnp.float32]


@pytest.mark.parametrize("weights", [[0, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
def test_a_token_of_weight_zero_may_hold_anything(weights):
    hidden, kernel, labels, _ = inputs((5,))
    weights = jnp.asarray(weights, jnp.float32)
    out = weights == 0
    clean = (jnp.where(out[:, None], 0, hidden), kernel, jnp.where(out, 0, labels), weights)
    hidden = jnp.where(out[:, None], jnp.array([jnp.nan, jnp.inf] * 4), hidden)
    labels = jnp.where(out, -100, labels)

    @partial(jax.jit, static_argnums=0)
    def total(loss, hidden, kernel, labels, weights):
        return jax.value_and_grad(lambda h, k: loss(h, k, labels, weights)[0], argnums=(0, 1))(
            hidden, kernel
        )

    found = total(partial(linear_cross_entropy, chunk_tokens=2), hidden, kernel, labels, weights)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(total(reference, *clean)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def products(function, *arguments):
    return str(jax.make_jaxpr(function)(*arguments)).count("dot_general[")


def test_only_the_products_that_are_asked_for_are_computed():
    hidden, kernel, labels, weights = inputs((16,))

    def loss(hidden, kernel):
        return linear_cross_entropy(hidden, kernel, labels, weights)[0]

    assert products(loss, hidden, kernel) == 1
    for function in (loss, jax.jit(loss)):  # what is perturbed is seen through a call
        assert products(jax.grad(function), hidden, kernel) == 2
        assert products(jax.grad(function, argnums=(0, 1)), hidden, kernel) == 3
    assert products(jax.grad(loss, argnums=1), hidden, kernel) == 2


def test_under_vmap_checkpoint_and_scan():
    hidden, kernel, labels, weights = inputs((3, 10))
    loss = partial(linear_cross_entropy, chunk_tokens=4)

    def of_rows(loss):
        return jax.jit(jax.vmap(partial(gradients, loss), in_axes=(0, None, 0, 0)))

    found = of_rows(loss)(hidden, kernel, labels, weights)
    expected = of_rows(reference)(hidden, kernel, labels, weights)
    for a, b in zip(jax.tree.leaves(found[1][:2]), jax.tree.leaves(expected[1][:2]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)

    def scanned(kernel):
        def body(total, x):
            h, label, weight = x
            return total + jax.checkpoint(loss)(h, kernel, label, weight)[0], None

        return jax.lax.scan(body, 0.0, (hidden, labels, weights))[0]

    value, gradient = jax.jit(jax.value_and_grad(scanned))(kernel)
    direct = jax.jit(jax.value_and_grad(lambda k: reference(hidden, k, labels, weights)[0]))
    expected_value, expected_gradient = direct(kernel)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)


@pytest.mark.usefixtures("compiled_anew")
def test_memory_is_that_of_a_chunk_not_of_all_logits():
    tokens, vocabulary = 2048, 32_000
    shapes = [((tokens, WIDTH), jnp.float32), ((WIDTH, vocabulary), jnp.float32)]
    shapes += [((tokens,), jnp.int32), ((tokens,), jnp.float32)]
    abstract = [jax.ShapeDtypeStruct(*shape) for shape in shapes]

    def value_and_grad(hidden, kernel, labels, weights):
        loss = partial(linear_cross_entropy, chunk_tokens=64)
        return jax.value_and_grad(lambda *x: loss(*x, labels, weights)[0], argnums=(0, 1))(
            hidden, kernel
        )

    memory = jax.jit(value_and_grad).lower(*abstract).compile().memory_analysis()
    assert memory.temp_size_in_bytes < tokens * vocabulary * 4 / 8


def test_chunk_of_no_tokens_is_refused():
    with pytest.raises(ValueError, match="chunk_tokens must be at least 1, got 0"):
        linear_cross_entropy(*inputs((4,)), chunk_tokens=0)
