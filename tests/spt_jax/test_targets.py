"""What LoRA's configuration names: modules with factors, their ranks, and modules trained whole."""

from __future__ import annotations

import copy
import json
import pickle
import re
from dataclasses import asdict, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import spt_jax
from spt_jax import LoRAConfig, RoutedFFNConfig, SparseAttentionConfig, SPTConfig
from spt_jax.layers import ADAPTER, HeadParam, LoRAParam, RoutedFFN
from spt_jax.models.slots import module_at
from spt_jax.targets import plan_lora
from tests.spt_jax.toy import ToyModel

GOLDEN = Path(__file__).parents[1] / "golden"
TASKS = {
    "bert": "sequence-classification",
    "roberta": "sequence-classification",
    "distilbert": "sequence-classification",
    "llama": "causal-lm",
    "llama_classify": "sequence-classification",
    "qwen2": "causal-lm",
    "opt": "causal-lm",
    "opt_350m": "causal-lm",
}
SPARSE = SparseAttentionConfig(
    density=0.5, min_keys=4, num_codewords=4, codeword_width=2, granularity="token"
)
ROUTED = RoutedFFNConfig(absent_rank=3)
FORMS = {"dense": {"attention": None, "ffn": None}, "sparse": {"attention": SPARSE, "ffn": ROUTED}}


def load(name, source=None):
    return spt_jax.load_pretrained(source or GOLDEN / name, task=TASKS[name], num_labels=3)


def batch():
    ids = np.random.default_rng(3).integers(3, 97, (3, 12))
    return {"input_ids": ids.astype(np.int32), "attention_mask": np.ones((3, 12), np.int32)}


def adapted(name, lora, form="dense", *, trained=True):
    config = SPTConfig(lora=lora, serve=None, **FORMS[form])
    model = spt_jax.adapt(load(name), config, calibration_batch=batch(), use_cache=False)
    rng = np.random.default_rng(0)
    if trained:
        for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Any(LoRAParam, HeadParam))):
            noise = 0.1 * rng.normal(size=variable.shape).astype(np.float32)
            variable.set_value(variable.get_value() + noise)
    return model


def with_factors(model):
    """Names in transformers of modules with factors -> their ranks and alphas."""
    modules = {name: module_at(model, path) for name, path in model.module_paths().items()}
    found = {name: getattr(module, "lora", None) for name, module in modules.items()}
    return {n: (x.config.rank, x.config.alpha) for n, x in found.items() if x is not None}


def kinds(names):
    """Names without what holds a layer's modules."""
    return {re.sub(r".*layers?\.\d+\.", "", name) for name in names}


@nnx.jit
def forward(model, inputs):
    return model(**inputs)


def assert_same_outputs(model, other, atol=1e-5):
    np.testing.assert_allclose(forward(model, batch()), forward(other, batch()), atol=atol)


def assert_comes_back(name, model, directory):
    """Saved, loaded onto the dense model, and saved again, an adapter is the same."""
    spt_jax.save_adapter(model, directory / "adapter")
    again = spt_jax.load_adapter(load(name), directory / "adapter")
    (graph, state), (other_graph, other) = nnx.split(model), nnx.split(again)
    assert graph == other_graph
    jax.tree.map(np.testing.assert_array_equal, state, other)
    spt_jax.save_adapter(again, directory / "again")
    first, second = (
        load_file(directory / d / "adapter_model.safetensors") for d in ("adapter", "again")
    )
    assert first.keys() == second.keys()
    return json.loads((directory / "adapter" / "adapter_config.json").read_text()), first


