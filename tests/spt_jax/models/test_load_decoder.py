import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from spt_jax.models import load_pretrained
from spt_jax.models.config import parse_config
from spt_jax.models.decoder import Decoder
from spt_jax.models.slots import tensor_slots
from tests.spt_jax.models.builders import GOLDEN, edited

ROOT = Path(__file__).parents[3]
NAMES = ("opt", "opt_350m", "llama", "llama_biased", "mistral", "qwen2", "qwen3")
CLASSIFY = {"task": "sequence-classification", "num_labels": 3}


def assert_same_weights(one, two):
    jax.tree.map(np.testing.assert_array_equal, nnx.state(one), nnx.state(two))


def without(*prefixes):
    def drop(tensors):
        for name in [name for name in tensors if name.startswith(prefixes)]:
            del tensors[name]

    return drop


def add(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_loaded(name):
    model = load_pretrained(GOLDEN / name, task="causal-lm")
    stored = {}
    for path in (GOLDEN / name).glob("*.safetensors"):
        stored |= load_file(path)
    slots = tensor_slots(model)
    assert slots.keys() == stored.keys()
    for tensor, slot in slots.items():
        array = np.asarray(slot.variable[...])
        np.testing.assert_array_equal(array.T if slot.transpose else array, stored[tensor])
    assert len(jax.tree.leaves(nnx.state(model))) == len(stored)


@pytest.mark.parametrize("name", ["llama", "opt", "qwen2"])
def test_the_backbone_of_a_language_model(name, caplog):
    with caplog.at_level(logging.INFO, "spt_jax"):
        model = load_pretrained(GOLDEN / name)
    skipped = [f"{GOLDEN / name}: skipped the heads of other tasks: lm_head.weight"]
    assert caplog.messages == (skipped if name == "llama" else [])
    assert model.head is None
    with_head = load_pretrained(GOLDEN / name, task="causal-lm")
    assert_same_weights(model.layers, with_head.layers)


def test_an_output_matrix_is_not_made_up():
    with pytest.raises(ValueError, match=r"tensor lm_head.weight of shape \(97, 32\) is missing"):
        load_pretrained(GOLDEN / "llama_backbone", task="causal-lm")


def test_a_tied_output_matrix_may_be_stored_too(tmp_path):
    table = load_file(GOLDEN / "qwen2" / "model.safetensors")["model.embed_tokens.weight"]
    source = edited(tmp_path / "model", "qwen2", tensors=add("lm_head.weight", table))
    model = load_pretrained(source, task="causal-lm")
    assert model.head is None
    np.testing.assert_array_equal(model.output_kernel(), table.T)


TIED = ("opt", "opt_350m", "qwen2")


def table_of(name):
    tensors = load_file(GOLDEN / name / "model.safetensors")
    return next((key, x) for key, x in tensors.items() if key.endswith("embed_tokens.weight"))


@pytest.mark.parametrize("name", TIED)
def test_another_output_matrix_unties(name, tmp_path, caplog):
    table, array = table_of(name)
    other = array + 0.1 * np.random.default_rng(0).standard_normal(array.shape, np.float32)
    source = edited(tmp_path / "model", name, tensors=add("lm_head.weight", other))
    model = load_pretrained(source, task="causal-lm")
    (line,) = caplog.messages
    assert f"{table} and lm_head.weight differ" in line
    np.testing.assert_array_equal(model.embedding.embedding[...], array)
    np.testing.assert_array_equal(model.output_kernel(), other.T)
    assert not model.config.tie_embeddings
    caplog.clear()
    assert_same_weights(load_pretrained(source), load_pretrained(GOLDEN / name))  # has no output
    assert not caplog.messages


def test_an_output_matrix_of_another_size_is_named(tmp_path):
    larger = add("lm_head.weight", np.zeros((99, 32), np.float32))
    source = edited(tmp_path / "model", "qwen2", tensors=larger)
    with pytest.raises(ValueError, match=r"lm_head.weight has shape \(99, 32\), expected \(97, 32"):
        load_pretrained(source, task="causal-lm")


@pytest.mark.parametrize("name", TIED)
@pytest.mark.parametrize("task", ["causal-lm", "backbone", "sequence-classification"])
def test_a_tied_pair_may_be_stored_as_the_output_matrix(name, task, tmp_path):
    table, _ = table_of(name)

    def rename(tensors):
        tensors["lm_head.weight"] = tensors.pop(table)

    source = edited(tmp_path / "model", name, tensors=rename)
    assert_same_weights(
        load_pretrained(source, task=task), load_pretrained(GOLDEN / name, task=task)
    )


def beside(directory, **files):
    """Write JSON files, by their names, into a model's directory."""
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize(
    ("ends", "expected"), [([5, 7], (5, 7)), (7, (7,)), ([], ()), (None, (2,))]
)
def test_ends_are_those_of_the_generation_config(ends, expected, tmp_path, caplog):
    source = beside(
        edited(tmp_path / "model", "llama"),
        generation_config={"eos_token_id": ends, "temperature": 0.6, "num_beams": 1},
    )
    assert load_pretrained(source, task="causal-lm").config.eos_token_ids == expected
    assert not caplog.messages  # without do_sample a temperature is none


def test_wrong_ends_are_named(tmp_path):
    source = beside(edited(tmp_path / "model", "llama"), generation_config={"eos_token_id": "x"})
    with pytest.raises(
        ValueError, match=r"generation_config.json: eos_token_id must be .* got 'x'"
    ):
        load_pretrained(source, task="causal-lm")


def test_what_lies_beside_and_is_not_read_is_told(tmp_path, caplog):
    sampling = {"do_sample": True, "temperature": 0.6, "top_k": 0, "repetition_penalty": 1.1}
    source = beside(
        edited(tmp_path / "model", "llama"),
        generation_config=sampling | {"suppress_tokens": None},
        adapter_config={"peft_type": "LORA"},
    )
    load_pretrained(source, task="causal-lm")
    adapter, generation = caplog.messages
    assert "holds an adapter too" in adapter
    assert "do_sample=True, temperature=0.6, repetition_penalty=1.1 from generation" in generation


@pytest.mark.parametrize(
    ("classes", "told"),
    [
        ({"AutoConfig": "configuration.Config", "AutoModel": "modeling.Model"}, "modeling.Model"),
        ({"AutoTokenizer": ["tokenization.Tokenizer", None]}, None),
        ("modeling.Model", None),
    ],
)
def test_code_of_a_model_s_own_is_told(classes, told, tmp_path, caplog):
    source = edited(tmp_path / "model", "llama", config=lambda raw: raw.update(auto_map=classes))
    load_pretrained(source, task="causal-lm")
    lines = [f"code of its own for the model, {told}, which is not run"] if told else []
    assert len(caplog.messages) == len(lines)
    assert all(line in caplog.text for line in lines)


def test_an_adapter_alone_is_told(tmp_path):
    with pytest.raises(ValueError, match="holds an adapter; load its base model, and then spt_jax"):
        load_pretrained(beside(tmp_path, adapter_config={"peft_type": "LORA"}))


@pytest.mark.parametrize(
    ("field", "value", "method"),
    [
        ("quantization_config", {"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "gptq"),
        ("quantization_config", {"quant_method": "awq", "bits": 4}, "awq"),
        ("quantization_config", {"load_in_4bit": True}, "bitsandbytes"),
        ("compression_config", {"format": "pack-quantized"}, "compressed-tensors"),
        ("quantization", {"group_size": 64, "bits": 4}, "MLX"),
    ],
)
def test_quantization_is_named(field, value, method, tmp_path):
    source = edited(tmp_path / "model", "llama", config=lambda raw: raw.update({field: value}))
    with pytest.raises(ValueError, match=rf"quantized by {method} \({field}\), .* or a GGUF file"):
        load_pretrained(source, task="causal-lm")


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        ("self_attn.q_proj.qweight", "GPTQ or AWQ"),
        ("self_attn.q_proj.weight_scale_inv", "fp8"),
        ("mlp.up_proj.SCB", "bitsandbytes"),
        ("mlp.up_proj.weight.absmax", "bitsandbytes"),
    ],
)
def test_quantized_tensors_are_named(tensor, kind, tmp_path):
    name = f"model.layers.0.{tensor}"
    source = edited(tmp_path / "model", "llama", tensors=add(name, np.ones((4, 4), np.float32)))
    with pytest.raises(ValueError, match=rf"quantized by {kind} \(tensor {name}\)"):
        load_pretrained(source, task="causal-lm")


def test_inverse_frequencies_are_ignored(tmp_path):
    buffer = np.ones(4, np.float32)

    def age(tensors):
        for i in range(2):
            tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = buffer
        tensors["model.rotary_emb.inv_freq"] = buffer

    source = edited(tmp_path / "model", "llama", tensors=age)
    assert_same_weights(
        load_pretrained(source, task="causal-lm"),
        load_pretrained(GOLDEN / "llama", task="causal-lm"),
    )


LAYER = "model.layers.1.mlp.gate_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            without(f"{LAYER}.weight"),
            r"tensor layers.1.mlp.gate_proj.weight of shape \(48, 32\) is missing",
        ),
        (
            add(f"{LAYER}.bias", np.zeros(48, np.float32)),
            rf"tensor {LAYER}.bias of shape \(48,\) is unknown",
        ),
        (
            add(f"{LAYER}.weight", np.zeros((32, 48), np.float32)),
            rf"tensor {LAYER}.weight has shape \(32, 48\), expected \(48, 32\)",
        ),
        (
            add(f"{LAYER}.weight", np.zeros((48, 32), np.int8)),
            rf"tensor {LAYER}.weight has dtype I8; supported: F64, F32",
        ),
        (
            add("lm_head.weight", np.zeros((96, 32), np.float32)),
            r"tensor lm_head.weight has shape \(96, 32\), expected \(97, 32\)",
        ),
    ],
)
def test_wrong_tensor_is_named(tmp_path, change, message):
    source = edited(tmp_path / "model", "llama", tensors=change)
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(source, task="causal-lm")
    assert str(source) in str(error.value)


