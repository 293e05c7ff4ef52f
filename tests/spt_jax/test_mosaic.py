"""A model on the Hopper kernels: the same step as on plain XLA, and no other kernels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import spt_jax
from spt_jax import LoRAConfig, RoutedFFNConfig, SparseAttentionConfig, SPTConfig
from spt_jax.layers import ADAPTER, RoutedFFN, SparseAttention
from spt_jax.models.config import parse_config
from spt_jax.models.encoder import Encoder
from tests.pallas_kernels import mosaic
from tests.spt_jax.models.builders import raw_config

pytestmark = pytest.mark.mosaic

LENGTH = 72
KERNELS = {
    "sparse_attention_forward": 1,
    "sparse_attention_dq": 1,
    "sparse_attention_dkv": 1,
}


@pytest.fixture(scope="module")
def adapted():
    """A one-layer encoder with SPT in bfloat16, and a batch."""
    config = parse_config(
        raw_config("bert", width=64, num_layers=1, num_heads=2, hidden=256, num_positions=LENGTH)
    )
    model = Encoder(config, num_labels=2, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[-1] == "kernel":  # large enough for the parts to matter
            leaf.set_value(leaf[...] * 4)
    keys = jax.random.split(jax.random.key(0))
    lengths = jnp.array([LENGTH, LENGTH // 2])
    batch = {
        "input_ids": jax.random.randint(keys[0], (2, LENGTH), 0, 97),
        "attention_mask": (jnp.arange(LENGTH) < lengths[:, None]).astype(jnp.int32),
    }
    spt = SPTConfig(
        serve=None,
        lora=LoRAConfig(rank=4),
        attention=SparseAttentionConfig(min_keys=16, num_codewords=8, granularity="tile"),
        ffn=RoutedFFNConfig(num_blocks=4, active_blocks=2),
    )
    model = spt_jax.adapt(model, spt, calibration_batch=batch, rngs=nnx.Rngs(1))
    for variable in jax.tree.leaves(
        nnx.state(model, ADAPTER), is_leaf=lambda x: isinstance(x, nnx.Variable)
    ):
        noise = 0.05 * jax.random.normal(keys[1], variable[...].shape)  # so that B is not 0
        variable.set_value(variable[...] + noise.astype(variable[...].dtype))
    return model, batch


def gradients(adapted, implementation, granularity="tile"):
    """A function of the adapter's parameters, and those."""
    model, batch = adapted
    model = nnx.clone(model)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, SparseAttention | RoutedFFN):
            options = {"implementation": implementation}
            if isinstance(module, SparseAttention):
                options["granularity"] = granularity
            module.config = dataclasses.replace(module.config, **options)
    graph, adapter, rest = nnx.split(model, ADAPTER, ...)

    def loss(adapter):
        return jnp.square(nnx.merge(graph, adapter, rest)(**batch).astype(jnp.float32)).sum()

    return jax.value_and_grad(loss), adapter


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["tile", "token"])
def test_a_step_is_that_of_xla(adapted, granularity):
    function, adapter = gradients(adapted, "xla", granularity)
    expected_loss, expected = jax.jit(function)(adapter)
    function, adapter = gradients(adapted, None, granularity)
    with mosaic.running():
        loss, actual = jax.jit(function)(adapter)
    np.testing.assert_allclose(loss, expected_loss, rtol=0.02)
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for a, b in pairs:
        error = np.linalg.norm(np.asarray(a - b, np.float32))
        assert error <= 0.05 * np.linalg.norm(np.asarray(b, np.float32))


@pytest.mark.versions
@pytest.mark.parametrize("implementation", ["mosaic", None])
def test_launches(adapted, implementation):
    function, adapter = gradients(adapted, implementation)
    launches = mosaic.launches(function, adapter)
    assert KERNELS.items() <= launches.items()
    assert launches["pq_tile_scores"] == 1
    assert {"routed_ffn_up", "routed_ffn_down"} <= launches.keys()
