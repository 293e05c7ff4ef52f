from __future__ import annotations

import errno
import functools
import json
import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import spt_jax
from spt_jax import (
    AdaptationReport,
    LoRAConfig,
    RoutedFFNConfig,
    SparseAttentionConfig,
    SPTConfig,
)
from spt_jax.export import files
from spt_jax.layers import (
    CalibrationStat,
    Embedding,
    HeadParam,
    Linear,
    LoRAParam,
    RoutedFFN,
    RouterParam,
    SparseAttention,
)
from spt_jax.models.slots import module_at, tensor_slots
from tests.spt_jax.toy import ToyModel

GOLDEN = Path(__file__).parents[1] / "golden"
ADAPTERS = GOLDEN / "adapters"
SPARSE = SparseAttentionConfig(
    density=0.5, min_keys=4, num_codewords=4, codeword_width=2, granularity="token"
)
ROUTED = RoutedFFNConfig(num_blocks=4, active_blocks=2, absent_rank=3)
TASKS = {
    "bert": "sequence-classification",
    "roberta": "sequence-classification",
    "distilbert": "backbone",
    "llama": "causal-lm",
    "llama_classify": "sequence-classification",
    "opt": "causal-lm",
    "opt_350m": "causal-lm",
    "qwen2": "causal-lm",
    "qwen3": "backbone",
}


def _load(name, source=None, **options):
    return spt_jax.load_pretrained(
        source or GOLDEN / name, task=TASKS[name], num_labels=3, **options
    )


def _batch(length=12):
    keys = jax.random.split(jax.random.key(3))
    lengths = jnp.array([length, length - 4, length - 1])
    return {
        "input_ids": jax.random.randint(keys[0], (3, length), 3, 97),
        "attention_mask": (jnp.arange(length) < lengths[:, None]).astype(jnp.int32),
    }


def _with_lora(name, **options):
    """A model with LoRA, as if it had been trained."""
    config = LoRAConfig(**({"rank": 3, "alpha": 7, "use_rslora": True, "dropout": 0.1} | options))
    model = spt_jax.adapt(_load(name), SPTConfig(lora=config, attention=None, ffn=None))
    rng = np.random.default_rng(0)
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Any(LoRAParam, HeadParam))):
        old = variable.get_value()
        new = np.asarray(old) + 0.1 * rng.normal(size=old.shape)
        variable.set_value(jnp.asarray(new, old.dtype))
    return model


