"""Rematerialization of sparse layers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.blocks import BlockStep
from spt_jax.config import RoutedFFNConfig, SparseAttentionConfig
from spt_jax.models.presets import bert_config, llama_config, opt_config
from tests.jaxprs import equations

CONFIGS = {
    "bert": bert_config(width=32, heads=2, hidden=64, layers=2),
    "opt": opt_config(width=32, heads=2, hidden=64, layers=2),
    "llama": llama_config(width=32, heads=2, kv_heads=1, hidden=64, layers=2),
}


def step_of(name, granularity="tile", **options):
    return BlockStep(
        config=CONFIGS[name],
        batch=2,
        length=80,
        method="spt",
        attention=SparseAttentionConfig(granularity=granularity, block_q=16, min_keys=16),
        ffn=RoutedFFNConfig(num_blocks=4, active_blocks=2),
        dense_attention="xla",
        dtype=jnp.float32,
        **options,
    )


def gradient_of(step):
    def gradient(trained, x, frozen):
        def loss(trained, x):
            y, aux = step.run((trained, x), frozen)
            return jnp.sum(y**3) + sum(aux.values())

        return jax.grad(loss, argnums=(0, 1))(trained, x)

    return gradient


def arguments_of(step):
    (trained, x), frozen = step.arguments(jax.random.key(0))
    return trained, x, frozen


@pytest.mark.parametrize(
    ("name", "granularity"), [("bert", "tile"), ("opt", "token"), ("llama", "tile")]
)
def test_no_gradient_changes(name, granularity):
    step = step_of(name, granularity)
    arguments = arguments_of(step)
    stored = jax.jit(gradient_of(step))(*arguments)
    made_again = jax.jit(gradient_of(replace(step, remat=True)))(*arguments)
    leaves = jax.tree.leaves(stored)
    largest = max(float(jnp.abs(leaf).max()) for leaf in leaves)
    assert largest > 1
    for a, b in zip(leaves, jax.tree.leaves(made_again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * largest)


@pytest.mark.parametrize("granularity", ["tile", "token"])
def test_choices_are_made_once(granularity):
    """Lists of tiles and the blocks of tokens are kept; a choice by token is too large for that."""
    step = step_of("opt", granularity, remat=True)
    found = list(equations(jax.make_jaxpr(gradient_of(step))(*arguments_of(step)).jaxpr))
    counts = Counter(equation.primitive.name for equation in found)
    counts += Counter(e.params["name"] for e in found if "name" in e.params)
    layers = step.config.num_layers
    assert sum(e.params.get("policy") is not None for e in found) == layers  # none for single parts
    assert counts["top_k"] == layers
    assert counts["pq_select"] == counts["pq_encode"] / 2 == layers * (1 + (granularity == "token"))
    assert counts["sparse_attention"] == 3 * layers  # forward, forward again, backward


def test_what_is_kept_is_small():
    """Beside the weights: inputs of the layers, lists of groups and blocks of tokens."""

    def kept(step):
        trained, x, frozen = arguments_of(step)
        _, pullback = jax.vjp(lambda t, x: step.run((t, x), frozen)[0], trained, x)
        weights = {id(leaf) for leaf in jax.tree.leaves((trained, frozen))}
        arrays = {id(leaf): leaf for leaf in jax.tree.leaves(pullback)}
        return sum(array.nbytes for key, array in arrays.items() if key not in weights), x.nbytes

    step = step_of("llama")
    (made_again, inputs), (stored, _) = kept(replace(step, remat=True)), kept(step)
    assert made_again < 1.5 * step.config.num_layers * inputs < 0.2 * stored


def test_dense_layers_keep_what_is_not_soon_computed():
    """Of the FFN the sums that its activation is applied to, and not what follows from them."""
    width, hidden, length = 32, 512, 256

    def peak(layers):
        config = llama_config(width=width, heads=2, kv_heads=1, hidden=hidden, layers=layers)
        step = replace(step_of("llama"), config=config, method="lora", batch=1, length=length)
        compiled = jax.jit(gradient_of(step)).lower(*arguments_of(step)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    numbers = (peak(6) - peak(2)) / 4 / 4 / length  # a layer and token keeps
    assert 2 * hidden <= numbers < 2 * hidden + 16 * width