@pytest.mark.parametrize(
    ("name", "target_modules", "expected"),
    [
        ("bert", ("query", "value"), {"attention.self.query", "attention.self.value"}),
        ("bert", ("dense",), {"attention.output.dense", "intermediate.dense", "output.dense"}),
        ("bert", ("attention.output.dense",), {"attention.output.dense"}),
        ("bert", ["encoder.layer.1.output.dense"], {"output.dense"}),
        ("bert", ("word_embeddings",), {"bert.embeddings.word_embeddings"}),
        ("distilbert", ("q_lin", "lin1"), {"attention.q_lin", "ffn.lin1"}),
        ("llama", ("q_proj",), {"self_attn.q_proj"}),
        ("llama", ("lm_head",), {"lm_head"}),
        ("llama", r".*\.(q|v)_proj", {"self_attn.q_proj", "self_attn.v_proj"}),
        ("llama", r"model\.layers\.1\.mlp.*", {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}),
        ("opt", ("fc1", "out_proj"), {"fc1", "self_attn.out_proj"}),
        ("qwen2", ("embed_tokens",), {"model.embed_tokens"}),
    ],
)
def test_names_are_those_of_transformers(name, target_modules, expected):
    model = load(name)
    found = plan_lora(model, LoRAConfig(target_modules=target_modules)).factors
    assert kinds(found) == expected


def test_a_layer_can_be_named():
    names = ("layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj")
    found = plan_lora(load("llama"), LoRAConfig(target_modules=names)).factors
    assert set(found) == {"model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"}
    assert "model.layers.0.self_attn.q_proj" in with_factors(
        adapted("llama", LoRAConfig(target_modules=names))
    )


@pytest.mark.parametrize("name", TASKS)
def test_all_linear_leaves_out_heads_and_the_output_matrix(name):
    model = load(name)
    found = plan_lora(model, LoRAConfig(target_modules="all-linear")).factors
    heads = {"bert.pooler.dense", "classifier", "classifier.dense", "classifier.out_proj",
             "pre_classifier", "score", "lm_head"}  # fmt: skip
    linear = {
        name
        for name, path in model.module_paths().items()
        if type(module_at(model, path)).__name__ == "Linear"
    }
    assert set(found) == linear - heads
    assert ("model.decoder.project_in" in found) == (name == "opt_350m")
    by_type = plan_lora(load(name), LoRAConfig()).factors
    assert set(by_type) == {n for n in found if "project_" not in n}


