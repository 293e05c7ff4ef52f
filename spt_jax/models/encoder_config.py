"""Sizes and options of an encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pallas_kernels import Activation
from spt_jax.models.config_fields import (
    ACTIVATION_NAMES,
    HUGGING_FACE_ACTIVATIONS,
    MOST_LAYERS,
    REQUIRED,
    Field,
    check,
    is_activation,
    is_integer,
    is_number,
    read_fields,
)

EncoderType = Literal["bert", "roberta", "distilbert"]
ENCODER_TYPES: tuple[EncoderType, ...] = get_args(EncoderType)

_BERT_FIELDS: dict[str, Field] = {
    "vocab_size": ("vocab_size", REQUIRED),
    "width": ("hidden_size", REQUIRED),
    "num_layers": ("num_hidden_layers", REQUIRED),
    "num_heads": ("num_attention_heads", REQUIRED),
    "hidden": ("intermediate_size", REQUIRED),
    "num_positions": ("max_position_embeddings", REQUIRED),
    "num_token_types": ("type_vocab_size", 2),
    "activation": ("hidden_act", "gelu"),
    "layer_norm_epsilon": ("layer_norm_eps", 1e-12),
    "hidden_dropout": ("hidden_dropout_prob", 0.1),
    "classifier_dropout": ("classifier_dropout", None),  # None: as hidden_dropout
    "pad_token_id": ("pad_token_id", 0),
}

#: For each family, our field -> its name in config.json and the default that transformers gives it.
FIELDS: dict[EncoderType, dict[str, Field]] = {
    "bert": _BERT_FIELDS,
    "roberta": _BERT_FIELDS | {"pad_token_id": ("pad_token_id", 1)},
    "distilbert": {
        "vocab_size": ("vocab_size", REQUIRED),
        "width": ("dim", REQUIRED),
        "num_layers": ("n_layers", REQUIRED),
        "num_heads": ("n_heads", REQUIRED),
        "hidden": ("hidden_dim", REQUIRED),
        "num_positions": ("max_position_embeddings", REQUIRED),
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

    model_type: EncoderType
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
    def padding_id(self) -> int:
        """Id to fill rows up with."""
        return self.pad_token_id

    @property
    def max_length(self) -> int:
        """Longest sequence that the position embedding serves."""
        return self.num_positions - self.position_offset

    @property
    def attention_output_dropout(self) -> float:
        """Dropout rate of the attention sublayer's output; DistilBERT has none there."""
        return 0.0 if self.model_type == "distilbert" else self.hidden_dropout

    def to_hugging_face(self) -> dict[str, Any]:
        """Fields of a `config.json` that describe this encoder."""
        written = {name: getattr(self, ours) for ours, (name, _) in FIELDS[self.model_type].items()}
        name = FIELDS[self.model_type]["activation"][0]
        written[name] = HUGGING_FACE_ACTIVATIONS[self.activation]
        return {"model_type": self.model_type, **written}


def parse_encoder_config(raw: Mapping[str, Any]) -> EncoderConfig:
    """The encoder that the fields of a `config.json` describe; others are ignored.

    Raises:
        ValueError: a field is missing or wrong.
    """
    model_type: EncoderType = raw["model_type"]
    fields = FIELDS[model_type]
    values = read_fields(raw, fields, model_type)
    if values["classifier_dropout"] is None:
        values["classifier_dropout"] = values["hidden_dropout"]

    def demand(ours: str, holds: bool, expected: str) -> None:
        check(fields[ours][0], values[ours], holds, expected)

    for ours in _SIZES:
        demand(ours, is_integer(values[ours]) and values[ours] > 0, "a positive integer")
    demand("num_layers", values["num_layers"] <= MOST_LAYERS, f"at most {MOST_LAYERS}")
    for ours in _RATES:
        demand(ours, is_number(values[ours]) and 0 <= values[ours] < 1, "a number in [0, 1)")
    if "num_token_types" in fields:
        types = values["num_token_types"]
        demand("num_token_types", is_integer(types) and types > 0, "a positive integer")
        epsilon = values["layer_norm_epsilon"]
        demand("layer_norm_epsilon", is_number(epsilon) and epsilon > 0, "a positive number")
    pad, activation = values["pad_token_id"], values["activation"]
    in_vocabulary = is_integer(pad) and 0 <= pad < values["vocab_size"]
    demand("pad_token_id", in_vocabulary, f"an id below vocab_size={values['vocab_size']}")
    demand("activation", is_activation(activation), f"one of {', '.join(ACTIVATION_NAMES)}")
    divides = values["width"] % values["num_heads"] == 0
    demand("width", divides, f"a multiple of {fields['num_heads'][0]}={values['num_heads']}")
    if (kind := raw.get("position_embedding_type") or "absolute") != "absolute":
        raise ValueError(f"position_embedding_type must be 'absolute', got {kind!r}")
    for name in ("is_decoder", "add_cross_attention"):
        if raw.get(name):
            raise ValueError(f"{name} is set: a {model_type} model serves as an encoder only")
    config = EncoderConfig(
        model_type=model_type, **values | {"activation": ACTIVATION_NAMES[activation]}
    )
    if config.max_length < 1:
        raise ValueError(
            f"max_position_embeddings={config.num_positions} leaves no position: a {model_type} "
            f"sequence starts at position {config.position_offset} (pad_token_id + 1)"
        )
    return config
