"""Reads a Hugging Face `config.json`, or a GGUF file's metadata, into a configuration."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from spt_jax.models.decoder_config import (
    DECODER_TYPES,
    DecoderConfig,
    parse_decoder_config,
    parse_token_ids,
)
from spt_jax.models.encoder_config import ENCODER_TYPES, EncoderConfig, parse_encoder_config
from spt_jax.models.gguf import config_fields, find_gguf, read_gguf
from spt_jax.models.hub import read_json

ModelConfig = EncoderConfig | DecoderConfig
MODEL_TYPES: tuple[str, ...] = (*ENCODER_TYPES, *DECODER_TYPES)

_GENERATION_FILE = "generation_config.json"
#: Fields of it that change what transformers generates; these only where `do_sample` is set,
_SAMPLING = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)
#: and these always.
_SEARCH = (
    "num_beams",
    "num_beam_groups",
    "diversity_penalty",
    "penalty_alpha",
    "dola_layers",
    "repetition_penalty",
    "encoder_repetition_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "bad_words_ids",
    "force_words_ids",
    "constraints",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "suppress_tokens",
    "begin_suppress_tokens",
    "sequence_bias",
    "token_healing",
    "guidance_scale",
    "watermarking_config",
    "min_length",
    "min_new_tokens",
    "stop_strings",
)
#: Files of sentence-transformers: its modules in order, options of the first by several names, and
#: prompts; and the options that change what it computes.
_SENTENCE_MODULES = "modules.json"
_SENTENCE_OPTIONS = "sentence_*_config.json"
_SENTENCE_PROMPTS = "config_sentence_transformers.json"
_SENTENCE_FIELDS = ("default_prompt_name", "do_lower_case", "max_seq_length")
NOT_QUANTIZED = (
    "which is not supported; give the original checkpoint, one that transformers' dequantize() and "
    "save_pretrained wrote, or a GGUF file"
)
#: Fields of a `config.json` that describe quantized weights -> the method where none is named.
_QUANTIZATION = {
    "quantization_config": "bitsandbytes",
    "compression_config": "compressed-tensors",
    "quantization": "MLX",
}


def read_config(source: Path) -> ModelConfig:
    """Parse `source/config.json`, or the metadata of a GGUF file.

    Where `generation_config.json` lies beside and has an `eos_token_id`, that is taken.

    Args:
        source: the directory, with a GGUF file where it has no `config.json`; or such a file.

    Raises:
        ValueError: the file is absent, no JSON object, of another model family, or has a missing
            or wrong field, which the message names.
    """
    if (file := find_gguf(source, instead_of="config.json")) is not None:
        gguf = read_gguf(file)
        with _naming(file):
            config = parse_config(config_fields(gguf))
    else:
        path = source / "config.json"
        if not path.is_file() and (source / "adapter_config.json").is_file():
            raise ValueError(
                f"{source} holds an adapter; load its base model, and then spt_jax.load_adapter"
            )
        if not path.is_file():
            raise ValueError(
                f"{source} has no config.json; give the directory of a saved model, "
                "or a .gguf file, downloaded where a Hub repository has those alone"
            )
        raw = read_json(path)
        with _naming(path):
            config = parse_config(raw)
    ends = _generation_config(source).get("eos_token_id")
    if isinstance(config, DecoderConfig) and ends is not None:
        with _naming(source / _GENERATION_FILE):
            config = replace(config, eos_token_ids=parse_token_ids(ends))
    return config


def unread_generation_options(source: Path) -> dict[str, Any]:
    """Fields of `generation_config.json` that change what transformers generates, and nothing here.

    Args:
        source: the directory, or a GGUF file, which has none.
    """
    given = _generation_config(source)
    names = _SAMPLING + _SEARCH if given.get("do_sample") else _SEARCH
    # 0, 1 and null ask for nothing
    return {
        name: value
        for name in names
        if (value := given.get(name)) and (value is True or value != 1)
    }


def unread_sentence_steps(source: Path) -> list[str]:
    """What sentence-transformers computes before and after the model, and this library does not.

    Args:
        source: the directory, or a GGUF file, which has none.

    Returns:
        Options as name=value, then the kinds of the modules that follow the model. Files that are
        none of sentence-transformers' count as absent.
    """
    options = _read_if_json(source / _SENTENCE_PROMPTS, dict)
    for path in sorted(source.glob(_SENTENCE_OPTIONS)):
        options |= _read_if_json(path, dict)
    steps = [f"{name}={options[name]}" for name in _SENTENCE_FIELDS if options.get(name)]
    for module in _read_if_json(source / _SENTENCE_MODULES, list):
        kind = str(module.get("type", "")) if isinstance(module, dict) else ""
        if kind.startswith("sentence_transformers.") and not kind.endswith(".Transformer"):
            steps.append(kind.rpartition(".")[2])
    return steps


def unread_code(source: Path) -> str | None:
    """The class of code beside `config.json` that it names as the model's; no code is run.

    Args:
        source: the directory, or a GGUF file, which has none.
    """
    named = _read_if_json(source / "config.json", dict).get("auto_map")
    classes = named.items() if isinstance(named, Mapping) else ()
    return next((str(found) for auto, found in classes if auto.startswith("AutoModel")), None)


def _read_if_json[Kind: (dict, list)](path: Path, kind: type[Kind]) -> Kind:
    """A file's JSON, empty where there is none of that kind."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return kind()
    return found if isinstance(found, kind) else kind()


def _generation_config(source: Path) -> dict[str, Any]:
    path = source / _GENERATION_FILE
    return read_json(path) if path.is_file() else {}


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The configuration that the fields of a `config.json` describe; others are ignored.

    Raises:
        ValueError: the model family is not supported, the weights are quantized, or a field is
            missing or wrong.
    """
    _check_not_quantized(raw)
    model_type = raw.get("model_type")
    if model_type in ENCODER_TYPES:
        return parse_encoder_config(raw)
    if model_type in DECODER_TYPES:
        return parse_decoder_config(raw)
    raise ValueError(
        f"model_type {model_type!r} is not supported; supported: {', '.join(MODEL_TYPES)}"
    )


def _check_not_quantized(raw: Mapping[str, Any]) -> None:
    for field, method in _QUANTIZATION.items():
        if found := raw.get(field):
            named = found.get("quant_method", method) if isinstance(found, Mapping) else method
            raise ValueError(f"the weights are quantized by {named} ({field}), {NOT_QUANTIZED}")
