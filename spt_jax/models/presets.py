"""Sizes of models, by name: configurations without weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from spt_jax.models.config import ModelConfig
from spt_jax.models.decoder_config import DecoderConfig, parse_decoder_config
from spt_jax.models.encoder_config import EncoderConfig, parse_encoder_config

POSITIONS = 2048  # that a preset has, until `with_positions` gives it more


def opt_config(
    *, width: int, heads: int, hidden: int, layers: int = 1, vocabulary: int = 1
) -> DecoderConfig:
    """Layers of OPT: LayerNorm, a plain FFN, biases."""
    return parse_decoder_config(
        {
            "model_type": "opt",
            "vocab_size": vocabulary,
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "ffn_dim": hidden,
            "max_position_embeddings": POSITIONS,
        }
    )


def llama_config(
    *, width: int, heads: int, kv_heads: int, hidden: int, layers: int = 1, vocabulary: int = 1
) -> DecoderConfig:
    """Layers of LLaMA: RMSNorm, a gated FFN, rotary embedding, no biases."""
    return parse_decoder_config(
        {
            "model_type": "llama",
            "vocab_size": vocabulary,
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "intermediate_size": hidden,
            "max_position_embeddings": POSITIONS,
        }
    )


def bert_config(
    *, width: int, heads: int, hidden: int, layers: int = 1, vocabulary: int = 1
) -> EncoderConfig:
    """Layers of BERT: attention to both sides, norms after the sums."""
    return parse_encoder_config(
        {
            "model_type": "bert",
            "vocab_size": vocabulary,
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": hidden,
            "max_position_embeddings": POSITIONS,
        }
    )


#: Models by name.
PRESETS: Mapping[str, ModelConfig] = {
    "bert-large": bert_config(width=1024, heads=16, hidden=4096, layers=24, vocabulary=30522),
    "opt-1024": opt_config(width=1024, heads=16, hidden=4096, layers=24, vocabulary=50272),
    "opt-2048": opt_config(width=2048, heads=32, hidden=8192, layers=24, vocabulary=50272),
    "opt-2560": opt_config(width=2560, heads=32, hidden=10240, layers=32, vocabulary=50272),
    "llama-2560": llama_config(
        width=2560, heads=20, kv_heads=20, hidden=6912, layers=32, vocabulary=32000
    ),
    "llama-4096": llama_config(
        width=4096, heads=32, kv_heads=32, hidden=11008, layers=32, vocabulary=32000
    ),
    "llama3-8b": llama_config(
        width=4096, heads=32, kv_heads=8, hidden=14336, layers=32, vocabulary=128256
    ),
    "tiny-llama": llama_config(
        width=32, heads=2, kv_heads=2, hidden=64, layers=1, vocabulary=128
    ),  # for trying things out
}
#: A LLaMA that trains from nothing in minutes on a CPU, as fields of its config.json.
SMALL_LLAMA: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def one_layer(config: ModelConfig) -> ModelConfig:
    """A model of a single layer of this one's."""
    if isinstance(config, DecoderConfig):
        return replace(config, num_layers=1, windows=config.windows[:1])
    return replace(config, num_layers=1)


def with_positions(config: ModelConfig, length: int) -> ModelConfig:
    """This model with positions for sequences of `length` tokens."""
    return replace(config, num_positions=max(config.num_positions, length))
