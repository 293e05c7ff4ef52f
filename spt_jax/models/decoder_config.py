"""Sizes and options of a decoder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pallas_kernels import Activation
from spt_jax.layers.rotary import RotaryConfig, RotaryKind
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

DecoderType = Literal["opt", "llama", "mistral", "qwen2", "qwen3"]
DECODER_TYPES: tuple[DecoderType, ...] = get_args(DecoderType)

_OPT_FIELDS: dict[str, Field] = {
    "vocab_size": ("vocab_size", REQUIRED),
    "width": ("hidden_size", REQUIRED),
    "num_layers": ("num_hidden_layers", REQUIRED),
    "num_heads": ("num_attention_heads", REQUIRED),
    "hidden": ("ffn_dim", REQUIRED),
    "num_positions": ("max_position_embeddings", REQUIRED),
    "activation": ("activation_function", "relu"),
    "hidden_dropout": ("dropout", 0.1),
    "pre_norm": ("do_layer_norm_before", True),
    "tie_embeddings": ("tie_word_embeddings", True),
    "qkv_bias": ("enable_bias", True),
    "embedding_width": ("word_embed_proj_dim", None),  # None: as width
    "pad_token_id": ("pad_token_id", 1),
    "bos_token_id": ("bos_token_id", 2),
    "eos_token_ids": ("eos_token_id", 2),
}
_LLAMA_FIELDS: dict[str, Field] = {
    "vocab_size": ("vocab_size", REQUIRED),
    "width": ("hidden_size", REQUIRED),
    "num_layers": ("num_hidden_layers", REQUIRED),
    "num_heads": ("num_attention_heads", REQUIRED),
    "num_kv_heads": ("num_key_value_heads", None),  # None: as num_heads
    "head_width": ("head_dim", None),  # None: width / num_heads
    "hidden": ("intermediate_size", REQUIRED),
    "num_positions": ("max_position_embeddings", REQUIRED),
    "activation": ("hidden_act", "silu"),
    "norm_epsilon": ("rms_norm_eps", 1e-6),
    "tie_embeddings": ("tie_word_embeddings", False),
    "pad_token_id": ("pad_token_id", None),
    "bos_token_id": ("bos_token_id", None),
    "eos_token_ids": ("eos_token_id", None),
}
#: For each family, our field -> its name in config.json and the default that transformers gives it.
FIELDS: dict[DecoderType, dict[str, Field]] = {
    "opt": _OPT_FIELDS,
    "llama": _LLAMA_FIELDS
    | {
        "qkv_bias": ("attention_bias", False),
        "ffn_bias": ("mlp_bias", False),
        "bos_token_id": ("bos_token_id", 1),
        "eos_token_ids": ("eos_token_id", 2),
    },
    "mistral": _LLAMA_FIELDS
    | {
        "num_kv_heads": ("num_key_value_heads", 8),
        "bos_token_id": ("bos_token_id", 1),
        "eos_token_ids": ("eos_token_id", 2),
    },
    "qwen2": _LLAMA_FIELDS | {"num_kv_heads": ("num_key_value_heads", 32)},
    "qwen3": _LLAMA_FIELDS
    | {
        "num_kv_heads": ("num_key_value_heads", 32),
        "head_width": ("head_dim", 128),
        "qkv_bias": ("attention_bias", False),
    },
}
_SIZES = ("vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "head_width", "hidden")
_FLAGS = ("pre_norm", "tie_embeddings", "qkv_bias", "ffn_bias")
#: Where null, if it is written, does not stand for the default.
_NULLABLE = ("num_kv_heads", "pad_token_id", "bos_token_id", "eos_token_ids")
_ROPE_NUMBERS = (
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
)
_ORIGINAL = "original_max_position_embeddings"
_OPT_POSITION_OFFSET = 2


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """One decoder of the OPT, LLaMA, Mistral, Qwen2 or Qwen3 family.

    Dropout acts on the outputs of sublayers, in OPT alone; that of attention probabilities is left
    out, as in encoders.

    Attributes:
        model_type: family.
        vocab_size: rows of the word embedding.
        width: model width D.
        num_layers: decoder layers.
        num_heads: query heads N.
        num_kv_heads: key/value heads K.
        head_width: width H of a head.
        hidden: hidden units F of an FFN.
        num_positions: positions that the checkpoint states.
        embedding_width: width of the word embedding; where it is not `width`, linear maps lead into
            and out of the layers.
        activation: the FFN's activation.
        norm_epsilon: added to the variance or mean square in norms.
        pre_norm: whether norms stand before the sublayers, else after the residual sum.
        final_norm: whether a norm follows the last layer.
        qkv_bias: whether query, key and value projections have biases.
        output_bias: whether the output projection has one.
        ffn_bias: whether the FFN's maps have.
        tie_embeddings: whether the output matrix is the word embedding.
        rotary: rotary embedding; None for learned positions (OPT).
        windows: for each layer, keys that a query sees, itself included; None for all before it.
        hidden_dropout: dropout rate of sublayer outputs.
        pad_token_id: id of the padding token, where there is one.
        bos_token_id: id of the token that begins a text, where there is one.
        eos_token_ids: ids of the tokens that end a text.
    """

    model_type: DecoderType
    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    hidden: int
    num_positions: int
    embedding_width: int
    activation: Activation
    norm_epsilon: float
    pre_norm: bool
    final_norm: bool
    qkv_bias: bool
    output_bias: bool
    ffn_bias: bool
    tie_embeddings: bool
    rotary: RotaryConfig | None
    windows: tuple[int | None, ...]
    hidden_dropout: float
    pad_token_id: int | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def gated(self) -> bool:
        """Whether the FFN has a gate."""
        return self.model_type != "opt"

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised, head by head."""
        return self.model_type == "qwen3"

    @property
    def position_offset(self) -> int:
        """Row of the position embedding that a sequence's first token reads."""
        return 0 if self.rotary is not None else _OPT_POSITION_OFFSET

    @property
    def padding_id(self) -> int:
        """Id to fill rows up with: of the padding token, or else of one that ends a text."""
        return next((i for i in (self.pad_token_id, *self.eos_token_ids) if i is not None), 0)

    @property
    def max_length(self) -> int:
        """Longest sequence that the positions serve, their scaling included."""
        if self.rotary is None:
            return self.num_positions
        return max(self.num_positions, int(self.rotary.factor * self.rotary.original_length))

    def to_hugging_face(self) -> dict[str, Any]:
        """Fields of a `config.json` that describe this decoder."""
        fields = FIELDS[self.model_type]
        written = {name: getattr(self, ours) for ours, (name, _) in fields.items()}
        written[fields["activation"][0]] = HUGGING_FACE_ACTIVATIONS[self.activation]
        ends = list(self.eos_token_ids)
        written["eos_token_id"] = (ends[0] if len(ends) == 1 else ends) if ends else None
        if self.rotary is None:
            return {
                "model_type": self.model_type,
                **written,
                "_remove_final_layer_norm": self.pre_norm and not self.final_norm,
            }
        return {
            "model_type": self.model_type,
            **written,
            "rope_theta": self.rotary.theta,
            "rope_scaling": _rope_scaling(self.rotary),
            **_window_fields(self),
        }