def _make_sparse(model):
    """Put random SPT modules into a model."""
    rng = np.random.default_rng(1)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    for layer in model.layers:
        attention, ffn = layer.attention, layer.ffn
        heads, width = attention.num_kv_heads, attention.head_width
        codebooks = (heads, width // 2, 4, 2)
        attention.sparse = SparseAttention(
            normal(*codebooks),
            normal(*codebooks),
            normal(heads, width),
            config=SPARSE,
            causal=attention.causal,
        )
        layer.ffn = RoutedFFN(
            ffn,
            permutation=jnp.asarray(rng.permutation(ffn.up.out_features), jnp.int32),
            router_kernel=0.3 * normal(ffn.up.in_features, 4),
            router_bias=normal(4),
            absent_output=normal(4, ffn.up.in_features),
            absent_a=normal(ffn.up.in_features, 4, 3),
            absent_b=normal(4, 3, ffn.up.in_features),
            config=ROUTED,
        )
    return model


@nnx.jit
def _forward(model, batch):
    return model(**batch)


def _run(model):
    return np.asarray(_forward(model, _batch()), np.float32)


def _assert_same(model, expected, *, atol=2e-5):
    batch = _batch()
    valid = batch["attention_mask"] != 0 if expected.ndim == 3 else ...
    np.testing.assert_allclose(_run(model)[valid], expected[valid], atol=atol)


@pytest.mark.parametrize("name", [name for name in TASKS if name not in ("opt", "llama")])
def test_merged_weights_and_config(name, tmp_path):
    model = _with_lora(name, targets=("attention", "ffn", "embeddings"))
    spt_jax.save_pretrained(model, tmp_path / "merged")
    files = {path.name for path in (tmp_path / "merged").iterdir()}
    assert files == {"config.json", "model.safetensors"}
    restored = _load(name, tmp_path / "merged")
    slots = tensor_slots(model)
    for key, slot in tensor_slots(restored).items():
        if key == "lm_head.weight" and key not in slots:  # that of a tied model, see below
            continue
        module = module_at(model, slot.path.rpartition(".")[0])
        expected = np.asarray(slots[key].variable[...])
        if isinstance(module, Linear | Embedding) and module.lora and expected.ndim == 2:
            a, b = module.lora.a[...], module.lora.b[...]
            expected = expected + np.asarray(a) @ np.asarray(b) * (7 / 3**0.5)
        np.testing.assert_allclose(slot.variable[...], expected, atol=1e-6)
    raw = json.loads((tmp_path / "merged" / "config.json").read_text())
    original = json.loads((GOLDEN / name / "config.json").read_text())
    assert raw["dtype"] == "float32"
    if TASKS[name] != "backbone":
        assert raw["architectures"] == original["architectures"]
    if TASKS[name] == "sequence-classification":
        assert raw["id2label"] == original["id2label"]
        assert raw["label2id"] == original["label2id"]


def test_merged_is_the_same_function(tmp_path):
    model = _with_lora("qwen2", targets=("attention", "ffn", "embeddings"))
    spt_jax.save_pretrained(model, tmp_path / "merged")
    _assert_same(_load("qwen2", tmp_path / "merged"), _run(model))


@pytest.fixture(scope="module")
def sparse_adapter(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sparse") / "adapter"
    spt_jax.save_adapter(_make_sparse(_with_lora("llama")), directory, base_model="llama")
    return directory


def test_sparse_models_come_back(tmp_path, caplog):
    name = "llama_classify"
    model = _make_sparse(_with_lora(name))
    spt_jax.save_pretrained(model, tmp_path / "merged")
    assert (
        "sparse attention of 1 layer and routed FFN of 1 layer are not part of a Hugging Face "
        "model: transformers computes these layers densely" in caplog.text
    )
    caplog.clear()
    with caplog.at_level(logging.INFO, "spt_jax"):
        merged = _load(name, tmp_path / "merged")
    assert "SPT modules too; the model is dense until spt_jax.load_adapter adds" in caplog.text
    spt_jax.load_adapter(merged, tmp_path / "merged")
    _assert_same(merged, _run(model))
    kinds = {type(v) for _, v in nnx.to_flat_state(nnx.state(merged))}
    assert {RouterParam, CalibrationStat} <= kinds
    assert LoRAParam not in kinds


@pytest.mark.parametrize("name", TASKS)
def test_the_dense_form_is_what_is_exported(name, tmp_path):
    """And it computes the same with and without a cache, and leaves the sparse form as it was."""
    model = _make_sparse(_with_lora(name))
    sparse = _run(model)
    spt_jax.save_pretrained(model, tmp_path / "merged")
    exported = _load(name, tmp_path / "merged")
    spt_jax.set_form(model, "dense")
    _assert_same(model, _run(exported))
    if TASKS[name] == "causal-lm":
        prompts = _batch()["input_ids"][:, :6].tolist()
        tokens = [spt_jax.generate(m, prompts, max_new_tokens=5) for m in (model, exported)]
        assert tokens[0] == tokens[1]
    spt_jax.set_form(model, "sparse")
    np.testing.assert_array_equal(_run(model), sparse)
    assert np.abs(sparse - _run(exported)).max() > 1e-2


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_sparse_adapters_come_back(name, tmp_path, caplog):
    model = _make_sparse(_with_lora(name))
    spt_jax.save_adapter(model, tmp_path / "adapter")
    assert not caplog.messages
    restored = _load(name)
    assert spt_jax.load_adapter(restored, tmp_path / "adapter") is restored
    _assert_equal(restored, model)


def _assert_equal(model, expected):
    """The same modules, variables, options and numbers."""
    (graph, state), (expected_graph, expected_state) = nnx.split(model), nnx.split(expected)
    assert graph == expected_graph
    jax.tree.map(np.testing.assert_array_equal, state, expected_state)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_hidden_units_are_written_in_their_first_order(name, tmp_path):
    dense, routed = _with_lora(name), _make_sparse(_with_lora(name))
    spt_jax.save_pretrained(dense, tmp_path / "dense")
    spt_jax.save_pretrained(routed, tmp_path / "routed")
    spt_jax.save_adapter(dense, tmp_path / "dense_adapter")
    spt_jax.save_adapter(routed, tmp_path / "routed_adapter")
    for kind, file in [("", "model.safetensors"), ("_adapter", "adapter_model.safetensors")]:
        first, second = (load_file(tmp_path / f"{d}{kind}" / file) for d in ("dense", "routed"))
        assert first.keys() == second.keys()
        for key, array in first.items():
            np.testing.assert_allclose(second[key], array, atol=1e-6)


def test_lora_of_a_tied_embedding_unties(tmp_path):
    model = _with_lora("qwen2", targets=("embeddings",))
    spt_jax.save_pretrained(model, tmp_path / "merged")
    raw = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert raw["tie_word_embeddings"] is False
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    table = load_file(GOLDEN / "qwen2" / "model.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(tensors["lm_head.weight"], table)
    assert not np.array_equal(tensors["model.embed_tokens.weight"], table)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "opt_350m", "bert"])
def test_shards_dtype_and_tokenizer(name, tmp_path):
    task = TASKS.get(name, "causal-lm")
    model = spt_jax.load_pretrained(GOLDEN / name, task=task, num_labels=3)
    out = tmp_path / "merged"
    spt_jax.save_pretrained(
        model, out, dtype="bfloat16", max_shard_bytes=20_000, tokenizer="minilm"
    )
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert len(shards) > 1
    assert index["weight_map"].keys() == tensor_slots(model).keys()
    size = sum(a.nbytes for shard in shards for a in load_file(out / shard).values())
    assert index["metadata"]["total_size"] == size
    assert all((out / shard).stat().st_size < 24_000 for shard in shards)
    restored = spt_jax.load_pretrained(
        out, task=task, num_labels=3, dtype="float32", param_dtype="bfloat16"
    )
    for name, slot in tensor_slots(restored).items():
        expected = tensor_slots(model)[name].variable[...].astype(jnp.bfloat16)
        np.testing.assert_array_equal(slot.variable[...], expected)
    assert spt_jax.load_tokenizer(out).encode("natural words").ids


def test_files_of_chat_templates_are_copied_or_told(tmp_path, caplog):
    source, out = tmp_path / "source", tmp_path / "out"
    (source / "additional_chat_templates").mkdir(parents=True)
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    for name in ("tokenizer.json", "chat_template.jinja", "chat_template.json"):
        (source / name).write_text(name)
    spt_jax.save_pretrained(_load("bert"), out, tokenizer=source)
    for name in ("tokenizer.json", "chat_template.jinja", "chat_template.json"):
        assert (out / name).read_text() == name
    (line,) = caplog.messages
    assert "chat templates tool_use.jinja are not copied; copy the folder additional_chat_t" in line
    spt_jax.save_pretrained(_load("bert"), out, tokenizer=source, overwrite=True)


@pytest.mark.parametrize("name", ["lora", "rslora", "embedding", "bert_classify"])
def test_adapters_of_peft(name, tmp_path):
    base = "bert" if name.startswith("bert") else "llama"
    with np.load(ADAPTERS / name / "golden.npz") as file:
        inputs = dict(file)
    expected = inputs.pop("logits")
    inputs.pop("hidden_states", None)
    model = spt_jax.load_adapter(_load(base), ADAPTERS / name)
    valid = inputs["attention_mask"] != 0 if expected.ndim == 3 else ...
    logits = np.asarray(model(**inputs))
    np.testing.assert_allclose(logits[valid], expected[valid], atol=1e-4)
    # and back
    spt_jax.save_adapter(model, tmp_path / "again", base_model=base)
    written = load_file(tmp_path / "again" / "adapter_model.safetensors")
    original = load_file(ADAPTERS / name / "adapter_model.safetensors")
    added = {key for key in written if "pooler" in key}
    assert written.keys() - added == {k for k in original if ".base_layer." not in k}
    for key in written.keys() - added:
        np.testing.assert_array_equal(written[key], original[key])
    ours, theirs = (
        json.loads((d / "adapter_config.json").read_text())
        for d in (tmp_path / "again", ADAPTERS / name)
    )
    same = ["peft_type", "base_model_name_or_path", "bias", "use_rslora", "lora_dropout"]
    if name != "rslora":
        same += ["r", "lora_alpha", "rank_pattern", "alpha_pattern"]
        assert set(ours["target_modules"]) == set(theirs["target_modules"])
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
    _assert_equal(spt_jax.load_adapter(_load(base), tmp_path / "again"), model)


@pytest.mark.parametrize(
    ("name", "targets", "modules", "heads", "task"),
    [
        (
            "bert",
            ("attention", "ffn"),
            ["query", "key", "value", "output.dense", "intermediate.dense"],
            ["bert.pooler.dense", "classifier"],
            "SEQ_CLS",
        ),
        (
            "roberta",
            ("ffn", "embeddings"),
            [
                *("word_embeddings", "position_embeddings", "token_type_embeddings"),
                *("intermediate.dense", "0.output.dense", "1.output.dense"),
            ],
            ["classifier"],
            "SEQ_CLS",
        ),
        ("distilbert", ("ffn",), ["lin1", "lin2"], None, "FEATURE_EXTRACTION"),
        (
            "opt",
            ("attention", "ffn"),
            ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
            None,
            "CAUSAL_LM",
        ),
        (
            "llama_classify",
            ("attention",),
            ["q_proj", "k_proj", "v_proj", "o_proj"],
            ["score"],
            "SEQ_CLS",
        ),
    ],
)
def test_adapter_config(name, targets, modules, heads, task, tmp_path):
    model = _with_lora(name, targets=targets)
    spt_jax.save_adapter(model, tmp_path / "adapter")
    raw = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert sorted(raw["target_modules"]) == sorted(modules)
    assert raw["modules_to_save"] == heads
    assert raw["task_type"] == task
    assert raw["use_rslora"] is True
    assert (raw["r"], raw["lora_alpha"], raw["lora_dropout"]) == (3, 7, 0.1)
    restored = spt_jax.load_adapter(_load(name), tmp_path / "adapter")
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        np.testing.assert_array_equal(
            variable[...], dict(nnx.to_flat_state(nnx.state(restored)))[path][...]
        )


def test_positions_of_opt_have_no_factors(tmp_path):
    model = _with_lora("opt", targets=("embeddings",))
    assert model.embedding.lora is not None
    assert model.position.lora is None
    spt_jax.save_adapter(model, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    position = "base_model.model.model.decoder.embed_positions.lora_embedding_"
    factors = {f"{position}A": np.zeros((3, 34), "f"), f"{position}B": np.zeros((32, 3), "f")}
    save_file(load_file(path) | factors, path)
    _assert_refused(path.parent, "factors of model.decoder.embed_positions are not", name="opt")


def test_sparse_modules_alone(tmp_path, caplog):
    model = _make_sparse(_load("bert"))
    model.head.out.bias[...] = jnp.ones(3)
    spt_jax.save_adapter(model, tmp_path / "adapter")
    assert "has no LoRA factors, so there is nothing for PEFT" in caplog.text
    found = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert found == {"spt_config.json", "spt_modules.safetensors"}
    again = spt_jax.load_adapter(_load("bert"), tmp_path / "adapter")
    assert again.adaptation == AdaptationReport(layers=())
    del again.adaptation
    _assert_equal(again, model)


def test_sixteen_bit_adapter_and_other_heads(tmp_path):
    adapter = _edited(
        tmp_path,
        "lora",
        tensors=lambda t: t.update({k: v.astype(np.float16) for k, v in t.items()}),
    )
    model = spt_jax.load_adapter(
        spt_jax.load_pretrained(GOLDEN / "llama", task="backbone", dtype="bfloat16"), adapter
    )
    state = nnx.to_flat_state(nnx.state(model, LoRAParam))
    assert len(list(state)) == 28
    assert all(v.get_value().dtype == jnp.float32 for _, v in state)


def test_factors_of_the_output_matrix(tmp_path):
    rng = np.random.default_rng(0)
    factors = {
        "base_model.model.lm_head.lora_A.weight": rng.normal(size=(4, 32)).astype(np.float32),
        "base_model.model.lm_head.lora_B.weight": rng.normal(size=(97, 4)).astype(np.float32),
    }
    adapter = _edited(tmp_path, "lora", tensors=lambda t: t.clear() or t.update(factors))
    base = _load("llama")
    hidden = jnp.asarray(rng.normal(size=(5, 32)), jnp.float32)
    a, b = factors.values()
    expected = base.logits(hidden) + hidden @ (b @ a).T * 2
    model = spt_jax.load_adapter(base, adapter)
    np.testing.assert_allclose(model.logits(hidden), expected, atol=1e-4)


def test_modules_saved_whole(tmp_path):
    rng = np.random.default_rng(0)
    norm = rng.normal(size=32).astype(np.float32)
    head = rng.normal(size=(97, 32)).astype(np.float32)
    names = {"base_model.model.model.norm.weight": norm, "base_model.model.lm_head.weight": head}
    adapter = _edited(tmp_path, "lora", tensors=lambda t: t.update(names))
    model = spt_jax.load_adapter(_load("llama"), adapter)
    assert isinstance(model.norm.scale, HeadParam)
    np.testing.assert_array_equal(model.norm.scale[...], norm)
    np.testing.assert_array_equal(model.head.kernel[...], head.T)
    spt_jax.save_adapter(model, tmp_path / "again")
    written = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert written.keys() == load_file(adapter / "adapter_model.safetensors").keys()
    raw = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert raw["modules_to_save"] == ["model.norm", "lm_head"]


def _edited(tmp_path, name, *, tensors=None, config=None):
    """A copy of an adapter of PEFT's, changed."""
    directory = tmp_path / "edited"
    shutil.copytree(ADAPTERS / name, directory)
    if tensors is not None:
        path = directory / "adapter_model.safetensors"
        loaded = load_file(path)
        tensors(loaded)
        path.unlink()
        save_file(loaded, path)
    if config is not None:
        path = directory / "adapter_config.json"
        raw = json.loads(path.read_text())
        config(raw)
        path.write_text(json.dumps(raw))
    return directory


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "DoRA one .* not supported; merge it"),
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported, only LORA"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices=\[3\] is not supported"),
        ({"target_parameters": ["experts.w"]}, "target_parameters=.* is not supported"),
        ({"layer_replication": [[0, 2]]}, "layer_replication=.* is not supported"),
        *(
            ({"init_lora_weights": init}, f"'{init}' is not .* changes the base weights; convert")
            for init in ("pissa", "pissa_niter_4", "olora", "OLoRA", "loftq", "corda", "lora_ga")
        ),
        ({"ensure_weight_tying": True}, "ensure_weight_tying=True is not supported"),
        ({"a_later_kind": {"x": 1}}, "a_later_kind=.* is not supported"),
        ({"r": 5}, r"lora_A.weight has shape \(4, 48\), expected \(5, 48\)"),
        ({"r": 0}, "LoRA rank must be at least 1, got 0"),
        ({"r": "many"}, "adapter_config.json"),
        ({"rank_pattern": {"q_proj": 2}}, r"has shape \(4, 32\), expected \(2, 32\)"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern has the pattern"),
    ],
)
def test_refused_configurations(change, message, tmp_path):
    _assert_refused(_edited(tmp_path, "lora", config=lambda raw: raw.update(change)), message)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "mica", "orthogonal"])
