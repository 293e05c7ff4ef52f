"""Perplexity with one sparse part at a time, on a small random decoder."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import spt_jax
from experiments.perplexity import (
    SINKS,
    WindowAttention,
    measure_perplexities,
    perplexity,
    perplexity_figures,
    perplexity_table,
)
from spt_jax.config import SparseAttentionConfig, SPTConfig
from tests.spt_jax.models.builders import GOLDEN

LENGTH = 160
SOURCE = str(GOLDEN / "llama")


@pytest.fixture(autouse=True)
def positions(monkeypatch):
    """More positions than the golden model has."""
    load = spt_jax.load_pretrained

    def longer(source, **options):
        model = load(source, **options)
        model.config = type(model.config)(**{**vars(model.config), "num_positions": LENGTH})
        return model

    monkeypatch.setattr(spt_jax, "load_pretrained", longer)


def rows(seed, number=2):
    return np.random.default_rng(seed).integers(3, 97, (number, LENGTH)).astype(np.int32)


def test_perplexity_is_exp_of_the_mean_loss():
    model, ids = spt_jax.load_pretrained(SOURCE, task="causal-lm"), rows(0)
    losses = optax.softmax_cross_entropy_with_integer_labels(model(ids)[:, :-1], ids[:, 1:])
    assert perplexity(model, ids) == pytest.approx(np.exp(losses.mean()), rel=1e-5)


def test_the_window_keeps_the_first_keys_and_the_last():
    q, k, v = (jax.random.normal(jax.random.key(i), (1, LENGTH, 2, 8)) for i in range(3))
    out, aux = WindowAttention(SINKS + 4)(q, k, v, capacity=LENGTH, key_mask=None)
    assert aux == {}
    kept = [*range(SINKS), *range(LENGTH - 4, LENGTH)]
    weights = jax.nn.softmax(jnp.einsum("bnh,bknh->bnk", q[:, -1], k[:, kept]) * 8**-0.5)
    expected = jnp.einsum("bnk,bknh->bnh", weights, v[:, kept])
    np.testing.assert_allclose(out[:, -1], expected, atol=1e-5)


def test_every_part_has_its_figure():
    found = measure_perplexities(SOURCE, rows(1), rows(2), density=1 / 8, seed=0, ffn=True)
    figures = perplexity_figures(found)
    assert figures.keys() == {
        "perplexity_dense",
        "perplexity_attention_token",
        "perplexity_attention_tile",
        "perplexity_attention_strict",
        "perplexity_window",
        "perplexity_ffn",
    }
    assert len(set(figures.values())) == 5  # token is strict
    assert perplexity_table(found).row_count == 5

    token = SPTConfig(
        serve=None, lora=None, ffn=None, attention=SparseAttentionConfig(granularity="token")
    )
    model = spt_jax.load_pretrained(SOURCE, task="causal-lm")
    spt_jax.adapt(model, token, calibration_batch={"input_ids": rows(1)}, rngs=nnx.Rngs(0))
    assert perplexity(model, rows(2)) == pytest.approx(
        figures["perplexity_attention_token"], rel=1e-6
    )
