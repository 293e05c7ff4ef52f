"""Captured attention mass: selections against the oracle, on made-up and recorded activations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.attention_capture import (
    LayerActivations,
    Rule,
    attention_mass,
    captured,
    fit,
    kept_keys,
    measure,
    oracle_keys,
    record_layers,
    window_keys,
)
from tests.spt_jax.toy import ToyModel

TILE = Rule(granularity="tile", block_q=16, key_group=8)


def layer(seed=0, batch=2, length=64, heads=4, kv_heads=2):
    """Queries and keys with a few strong directions, as real ones have."""
    keys = jax.random.split(jax.random.key(seed), 2)
    scale = jnp.array([2.0, 2.0, 1, 1, 0.3, 0.3, 0.1, 0.1])
    q, k = (
        scale * jax.random.normal(key, (batch, length, n, 8))
        for key, n in zip(keys, (heads, kv_heads), strict=True)
    )
    return LayerActivations(q, k + 3)


@pytest.mark.parametrize("causal", [False, True])
def test_mass_is_the_softmax(causal):
    q, k = (np.asarray(a, np.float64) for a in layer())
    mass = np.asarray(attention_mass(layer(), causal=causal))
    np.testing.assert_allclose(mass.sum(-1), 1, rtol=1e-5)
    if causal:
        assert (mass[..., ~np.tri(64, dtype=bool)] == 0).all()
    row = np.exp(k[1, :, 1] @ q[1, 63, 3] / 8**0.5)  # the last query sees all keys either way
    np.testing.assert_allclose(mass[1, 3, 63], row / row.sum(), rtol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rule", [Rule(), TILE], ids=["token", "tile"])
def test_the_oracle_is_the_best_within_its_budget(rule, causal):
    options = {"num_keys": 16, "causal": causal}
    mass = attention_mass(layer(), causal=causal)
    best = np.asarray(captured(mass, oracle_keys(mass, rule, **options)))
    sparse = fit(layer(1), dataclasses.replace(rule, codeword_width=2), causal=causal)
    by_codes = np.asarray(captured(mass, kept_keys(layer(), sparse, num_keys=16)))
    nearest = np.asarray(captured(mass, window_keys(64, rule, **options)))
    assert (best <= 1).all()
    assert (by_codes <= best + 1e-6).all()
    assert by_codes.mean() > 0.75 * best.mean()
    assert (nearest < best).all()
    for kept in (
        oracle_keys(mass, rule, **options),
        kept_keys(layer(), sparse, num_keys=16),
        jnp.broadcast_to(window_keys(64, rule, **options), mass.shape),
    ):
        number = np.asarray(kept.sum(-1))
        own = 16 * (rule is TILE and causal)  # those of the tile itself come on top
        assert number.max() <= 16 + own
        assert number.min() >= 1
        if not causal:
            assert (number == 16).all()
        else:
            assert not np.asarray(kept)[..., ~np.tri(64, dtype=bool)].any()


def test_everything_kept_captures_everything():
    for rule in (Rule(kind="oracle"), dataclasses.replace(TILE, kind="window")):
        found = measure([layer()], rule, num_keys=64, causal=False)
        np.testing.assert_allclose(found.shares, 1, rtol=1e-5)
        assert found.kept == 64


def test_a_window_is_the_nearest_keys():
    kept = np.asarray(window_keys(10, Rule(), num_keys=3, causal=False))[0, 0]
    assert np.flatnonzero(kept[5]).tolist() == [4, 5, 6]
    kept = np.asarray(window_keys(10, Rule(), num_keys=3, causal=True))[0, 0]
    assert np.flatnonzero(kept[5]).tolist() == [3, 4, 5]
    kept = np.asarray(window_keys(64, TILE, num_keys=24, causal=True))[0, 0]
    assert np.flatnonzero(kept[63]).tolist() == list(range(24, 64))


def test_measure_of_a_model():
    model = ToyModel(rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    rows = [record_layers(model, rng.integers(0, 50, (2, 32))) for _ in range(2)]
    rule = Rule(codeword_width=2, num_codewords=4)
    found = measure(rows[0], rule, num_keys=8, causal=True, calibration=rows[1])
    assert found.shares.shape == (len(rows[0]), rows[0][0].q.shape[2])
    assert 0 < found.share <= 1
    assert found.kept < 8
    with pytest.raises(ValueError, match="needs calibration"):
        measure(rows[0], rule, num_keys=8, causal=True)
