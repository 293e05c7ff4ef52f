import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import routing_error
from experiments.routing_error import (
    RoutingError,
    dense_ffns,
    ffn_inputs,
    mean_error,
    measure_layer,
    oracle_index,
    routed_output,
)
from spt_jax.calibration import random_routing
from spt_jax.config import RoutedFFNConfig
from spt_jax.layers import FeedForward, RoutedFFN
from tests.spt_jax.toy import WIDTH, ToyModel, toy_batch

D, F = 16, 64


def _ffn(*, gated=False, dtype=jnp.float32):
    ffn = FeedForward(D, F, gated=gated, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    ffn.up.kernel[...] = ffn.up.kernel[...] * 4
    return ffn


def _inputs(seed, tokens=300, dtype=jnp.float32):
    # tokens of a few topics, so that there is something to route by
    topics = 3 * jax.random.normal(jax.random.key(0), (5, D))
    key, noise = jax.random.split(jax.random.key(seed))
    topic = jax.random.randint(key, (tokens,), 0, 5)
    return (topics[topic] + jax.random.normal(noise, (tokens, D))).astype(dtype)


def _routed(ffn, config, seed=0):
    routing = random_routing(ffn, config, key=jax.random.key(seed))
    key = jax.random.key(seed + 1)
    blocks, rank = config.num_blocks, config.absent_rank
    routing = routing._replace(
        router_kernel=jax.random.normal(key, routing.router_kernel.shape),
        absent_output=0.1 * jax.random.normal(key, routing.absent_output.shape),
        absent_a=0.1 * jax.random.normal(key, (D, blocks, rank)),
        absent_b=0.1 * jax.random.normal(key, (blocks, rank, D)),
    )
    return RoutedFFN(nnx.clone(ffn), **routing._asdict(), config=config)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_fitted_beats_random_and_the_oracle_beats_fitted(gated, dtype):
    ffn = _ffn(gated=gated, dtype=dtype)
    before = jax.tree.map(np.asarray, nnx.state(ffn))
    config = RoutedFFNConfig()
    errors = measure_layer(ffn, _inputs(1, dtype=dtype), _inputs(2, dtype=dtype), config)
    assert list(errors) == ["random", "random_blocks", "fitted", "oracle"]
    relative = [error.relative_error for error in errors.values()]
    assert relative == sorted(relative, reverse=True)
    assert errors["fitted"].relative_error < 0.72 * errors["random"].relative_error
    assert all(1 <= error.load_balance <= 2 for error in errors.values())
    assert all(error.relative_error < error.centered_error for error in errors.values())
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(ffn))


def test_activating_every_block_loses_nothing():
    config = RoutedFFNConfig(num_blocks=4, active_blocks=4)
    errors = measure_layer(_ffn(), _inputs(1), _inputs(2, tokens=50), config)
    for error in errors.values():
        assert error.token_error < 1e-4
        assert error.load_balance == 1


def test_the_output_for_the_routers_own_choice_is_the_modules():
    ffn, x = _ffn(gated=True), _inputs(3, tokens=300)
    routed = _routed(ffn, RoutedFFNConfig(num_blocks=8, active_blocks=3))
    index = jax.lax.top_k(routed.probabilities(x), 3)[1]
    expected = routed(x[None])[0][0]
    np.testing.assert_allclose(routed_output(ffn, routed, x, index), expected, atol=1e-4)


@pytest.mark.parametrize("limit", [routing_error.MOST_SUBSETS, 0])
def test_the_oracle_takes_the_best_subset(limit, monkeypatch):
    monkeypatch.setattr(routing_error, "MOST_SUBSETS", limit)
    ffn, x = _ffn(), _inputs(4, tokens=40)
    routed = _routed(ffn, RoutedFFNConfig(num_blocks=4, active_blocks=2))
    dense = ffn(x[None])[0][0]

    def errors(index):
        return ((routed_output(ffn, routed, x, index) - dense) ** 2).sum(-1)

    every = [
        errors(jnp.broadcast_to(jnp.array(subset), (40, 2)))
        for subset in itertools.combinations(range(4), 2)
    ]
    mine, best = errors(oracle_index(ffn, routed, x)), jnp.stack(every).min(0)
    if limit:
        np.testing.assert_allclose(mine, best, rtol=1e-3)
    else:  # exchanges end in a local minimum, nowhere worse than the router's choice
        own = errors(jax.lax.top_k(routed.probabilities(x), 2)[1])
        assert (mine <= own * 1.001).all()
        assert mine.sum() < 0.5 * (own.sum() + best.sum())


def test_inputs_are_those_of_the_valid_tokens():
    model, batch = ToyModel(rngs=nnx.Rngs(0)), toy_batch()
    inputs = ffn_inputs(model, batch)
    assert list(inputs) == list(dense_ffns(model)) == ["layers.0.ffn", "layers.1.ffn"]
    tokens = int(batch["attention_mask"].sum())
    assert {x.shape for x in inputs.values()} == {(tokens, WIDTH)}


def test_errors_are_averaged_by_figure():
    one = RoutingError(relative_error=1, centered_error=2, token_error=3, load_balance=1)
    two = RoutingError(relative_error=3, centered_error=2, token_error=5, load_balance=2)
    mean = RoutingError(relative_error=2, centered_error=2, token_error=4, load_balance=1.5)
    assert mean_error([one, two]) == mean
    with pytest.raises(ValueError, match="no errors"):
        mean_error([])
