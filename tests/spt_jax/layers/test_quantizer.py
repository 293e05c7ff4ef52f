"""Codebooks: k-means and the codebook loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import pq_encode
from spt_jax.layers.quantizer import codebook_loss, evenly_spaced, kmeans
from tests.tolerance import assert_close


def clustered(number=400, heads=2, width=6, codeword_width=3, clusters=8):
    """Samples near few centres in each subspace, and the centres."""
    keys = jax.random.split(jax.random.key(0), 3)
    spaces = width // codeword_width
    centres = 10 * jax.random.normal(keys[0], (heads, spaces, clusters, codeword_width))
    pick = jax.random.randint(keys[1], (number, heads, spaces), 0, clusters)
    x = centres[jnp.arange(heads)[:, None], jnp.arange(spaces), pick]
    x = x + 0.01 * jax.random.normal(keys[2], x.shape)
    return x.reshape(number, heads, width), centres


def test_kmeans_finds_separated_clusters():
    x, centres = clustered()
    books = kmeans(x, num_codewords=8, codeword_width=3, steps=15, key=jax.random.key(1))
    distance = jnp.linalg.norm(centres[:, :, :, None] - books[:, :, None], axis=-1)
    assert float(distance.min(-1).max()) < 0.05


def test_kmeans_is_deterministic_and_each_step_helps():
    x = jax.random.normal(jax.random.key(0), (500, 2, 8))
    errors = []
    for steps in (0, 1, 5, 20):
        books, again = (
            kmeans(x, num_codewords=16, codeword_width=4, steps=steps, key=jax.random.key(2))
            for _ in range(2)
        )
        np.testing.assert_array_equal(books, again)
        parts = x.reshape(500, 2, 2, 1, 4)
        errors.append(float(jnp.sum((parts - books) ** 2, -1).min(-1).mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]


def test_kmeans_restarts_empty_clusters():
    values = jnp.repeat(jnp.arange(6.0), 50).reshape(-1, 1, 1)
    books = kmeans(values, num_codewords=6, codeword_width=1, steps=10, key=jax.random.key(0))
    np.testing.assert_allclose(jnp.sort(books.ravel()), jnp.arange(6.0), atol=1e-5)


def test_kmeans_with_fewer_samples_than_codewords():
    x = jnp.arange(3.0).reshape(3, 1, 1)
    books = kmeans(x, num_codewords=5, codeword_width=1, steps=4, key=jax.random.key(0))
    assert set(np.asarray(books).ravel()) == {0.0, 1.0, 2.0}


def test_evenly_spaced_codewords_reach_from_the_least_value_to_the_largest():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(50, 2, 3)), jnp.bfloat16)
    x = x.at[7, 1, 2].set(100)
    books = np.asarray(evenly_spaced(x, num_codewords=5))
    assert books.shape == (2, 3, 5, 1)
    values = np.asarray(x, np.float32)
    np.testing.assert_array_equal(books[:, :, 0, 0], values.min(0))
    np.testing.assert_allclose(books[:, :, -1, 0], values.max(0), rtol=1e-6)
    gaps = np.diff(books[..., 0], axis=-1)
    np.testing.assert_allclose(gaps, gaps.mean(-1, keepdims=True).repeat(4, -1), rtol=1e-4)
    with pytest.raises(ValueError, match="at least one sample"):
        evenly_spaced(x[:0], num_codewords=5)


def test_kmeans_errors():
    x = jnp.zeros((4, 1, 6))
    options = {"num_codewords": 2, "key": jax.random.key(0)}
    with pytest.raises(ValueError, match="codeword_width 4 does not divide the head width 6"):
        kmeans(x, codeword_width=4, **options)
    with pytest.raises(ValueError, match="at least one sample"):
        kmeans(x[:0], codeword_width=3, **options)


def problem():
    """Vectors of four heads over two codebooks, codes, and a mask."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 9, 4, 6))
    books = jax.random.normal(keys[1], (2, 3, 5, 2))
    return x, books, pq_encode(x, books), jax.random.bernoulli(keys[2], 0.6, (2, 9))


def test_codebook_loss_is_its_formula():
    x, books, codes, mask = problem()
    total = 0.0
    for b, s, n, m in np.ndindex(2, 9, 4, 3):
        if mask[b, s]:
            book = np.asarray(books[n // 2, m], np.float64)
            vector = np.asarray(x[b, s, n, 2 * m : 2 * m + 2], np.float64)
            distance = ((vector - book) ** 2).sum(-1)
            weights = np.exp(-distance) / np.exp(-distance).sum()
            nearest = book[codes[b, s, n, m]]
            assert distance.argmin() == codes[b, s, n, m]
            total += ((weights @ book - nearest) ** 2).sum() + ((vector - nearest) ** 2).sum()
    assert_close(codebook_loss(x, books, codes, mask), np.float64(total / 24), 24 * 18)


def test_codebook_loss_moves_codebooks_alone_and_downhill():
    x, books, codes, mask = problem()
    to_x, to_books = jax.grad(codebook_loss, (0, 1))(x, books, codes, mask)
    np.testing.assert_array_equal(to_x, 0)
    assert np.abs(to_books).max() > 0
    lower = codebook_loss(x, books - 0.01 * to_books, codes, mask)
    assert lower < codebook_loss(x, books, codes, mask)
    everything = codebook_loss(x, books, codes, jnp.ones_like(mask))
    np.testing.assert_array_equal(codebook_loss(x, books, codes), everything)