def test_models_of_one_s_own_are_named_by_path():
    model = ToyModel(rngs=nnx.Rngs(0))
    lora = LoRAConfig(
        target_modules=("q_proj", "layers.1.ffn.up"),
        rank_pattern={"layers.0.*": 2},
        modules_to_save=("embedding",),
    )
    spt_jax.adapt(model, SPTConfig(lora=lora, attention=None, ffn=None))
    ranks = [layer.attention.q_proj.lora.config.rank for layer in model.layers]
    assert ranks == [2, 16]
    assert model.layers[0].ffn.up.lora is None
    assert model.layers[1].ffn.up.lora is not None
    assert isinstance(model.embedding.embedding, HeadParam)
    found = plan_lora(ToyModel(rngs=nnx.Rngs(0)), LoRAConfig(target_modules="all-linear")).factors
    assert "head" not in found
    assert len(found) == 2 * 6


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("bert", {"target_modules": ("query", "q_proj")},
         r"target_modules: 'q_proj' matches no module; there are bert.embeddings.word_e"),
        ("llama", {"target_modules": "q_proj"}, "'q_proj' matches no module; there are .*q_proj"),
        ("llama", {"target_modules": ("proj",)}, "'proj' matches no module"),
        ("llama", {"target_modules": ("all-linear",)}, "target_modules='all-linear', in no tuple"),
        ("llama", {"target_modules": ("norm",)}, "matches model.norm, a RMSNorm, which takes no L"),
        ("bert", {"target_modules": ".*"}, "LayerNorm, which takes no LoRA factors; match linear"),
        ("opt", {"target_modules": ("embed_positions",)}, "OPT's positions, which take no LoRA"),
        ("bert", {"target_modules": ("classifier",)}, "matches only classifier, of the task"),
        ("qwen2", {"target_modules": ("lm_head",)}, "the output matrix is the word embedding, to"),
        ("bert", {"rank_pattern": {"query": 2, "q_proj": 3}},
         "rank_pattern: 'q_proj' matches no module that gets LoRA factors; those are bert.encoder"),
        ("llama", {"target_modules": ("q_proj",), "alpha_pattern": {"v_proj": 3}},
         "alpha_pattern: 'v_proj' matches no module .* those are model.layers.0.self_attn.q_proj$"),
        ("llama", {"modules_to_save": ("pooler",)}, "modules_to_save: 'pooler' matches no module"),
        ("qwen2", {"modules_to_save": ("lm_head",)}, "the output matrix is the word embedding, to"),
        ("llama", {"modules_to_save": ("self_attn",)},
         "self_attn.q_proj is to get LoRA factors and is in modules_to_save"),
    ],
)  # fmt: skip
def test_what_names_nothing_is_told_before_anything_changes(name, options, message):
    model = load(name)
    graph, state = nnx.split(model)
    state = jax.tree.map(np.array, state)
    config = SPTConfig(lora=LoRAConfig(**options), serve=None, **FORMS["sparse"])
    with pytest.raises(ValueError, match=message):
        spt_jax.adapt(model, config, calibration_batch=batch())
    found, now = nnx.split(model)
    assert found == graph
    jax.tree.map(np.testing.assert_array_equal, now, state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ("ffn",), "target_modules": ("q_proj",)}, "both say what gets factors"),
        ({"target_modules": ()}, "target_modules is empty; name modules, or set lora=None"),
        ({"target_modules": 3}, "target_modules must be a tuple of names of modules, got 3"),
        ({"target_modules": ("q_proj", 3)}, "target_modules must hold names of modules, got 3"),
        ({"target_modules": "("}, r"target_modules has the pattern '\(', which is no regular exp"),
        ({"modules_to_save": "norm"}, "modules_to_save must be a tuple of names .* got 'norm'"),
        ({"targets": (), "modules_to_save": ("norm",)}, "trained beside LoRA factors; name target"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern of 'q' must be at least 1, got 0"),
        ({"rank_pattern": {"q": 1.5}}, "rank_pattern of 'q' must be a whole number, got 1.5"),
        ({"rank_pattern": {"q": True}}, "rank_pattern of 'q' must be a whole number, got True"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern has the pattern '\(', which is no regular"),
        ({"rank_pattern": {3: 2}}, "rank_pattern takes patterns as text, got 3"),
        ({"rank_pattern": ("q", 2)}, "rank_pattern must be a mapping from patterns to numbers"),
        ({"alpha_pattern": {"q": 0}}, "alpha_pattern of 'q' must be a number above 0, got 0"),
        ({"alpha_pattern": {"q": "x"}}, "alpha_pattern of 'q' must be a number above 0, got 'x'"),
        ({"rank": 2.0}, "LoRA rank must be a whole number, got 2.0"),
        ({"alpha": float("nan")}, "LoRA alpha must be a number above 0, got nan"),
        ({"targets": ("q_proj",)}, "choose from attention, ffn, embeddings, or name modules in ta"),
    ],
)
def test_wrong_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**options)