def parse_decoder_config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that the fields of a `config.json` describe; others are ignored.

    Raises:
        ValueError: a field is missing or wrong.
    """
    model_type: DecoderType = raw["model_type"]
    fields = FIELDS[model_type]
    values = read_fields(raw, fields, model_type)
    for ours in _NULLABLE:
        if ours in fields and raw.get(fields[ours][0], values[ours]) is None:
            values[ours] = None

    def demand(ours: str, holds: bool, expected: str) -> None:
        check(fields[ours][0], values[ours], holds, expected)

    for ours in (*_SIZES, "num_positions", "embedding_width"):
        if ours in fields and values[ours] is not None:
            demand(ours, is_integer(values[ours]) and values[ours] > 0, "a positive integer")
    demand("num_layers", values["num_layers"] <= MOST_LAYERS, f"at most {MOST_LAYERS}")
    for ours in _FLAGS:
        if ours in fields:
            demand(ours, isinstance(values[ours], bool), "true or false")
    demand(
        "activation", is_activation(values["activation"]), f"one of {', '.join(ACTIVATION_NAMES)}"
    )
    values["activation"] = ACTIVATION_NAMES[values["activation"]]
    heads = values["num_heads"]
    if values.get("head_width") is None:
        demand("width", values["width"] % heads == 0, f"a multiple of num_attention_heads={heads}")
        values["head_width"] = values["width"] // heads
    values["num_kv_heads"] = values.get("num_kv_heads") or heads
    if heads % values["num_kv_heads"]:
        raise ValueError(
            f"num_attention_heads={heads} must be a multiple of num_key_value_heads="
            f"{values['num_kv_heads']}"
        )
    values["eos_token_ids"] = parse_token_ids(values["eos_token_ids"])
    for ours in ("pad_token_id", "bos_token_id"):
        token = values[ours]
        demand(ours, token is None or is_integer(token), "an id or null")
    if (pad := values["pad_token_id"]) is not None and pad < 0:
        values["pad_token_id"] = None  # the -1 of some LLaMA checkpoints stands for none
    values["embedding_width"] = values.get("embedding_width") or values["width"]
    own = _opt_options(raw, values) if model_type == "opt" else _llama_options(raw, values)
    return DecoderConfig(model_type=model_type, **values | own)


def _opt_options(raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    rate = values["hidden_dropout"]
    check("dropout", rate, is_number(rate) and 0 <= rate < 1, "a number in [0, 1)")
    if not _flag(raw, "layer_norm_elementwise_affine", True):
        raise ValueError("layer_norm_elementwise_affine=false is not supported")
    return {
        "norm_epsilon": 1e-5,
        "final_norm": values["pre_norm"] and not _flag(raw, "_remove_final_layer_norm", False),
        "output_bias": values["qkv_bias"],
        "ffn_bias": values["qkv_bias"],
        "rotary": None,
        "windows": (None,) * values["num_layers"],
    }


def _llama_options(raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    model_type, epsilon = raw["model_type"], values["norm_epsilon"]
    check("rms_norm_eps", epsilon, is_number(epsilon) and epsilon > 0, "a positive number")
    head_width = values["head_width"]
    check("head_dim", head_width, head_width % 2 == 0, "even, for rotary embeddings")
    qkv_bias = model_type == "qwen2" or values.get("qkv_bias", False)
    return {
        "pre_norm": True,
        "final_norm": True,
        "qkv_bias": qkv_bias,
        "output_bias": qkv_bias and model_type != "qwen2",
        "ffn_bias": values.get("ffn_bias", False),
        "rotary": _rotary(raw, values["num_positions"]),
        "windows": _windows(raw, values["num_layers"]),
        "hidden_dropout": 0.0,
    }


def _flag(raw: Mapping[str, Any], name: str, default: bool) -> bool:
    value = default if raw.get(name) is None else raw[name]
    check(name, value, isinstance(value, bool), "true or false")
    return value


def parse_token_ids(value: Any) -> tuple[int, ...]:
    """What an `eos_token_id` stands for: an id, several or none.

    Raises:
        ValueError: it is none of these.
    """
    ids = [] if value is None else value if isinstance(value, list) else [value]
    check("eos_token_id", value, all(map(is_integer, ids)), "an id, a list of ids or null")
    return tuple(ids)


def _windows(raw: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """Mistral's window is in all layers, Qwen's in those of `layer_types` or above a number."""
    window = raw.get("sliding_window", 4096)
    if raw["model_type"] == "llama" or window is None:
        return (None,) * num_layers
    check("sliding_window", window, is_integer(window) and window > 0, "a positive integer or null")
    if raw["model_type"] == "mistral":
        return (window,) * num_layers
    if not _flag(raw, "use_sliding_window", False):
        return (None,) * num_layers
    types = raw.get("layer_types")
    if types is None:
        first = raw.get("max_window_layers", 28)
        check("max_window_layers", first, is_integer(first), "an integer")
        return tuple(window if i >= first else None for i in range(num_layers))
    known = ("full_attention", "sliding_attention")
    fits = isinstance(types, list) and len(types) == num_layers and all(t in known for t in types)
    check("layer_types", types, fits, f"a list of {num_layers}, each one of {', '.join(known)}")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _window_fields(config: DecoderConfig) -> dict[str, Any]:
    windows = {window for window in config.windows if window is not None}
    window = windows.pop() if windows else None
    if config.model_type == "llama":
        return {}
    if config.model_type == "mistral":
        return {"sliding_window": window}
    if window is None:
        return {"use_sliding_window": False}
    kinds = ["full_attention" if w is None else "sliding_attention" for w in config.windows]
    return {"use_sliding_window": True, "sliding_window": window, "layer_types": kinds}


def _rotary(raw: Mapping[str, Any], num_positions: int) -> RotaryConfig:
    """From `rope_theta` and `rope_scaling`, or from `rope_parameters`, which replaced both."""
    source = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    given = raw.get(source) or {}
    check(source, given, isinstance(given, Mapping), "an object or null")
    beside = {name: raw.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    original = {_ORIGINAL: raw[_ORIGINAL]} if raw.get(_ORIGINAL) is not None else {}
    rope = {k: v for k, v in (beside | dict(given) | original).items() if v is not None}
    for name in filter(rope.__contains__, _ROPE_NUMBERS):
        value = rope[name]
        positive = is_number(value) and math.isfinite(value) and value > 0
        check(name, value, positive, "a positive number")
        rope[name] = float(value)
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = get_args(RotaryKind)
    check("rope_type", kind, kind in known, f"one of {', '.join(known)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor is not supported: heads rotate whole")
    options: dict[str, Any] = {
        "theta": rope.get("rope_theta", 10000.0),
        "kind": kind,
        "original_length": num_positions,
    }
    if kind == "default":
        return RotaryConfig(**options)
    if kind in ("llama3", "yarn") and _ORIGINAL in rope:
        length = rope[_ORIGINAL]
        check(_ORIGINAL, length, is_integer(length) and length > 0, "a positive integer")
        options["original_length"] = length
        if kind == "yarn":
            rope.setdefault("factor", num_positions / length)
    names = ("low_freq_factor", "high_freq_factor") if kind == "llama3" else ()
    if missing := [name for name in ("factor", *names) if name not in rope]:
        raise ValueError(f"{source} of type {kind} needs {', '.join(missing)}")
    factor = rope["factor"]
    check("factor", factor, factor >= 1, "at least 1")
    options |= {"factor": factor} | {name: rope[name] for name in names}
    if kind == "llama3":
        low, high = (rope[name] for name in names)
        check("high_freq_factor", high, high > low, f"above low_freq_factor={low}")
    if kind == "yarn":
        options |= {name: rope[name] for name in ("beta_fast", "beta_slow") if name in rope}
        options["truncate"] = _flag(rope, "truncate", True)
        options["attention_factor"] = _yarn_attention_factor(rope, factor)
    return RotaryConfig(**options)


def _yarn_attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    def scale(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1

    if "attention_factor" in rope:
        return rope["attention_factor"]
    if "mscale" in rope and "mscale_all_dim" in rope:
        return scale(rope["mscale"]) / scale(rope["mscale_all_dim"])
    return scale(1.0)


def _rope_scaling(config: RotaryConfig) -> dict[str, Any] | None:
    if config.kind == "default":
        return None
    scaling: dict[str, Any] = {"rope_type": config.kind, "factor": config.factor}
    if config.kind in ("llama3", "yarn"):
        scaling[_ORIGINAL] = config.original_length
    names = {
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "yarn": ("beta_fast", "beta_slow", "attention_factor", "truncate"),
    }
    return scaling | {name: getattr(config, name) for name in names.get(config.kind, ())}