def test_initialisations_that_leave_the_base_weights(init, tmp_path):
    adapter = _edited(tmp_path, "lora", config=lambda raw: raw.update(init_lora_weights=init))
    model = spt_jax.load_adapter(_load("llama"), adapter)
    _assert_equal(model, spt_jax.load_adapter(_load("llama"), ADAPTERS / "lora"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q0}.lora_A.weight"), "q_proj.lora_A.weight is missing"),
        (lambda t: t.pop(f"{Q0}.lora_B.weight"), "q_proj.lora_B.weight is missing"),
        (
            lambda t: t.update({f"{Q0}.lora_B.weight": np.zeros((31, 4), np.float32)}),
            r"q_proj.lora_B.weight has shape \(31, 4\), expected \(32, 4\)",
        ),
        (
            lambda t: t.update({f"{Q0}x.lora_B.weight": np.zeros((32, 4), np.float32)}),
            "the model has no module model.layers.0.self_attn.q_projx",
        ),
        (
            lambda t: t.update({f"{Q0}.lora_magnitude_vector": np.zeros(32, np.float32)}),
            "q_proj.lora_magnitude_vector is nothing that the model has",
        ),
        (
            lambda t: t.update({f"{Q0}.lora_embedding_A": np.zeros((4, 32), np.float32)}),
            "q_proj.lora_embedding_A does not fit a Linear",
        ),
        (
            lambda t: t.update({"base_model.model.lm_head.weight": np.zeros((99, 32), "f")}),
            r"lm_head.weight has shape \(99, 32\), expected \(97, 32\)",
        ),
        (lambda t: t.clear() or t.update(x=np.zeros(1)), "tensor x is nothing"),
        (
            lambda t: t.update({f"{Q0}.weight": np.zeros((32, 32), np.float32)}),
            "q_proj has LoRA factors and is saved whole too",
        ),
        (
            lambda t: t.update({f"{Q0}.base_layer.weight": np.zeros((32, 32), np.float32)}),
            "q_proj.weight differs from the model's, under LoRA factors, which is not supported",
        ),
    ],
)
def test_refused_tensors(change, message, tmp_path):
    _assert_refused(_edited(tmp_path, "lora", tensors=change), message)


