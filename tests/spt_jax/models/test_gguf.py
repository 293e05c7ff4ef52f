import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file

import spt_jax
from spt_jax.chat import ChatTemplate
from spt_jax.models import load_pretrained, load_tokenizer
from spt_jax.models.config import parse_config, read_config
from spt_jax.models.decoder import Decoder
from spt_jax.models.slots import tensor_slots
from tests.spt_jax.models import gguf_files
from tests.spt_jax.models.builders import GOLDEN, edited, golden
from tests.spt_jax.models.gguf_files import write_golden
from tests.spt_jax.models.test_load_decoder import (
    LARGE,
    assert_same_weights,
    resident_and_held_bytes,
)

LM = {"task": "causal-lm"}


@pytest.mark.parametrize("name", ["llama", "llama_biased", "qwen2", "qwen3"])
def test_the_same_model_as_safetensors(name, tmp_path):
    """LLaMA untied and with biases everywhere, Qwen2 with its own, Qwen3 with norms, both tied."""
    source = edited(tmp_path / "m", name, config=lambda raw: raw.update(hidden_act="silu"))
    file = write_golden(tmp_path / "model.gguf", source)
    expected = load_pretrained(source, **LM)
    model = load_pretrained(file, **LM)
    assert_same_weights(model, expected)
    epsilon = model.config.norm_epsilon
    assert epsilon == pytest.approx(expected.config.norm_epsilon, rel=1e-6)  # float32 in the file
    assert dataclasses.replace(expected.config, norm_epsilon=epsilon) == model.config


def test_logits_equal_transformers(tmp_path):
    inputs, _, logits = golden("llama")
    model = load_pretrained(write_golden(tmp_path / "model.gguf"), **LM)
    valid = inputs["attention_mask"] != 0
    found = np.asarray(model(**inputs))
    np.testing.assert_allclose(found[valid], logits[valid], atol=2e-5)


def test_tied_and_untied(tmp_path):
    """Without output.weight the output matrix is the word embedding."""
    file = write_golden(tmp_path / "tied.gguf", tensors={"output.weight": None})
    model = load_pretrained(file, **LM)
    assert model.config.tie_embeddings
    assert model.head is None
    assert not load_pretrained(write_golden(tmp_path / "untied.gguf"), **LM).config.tie_embeddings


