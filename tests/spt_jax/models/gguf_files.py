"""GGUF files of the golden models, written by the package gguf as llama.cpp converts them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from safetensors.numpy import load_file

from tests.spt_jax.models.builders import GOLDEN

LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor."""
    module, _, kind = name.rpartition(".")
    if module in OUTER:
        return f"{OUTER[module]}.{kind}"
    _, _, layer, module = module.split(".", 3)
    return f"blk.{layer}.{LAYER[module]}.{kind}"


def interleaved(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows i and i + H/2 of each head side by side."""
    halves = array.reshape(heads, 2, -1, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)


def metadata(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What llama.cpp's converter writes of a config.json."""
    arch = raw["model_type"]
    own = {
        "block_count": raw["num_hidden_layers"],
        "context_length": raw["max_position_embeddings"],
        "embedding_length": raw["hidden_size"],
        "feed_forward_length": raw["intermediate_size"],
        "attention.head_count": raw["num_attention_heads"],
        "attention.head_count_kv": raw["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": raw["rms_norm_eps"],
        "rope.freq_base": raw["rope_parameters"]["rope_theta"],
        "vocab_size": raw["vocab_size"],
    }
    if "head_dim" in raw:
        own |= {"attention.key_length": raw["head_dim"], "attention.value_length": raw["head_dim"]}
    special = {
        f"tokenizer.ggml.{name}_token_id": raw.get(f"{name}_token_id")
        for name in ("bos", "eos", "padding")
    }
    tokens = ["<unk>", "<s>", "</s>", "t", "1", *(f"t{i}" for i in range(raw["vocab_size"] - 5))]
    return (
        {f"{arch}.{key}": value for key, value in own.items()}
        | special
        | {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}
        | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": ["t 1"]}
    )


def write(
    path: Path,
    arch: str,
    values: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    kinds: Mapping[str, str] | None = None,
) -> Path:
    """Write a file; values that are None are left out, and tensors are of `kinds`, else F32."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, arch)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    add |= {str: writer.add_string, list: writer.add_array}
    for key, value in values.items():
        if value is not None:
            add[type(value)](key, value)
    for name, array in tensors.items():
        kind = GGMLQuantizationType[(kinds or {}).get(name, "F32")]
        integers = array.dtype.kind == "i"
        writer.add_tensor(
            name, array if integers else quantize(array, kind), raw_dtype=None if integers else kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_golden(
    path: Path,
    source: Path = GOLDEN / "llama",
    *,
    kinds: Mapping[str, str] | None = None,
    changes: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
    arch: str | None = None,
) -> Path:
    """Write a golden model with other metadata and tensors; None takes one out."""
    raw = json.loads((source / "config.json").read_text())
    heads = {"q": raw["num_attention_heads"], "k": raw["num_key_value_heads"]}
    arrays: dict[str, np.ndarray | None] = {}
    for name, array in load_file(source / "model.safetensors").items():
        for letter, count in heads.items():
            if raw["model_type"] == "llama" and f"self_attn.{letter}_proj." in name:
                array = interleaved(array, count)
        arrays[gguf_name(name)] = array
    kept = {name: a for name, a in (arrays | dict(tensors or {})).items() if a is not None}
    values = metadata(raw) | dict(changes or {})
    return write(path, arch or raw["model_type"], values, kept, kinds)