@functools.cache
def _untouched(name):
    """A model to refuse adapters, and what it must still be afterwards."""
    model = _load(name)
    graph, state = nnx.split(model)
    return model, graph, jax.tree.map(np.array, state)


def _assert_refused(adapter, message, name="llama"):
    model, graph, state = _untouched(name)
    with pytest.raises(ValueError, match=message):
        spt_jax.load_adapter(model, adapter)
    found, now = nnx.split(model)
    assert found == graph
    jax.tree.map(np.testing.assert_array_equal, now, state)


def test_other_refusals(tmp_path):
    _assert_refused(ADAPTERS / "dora", "DoRA")
    _assert_refused(ADAPTERS / "bert_classify", "the model has no module bert.encoder")
    _assert_refused(GOLDEN / "llama", "has neither adapter_config.json nor spt_config.json")
    pickle = _edited(tmp_path, "lora")
    (pickle / "adapter_model.safetensors").rename(pickle / "adapter_model.bin")
    _assert_refused(pickle, r"only adapter_model\.bin, which is a pickle; save the adapter anew")
    (pickle / "adapter_model.bin").rename(pickle / "adapter_model.safetensors")
    (pickle / "adapter_model.safetensors").write_bytes(b"1234567890")
    _assert_refused(pickle, "is truncated or corrupt")
    (pickle / "adapter_config.json").write_text("{")
    _assert_refused(pickle, "adapter_config.json is not valid JSON")
    model = spt_jax.load_adapter(_load("llama"), ADAPTERS / "lora")
    with pytest.raises(ValueError, match="adapted already; load it again"):
        spt_jax.load_adapter(model, ADAPTERS / "lora")
    with pytest.raises(ValueError, match="neither LoRA factors nor SPT modules"):
        spt_jax.save_adapter(_load("llama"), tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(ValueError, match="max_shard_bytes must be positive"):
        spt_jax.save_pretrained(model, tmp_path / "nothing", max_shard_bytes=0)
    with pytest.raises(ValueError, match=r"dtype must be one of .* got 'int8'"):
        spt_jax.save_pretrained(model, tmp_path / "nothing", dtype="int8")
    with pytest.raises(ValueError, match=r"has no tokenizer: none of tokenizer.json"):
        spt_jax.save_pretrained(model, tmp_path / "nothing", tokenizer=GOLDEN / "bert")


def _adapter_with(directory, name, tensors, **fields):
    """An adapter with more tensors, for which whole ones of the same modules make room."""
    model = _with_lora(name)
    spt_jax.save_adapter(model, directory)
    path, config = directory / "adapter_model.safetensors", directory / "adapter_config.json"
    modules = {key.partition(".lora_")[0] for key in tensors if ".lora_" in key}
    kept = {k: v for k, v in load_file(path).items() if k.rpartition(".")[0] not in modules}
    save_file(kept | {k: np.ascontiguousarray(v) for k, v in tensors.items()}, path)
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    return directory


@pytest.mark.parametrize(
    ("name", "modules", "whole", "task"),
    [
        ("bert", ["bert.pooler.dense"], ["classifier"], "SEQ_CLS"),
        ("bert", ["classifier"], ["bert.pooler.dense"], None),
        ("bert", ["bert.pooler.dense", "classifier"], None, None),
        ("roberta", ["classifier.dense"], ["classifier.out_proj"], None),
        ("roberta", ["classifier.dense", "classifier.out_proj"], None, None),
        ("llama_classify", ["score"], None, None),
    ],
)
def test_factors_of_a_head(name, modules, whole, task, tmp_path):
    rng = np.random.default_rng(0)
    base = _load(name)
    heads = {module: module_at(base, base.module_paths()[module]) for module in modules}
    factors = {
        module: (rng.normal(size=(3, head.in_features)), rng.normal(size=(head.out_features, 3)))
        for module, head in heads.items()
    }
    tensors = {
        f"base_model.model.{module}.lora_{letter}.weight": factor.astype(np.float32)
        for module, pair in factors.items()
        for letter, factor in zip("AB", pair, strict=True)
    }
    adapter = _adapter_with(tmp_path / "adapter", name, tensors)
    model = spt_jax.load_adapter(_load(name), adapter)
    for module, (a, b) in factors.items():
        found = module_at(model, model.module_paths()[module])
        x = jnp.asarray(rng.normal(size=(5, found.in_features)), jnp.float32)
        expected = heads[module](x) + x @ (b @ a).T * (7 / 3**0.5)
        np.testing.assert_allclose(found(x), expected, atol=1e-3)
        assert not isinstance(found.kernel, HeadParam)
    spt_jax.save_adapter(model, tmp_path / "again")
    first, second = (
        load_file(d / "adapter_model.safetensors") for d in (adapter, tmp_path / "again")
    )
    assert second.keys() == first.keys()
    for key, array in first.items():
        np.testing.assert_array_equal(second[key], array)
    raw = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert (raw["modules_to_save"], raw["task_type"]) == (whole, task)
    _assert_equal(spt_jax.load_adapter(_load(name), tmp_path / "again"), model)


def test_a_backbone_leaves_out_what_heads_have(tmp_path, caplog):
    factors = {
        "base_model.model.bert.pooler.dense.lora_A.weight": np.ones((3, 32), np.float32),
        "base_model.model.bert.pooler.dense.lora_B.weight": np.ones((32, 3), np.float32),
    }
    adapter = _adapter_with(tmp_path / "adapter", "bert", factors)
    model = spt_jax.load_adapter(spt_jax.load_pretrained(GOLDEN / "bert"), adapter)
    (line,) = caplog.messages
    assert "skipped of the adapter: " in line
    assert "pooler.dense.lora_A.weight" in line
    assert "classifier.weight" in line
    classify = spt_jax.load_adapter(_load("bert"), adapter)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model.layers), nnx.state(classify.layers))