@pytest.mark.parametrize("name", ["opt_classify", "llama_classify"])
def test_classification_head(name, tmp_path, caplog):
    loaded = load_pretrained(GOLDEN / name, **CLASSIFY)
    stored = load_file(GOLDEN / name / "model.safetensors")["score.weight"]
    np.testing.assert_array_equal(loaded.score.kernel[...], stored.T)
    with pytest.raises(ValueError, match=r"classifier of 3 labels, but num_labels=2 was asked"):
        load_pretrained(GOLDEN / name, task="sequence-classification")
    source = edited(tmp_path / "model", name, tensors=without("score"))
    with caplog.at_level(logging.INFO, "spt_jax"):
        one, same, other = (
            load_pretrained(source, **CLASSIFY, rngs=nnx.Rngs(seed)) for seed in (0, 0, 1)
        )
    assert "no weights for score; initialised anew" in caplog.messages[0]
    assert one.score.kernel.shape == loaded.score.kernel.shape
    assert_same_weights(one, same)
    assert np.abs(one.score.kernel[...] - other.score.kernel[...]).max() > 0
    assert_same_weights(one.layers, loaded.layers)


SHARDED = """
import sys
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from flax import nnx
import numpy as np
from spt_jax import load_pretrained

assert len(jax.devices()) == 2
mesh = Mesh(np.array(jax.devices()), ("x",))
seen = {}

def place(path, shape):
    seen[path] = shape
    return NamedSharding(mesh, P(None, "x") if path.endswith("up.kernel") else P())

options = {"task": "sequence-classification", "num_labels": 3}
whole = load_pretrained(sys.argv[1], **options)
for sharding in (place, NamedSharding(mesh, P())):
    model = load_pretrained(sys.argv[1], sharding=sharding, **options)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        path = ".".join(map(str, path))
        expected = sharding if sharding is not place else place(path, variable.shape)
        assert variable.get_value().sharding == expected, path
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(whole))
assert {seen.pop("score.kernel"), seen.pop("layers.1.ffn.up.kernel")} == {(32, 3), (32, 48)}
kernel = load_pretrained(sys.argv[1], sharding=place).layers[0].ffn.up.kernel.get_value()
assert [shard.data.shape for shard in kernel.addressable_shards] == [(32, 24), (32, 24)]
"""


