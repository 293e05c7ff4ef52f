"""Tiny models with tokenizers, for fine-tuning in seconds."""

from __future__ import annotations

import json
from pathlib import Path

from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from spt_jax.models.config import parse_config
from spt_jax.models.decoder import Decoder
from tests.spt_jax.models.builders import save_model

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def write_decoder(directory: Path, *, template: bool = True) -> Path:
    """Save a random LLaMA that reads bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<pad>", "<s>", "</s>", *alphabet]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(tokens[:3])
    raw = {
        "model_type": "llama",
        "vocab_size": len(tokens),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    save_model(directory, raw, Decoder(parse_config(raw), task="causal-lm", rngs=nnx.Rngs(0)))
    tokenizer.save(str(directory / "tokenizer.json"))
    fields: dict[str, object] = {"bos_token": "<s>", "eos_token": "</s>"}
    if template:
        fields["chat_template"] = TEMPLATE
    (directory / "tokenizer_config.json").write_text(json.dumps(fields))
    return directory
