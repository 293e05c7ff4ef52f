import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels import kept_keys
from spt_jax.calibration import fit_sparse_attention
from spt_jax.config import SparseAttentionConfig
from spt_jax.layers import (
    Attention,
    RotaryConfig,
    SparseAttention,
    dense_attention,
    rotary_angles,
    rotate,
)
from spt_jax.layers.attention import _sampled_codebook_loss
from spt_jax.layers.quantizer import codebook_loss

B, S, N, K, H = 2, 40, 4, 2, 8


def _inputs(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((B, S, N, H), (B, S, K, H), (B, S, K, H))
    return tuple(jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))


@pytest.mark.parametrize("causal", [False, True])
def test_dense_attention_equals_its_formula_and_masked_rows_are_zero(causal):
    q, k, v = _inputs()
    key_mask = (jnp.arange(S) < jnp.array([[30], [0]])) & (jnp.arange(S) >= 3)
    segments = jnp.broadcast_to(jnp.arange(S) // 16, (B, S))
    out = dense_attention(q, k, v, causal=causal, key_mask=key_mask, segment_ids=segments)
    k, v = (jnp.repeat(a, N // K, axis=2) for a in (k, v))
    valid = key_mask[:, None, :] & (segments[:, :, None] == segments[:, None, :])
    if causal:
        valid &= np.tri(S, dtype=bool)
    logits = jnp.where(valid[:, None], jnp.einsum("bqnh,bknh->bnqk", q, k) * H**-0.5, -jnp.inf)
    some = valid.any(-1)[:, None, :, None]
    weights = jnp.where(some, jax.nn.softmax(jnp.where(some, logits, 0)), 0)
    expected = jnp.einsum("bnqk,bknh->bqnh", weights, v)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert not np.asarray(out[1]).any()


@pytest.mark.parametrize("granularity", ["token", "tile"])
def test_a_causal_layer_never_looks_ahead(granularity):
    """Neither values nor the choice of keys depend on later tokens."""
    config = SparseAttentionConfig(min_keys=16, granularity=granularity, block_q=8, key_group=8)
    layer = Attention(32, N, num_kv_heads=K, causal=True, rngs=nnx.Rngs(0))
    q, k, _ = _inputs()
    layer.sparse = fit_sparse_attention(
        q.reshape(-1, N, H), k.reshape(-1, K, H), config=config, causal=True, key=jax.random.key(1)
    )
    x = jax.random.normal(jax.random.key(2), (B, S, 32))
    changed = x.at[:, 24:].set(9.0)
    before, after = (layer(a)[0][:, :24] for a in (x, changed))
    # in tile granularity the queries of a tile share their list: compare whole tiles
    np.testing.assert_allclose(before, after, atol=1e-6)


def test_strictly_no_output_depends_on_a_later_token():
    """By tile others do, through the keys that their tile keeps."""
    config = SparseAttentionConfig(min_keys=8, granularity="tile", block_q=16, key_group=4)
    layer = Attention(32, N, num_kv_heads=K, causal=True, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(2), (B, 64, 32))
    q, k, _ = layer._project(x, None, [None] * 4)
    layer.sparse = fit_sparse_attention(
        q.reshape(-1, N, H), k.reshape(-1, K, H), config=config, causal=True, key=jax.random.key(1)
    )
    changed = x.at[:, -1].multiply(-3)
    for strict in (False, True):
        layer.set_attributes(strict=strict)
        before, after = (np.asarray(layer(a)[0])[:, :-1] for a in (x, changed))
        assert (before == after).all() == strict
    layer.sparse.config = dataclasses.replace(config, granularity="token")
    np.testing.assert_array_equal(layer(x)[0][:, :-1], before)


def test_four_heads_of_a_key_head_share_lists():
    """By default, and every query keeps keys; the reference gives the same."""
    config = SparseAttentionConfig(min_keys=8, granularity="tile", block_q=32, key_group=4)
    layer = Attention(32, 8, num_kv_heads=2, causal=True, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(2), (B, 50, 32))
    q, k, _ = layer._project(x, None, [None] * 4)
    layer.sparse = fit_sparse_attention(
        q.reshape(-1, 8, 4), k.reshape(-1, 2, 4), config=config, causal=True, key=jax.random.key(1)
    )
    selection = layer.sparse.select(q, k, num_keys=8, granularity="tile")
    assert (selection.heads, selection.block_q) == (4, 8)
    assert selection.counts.shape == (B, 2, 7)
    assert kept_keys(selection, 50).shape == (B, 8, 50, 50)
    out = layer(x)[0]
    for options in ({"implementation": "reference"}, {"share_heads": False}):
        layer.sparse.config = dataclasses.replace(config, **options)
        same = np.abs(np.asarray(layer(x)[0] - out)).max() < 1e-5
        assert same == ("implementation" in options)


@pytest.mark.parametrize("num_tokens", [7, 40, 1000])
def test_the_sampled_codebook_loss_estimates_the_whole(num_tokens):
    config = SparseAttentionConfig()
    q, k, _ = _inputs()
    sparse = fit_sparse_attention(
        q.reshape(-1, N, H), k.reshape(-1, K, H), config=config, causal=False, key=jax.random.key(1)
    )
    books = sparse.key_codebooks[...]
    codes = jax.random.randint(jax.random.key(3), (B, S, *books.shape[:2]), 0, 16).astype(jnp.uint8)
    mask = jnp.arange(S) < jnp.array([[33], [21]])
    whole = codebook_loss(k, books, codes, mask)
    estimate = _sampled_codebook_loss(k, books, codes, mask, num_tokens)
    relative = abs(float(estimate / whole) - 1)
    assert relative < (1e-5 if num_tokens >= B * S else 0.5)


def test_short_sequences_keep_every_key():
    config = SparseAttentionConfig(min_keys=S)
    q, k, v = _inputs()
    sparse = fit_sparse_attention(
        q.reshape(-1, N, H), k.reshape(-1, K, H), config=config, causal=False, key=jax.random.key(1)
    )
    out, aux = sparse(q, k, v)
    np.testing.assert_array_equal(out, dense_attention(q, k, v))
    assert aux == {}
    assert config.num_keys(S) == S
    assert config.num_keys(16 * S) == 2 * S


def test_the_rule_for_a_length():
    config = SparseAttentionConfig()
    longest = config.dense_max_length
    assert config.granularity_at(longest) == "dense"
    assert config.granularity_at(longest + 1) == "tile"
    assert config.granularity_at(longest + 1, strict=True) == "token"
    assert config.granularity_at(longest, strict=True) == "dense"
    for granularity in ("token", "tile", "dense"):
        chosen = dataclasses.replace(config, granularity=granularity)
        assert chosen.granularity_at(512) == granularity
        assert chosen.granularity_at(chosen.min_keys) == "dense"


def test_inputs_that_do_not_fit_are_named():
    layer = Attention(32, N, num_kv_heads=K, causal=True, rngs=nnx.Rngs(0))
    x, mask = jnp.zeros((B, S, 32)), jnp.ones((B, S), bool)
    for arguments, message in [
        ({"x": x[..., 1:]}, r"Attention: x is float32\[2, 40, 31\]; expected .* = \[B, S, 32\]"),
        ({"x": x[0]}, r"Attention: x is float32\[40, 32\]; expected float \[B, S, D\]"),
        ({"x": x, "key_mask": mask[:1]}, r"Attention: key_mask is bool\[1, 40\].* = \[2, 40\]"),
        ({"x": x, "key_mask": mask * 1}, r"Attention: key_mask is int32\[2, 40\]; expected bool"),
        ({"x": x, "segment_ids": mask}, r"Attention: segment_ids is bool\[2, 40\]; expected int"),
    ]:
        with pytest.raises(ValueError, match=f"^{message}"):
            layer(**arguments)
    with pytest.raises(ValueError, match="prompts of 40 tokens do not fit capacity=39"):
        layer.prefill(x, capacity=39, key_mask=mask)
    _, cache = layer.prefill(x, capacity=S, key_mask=mask)
    with pytest.raises(ValueError, match=r"cache.keys is .*\[2, 2, 40, 8\].* = \[1, 2, 40, 8\]"):
        layer.decode(x[:1, :1], cache, index=jnp.array(3), key_mask=mask[:1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"num_kv_heads": 0}, "4 query heads cannot be shared evenly by 0"),
        ({"head_width": 0}, "head_width must be at least 1, got 0"),
        ({"causal": True, "window": 0}, "a window must hold at least 1 key, got 0"),
        ({"window": 4}, "a window of 4 keys needs causal attention"),
    ],
)
def test_sizes_that_make_no_layer_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Attention(**{"width": 32, "num_heads": 4} | options, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"query_codebooks": jnp.zeros((K, 8, 16, 1))[:1]},
            r"key_codebooks is .*= \[1, 8, 16, 1\]",
        ),
        ({"key_center": jnp.zeros((K, 7))}, "8 subspaces of width 1 do not cover the head width 7"),
        ({"key_center": jnp.zeros((1, H))}, r"key_center is float32\[1, 8\].* = \[2, H\]"),
        ({"query_codebooks": None}, "query_codebooks must be None with the rule match_count, and"),
        (
            {"config": SparseAttentionConfig(num_codewords=8)},
            r"query_codebooks is .*= \[K, M, 8, 1\]",
        ),
        (
            {"config": SparseAttentionConfig(codeword_width=2)},
            r"query_codebooks is .*\[K, M, 16, 2\]",
        ),
        ({"config": SparseAttentionConfig(rule="match_count")}, "the rule is match_count"),
    ],
)
def test_codebooks_that_do_not_fit_are_named(wrong, message):
    arrays = {
        "query_codebooks": jnp.zeros((K, H, 16, 1)),
        "key_codebooks": jnp.zeros((K, H, 16, 1)),
        "key_center": jnp.zeros((K, H)),
        "config": SparseAttentionConfig(),
    }
    SparseAttention(**arrays, causal=True)
    with pytest.raises(ValueError, match=f"^SparseAttention: .*{message}"):
        SparseAttention(**arrays | wrong, causal=True)


def test_angles_that_do_not_fit_are_named():
    positions = jnp.zeros((B, S), int)
    with pytest.raises(ValueError, match="head_width must be even, got 7"):
        rotary_angles(positions, 7, RotaryConfig())
    with pytest.raises(ValueError, match="heads of width 8; the angles serve 6"):
        rotate(_inputs()[0], *rotary_angles(positions, 6, RotaryConfig()))
