"""Sizes and options of an encoder, read from a Hugging Face `config.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pallas_kernels import Activation

ModelType = Literal["bert", "roberta", "distilbert"]
MODEL_TYPES: tuple[ModelType, ...] = get_args(ModelType)

#: Hugging Face's name of an activation -> ours.
ACTIVATION_NAMES: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}

_REQUIRED = object()
_Field = tuple[str, object]  # name in config.json, default

_BERT_FIELDS: dict[str, _Field] = {
    "vocab_size": ("vocab_size", _REQUIRED),
    "width": ("hidden_size", _REQUIRED),
    "num_layers": ("num_hidden_layers", _REQUIRED),
    "num_heads": ("num_attention_heads", _REQUIRED),
    "hidden": ("intermediate_size", _REQUIRED),
    "num_positions": ("max_position_embeddings", _REQUIRED),
    "num_token_types": ("type_vocab_size", 2),
    "activation": ("hidden_act", "gelu"),
    "layer_norm_epsilon": ("layer_norm_eps", 1e-12),
    "hidden_dropout": ("hidden_dropout_prob", 0.1),
    "classifier_dropout": ("classifier_dropout", None),  # None: as hidden_dropout
    "pad_token_id": ("pad_token_id", 0),
}

#: For each family, our field -> its name in config.json and the default that transformers gives it.
FIELDS: dict[ModelType, dict[str, _Field]] = {
    "bert": _BERT_FIELDS,
    "roberta": _BERT_FIELDS | {"pad_token_id": ("pad_token_id", 1)},
    "distilbert": {
        "vocab_size": ("vocab_size", _REQUIRED),
        "width": ("dim", _REQUIRED),
        "num_layers": ("n_layers", _REQUIRED),
        "num_heads": ("n_heads", _REQUIRED),
        "hidden": ("hidden_dim", _REQUIRED),
        "num_positions": ("max_position_embeddings", _REQUIRED),
        "activation": ("activation", "gelu"),
        "hidden_dropout": ("dropout", 0.1),
        "classifier_dropout": ("seq_classif_dropout", 0.2),
        "pad_token_id": ("pad_token_id", 0),
    },
}

_SIZES = ("vocab_size", "width", "num_layers", "num_heads", "hidden", "num_positions")
_RATES = ("hidden_dropout", "classifier_dropout")


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """One encoder of the BERT, RoBERTa or DistilBERT family.

    Dropout acts on embeddings, on the outputs of sublayers and in the head. Dropout of attention
    probabilities is left out in every family: sparse attention never forms them all, and dense and
    sparse training are to differ in nothing else.

    Attributes:
        model_type: family.
        vocab_size: rows of the word embedding.
        width: model width D.
        num_layers: encoder layers.
        num_heads: attention heads N.
        hidden: hidden units F of an FFN.
        num_positions: rows of the position embedding.
        num_token_types: rows of the token type embedding; 0 for none.
        activation: the FFN's activation.
        layer_norm_epsilon: added to the variance in LayerNorm.
        hidden_dropout: dropout rate of embeddings and sublayer outputs.
        classifier_dropout: dropout rate in the classification head.
        pad_token_id: id of the padding token.
    """

    model_type: ModelType
    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    hidden: int
    num_positions: int
    num_token_types: int = 0
    activation: Activation = "gelu"
    layer_norm_epsilon: float = 1e-12
    hidden_dropout: float = 0.1
    classifier_dropout: float = 0.1
    pad_token_id: int = 0

    @property
    def position_offset(self) -> int:
        """Row of the position embedding that a sequence's first token reads."""
        return self.pad_token_id + 1 if self.model_type == "roberta" else 0

    @property
    def max_length(self) -> int:
        """Longest sequence that the position embedding serves."""
        return self.num_positions - self.position_offset

    @property
    def attention_output_dropout(self) -> float:
        """Dropout rate of the attention sublayer's output; DistilBERT has none there."""
        return 0.0 if self.model_type == "distilbert" else self.hidden_dropout


def read_config(directory: Path) -> EncoderConfig:
    """Parse `directory/config.json`.

    Raises:
        ValueError: the file is absent, no JSON object, of another model family, or has a missing
            or wrong field, which the message names.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} has no config.json; give the directory of a saved model")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a JSON {type(raw).__name__}, not an object")
    try:
        return parse_config(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_config(raw: Mapping[str, Any]) -> EncoderConfig:
    """The configuration that the fields of a `config.json` describe; others are ignored.

    Raises:
        ValueError: the model family is not supported, or a field is missing or wrong.
    """
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"model_type {model_type!r} is not supported; supported: {', '.join(MODEL_TYPES)}"
        )
    fields = FIELDS[model_type]
    missing = [
        name for name, default in fields.values() if default is _REQUIRED and name not in raw
    ]
    if missing:
        raise ValueError(f"a {model_type} config needs {', '.join(missing)}")
    values: dict[str, Any] = {
        ours: default if raw.get(name) is None and default is not _REQUIRED else raw[name]
        for ours, (name, default) in fields.items()
    }
    if values["classifier_dropout"] is None:
        values["classifier_dropout"] = values["hidden_dropout"]

    def check(ours: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{fields[ours][0]} must be {expected}, got {values[ours]!r}")

    for ours in _SIZES:
        check(ours, _is_integer(values[ours]) and values[ours] > 0, "a positive integer")
    for ours in _RATES:
        check(ours, _is_number(values[ours]) and 0 <= values[ours] < 1, "a number in [0, 1)")
    if "num_token_types" in fields:
        types = values["num_token_types"]
        check("num_token_types", _is_integer(types) and types > 0, "a positive integer")
        epsilon = values["layer_norm_epsilon"]
        check("layer_norm_epsilon", _is_number(epsilon) and epsilon > 0, "a positive number")
    pad, activation = values["pad_token_id"], values["activation"]
    in_vocabulary = _is_integer(pad) and 0 <= pad < values["vocab_size"]
    check("pad_token_id", in_vocabulary, f"an id below vocab_size={values['vocab_size']}")
    known = isinstance(activation, str) and activation in ACTIVATION_NAMES
    check("activation", known, f"one of {', '.join(ACTIVATION_NAMES)}")
    divides = values["width"] % values["num_heads"] == 0
    check("width", divides, f"a multiple of {fields['num_heads'][0]}={values['num_heads']}")
    if (kind := raw.get("position_embedding_type") or "absolute") != "absolute":
        raise ValueError(f"position_embedding_type must be 'absolute', got {kind!r}")
    for name in ("is_decoder", "add_cross_attention"):
        if raw.get(name):
            raise ValueError(f"{name} is set: only encoders are supported, not decoders")
    config = EncoderConfig(
        model_type=model_type, **values | {"activation": ACTIVATION_NAMES[activation]}
    )
    if config.max_length < 1:
        raise ValueError(
            f"max_position_embeddings={config.num_positions} leaves no position: a {model_type} "
            f"sequence starts at position {config.position_offset} (pad_token_id + 1)"
        )
    return config


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