def test_sharding():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    subprocess.run(
        [sys.executable, "-c", SHARDED, str(GOLDEN / "llama")],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        check=True,
    )


def test_a_device_is_a_place():
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    model = load_pretrained(GOLDEN / "qwen3", task="causal-lm", sharding=place)
    assert {x.sharding for x in jax.tree.leaves(nnx.state(model))} == {place}
    assert_same_weights(model, load_pretrained(GOLDEN / "qwen3", task="causal-lm"))


def test_loaded_weights_may_be_donated():
    model = load_pretrained(GOLDEN / "llama", task="causal-lm")
    expected = jax.tree.map(lambda x: np.asarray(x) * 2 + 1, nnx.state(model))
    step = jax.jit(lambda state: jax.tree.map(lambda x: x * 2 + 1, state), donate_argnums=0)
    jax.tree.map(np.testing.assert_array_equal, step(nnx.state(model)), expected)


LARGE = {
    "model_type": "llama",
    "vocab_size": 16000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 7,
    "num_attention_heads": 12,
    "max_position_embeddings": 128,
}
TENSORS_A_SHARD = 16

MEASURE = """
import sys
import jax
from flax import nnx
from spt_jax import load_pretrained

def resident(field):
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith(field + ":"))

small, large, dtype = sys.argv[1:]
load_pretrained(small, task="causal-lm", dtype=dtype)
before = resident("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the highest resident size starts anew
model = load_pretrained(large, task="causal-lm", dtype=dtype)
jax.block_until_ready(nnx.state(model))
highest = resident("VmHWM") - before
print(highest, sum(x.nbytes for x in jax.tree.leaves(nnx.state(model))))
"""