KINDS = {
    "token_embd.weight": "Q8_0",
    "blk.0.attn_q.weight": "Q4_1",
    "blk.1.attn_k.weight": "Q8_0",
    "blk.0.ffn_up.weight": "Q4_0",
    "blk.1.ffn_up.weight": "Q5_1",
    "blk.0.attn_output.weight": "BF16",
    "blk.1.attn_v.weight": "F16",
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantized_tensors(dtype, tmp_path):
    file = write_golden(tmp_path / "model.gguf", kinds=KINDS)
    model = load_pretrained(file, task="causal-lm", dtype="float32", param_dtype=dtype)
    for name, array in load_file(GOLDEN / "llama" / "model.safetensors").items():
        kind = GGMLQuantizationType[KINDS.get(gguf_files.gguf_name(name), "F32")]
        expected = dequantize(quantize(array, kind), kind).astype(jnp.dtype(dtype))
        slot = tensor_slots(model)[name]
        found = np.asarray(slot.variable[...])
        np.testing.assert_array_equal(found.T if slot.transpose else found, expected)


def test_bands_may_cut_heads(tmp_path, monkeypatch):
    """Rows are put in order whatever the number that is read at a time."""
    file = write_golden(tmp_path / "model.gguf")
    expected = load_pretrained(GOLDEN / "llama", **LM)
    for rows in (1, 3):
        monkeypatch.setattr("spt_jax.models.checkpoint._BAND", rows * 32 * 4)
        assert_same_weights(load_pretrained(file, **LM), expected)


def test_tasks_and_sharding(tmp_path):
    file = write_golden(tmp_path / "model.gguf")
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    model = load_pretrained(
        file, task="sequence-classification", num_labels=3, dtype="bfloat16", sharding=place
    )
    assert model.score.kernel.shape == (32, 3)
    arrays = jax.tree.leaves(nnx.state(model))
    assert {x.sharding for x in arrays} == {place}
    assert {x.dtype for x in arrays} == {jnp.dtype("bfloat16")}
    assert load_pretrained(file).head is None


def rope_factors(factor, original):
    """Divisors of the frequencies that llama.cpp's converter writes for LLaMA 3."""
    turns = 500_000.0 ** -(np.arange(0, 64, 2) / 64) * original / (2 * np.pi)
    kept = np.clip((turns - 1) / 3, 0, 1)
    return (1 / (kept + (1 - kept) / factor)).astype(np.float32)


WIDE = {  # heads wide enough to have frequencies in LLaMA 3's band
    "llama.attention.key_length": 64,
    "llama.attention.value_length": 64,
    "llama.rope.freq_base": 500_000.0,
}


@pytest.mark.parametrize(("factor", "original"), [(8.0, 8192), (32.0, 4096)])
def test_llama3_scaling_is_found_from_its_factors(factor, original, tmp_path):
    tensors = {"rope_freqs.weight": rope_factors(factor, original)}
    rotary = read_config(write_golden(tmp_path / "m.gguf", changes=WIDE, tensors=tensors)).rotary
    assert rotary.kind == "llama3"
    assert (rotary.factor, rotary.original_length) == (factor, original)
    assert (rotary.low_freq_factor, rotary.high_freq_factor) == (1, 4)


def test_other_scalings(tmp_path):
    given = {"type": "linear", "factor": 4.0}
    linear = {f"llama.rope.scaling.{key}": value for key, value in given.items()}
    rotary = read_config(write_golden(tmp_path / "a.gguf", changes=linear)).rotary
    assert (rotary.kind, rotary.factor) == ("linear", 4)
    given = {"type": "yarn", "factor": 4.0, "original_context_length": 8, "finetuned": True}
    yarn = {f"llama.rope.scaling.{key}": value for key, value in given.items()}
    rotary = read_config(write_golden(tmp_path / "b.gguf", changes=yarn)).rotary
    raw = json.loads((GOLDEN / "llama" / "config.json").read_text())
    raw["rope_parameters"] = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 8,
    }
    assert rotary == parse_config(raw).rotary
    none = {"llama.rope.scaling.type": "none"}
    assert read_config(write_golden(tmp_path / "c.gguf", changes=none)).rotary.kind == "default"


def test_every_token_that_ends_a_text(tmp_path):
    ends = {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 2}
    assert read_config(write_golden(tmp_path / "m.gguf", changes=ends)).eos_token_ids == (2, 7)


def test_a_directory_with_one_file(tmp_path):
    file = write_golden(tmp_path / "one" / "model.gguf")
    assert_same_weights(load_pretrained(tmp_path / "one"), load_pretrained(file))
    write_golden(tmp_path / "one" / "other.gguf")
    with pytest.raises(ValueError, match=r"several GGUF files: model.gguf, other.gguf; give"):
        load_pretrained(tmp_path / "one")
    mixed = edited(tmp_path / "mixed", "llama")
    write_golden(mixed / "model.gguf", tensors={"output.weight": None})
    assert not read_config(mixed).tie_embeddings  # config.json comes first


def test_no_such_file(tmp_path):
    for source in (tmp_path / "model.gguf", "owner/model.gguf"):
        with pytest.raises(ValueError, match=r"there is no file .*model\.gguf; check the path"):
            load_pretrained(source)


def test_without_the_package(tmp_path, monkeypatch):
    file = write_golden(tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"install it with `pip install 'spt-jax\[gguf\]'`"):
        load_pretrained(file)
    assert load_tokenizer(file).get_vocab_size() == 97  # needs no tensors


def refused(**options):
    return lambda path: write_golden(path, **options)


def changed(**changes):
    named = {key.replace("__", "."): value for key, value in changes.items()}
    return refused(changes={f"llama.{key}": value for key, value in named.items()})