TIED = "qwen2"
_OUTPUT = "base_model.model.lm_head.weight"
_INPUT = "base_model.model.model.embed_tokens.weight"


def _table(name, change=0.0):
    stored = load_file(GOLDEN / name / "model.safetensors")
    return stored["model.embed_tokens.weight"] + np.float32(change)


@pytest.mark.parametrize("names", [(_INPUT,), (_OUTPUT,), (_INPUT, _OUTPUT)])
def test_tables_of_a_tied_model_that_are_its_own(names, tmp_path):
    expected = _with_lora(TIED)
    adapter = _adapter_with(tmp_path / "adapter", TIED, dict.fromkeys(names, _table(TIED)))
    _assert_equal(spt_jax.load_adapter(_load(TIED), adapter), expected)


def test_equal_tables_of_a_tied_model_replace_its_own(tmp_path):
    table = _table(TIED, 0.5)
    adapter = _adapter_with(tmp_path / "adapter", TIED, {_INPUT: table, _OUTPUT: table})
    model = spt_jax.load_adapter(_load(TIED), adapter)
    np.testing.assert_array_equal(model.output_kernel(), table.T)
    assert isinstance(model.embedding.embedding, HeadParam)
    spt_jax.save_adapter(model, tmp_path / "again")
    written = load_file(tmp_path / "again" / "adapter_model.safetensors")
    for name in (_INPUT, _OUTPUT):  # for PEFT, where each is a copy
        np.testing.assert_array_equal(written[name], table)
    raw = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert raw["modules_to_save"] == ["model.embed_tokens", "lm_head"]
    _assert_equal(spt_jax.load_adapter(_load(TIED), tmp_path / "again"), model)