def test_configurations_are_values():
    patterns = {"q_proj": 8, r"layers\.0\..*": 4}
    config = LoRAConfig(target_modules=["q_proj"], rank_pattern=patterns, modules_to_save=["norm"])
    assert config == replace(config)
    assert hash(config) == hash(LoRAConfig(**asdict(config)))
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
    assert list(json.loads(json.dumps(asdict(config)))["rank_pattern"].items()) == [
        *patterns.items()
    ]
    patterns["v_proj"] = 2
    assert "v_proj" not in config.rank_pattern
    with pytest.raises(TypeError, match="cannot change"):
        config.rank_pattern["v_proj"] = 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("name", "target_modules", "saved"),
    [
        ("bert", ("query", "value"), ["query", "value"]),
        ("llama", ("q_proj", "v_proj"), ["q_proj", "v_proj"]),
        ("bert", ("intermediate.dense",), ["intermediate.dense"]),
        ("bert", r".*layer\.\d\.output\.dense", ["0.output.dense", "1.output.dense"]),
        ("llama", ("gate_proj",), ["gate_proj"]),
        ("llama", ("k_proj", "down_proj"), ["k_proj", "down_proj"]),
    ],
)
def test_some_maps_alone_have_factors(name, target_modules, saved, form, tmp_path):
    """Also of an FFN that is routed: forward, gradients, and files."""
    model = adapted(name, LoRAConfig(rank=3, target_modules=target_modules, dropout=0.1), form)
    graph, params, frozen = nnx.split(model, ADAPTER, ...)

    @jax.jit
    def gradient(params):
        def loss(params):
            outputs, aux = nnx.merge(graph, params, frozen).forward(
                **batch(), dropout_key=jax.random.key(1)
            )
            return jnp.square(outputs).mean() + sum(aux.values())

        return jax.grad(loss)(params)

    for path, found in nnx.to_flat_state(gradient(params)):
        values = np.asarray(found[...])
        assert np.isfinite(values).all(), path
        assert np.abs(values).max() > 0, path
    config, tensors = assert_comes_back(name, model, tmp_path)
    assert sorted(config["target_modules"]) == sorted(saved)
    factors = {key.partition(".lora_")[0] for key in tensors if ".lora_" in key}
    assert factors == {f"base_model.model.{module}" for module in with_factors(model)}
    spt_jax.save_pretrained(model, tmp_path / "merged")
    spt_jax.set_form(model, "dense")
    assert_same_outputs(model, load(name, tmp_path / "merged"), atol=1e-4)


def test_ranks_and_alphas_by_pattern_come_back(tmp_path):
    """The first pattern that matches counts, as in PEFT's `get_pattern_key`."""
    lora = LoRAConfig(
        rank=4,
        alpha=8,
        target_modules=("q_proj", "v_proj", "up_proj"),
        rank_pattern={r"layers\.0\.self_attn\.q_proj": 2, "q_proj": 6, "up_pro": 3, r"mlp\..*": 5}
        | {"up_proj": 7},
        alpha_pattern={r"model\.layers\.1\.self_attn\.v_proj": 1.5},
    )
    with pytest.raises(ValueError, match="'up_pro' matches no module"):
        adapted("llama", lora)
    lora = replace(lora, rank_pattern={p: r for p, r in lora.rank_pattern.items() if p != "up_pro"})
    model = adapted("llama", lora)
    expected = {
        "model.layers.0.self_attn.q_proj": (2, 8),
        "model.layers.1.self_attn.q_proj": (6, 8),
        "model.layers.0.self_attn.v_proj": (4, 8),
        "model.layers.1.self_attn.v_proj": (4, 1.5),
        "model.layers.0.mlp.up_proj": (5, 8),
        "model.layers.1.mlp.up_proj": (5, 8),
    }
    assert with_factors(model) == expected
    assert model.layers[0].attention.q_proj.lora.a.shape == (32, 2)
    config, _ = assert_comes_back("llama", model, tmp_path)
    assert (config["r"], config["lora_alpha"]) in ((4, 8), (5, 8))
    again = spt_jax.load_adapter(load("llama"), tmp_path / "adapter")
    assert with_factors(again) == expected
    assert_same_outputs(again, model)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("name", "modules_to_save", "saved"),
    [
        (
            "llama",
            ("embed_tokens", "norm", "lm_head", "input_layernorm", "up_proj"),
            [
                "model.embed_tokens",
                *(f"model.layers.{i}.input_layernorm" for i in range(2)),
                *(f"model.layers.{i}.mlp.up_proj" for i in range(2)),
                "model.norm",
                "lm_head",
            ],
        ),
        (
            "bert",
            ("word_embeddings", "embeddings.LayerNorm", "encoder.layer.1.output", "classifier"),
            [
                "bert.embeddings.word_embeddings",
                "bert.embeddings.LayerNorm",
                *(f"bert.encoder.layer.1.output.{kind}" for kind in ("dense", "LayerNorm")),
                *("bert.pooler.dense", "classifier"),
            ],
        ),
        ("opt", ("embed_positions",), ["model.decoder.embed_positions"]),
    ],
)
def test_modules_trained_whole_are_saved_as_peft_does(name, modules_to_save, saved, form, tmp_path):
    target = "query" if name == "bert" else "q_proj"
    lora = LoRAConfig(target_modules=(target,), modules_to_save=modules_to_save)
    model = adapted(name, lora, form)
    names = {f"base_model.model.{module}" for module in saved}
    config, tensors = assert_comes_back(name, model, tmp_path)
    whole = {key.rpartition(".")[0] for key in tensors if ".lora_" not in key}
    assert whole == names
    assert sorted(config["modules_to_save"]) == sorted(saved)
    for key in whole:
        module = module_at(model, model.module_paths()[key.removeprefix("base_model.model.")])
        trained = [v for v in vars(module).values() if isinstance(v, nnx.Param)]
        assert all(isinstance(v, HeadParam) for v in trained)
        assert len(trained) == sum(k.rpartition(".")[0] == key for k in tensors)
    if form == "sparse":
        assert isinstance(model.layers[0].ffn, RoutedFFN)
        dense = adapted(name, lora, trained=False)  # hidden units in their first order
        spt_jax.save_adapter(adapted(name, lora, form, trained=False), tmp_path / "sparse")
        spt_jax.save_adapter(dense, tmp_path / "dense")
        first, second = (
            load_file(tmp_path / d / "adapter_model.safetensors") for d in ("dense", "sparse")
        )
        for key in whole:
            np.testing.assert_array_equal(first[f"{key}.weight"], second[f"{key}.weight"])


