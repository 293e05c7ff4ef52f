"""A small LLaMA trained from nothing, for demonstrations without a download."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import spt_jax
from spt_jax.models import Decoder, DecoderConfig
from spt_jax.models.config import parse_config
from spt_jax.models.presets import SMALL_LLAMA
from spt_jax.processes import exchange, is_first
from spt_jax.training import encode_documents, next_token, pack, train

BOS, EOS = "<s>", "</s>"
BOS_ID, EOS_ID = 0, 1
STEP_TOKENS = 4096
#: Fields of its config.json.
CONFIG = {
    **SMALL_LLAMA,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": EOS_ID,
}


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """A byte-level BPE tokenizer that begins each text with BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SMALL_LLAMA["vocab_size"],
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def train_small_llama(
    texts: Sequence[str],
    out: Path,
    *,
    steps: int,
    length: int,
    seed: int = 0,
    mesh: spt_jax.MeshConfig | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Path:
    """Train a tokenizer and a model on `texts`.

    Args:
        texts: documents.
        out: gets checkpoints, TensorBoard events and `model/`.
        steps: optimizer steps of `STEP_TOKENS` tokens.
        length: tokens of a row.
        seed: of weights and order.
        mesh: devices to train on.
        resume: go on with the training in `out`; a finished model is left as it is.
        overwrite: delete the training in `out`.

    Returns:
        The Hugging Face directory of the model and its tokenizer, `out/model`.
    """
    directory = out / "model"
    if resume and (directory / "tokenizer_config.json").is_file():
        return directory
    tokenizer = train_tokenizer(texts)
    documents = encode_documents(texts, tokenizer, name="pretraining text", eos_id=EOS_ID)
    data = pack(documents, length, pad_id=EOS_ID, name="pretraining text")
    config = parse_config(CONFIG)
    assert isinstance(config, DecoderConfig)
    model = Decoder(config, rngs=nnx.Rngs(seed))
    options = spt_jax.TrainConfig(
        trainable="all",
        steps=steps,
        batch_size=max(1, STEP_TOKENS // length),
        learning_rate=2e-3,
        schedule="cosine",
        weight_decay=0.1,
        seed=seed,
        mesh=mesh,
    )
    train(model, data, options, out, objective=next_token, resume=resume, overwrite=overwrite)
    spt_jax.save_pretrained(model, directory, overwrite=True)
    if not is_first():
        exchange(None)  # wait for the tokenizer
        return directory
    tokenizer.save(str(directory / "tokenizer.json"))
    special = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
    }
    text = json.dumps(special, indent=2) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
    exchange(None)
    return directory