@pytest.mark.parametrize(
    ("tables", "named"),
    [
        ({_INPUT: 0.5}, "model.embed_tokens.weight"),
        ({_OUTPUT: 0.5}, "lm_head.weight"),
        ({_INPUT: 0.5, _OUTPUT: 0.0}, "lm_head.weight"),
        ({_INPUT: 0.0, _OUTPUT: 0.5}, "lm_head.weight"),
        ({_INPUT: 0.5, _OUTPUT: 0.25}, "lm_head.weight"),
        ({"base_model.model.lm_head.lora_A.weight": 0.5}, "with its LoRA factors lm_head"),
    ],
)
def test_tables_that_would_untie_are_refused(tables, named, tmp_path):
    tensors = {key: _table(TIED, change) for key, change in tables.items()}
    adapter = _adapter_with(tmp_path / "adapter", TIED, tensors)
    message = f"added: {named} differs from the model's, whose output matrix is tied to its"
    _assert_refused(adapter, message, name=TIED)


def _assert_comes_back(name, adapter, tmp_path, tables):
    """Loaded, saved and loaded again an adapter is the same, and holds the tables."""
    model = spt_jax.load_adapter(_load(name), adapter)
    spt_jax.save_adapter(model, tmp_path / "again")
    written = load_file(tmp_path / "again" / "adapter_model.safetensors")
    for key, table in tables.items():
        np.testing.assert_array_equal(written[key], table)
    again = spt_jax.load_adapter(_load(name), tmp_path / "again")
    _assert_equal(again, model)
    np.testing.assert_array_equal(_run(again), _run(model))
    return model


