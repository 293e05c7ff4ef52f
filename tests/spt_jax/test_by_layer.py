"""Models that run layer by layer."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spt_jax import by_layer
from spt_jax.layers import recording
from tests.spt_jax.test_budget import llama, llama_batch


@pytest.fixture
def inputs():
    return {"input_ids": jnp.asarray(llama_batch(2, 16)["input_ids"])}


def test_layers_that_are_alike_are_one_program(inputs):
    model = llama(scale=1.0)
    expected = model.hidden_states(**inputs)[0]
    before = by_layer._called._cache_size()
    found = by_layer.by_layer(model).hidden_states(**inputs)[0]
    assert by_layer._called._cache_size() == before + 1
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert isinstance(model.layers, nnx.List)  # the model itself is as it was


def test_what_is_recorded_is_what_the_model_records(inputs):
    model = llama(scale=1.0)
    paths = [("layers", 0, "attention"), ("layers", 1, "ffn"), ("layers", 1, "attention")]
    tokens = jnp.array([0, 5, 31])
    with recording() as records:
        model.hidden_states(**inputs)
    found = by_layer.recorded(model, inputs, tokens, paths, ("q", "k", "x"))
    assert set(found) == set(paths)
    modules = dict(nnx.iter_modules(model))
    for path in paths:
        (read,), (call,) = found[path], records[id(modules[path])]
        assert set(read) == ({"x"} if path[-1] == "ffn" else {"q", "k"})
        for name, x in read.items():
            expected = call[name].reshape(-1, *call[name].shape[2:])[tokens]
            np.testing.assert_allclose(x, expected, atol=1e-5)


def test_layers_behind_the_last_one_asked_for_do_not_run(inputs):
    model = llama()
    model.layers[2] = None
    (path,) = paths = [("layers", 1, "ffn")]
    found = by_layer.recorded(model, inputs, jnp.array([3]), paths, ("x",))
    assert found[path][0]["x"].shape == (1, 32)
