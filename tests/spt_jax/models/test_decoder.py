import dataclasses
import functools
import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import spt_jax
from spt_jax import LoRAConfig, SparseAttentionConfig, SPTConfig
from spt_jax.layers import LoRAParam
from spt_jax.models import load_pretrained
from spt_jax.models.decoder import Decoder
from spt_jax.training import eval_step, partition
from spt_jax.training.objectives import Outcome
from tests.spt_jax.models.builders import GOLDEN, golden

TOLERANCE = 1e-4  # float32, absolute; outputs are of size 1 to 10
FAMILIES = ("opt", "opt_350m", "llama", "llama_biased", "mistral", "qwen2", "qwen3")
CLASSIFY = {"task": "sequence-classification", "num_labels": 3}
SPARSE = {
    "token": SparseAttentionConfig(density=0.1, min_keys=9, granularity="token"),
    "tile": SparseAttentionConfig(
        density=0.1, min_keys=9, granularity="tile", block_q=8, key_group=8
    ),
}
SHAPE = (4, 24)


@functools.cache
def causal_lm(name) -> Decoder:
    """A golden model; not to be changed."""
    return load_pretrained(GOLDEN / name, task="causal-lm")


@functools.cache
def small(name, attention="dense") -> Decoder:
    """One layer of a golden model."""
    model = load_pretrained(GOLDEN / name, task="causal-lm")
    model.layers = nnx.List(model.layers[:1])
    if attention == "dense":
        return model
    config = SPTConfig(serve=None, lora=LoRAConfig(rank=2), attention=SPARSE[attention], ffn=None)
    return spt_jax.adapt(model, config, calibration_batch={"input_ids": tokens((4, 32))})


KINDS = [
    ("opt", "dense"),
    ("mistral", "dense"),
    ("llama", "dense"),
    ("llama", "token"),
    ("llama", "tile"),
]


@nnx.jit
def _run(model, ids, mask, segments):
    return model(ids, mask, segment_ids=segments)


def run(model, ids, mask=None, segments=None):
    """Logits; compiled once for a model and a shape."""
    mask = np.ones(ids.shape, np.int32) if mask is None else mask
    segments = np.zeros(ids.shape, np.int32) if segments is None else segments
    return np.asarray(_run(model, ids, mask, segments))


def tokens(shape, seed=0):
    return jax.random.randint(jax.random.key(seed), shape, 3, 97)


def assert_close(actual, expected, valid=...):
    np.testing.assert_allclose(
        np.asarray(actual)[valid], np.asarray(expected)[valid], rtol=0, atol=TOLERANCE
    )


@pytest.mark.versions
@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_equal_transformers(name):
    inputs, hidden_states, logits = golden(name)
    valid = inputs["attention_mask"] == 1
    model = causal_lm(name)
    ours, aux = model.forward(**inputs)
    assert aux == {}
    assert ours.dtype == jnp.float32
    assert_close(ours, logits, valid)
    hidden, _ = model.hidden_states(**inputs)
    assert_close(hidden, hidden_states, valid)
    assert_close(model.logits(hidden), logits, valid)
    assert_close(hidden @ model.output_kernel(), logits, valid)


@pytest.mark.versions
@pytest.mark.parametrize("source", ["llama", "llama_backbone"])
def test_backbone_equals_transformers(source):
    inputs, expected, _ = golden("llama")
    hidden = load_pretrained(GOLDEN / source)(**inputs)
    assert_close(hidden, expected, inputs["attention_mask"] == 1)


@pytest.mark.versions
@pytest.mark.parametrize("name", ["opt_classify", "llama_classify"])
def test_classifiers_equal_transformers(name):
    inputs, _, expected = golden(name)
    model = load_pretrained(GOLDEN / name, **CLASSIFY)
    assert_close(model(**inputs), expected)
    left = {field: turned(inputs["attention_mask"], array) for field, array in inputs.items()}
    assert_close(model(**left), expected)
    full = inputs["attention_mask"].all(1)
    assert_close(model(inputs["input_ids"]), expected, full)


def test_evaluation_is_strictly_causal():
    """No logit that a model is judged by depends on a later token; by tile some do."""
    config = SparseAttentionConfig(min_keys=8, granularity="tile", block_q=16, key_group=4)
    model = load_pretrained(GOLDEN / "llama", task="causal-lm")
    spt = SPTConfig(serve=None, lora=LoRAConfig(rank=2), attention=config, ffn=None)
    spt_jax.adapt(model, spt, calibration_batch={"input_ids": tokens((4, 32))})
    ids = tokens((4, 32), seed=1)
    changed = ids.at[:, -1].set((ids[:, -1] + 40) % 97)
    parts = partition(model, "adapter")

    def logits(model, batch, key):
        return Outcome(jnp.zeros(()), jnp.ones(()), {}, model(batch["input_ids"]))

    judged = [
        eval_step(
            parts.params, parts.frozen, {"input_ids": x}, merge=parts.merge, objective=logits
        )[2][:, :-1]
        for x in (ids, changed)
    ]
    np.testing.assert_array_equal(*judged)
    assert (np.asarray(model(ids)) != np.asarray(model(changed)))[:, :-1].any()