@pytest.mark.parametrize("form", FORMS)
def test_modules_trained_whole_have_gradients(form):
    lora = LoRAConfig(target_modules=("q_proj",), modules_to_save=("embed_tokens", "norm", "mlp"))
    model = adapted("llama", lora, form)
    graph, params, frozen = nnx.split(model, HeadParam, ...)

    @jax.jit
    def gradient(params):
        def loss(params):
            return jnp.square(nnx.merge(graph, params, frozen)(**batch())).mean()

        return jax.grad(loss)(params)

    found = dict(nnx.to_flat_state(gradient(params)))
    assert len(found) == 2 + 2 * 3
    assert all(np.abs(np.asarray(v[...])).max() > 0 for v in found.values())


def test_a_tied_embedding_that_is_trained_stays_tied(tmp_path):
    lora = LoRAConfig(target_modules=("q_proj",), modules_to_save=("embed_tokens",))
    model = adapted("qwen2", lora)
    np.testing.assert_array_equal(model.output_kernel(), model.embedding.embedding[...].T)
    config, tensors = assert_comes_back("qwen2", model, tmp_path)
    assert config["modules_to_save"] == ["model.embed_tokens", "lm_head"]
    np.testing.assert_array_equal(
        tensors["base_model.model.lm_head.weight"],
        tensors["base_model.model.model.embed_tokens.weight"],
    )
    assert_comes_back("qwen2", adapted("qwen2", lora, trained=False), tmp_path / "untrained")


def test_a_model_of_linear_maps_alone_takes_factors():
    class Maps(nnx.Module):
        def __init__(self, rngs):
            self.first = spt_jax.layers.Linear(4, 8, rngs=rngs)
            self.second = nnx.Linear(8, 4, rngs=rngs)

    def adapt(**options):
        model, config = Maps(nnx.Rngs(0)), LoRAConfig(**options)
        return spt_jax.adapt(model, SPTConfig(lora=config, attention=None, ffn=None))

    model = adapt(target_modules=("first",), modules_to_save=("second",))
    assert model.first.lora is not None
    assert isinstance(model.second.kernel, HeadParam)
    with pytest.raises(ValueError, match="Maps has neither Attention nor FeedForward layers"):
        adapt()
    with pytest.raises(ValueError, match="matches second, a Linear, which takes no LoRA factors"):
        adapt(target_modules=("second",))
