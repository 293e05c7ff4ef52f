import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spt_jax.config import LoRAConfig
from spt_jax.layers import Embedding, Linear, LoRA, lora_dot
from spt_jax.layers.lora import cheaper_form
from tests.tolerance import tolerance


def _operands(tokens, width, out, rank, dtype):
    keys = jax.random.split(jax.random.key(tokens), 4)
    shapes = ((tokens, width), (width, out), (width, rank), (rank, out))
    x, w, a, b = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    return x.astype(dtype), w.astype(dtype), a, b


@pytest.mark.parametrize("form", ["merged", "factored"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(1, 5, 3, 2), (33, 16, 24, 4), (130, 64, 8, 16)])
def test_lora_dot_equals_its_formula_with_every_gradient(shape, dtype, form):
    operands = _operands(*shape, dtype)

    def formula(x, w, a, b):
        x, w = x.astype(jnp.float32), w.astype(jnp.float32)
        return x @ (w + a @ b)

    def value(product, *operands):
        return (product(*operands).astype(jnp.float32) ** 2).sum()

    out = lora_dot(*operands, form=form)
    expected = formula(*operands)
    bound = 4 * tolerance(dtype, shape[1] * shape[3])
    assert out.dtype == dtype
    assert np.linalg.norm(out.astype(jnp.float32) - expected) < bound * np.linalg.norm(expected)
    gradients = jax.grad(lambda *o: value(lambda *p: lora_dot(*p, form=form), *o), range(4))
    references = jax.grad(lambda *o: value(formula, *o), range(4))
    for got, want in zip(gradients(*operands), references(*operands), strict=True):
        got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
        assert np.linalg.norm(got - want) < bound * np.linalg.norm(want)


def test_the_cheaper_form_has_fewer_multiply_adds():
    for tokens, width, out in [(1, 64, 64), (32, 64, 64), (33, 64, 64), (4096, 384, 1536)]:
        merged, factored = width * out, tokens * (width + out)
        assert cheaper_form(tokens, width, out) == ("merged" if merged < factored else "factored")


def test_a_frozen_weight_costs_no_gradient_product():
    x, w, a, b = _operands(64, 32, 48, 4, jnp.float32)

    def loss(a, b):
        return lora_dot(x, w, a, b, form="merged").sum()

    hlo = jax.jit(jax.grad(loss, (0, 1))).lower(a, b).compile().as_text()
    assert "f32[32,48]" not in "".join(line for line in hlo.splitlines() if " dot(" in line)


@pytest.mark.parametrize("module", ["linear", "embedding"])
def test_fresh_factors_change_nothing_and_trained_ones_add_their_product(module):
    rngs = nnx.Rngs(0)
    if module == "linear":
        layer = Linear(12, 20, rngs=rngs)
        x, table = jax.random.normal(jax.random.key(1), (7, 12)), layer.kernel
    else:
        layer = Embedding(12, 20, rngs=rngs)
        x, table = jax.nn.one_hot(jnp.array([3, 0, 11]), 12), layer.embedding
    inputs = x if module == "linear" else x.argmax(-1)
    before = layer(inputs)
    layer.lora = LoRA(12, 20, config=LoRAConfig(rank=3, alpha=6), rngs=rngs)
    np.testing.assert_allclose(layer(inputs), before, atol=1e-6)
    layer.lora.b[...] = jax.random.normal(jax.random.key(2), (3, 20))
    merged = table[...] + 2 * layer.lora.a[...] @ layer.lora.b[...]
    np.testing.assert_allclose(layer(inputs), x @ merged, atol=1e-5)


def test_dropout_drops_whole_input_features_and_keeps_the_mean():
    lora = LoRA(4000, 2, config=LoRAConfig(rank=3, dropout=0.25), rngs=nnx.Rngs(0))
    a, _ = lora.factors(jax.random.key(3))
    dropped = np.asarray(a == 0)
    assert (dropped.all(1) == dropped.any(1)).all()
    assert 0.2 < dropped.mean() < 0.3
    np.testing.assert_allclose(a[~dropped.any(1)], lora.a[...][~dropped.any(1)] / 0.75, rtol=1e-6)
    np.testing.assert_array_equal(lora.factors(None)[0], lora.a[...])


def test_scaling():
    assert LoRAConfig(rank=16, alpha=32).scaling == 2
    assert LoRAConfig(rank=16, alpha=32, use_rslora=True).scaling == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"targets": ("attention", "mlp")}, "unknown LoRA targets .'mlp'."),
    ],
)
def test_bad_configurations_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**options)