VARIANTS = [
    (path.parent.name, variant)
    for path in sorted(GOLDEN.glob("*/variants.json"))
    for variant in json.loads(path.read_text())["variants"]
]


@pytest.mark.versions
@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_variants_equal_transformers(name, variant, tmp_path):
    golden = json.loads((GOLDEN / name / "variants.json").read_text())
    directory = tmp_path / "model"
    shutil.copytree(GOLDEN / name, directory)
    raw = json.loads((directory / "config.json").read_text()) | golden["variants"][variant][0]
    raw = {field: value for field, value in raw.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(raw))
    model = load_pretrained(directory, task="causal-lm")
    # transformers does not stop at the model's positions
    model.config = dataclasses.replace(model.config, num_positions=64)
    with np.load(GOLDEN / name / "variants.npz") as arrays:
        for batch in ("short", "long"):
            mask = arrays[f"{batch}.attention_mask"]
            logits = model(arrays[f"{batch}.input_ids"], mask)[:, :, :: golden["logits_stride"]]
            assert_close(logits, arrays[f"{variant}.{batch}"], mask == 1)


@pytest.mark.parametrize("name", ["opt", "qwen3"])
def test_bfloat16_is_near_float32(name):
    inputs, _, expected = golden(name)
    model = load_pretrained(GOLDEN / name, task="causal-lm", dtype="bfloat16")
    assert {x.dtype.name for x in jax.tree.leaves(nnx.state(model))} == {"bfloat16"}
    logits = model(**inputs)
    assert logits.dtype == jnp.bfloat16
    valid = inputs["attention_mask"] == 1
    error = (np.asarray(logits, np.float32) - expected)[valid]
    assert np.sqrt((error**2).mean() / (expected[valid] ** 2).mean()) < 0.03


def test_weights_and_compute_may_differ_in_dtype():
    inputs, _, expected = golden("llama")
    model = load_pretrained(
        GOLDEN / "llama", task="causal-lm", dtype="float32", param_dtype="bfloat16"
    )
    logits = model(**inputs)
    assert logits.dtype == jnp.float32
    valid = inputs["attention_mask"] == 1
    assert np.abs(np.asarray(logits) - expected)[valid].max() < 0.3


def turned(mask, array):
    """Rows padded at the left, from rows padded at the right."""
    return np.stack([np.roll(a, -int(m.sum())) for m, a in zip(mask, array, strict=True)])


@pytest.mark.parametrize("name", ["opt", "llama", "mistral"])
def test_padding_may_lie_on_either_side(name):
    inputs, _, expected = golden(name)
    mask = inputs["attention_mask"]
    left = {field: turned(mask, array) for field, array in inputs.items()}
    logits = run(causal_lm(name), left["input_ids"], left["attention_mask"])
    assert_close(logits[left["attention_mask"] == 1], expected[mask == 1])


@pytest.mark.parametrize("name", ["opt", "llama", "mistral"])
def test_what_padding_holds_does_not_matter(name):
    inputs, _, _ = golden(name)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    other = np.where(mask == 1, ids, 96)
    one, two = (run(causal_lm(name), i, mask) for i in (ids, other))
    np.testing.assert_array_equal(one[mask == 1], two[mask == 1])


CHANGED = (0, 7, 13, 23)
STARTS = (0, 9, 15, 17, 24)


@pytest.mark.parametrize(("name", "attention"), KINDS[:-1])
def test_packed_sequences_are_as_if_alone(name, attention):
    packed = np.asarray(tokens(SHAPE))
    ids = np.repeat([[4, 4, 7, 2]], np.diff(STARTS), axis=1)
    ids[:, STARTS[1] :] += 1  # so that neighbours differ; an id may come again
    segments = np.broadcast_to(ids, SHAPE)
    alone, mask = np.full(SHAPE, 5), np.zeros(SHAPE, np.int32)
    for row, (start, end) in enumerate(itertools.pairwise(STARTS)):
        alone[row, : end - start] = packed[0, start:end]
        mask[row, : end - start] = 1
    expected = run(small(name), alone, mask)
    # sparse attention keeps the keys of the longest sequence, so it drops none here
    actual = run(small(name, attention), packed, None, segments)
    for row, (start, end) in enumerate(itertools.pairwise(STARTS)):
        assert_close(actual[0, start:end], expected[row, : end - start])


@pytest.mark.parametrize(("name", "attention"), KINDS)
def test_tokens_see_none_that_follow(name, attention):
    model = small(name, attention)
    ids = np.array(tokens(SHAPE)[:1].repeat(len(CHANGED), 0))
    before = run(model, ids)
    for row, changed in enumerate(CHANGED):
        ids[row, changed] = 3 + (ids[row, changed] - 2) % 94
    after = run(model, ids)
    for row, changed in enumerate(CHANGED):
        # the queries of a tile choose their keys together
        start = changed - changed % SPARSE["tile"].block_q if attention == "tile" else changed
        assert_close(after[row, :start], before[row, :start])
        assert np.abs(after[row, changed] - before[row, changed]).max() > 0.1


