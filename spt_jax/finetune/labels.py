"""Labels of rows as numbers: classes by name, scores, several classes at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Num

from spt_jax.finetune.columns import number_of
from spt_jax.finetune.config import DataConfig, Task
from spt_jax.finetune.rows import BadRow, Row

Label = str | float | tuple[str, ...]


def texts_of(row: Row, columns: Sequence[str]) -> tuple[str, ...]:
    """The texts of a row.

    Args:
        row: of a file.
        columns: one or two.

    Raises:
        BadRow: one is missing, no text, or blank.
    """
    for name in columns:
        text = row.values.get(name)
        if not isinstance(text, str) or not text.strip():
            found = "is missing" if text is None else f"is {text!r:.40}, not a text"
            found = "is blank" if isinstance(text, str) else found
            raise BadRow(f"{row.where}: column {name!r} {found}; fill it in, or remove the row")
    return tuple(row.values[name] for name in columns)


def label_of(row: Row, task: Task, data: DataConfig) -> Label:
    """The label of a row: the name of its class, a score, or the names of its classes.

    Raises:
        BadRow: it is missing, or not what the task asks for.
    """
    if len(data.label_columns) > 1:
        return tuple(name for name in data.label_columns if _is_set(row, name))
    (name,) = data.label_columns
    value = row.values.get(name)
    if value is None or (value == "" and task != "multi-label"):
        raise BadRow(f"{row.where}: column {name!r} is missing; fill it in, or remove the row")
    if task == "multi-label":
        return _names(row, name, value)
    if task == "regression":
        number = number_of(value)
        if number is None or not math.isfinite(number):
            raise BadRow(f"{row.where}: column {name!r} is {value!r:.40}, not a number")
        return number
    return _name(row, name, value)


def _is_set(row: Row, name: str) -> bool:
    number = number_of(row.values.get(name, ""))
    number = float(row.values[name]) if isinstance(row.values.get(name), bool) else number
    if number not in (0, 1):
        raise BadRow(
            f"{row.where}: column {name!r} is {row.values.get(name)!r:.40}; several label columns "
            "hold 0 or 1 each"
        )
    return number == 1


def _names(row: Row, column: str, value: Any) -> tuple[str, ...]:
    values = value.split(",") if isinstance(value, str) else value
    if not isinstance(values, list):
        raise BadRow(
            f"{row.where}: column {column!r} is {value!r:.40}; several classes are a list, or "
            "names with commas between them"
        )
    names = (_name(row, column, x) for x in values if not isinstance(x, str) or x.strip())
    return tuple(dict.fromkeys(names))


def _name(row: Row, column: str, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int) or not str(value).strip():
        raise BadRow(f"{row.where}: column {column!r} is {value!r:.40}, not a class")
    return str(value).strip()


def classes_of(labels: Sequence[Label], data: DataConfig) -> tuple[str, ...]:
    """Names of all classes, numbers by their size and others by the alphabet.

    Raises:
        ValueError: there is none, or a single one of which each row is.
    """
    if len(data.label_columns) > 1:
        return data.label_columns
    names = {x for label in labels for x in ((label,) if isinstance(label, str) else label)}  # type: ignore[union-attr]
    several = any(isinstance(label, tuple) for label in labels)
    if len(names) < (1 if several else 2):
        found = f"all rows are of the class {min(names)!r}" if names else "no row has a class"
        raise ValueError(f"{data.train_file}: {found}, so there is nothing to learn")
    numbers = {name: number_of(name) for name in names}
    if None in numbers.values():
        return tuple(sorted(names))
    return tuple(sorted(names, key=lambda name: numbers[name] or 0.0))


def check_classes(label: Label, row: Row, classes: Sequence[str]) -> None:
    """Raise a BadRow where a row is of a class that training has none of."""
    for name in (label,) if isinstance(label, str) else label if isinstance(label, tuple) else ():
        if name not in classes:
            raise BadRow(
                f"{row.where}: class {name!r} is not among those to train on "
                f"({', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''})"
            )


def as_array(labels: Sequence[Label], classes: Sequence[str]) -> Num[np.ndarray, "n *C"]:
    """Labels as numbers.

    Args:
        labels: of one kind.
        classes: names of all classes; empty for scores.

    Returns:
        int32 `[n]` of classes, float32 `[n]` of scores, float32 `[n, C]` of several classes.
    """
    number = {name: i for i, name in enumerate(classes)}
    if not classes:
        return np.array(labels, np.float32)
    if isinstance(labels[0], str):
        return np.array([number[str(label)] for label in labels], np.int32)
    array: np.ndarray = np.zeros((len(labels), len(classes)), np.float32)
    for i, label in enumerate(labels):
        assert isinstance(label, tuple)
        array[i, [number[name] for name in label]] = 1
    return array