INTEGERS = {"output_norm.weight": np.ones(32, np.int32)}
REFUSED = {
    "other architecture": (refused(arch="gemma2"), "architecture 'gemma2' is not supported"),
    "adapter": (refused(changes={"general.type": "adapter"}), "general.type is 'adapter'"),
    "split": (refused(changes={"split.count": 3}), "split.count is 3.*llama-gguf-split --merge"),
    "experts": (changed(expert_count=8), "llama.expert_count = 8 is not supported"),
    "window": (changed(attention__sliding_window=512), "llama.attention.sliding_window = 512"),
    "a list of heads": (changed(attention__head_count=[4, 4]), "head_count is a list of 2 values"),
    "partial rotation": (changed(rope__dimension_count=4), "rope.dimension_count = 4.*of width 8"),
    "other values": (changed(attention__value_length=4), "attention.value_length = 4"),
    "longrope": (changed(rope__scaling__type="longrope"), "rope.scaling.type='longrope'"),
    "other factors": (
        refused(tensors={"rope_freqs.weight": np.array([1, 2, 3, 4], np.float32)}),
        "rope_freqs.weight of shape .4,. does not hold the factors of LLaMA 3",
    ),
    "key missing": (changed(block_count=None), "the metadata needs llama.block_count"),
    "no heads": (changed(attention__head_count=0), "num_attention_heads must be a positive"),
    "no vocabulary": (
        refused(changes={"tokenizer.ggml.tokens": None, "llama.vocab_size": None}),
        "needs tokenizer.ggml.tokens or llama.vocab_size",
    ),
    "one layer more": (changed(block_count=3), r"does not fit its metadata.*layers.2.*is missing"),
    "10^9 layers": (changed(block_count=10**9), "num_hidden_layers must be at most"),
    "5,000 layers": (changed(block_count=5000), "does not fit its metadata: num_hidden_layers is"),
    "wider": (changed(feed_forward_length=64), r"does not fit its metadata.*expected \(64, 32\)"),
    "unknown tensor": (
        refused(tensors={"blk.0.other.weight": np.ones(3, np.float32)}),
        r"tensor blk.0.other.weight of shape \(3,\) is unknown",
    ),
    "integers": (refused(tensors=INTEGERS), "output_norm.weight is of a type.*I32"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_named(case, tmp_path):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(make(tmp_path / "model.gguf"))
    assert "model.gguf" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [0, 3, 4, 10, 30, 100, 3000, -1])
def test_truncated_anywhere(size, tmp_path):
    file = write_golden(tmp_path / "model.gguf")
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"is truncated or corrupt|is no GGUF file") as error:
        load_pretrained(file)
    assert "save it again" in str(error.value)


def test_save_pretrained_takes_the_tokenizer_along(tmp_path):
    changes = {
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}",
        "tokenizer.ggml.token_type": [1, 3, 3, *[1] * 94],  # BOS and EOS are control tokens
    }
    file = write_golden(tmp_path / "model.gguf", changes=changes)
    model = load_pretrained(file, **LM)
    spt_jax.save_pretrained(model, tmp_path / "out", tokenizer=file)
    assert_same_weights(load_pretrained(tmp_path / "out", **LM), model)
    assert load_tokenizer(tmp_path / "out").to_str() == load_tokenizer(file).to_str()
    for source in (file, tmp_path / "out"):
        template = ChatTemplate.load(source)
        assert template.render([{"role": "user", "content": "Hi"}]) == "<s>Hi"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_are_held_once_while_loading(tmp_path):
    """74 million weights in Q8_0, loaded as bfloat16."""
    raw = LARGE | {"num_key_value_heads": 12, "rms_norm_eps": 1e-6}
    raw |= {"rope_parameters": {"rope_theta": 10000.0}}
    model = nnx.eval_shape(lambda: Decoder(parse_config(raw), rngs=nnx.Rngs(0)))
    values = np.random.default_rng(0).standard_normal(1 << 20, np.float32)
    tensors = {gguf_files.gguf_name(n): s.shape for n, s in tensor_slots(model).items()}
    kinds = {name: "Q8_0" for name, shape in tensors.items() if len(shape) == 2}
    large = gguf_files.write(
        tmp_path / "large.gguf",
        "llama",
        gguf_files.metadata(raw),
        {name: np.resize(values, shape) for name, shape in tensors.items()},
        kinds,
    )
    small = write_golden(tmp_path / "small.gguf", kinds={"token_embd.weight": "Q8_0"})
    highest, size = resident_and_held_bytes(small, large, "bfloat16")
    assert size == 2 * 74_132_736
    assert highest < 1.3 * size