def resident_and_held_bytes(small, large, dtype):
    """The most memory that loading `large` takes after `small`, and that of its weights."""
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(large), dtype],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return map(int, measured.stdout.split())


@pytest.fixture(scope="module")
def large(request, tmp_path_factory):
    """A LLaMA of 74 million weights, in shards; the parameter is their dtype."""
    directory = tmp_path_factory.mktemp("large")
    stored = np.dtype(ml_dtypes.bfloat16 if request.param == "bfloat16" else request.param)
    (directory / "config.json").write_text(json.dumps(LARGE))
    model = nnx.eval_shape(lambda: Decoder(parse_config(LARGE), rngs=nnx.Rngs(0)))
    values = np.random.default_rng(0).standard_normal(1 << 20, np.float32).astype(stored)
    shards = {}
    for i, (name, slot) in enumerate(tensor_slots(model).items()):
        shard = shards.setdefault(f"model-{i // TENSORS_A_SHARD}.safetensors", {})
        shard[name] = np.resize(values, slot.shape)
    for file, tensors in shards.items():
        save_file(tensors, directory / file)
    index = {name: file for file, tensors in shards.items() for name in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    yield directory
    for path in directory.iterdir():
        path.unlink()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("large", "dtype"),
    [("float32", "bfloat16"), ("float32", "float32"), ("bfloat16", "bfloat16")],
    indirect=["large"],
)
def test_weights_are_held_once_while_loading(large, dtype):
    highest, size = resident_and_held_bytes(GOLDEN / "llama", large, dtype)
    assert size == 74_132_736 * (2 if dtype == "bfloat16" else 4)
    assert highest < 1.3 * size
