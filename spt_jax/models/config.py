"""Reads a Hugging Face `config.json`, or a GGUF file's metadata, into a configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spt_jax.models.decoder_config import DECODER_TYPES, DecoderConfig, parse_decoder_config
from spt_jax.models.encoder_config import ENCODER_TYPES, EncoderConfig, parse_encoder_config
from spt_jax.models.gguf import config_fields, find_gguf, read_gguf

ModelConfig = EncoderConfig | DecoderConfig
MODEL_TYPES: tuple[str, ...] = (*ENCODER_TYPES, *DECODER_TYPES)


def read_config(source: Path) -> ModelConfig:
    """Parse `source/config.json`, or the metadata of a GGUF file.

    Args:
        source: the directory, with a GGUF file where it has no `config.json`; or such a file.

    Raises:
        ValueError: the file is absent, no JSON object, of another model family, or has a missing
            or wrong field, which the message names.
    """
    if (file := find_gguf(source, instead_of="config.json")) is not None:
        gguf = read_gguf(file)
        try:
            return parse_config(config_fields(gguf))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
    directory = source
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{directory} has no config.json; give the directory of a saved model, "
            "or a .gguf file, downloaded where a Hub repository has those alone"
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a JSON {type(raw).__name__}, not an object")
    try:
        return parse_config(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The configuration that the fields of a `config.json` describe; others are ignored.

    Raises:
        ValueError: the model family is not supported, or a field is missing or wrong.
    """
    model_type = raw.get("model_type")
    if model_type in ENCODER_TYPES:
        return parse_encoder_config(raw)
    if model_type in DECODER_TYPES:
        return parse_decoder_config(raw)
    raise ValueError(
        f"model_type {model_type!r} is not supported; supported: {', '.join(MODEL_TYPES)}"
    )