def test_new_tables_of_an_untied_model_come_back(tmp_path):
    head = load_file(GOLDEN / "llama" / "model.safetensors")["lm_head.weight"]
    tables = {_INPUT: _table("llama", 0.5), _OUTPUT: head - np.float32(0.25)}
    adapter = _adapter_with(tmp_path / "adapter", "llama", tables)
    model = _assert_comes_back("llama", adapter, tmp_path, tables)
    np.testing.assert_array_equal(model.embedding.embedding[...], tables[_INPUT])
    np.testing.assert_array_equal(model.head.kernel[...], tables[_OUTPUT].T)


def _with_factors(directory, name, module, change):
    """An adapter with LoRA factors of the embedding, and the table under them."""
    spt_jax.save_adapter(_with_lora(name, targets=("embeddings",)), directory)
    path = directory / "adapter_model.safetensors"
    stored = load_file(GOLDEN / name / "model.safetensors")[f"{module}.weight"]
    scaled = stored * np.float32(1 + change)  # a norm after it would take a shift out
    table = {f"base_model.model.{module}.base_layer.weight": scaled}
    save_file(load_file(path) | table, path)
    return table


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("llama", "model.embed_tokens"),
        (TIED, "model.embed_tokens"),
        ("bert", "bert.embeddings.word_embeddings"),
    ],
)
def test_new_tables_under_factors_come_back(name, module, tmp_path):
    table = _with_factors(tmp_path / "adapter", name, module, 0.5)
    model = _assert_comes_back(name, tmp_path / "adapter", tmp_path, table)
    assert np.abs(_run(model) - _run(_with_lora(name, targets=("embeddings",)))).max() > 0.01
    trained = nnx.state(model, spt_jax.layers.ADAPTER)
    assert not any(path[-1] == "embedding" for path, _ in nnx.to_flat_state(trained))


def test_a_new_output_matrix_under_factors_comes_back(tmp_path):
    base = "base_model.model.lm_head"
    rng = np.random.default_rng(0)
    tensors = {
        f"{base}.lora_A.weight": rng.normal(size=(3, 32)).astype(np.float32),
        f"{base}.lora_B.weight": rng.normal(size=(97, 3)).astype(np.float32),
        f"{base}.base_layer.weight": rng.normal(size=(97, 32)).astype(np.float32),
    }
    adapter = _adapter_with(tmp_path / "adapter", "llama", tensors)
    _assert_comes_back("llama", adapter, tmp_path, tensors)


