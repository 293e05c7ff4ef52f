"""What `sparse_choices` reports is what the layers compute."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import spt_jax
from spt_jax import RoutedFFNConfig, SparseAttentionConfig, SPTConfig
from tests.spt_jax.toy import HEADS, HIDDEN, WIDTH, ToyModel, toy_batch

SPARSE = SparseAttentionConfig(min_keys=8, num_codewords=8, codeword_width=4, granularity="token")


def _adapted(config, *, causal=False):
    model = ToyModel(rngs=nnx.Rngs(0), causal=causal)
    return spt_jax.adapt(model, config, calibration_batch=toy_batch(), rngs=nnx.Rngs(1))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("granularity", ["token", "tile"])
def test_attention_over_the_kept_keys_is_what_the_layer_computes(granularity, causal):
    sparse = replace(SPARSE, granularity=granularity, block_q=16, key_group=8)
    model, batch = (
        _adapted(SPTConfig(serve=None, attention=sparse, ffn=None), causal=causal),
        toy_batch(),
    )
    mask = batch["attention_mask"] > 0
    choices = spt_jax.sparse_choices(model, batch)
    assert list(choices.attention) == ["layers.0.attention", "layers.1.attention"]
    assert choices.ffn == {}

    layer = choices.attention["layers.0.attention"]
    valid = np.broadcast_to(mask[:, None, None], layer.kept.shape)
    if causal:
        valid = valid & np.tri(mask.shape[1], dtype=bool)
    assert not (np.asarray(layer.kept) & ~valid).any()
    np.testing.assert_allclose(layer.weights.sum(-1), valid.any(-1), rtol=1e-5)
    if granularity == "token":
        kept = np.asarray(layer.kept).sum(-1)
        np.testing.assert_array_equal(kept, np.minimum(8, valid.sum(-1)))
    assert layer.query_codes.shape == layer.key_codes.shape == (*mask.shape, HEADS, 2)
    assert int(layer.key_codes.max()) < SPARSE.num_codewords

    attention, x = model.layers[0].attention, model.embedding(batch["input_ids"])
    values = attention.v_proj(x).reshape(*x.shape[:2], HEADS, -1)
    weights = jnp.where(layer.kept, layer.weights, 0)
    weights /= weights.sum(-1, keepdims=True)
    expected = attention.o_proj(jnp.einsum("bnqk,bknh->bqnh", weights, values).reshape(x.shape))
    found, _ = attention(x, key_mask=mask)
    np.testing.assert_allclose(found, expected, atol=1e-4 * float(jnp.abs(expected).max()))


def test_the_active_blocks_are_what_the_ffn_computes():
    config = RoutedFFNConfig(num_blocks=4, active_blocks=1, absent_rank=0)
    model, batch = (
        _adapted(SPTConfig(serve=None, lora=None, attention=None, ffn=config)),
        toy_batch(),
    )
    choices = spt_jax.sparse_choices(model, batch)
    assert list(choices.ffn) == ["layers.0.ffn", "layers.1.ffn"]
    assert choices.attention == {}
    probabilities, active = choices.ffn["layers.0.ffn"]
    assert (active.sum(-1) == 1).all()

    block = model.layers[0]
    embedded = model.embedding(batch["input_ids"])
    x = embedded + block.attention(embedded, key_mask=batch["attention_mask"] > 0)[0]
    coefficients = jnp.repeat(2 * probabilities * active, HIDDEN // 4, axis=-1)
    up, down = block.ffn.up, block.ffn.down
    hidden = x @ up.kernel[...].reshape(WIDTH, HIDDEN) + up.bias[...].reshape(HIDDEN)
    hidden = jax.nn.gelu(hidden, approximate=False) * coefficients
    expected = hidden @ down.kernel[...].reshape(HIDDEN, WIDTH) + down.bias[...]
    expected += (1.0 - active) @ block.ffn.absent_output[...]
    found, _ = block.ffn(x)
    np.testing.assert_allclose(found, expected, atol=1e-4 * float(jnp.abs(expected).max()))


def test_a_short_sequence_keeps_all_it_may_see():
    model = _adapted(SPTConfig(serve=None, attention=replace(SPARSE, min_keys=64)), causal=True)
    batch = toy_batch()
    layer = spt_jax.sparse_choices(model, batch).attention["layers.1.attention"]
    seen = np.tri(48, dtype=bool) & np.asarray(batch["attention_mask"] > 0)[:, None, None]
    np.testing.assert_array_equal(layer.kept, np.broadcast_to(seen, layer.kept.shape))


def test_a_packed_row_stays_within_its_segments():
    model = spt_jax.load_pretrained("minilm")
    ids = np.random.default_rng(0).integers(1000, 2000, (4, 64)).astype(np.int32)
    batch = {"input_ids": ids, "segment_ids": np.repeat([[0, 1]], 32, 1).repeat(4, 0)}
    config = SPTConfig(
        serve=None, attention=SparseAttentionConfig(min_keys=8, granularity="token"), ffn=None
    )
    spt_jax.adapt(model, config, calibration_batch=batch)
    for layer in spt_jax.sparse_choices(model, batch).attention.values():
        for array in (layer.kept, layer.weights):
            assert not np.asarray(array)[..., :32, 32:].any()
        assert (np.asarray(layer.kept).sum(-1) == 8).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda layer, x: layer(layer(x, None, None)[0], None, None), r"calls {} 2 times"),
        (lambda layer, x: (x, {}), r"{} chose nothing: the model does not call it"),
    ],
)
@pytest.mark.parametrize(("part", "layer"), [("attention", "ffn"), ("ffn", "attention")])
def test_layers_that_are_not_called_once_are_named(call, message, part, layer):
    model = ToyModel(rngs=nnx.Rngs(0), layers=1)
    config = SPTConfig(serve=None, lora=None, attention=SPARSE, ffn=RoutedFFNConfig())
    spt_jax.adapt(model, replace(config, **{layer: None}), calibration_batch=toy_batch())

    class Other(ToyModel):
        def __call__(self, input_ids, attention_mask=None):
            return call(self.layers[0], self.embedding(input_ids))[0]

    other = Other(rngs=nnx.Rngs(0), layers=1)
    other.layers[0] = model.layers[0]
    with pytest.raises(ValueError, match=message.format(rf"layers\.0\.{part}")):
        spt_jax.sparse_choices(other, toy_batch())


def test_a_dense_model_has_no_choices():
    with pytest.raises(ValueError, match="adapt it first"):
        spt_jax.sparse_choices(ToyModel(rngs=nnx.Rngs(0)), toy_batch())