@pytest.mark.parametrize(("name", "attention"), KINDS)
def test_empty_rows_are_finite_and_change_nothing(name, attention):
    model = small(name, attention)
    ids, mask = tokens(SHAPE), np.ones(SHAPE, np.int32)
    expected = run(model, ids, mask)
    mask[1] = mask[3] = 0
    actual = run(model, ids, mask)
    assert np.isfinite(actual).all()
    assert_close(actual[::2], expected[::2])


@nnx.jit
def gradients(model, ids, mask, key):
    def loss(model):
        logits, aux = model.forward(ids, mask, dropout_key=key)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:])
        return (losses * mask[:, 1:]).sum() / mask.sum() + sum(aux.values()) / mask.sum()

    return nnx.grad(loss)(model)


def ragged():
    mask = np.ones(SHAPE, np.int32)
    mask[0, 5:] = 0
    mask[1] = 0
    return tokens(SHAPE), mask


@pytest.mark.parametrize(
    ("name", "attention"), [("opt", "dense"), ("llama", "dense"), ("llama", "token")]
)
def test_gradients_reach_the_weights(name, attention):
    found = gradients(small(name, attention), *ragged(), jax.random.key(1))
    for path, gradient in nnx.to_flat_state(found):
        gradient = np.asarray(gradient[...])
        assert np.isfinite(gradient).all(), path
        if attention == "dense":  # of LoRA's factors one starts at zero, and codewords may lie idle
            assert np.abs(gradient).max() > 0, path


def test_remat_changes_no_gradient(monkeypatch):
    stored = gradients(small("llama"), *ragged(), jax.random.key(1))
    monkeypatch.setattr(small("llama"), "remat", True)
    recomputed = gradients(small("llama"), *ragged(), jax.random.key(1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-3, 1e-4), stored, recomputed)


def test_split_merge_and_jit():
    model, ids = small("llama"), tokens(SHAPE)
    graph, state = nnx.split(model)
    jitted = jax.jit(lambda state, ids: nnx.merge(graph, state)(ids))
    assert_close(jitted(state, ids), run(model, ids))
    assert hash(graph) == hash(nnx.split(model)[0])


def test_dropout_follows_its_key():
    model, ids = small("opt"), tokens(SHAPE)
    dropped = nnx.jit(lambda model, key: model(ids, dropout_key=key))
    one, two = jax.random.split(jax.random.key(0))
    first = dropped(model, one)
    np.testing.assert_array_equal(first, dropped(model, one))
    assert np.abs(first - dropped(model, two)).max() > 0.1
    assert np.abs(first - run(model, ids)).max() > 0.1


def test_the_output_matrix_is_the_word_embedding_without_its_factors():
    model, ids = load_pretrained(GOLDEN / "qwen2", task="causal-lm"), tokens(SHAPE)
    config = SPTConfig(
        serve=None, lora=LoRAConfig(rank=2, targets=("embeddings",)), attention=None, ffn=None
    )
    spt_jax.adapt(model, config)
    model.layers = nnx.List([])
    before, _ = model.hidden_states(ids)
    for _, factor in nnx.to_flat_state(nnx.state(model, LoRAParam)):
        factor[...] = jnp.ones_like(factor[...])
    table = model.embedding.embedding[...]
    np.testing.assert_array_equal(model.output_kernel(), table.T)
    hidden, _ = model.hidden_states(ids)
    assert np.abs(hidden - before).max() > 0.1
    assert_close(model(ids), hidden @ table.T)


def test_sparse_attention_knows_no_window(monkeypatch):
    model, sparse = small("mistral"), small("llama", "token").layers[0].attention.sparse
    monkeypatch.setattr(model.layers[0].attention, "sparse", sparse)
    ids = tokens((2, 9))  # of which every query keeps all, within the window
    np.testing.assert_array_equal(model(ids), small("mistral")(ids))
    with pytest.raises(NotImplementedError, match=r"window of 4 keys: give .* got 10, or adapt"):
        model(tokens((2, 10)))


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_longest_sequence(name):
    model = causal_lm(name)
    assert jax.eval_shape(model, tokens((1, 32))).shape == (1, 32, 97)
    with pytest.raises(ValueError, match=r"has 33 tokens, .* serve 1 to 32"):
        model(tokens((1, 33)))


@pytest.mark.usefixtures("unhooked")
def test_wrong_inputs_are_named():
    model, ids = causal_lm("llama"), tokens((2, 6))
    with pytest.raises(ValueError, match=r"must be \[batch, sequence\], got shape \(6,\)"):
        model(ids[0])
    for name in ("attention_mask", "segment_ids"):
        with pytest.raises(ValueError, match=rf"{name} has shape \(2, 5\), .* \(2, 6\)"):
            model(ids, **{name: ids[:, 1:]})
    with pytest.raises(ValueError, match="a llama model has no token types"):
        model(ids, token_type_ids=jnp.zeros_like(ids))
