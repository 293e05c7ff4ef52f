"""Reading of single fields of a Hugging Face `config.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pallas_kernels import Activation

#: Hugging Face's name of an activation -> ours.
ACTIVATION_NAMES: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
#: Ours -> the name that is written.
HUGGING_FACE_ACTIVATIONS = {ours: name for name, ours in reversed(ACTIVATION_NAMES.items())}

#: Layers at most; a hundred times those of the deepest models.
MOST_LAYERS = 10_000

REQUIRED: Any = object()
Field = tuple[str, Any]  # name in config.json, default


def read_fields(raw: Mapping[str, Any], fields: Mapping[str, Field], family: str) -> dict[str, Any]:
    """Our name -> value in `raw`, or its default where that is absent or null.

    Raises:
        ValueError: a field without a default is absent.
    """
    missing = [
        name for name, default in fields.values() if default is REQUIRED and raw.get(name) is None
    ]
    if missing:
        raise ValueError(f"a config of the {family} family needs {', '.join(missing)}")
    return {
        ours: default if raw.get(name) is None else raw[name]
        for ours, (name, default) in fields.items()
    }


def check(name: str, value: Any, holds: bool, expected: str) -> None:
    """Raise a ValueError that names the field, unless `holds`."""
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def is_integer(value: object) -> bool:
    """Whether it is a JSON integer."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is a JSON number, and finite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_activation(value: object) -> bool:
    """Whether it names a supported activation."""
    return isinstance(value, str) and value in ACTIVATION_NAMES