@pytest.mark.parametrize(
    ("name", "module"),
    [("llama", "model.embed_tokens"), ("bert", "bert.embeddings.word_embeddings")],
)
@pytest.mark.parametrize("factors", [True, False])
def test_own_tables_are_not_the_adapter_s(name, module, factors, tmp_path):
    if factors:
        table = _with_factors(tmp_path / "adapter", name, module, 0.0)
        plain = _with_lora(name, targets=("embeddings",))
    else:
        table = load_file(GOLDEN / name / "model.safetensors")[f"{module}.weight"]
        tensors = {f"base_model.model.{module}.weight": table}
        _adapter_with(tmp_path / "adapter", name, tensors)
        plain = _with_lora(name)
    spt_jax.save_adapter(plain, tmp_path / "plain")
    model = _assert_comes_back(name, tmp_path / "adapter", tmp_path, {})
    _assert_equal(model, spt_jax.load_adapter(_load(name), tmp_path / "plain"))


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_own_tables_of_an_untied_model_train_only_if_asked(saved, tmp_path):
    stored = load_file(GOLDEN / "llama" / "model.safetensors")
    tables = {_INPUT: _table("llama"), _OUTPUT: stored["lm_head.weight"]}
    adapter = _adapter_with(tmp_path / "adapter", "llama", tables, modules_to_save=saved)
    model = spt_jax.load_adapter(_load("llama"), adapter)
    _assert_same(model, _run(_with_lora("llama")))
    assert not isinstance(model.embedding.embedding, HeadParam)
    assert isinstance(model.head.kernel, HeadParam) == (saved is not None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, t: c.update(format_version=1), "format_version 1, and this spt-jax reads 2"),
        (lambda c, t: c.update(more=1), r"unknown fields \['more'\]"),
        (
            lambda c, t: c["sparse_attention"]["layers.0.attention"].update(speed=1),
            r"layers.0.attention has the unknown fields \['speed'\]",
        ),
        (
            lambda c, t: c["sparse_attention"]["layers.0.attention"].update(block_q="64"),
            "block_q of layers.0.attention must be int, got '64'",
        ),
        (
            lambda c, t: c["sparse_attention"]["layers.0.attention"].update(density=2),
            r"attention density must lie in \(0, 1\]",
        ),
        (
            lambda c, t: c["sparse_attention"]["layers.0.attention"].update(codeword_width=3),
            "codeword_width=3 does not divide the head width 8",
        ),
        (
            lambda c, t: c["sparse_attention"].update({"layers.7.attention": {}}),
            "no attention layer layers.7.attention",
        ),
        (lambda c, t: c["routed_ffn"].update({"norm": {}}), "the model has no FFN norm"),
        (
            lambda c, t: c["routed_ffn"]["layers.0.ffn"].update(num_blocks=5),
            "48 hidden units do not split into num_blocks=5",
        ),
        (lambda c, t: t.pop("layers.0.ffn.router_bias"), "router_bias is missing"),
        (lambda c, t: t.update(x=np.zeros(1)), "tensor x is unknown"),
        (
            lambda c, t: t["layers.0.ffn.permutation"].fill(0),
            "permutation must hold each of 0 to 47 once, and lacks 1",
        ),
        (
            lambda c, t: t.update({"layers.0.ffn.permutation": np.zeros(48, np.float32)}),
            "permutation has dtype float32",
        ),
        (
            lambda c, t: t.update({"layers.1.ffn.router_bias": np.zeros(5, np.float32)}),
            r"router_bias has shape \(5,\), expected \(4,\)",
        ),
    ],
)
def test_wrong_sparse_modules(change, message, sparse_adapter, tmp_path):
    directory = tmp_path / "adapter"
    shutil.copytree(sparse_adapter, directory)
    config = json.loads((directory / "spt_config.json").read_text())
    tensors = load_file(directory / "spt_modules.safetensors")
    change(config, tensors)
    (directory / "spt_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "spt_modules.safetensors")
    _assert_refused(directory, message)


def _save_both(model):
    return [
        lambda out, **options: spt_jax.save_pretrained(model, out, **options),
        lambda out, **options: spt_jax.save_adapter(model, out, **options),
    ]


def test_a_full_disk_changes_nothing(sparse_adapter, tmp_path, monkeypatch):
    model = spt_jax.load_adapter(_load("llama"), sparse_adapter)
    for i, save in enumerate(_save_both(model)):
        parent = tmp_path / str(i)
        out = parent / "out"
        save(out)
        before = {path.name: path.read_bytes() for path in out.iterdir()}

        def full(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "fsync", full)
            for target, options in [(out, {"overwrite": True}), (parent / "other", {})]:
                with pytest.raises(OSError, match=r"cannot write .*No space left.* nothing was"):
                    save(target, **options)
        assert [path.name for path in parent.iterdir()] == ["out"]
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
        save(out, overwrite=True)
        assert [path.name for path in parent.iterdir()] == ["out"]
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_failing_rename_puts_the_old_directory_back(sparse_adapter, tmp_path, monkeypatch):
    model = spt_jax.load_adapter(_load("llama"), sparse_adapter)
    out = tmp_path / "out"
    spt_jax.save_adapter(model, out)
    rename = Path.rename

    def fail(self, target):
        if ".new-" in self.name:
            raise OSError(errno.EACCES, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Permission denied"):
        spt_jax.save_adapter(model, out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    spt_jax.load_adapter(_load("llama"), out)


def test_directories_that_are_not_replaced(tmp_path, sparse_adapter):
    model = spt_jax.load_adapter(_load("llama"), sparse_adapter)
    for save in _save_both(model):
        (tmp_path / "file").write_text("")
        with pytest.raises(ValueError, match="is a file; give a directory"):
            save(tmp_path / "file")
        other = tmp_path / "other"
        other.mkdir(exist_ok=True)
        (other / "thesis.txt").write_text("x")
        with pytest.raises(ValueError, match="is not empty; choose another directory"):
            save(other)
        with pytest.raises(ValueError, match="holds no model or adapter, so it is not overwritten"):
            save(other, overwrite=True)
        clone = tmp_path / "clone"
        shutil.copytree(GOLDEN / "llama", clone, dirs_exist_ok=True)
        (clone / ".git").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=r"holds the folders \.git, so it is not overwritten"):
            save(clone, overwrite=True)
        assert (other / "thesis.txt").read_text() == "x"
        empty = tmp_path / "deep" / "empty"
        empty.mkdir(parents=True)
        save(empty)
        shutil.rmtree(tmp_path / "deep")


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize("function", [spt_jax.save_adapter, spt_jax.save_pretrained])
def test_a_model_of_one_s_own_is_refused_by_name(function, tmp_path):
    lora = SPTConfig(attention=None, ffn=None)
    model = spt_jax.adapt(ToyModel(rngs=nnx.Rngs(0)), lora)
    message = "takes a model of load_pretrained.*, and got ToyModel; keep a model of your own as"
    with pytest.raises(ValueError, match=f"^{function.__name__} {message}"):
        function(model, tmp_path / "out")
    with pytest.raises(ValueError, match=f"^load_adapter {message}"):
        spt_jax.load_adapter(ToyModel(rngs=nnx.Rngs(0)), ADAPTERS)
    assert not (tmp_path / "out").exists()
