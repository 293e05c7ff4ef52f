"""Drawn queries and keys overlap as text's do, random ones do not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.text_like import kept_mass, selected, text_like, touched_blocks
from pallas_kernels import TileSelection

SIZE = (1, 2048, 2, 128)


def test_lists_are_as_scattered_as_those_of_text():
    """The module's docstring has the figures of SmolLM2: 1.64, 1.31 and 0.87."""
    q, k = text_like(jax.random.key(0), *SIZE, jnp.float32)
    assert touched_blocks(selected(q, k, 16)) == pytest.approx(1.64, rel=0.15)
    assert touched_blocks(selected(q, k, 32)) == pytest.approx(1.31, rel=0.15)
    assert kept_mass(q, k, 16) == pytest.approx(0.87, rel=0.15)


def test_random_ones_overstate_waste():
    q, k = (jax.random.normal(key, SIZE) for key in jax.random.split(jax.random.key(0)))
    assert touched_blocks(selected(q, k, 16)) > 2.2


def test_touched_blocks():
    """A tile of few keys, which keeps all, one whose groups fill a block, one that takes three."""
    selection = TileSelection(
        groups=jnp.array([[[[0, 0, 0, 0], [0, 1, 2, 3], [1, 4, 9, 10]]]]),
        counts=jnp.array([[[1, 4, 4]]]),
        block_q=64,
        key_group=16,
    )
    assert touched_blocks(selection) == (1 + 3) / 2


def test_types():
    q, k = text_like(jax.random.key(0), 2, 5, 3, 4, jnp.bfloat16)
    assert q.shape == k.shape == (2, 5, 3, 4)
    assert q.dtype == k.dtype == jnp.bfloat16
    assert np.isfinite(np.asarray(q, np.float32)).all()
