"""Which task a file is for, and which of its columns are what."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from spt_jax.finetune.config import DataConfig, Layout, Task
from spt_jax.finetune.rows import Rows

_TEXTS = ("text", "sentence", "review", "content", "document", "question", "query", "tweet")
_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("text", "text_pair"),
    ("question", "sentence"),
    ("query", "passage"),
)
_LABELS = ("label", "labels", "class", "category", "target", "sentiment", "score", "rating")
_LAYOUTS: dict[Layout, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
}
#: Different whole numbers above which they are taken for neither classes nor scores unasked.
_MOST_CLASSES_GUESSED = 50

_log = logging.getLogger(__name__)


def find_columns(rows: Rows, data: DataConfig, task: Task | None) -> tuple[Task, DataConfig]:
    """The task, and the data's options with all columns named; the log says what was guessed.

    Args:
        rows: of the training file.
        data: its options.
        task: where it is given.

    Raises:
        ValueError: a column that is named is not there, or one that is not named is not plain.
    """
    named = (*data.text_columns, *data.label_columns)
    if missing := [name for name in named if name not in rows.columns]:
        raise ValueError(
            f"{rows.name} has no column {missing[0]!r}; its columns are {_listed(rows.columns)}"
        )
    if (layout := _layout(rows, data, task)) is not None:
        if task not in (None, "language"):
            raise ValueError(f"layout {layout} is of the task language, not of {task}")
        columns = data.text_columns if layout == "text" else ()
        if layout == "text" and not columns:
            columns = (_text(rows, ()),)
        found = replace(data, layout=layout, text_columns=columns)
        check_layout(rows, found)
        _tell(rows, "language", found)
        return "language", found
    labels = data.label_columns or (_label(rows, data.text_columns),)
    texts = data.text_columns or _texts(rows, labels)
    found = replace(data, text_columns=texts, label_columns=labels)
    task = task or _task_of_labels(rows, labels)
    _tell(rows, task, found)
    return task, found


def find_inputs(rows: Rows, data: DataConfig, task: Task) -> DataConfig:
    """As `find_columns`, of a file whose labels or replies may be missing.

    Args:
        rows: of the file.
        data: its options, those of training where they are known.
        task: of the model.

    Raises:
        ValueError: a column that is needed is not there, or not plain.
    """
    if task != "language":
        texts = data.text_columns or _texts(rows, [n for n in rows.columns if n.lower() in _LABELS])
        needed: tuple[str, ...] = texts
        found = replace(data, text_columns=texts)
    else:
        prompts = (data.prompt_column,)
        layout = data.layout or _layout_of_inputs(rows, prompts[0])
        texts = data.text_columns or ((_text(rows, ()),) if layout == "text" else ())
        needed = {"text": texts, "prompt-completion": prompts}.get(layout) or _LAYOUTS[layout][:1]
        found = replace(data, layout=layout, text_columns=texts)
    if missing := [name for name in needed if name not in rows.columns]:
        raise ValueError(
            f"{rows.name} has no column {missing[0]!r}, which the model was trained on; its "
            f"columns are {_listed(rows.columns)}; name the ones to read (--text-columns, --layout)"
        )
    return found


def _layout_of_inputs(rows: Rows, prompt_column: str) -> Layout:
    for layout, needed in _LAYOUTS.items():
        if needed[0] in rows.columns:
            return layout
    return "prompt-completion" if prompt_column in rows.columns else "text"


def check_layout(rows: Rows, data: DataConfig) -> None:
    """Raise a ValueError unless a file has the columns of the layout."""
    assert data.layout is not None
    columns = data.text_columns
    if data.layout == "prompt-completion":
        columns = (data.prompt_column, data.completion_column)
    elif data.layout != "text":
        columns = _LAYOUTS[data.layout]
    for name in columns:
        if name not in rows.columns:
            raise ValueError(
                f"{rows.name}: layout {data.layout} needs a column {name!r}; its columns are "
                f"{_listed(rows.columns)}"
            )


def _layout(rows: Rows, data: DataConfig, task: Task | None) -> Layout | None:
    if data.layout is not None:
        return data.layout
    if data.label_columns or task not in (None, "language"):
        return None
    for layout, needed in _LAYOUTS.items():
        if set(needed) <= set(rows.columns):
            return layout
    if {data.prompt_column, data.completion_column} <= set(rows.columns):
        return "prompt-completion"
    if task == "language" or rows.columns == ("text",):
        return "text"
    return None


def _label(rows: Rows, texts: Sequence[str]) -> str:
    columns = [name for name in rows.columns if name not in texts]
    known = [name for name in columns if name.lower() in _LABELS]
    if len(known) == 1:
        return known[0]
    if not known and texts and len(columns) == 1:
        return columns[0]
    raise ValueError(
        f"{rows.name}: {'several columns' if known else 'no column'} may be the label "
        f"({_listed(known or rows.columns)}); name it with label_columns (--label-columns), or a "
        "layout for a language model (--layout)"
    )


def _texts(rows: Rows, labels: Sequence[str]) -> tuple[str, ...]:
    columns = [name for name in rows.columns if name not in labels]
    lower = {name.lower(): name for name in columns}
    for first, second in _PAIRS:
        if first in lower and second in lower:
            return lower[first], lower[second]
    return (_text(rows, labels),)


def _text(rows: Rows, labels: Sequence[str]) -> str:
    columns = [name for name in rows.columns if name not in labels]
    known = [name for name in columns if name.lower() in _TEXTS]
    if len(known) == 1:
        return known[0]
    if len(columns) == 1:
        return columns[0]
    raise ValueError(
        f"{rows.name}: {'several columns' if known else 'no column'} may be the text "
        f"({_listed(known or columns)}); name it with text_columns (--text-columns)"
    )


def _task_of_labels(rows: Rows, labels: Sequence[str]) -> Task:
    if len(labels) > 1:
        return "multi-label"
    values = [row.values.get(labels[0]) for row in rows.rows]
    present = [value for value in values if value not in (None, "")]
    if any(isinstance(value, list) for value in present):
        return "multi-label"
    numbers = [number_of(value) for value in present]
    if None in numbers or not numbers:
        return "classification"
    real = [number for number in numbers if number is not None]
    if not all(number.is_integer() for number in real):
        return "regression"
    if len(set(real)) > _MOST_CLASSES_GUESSED:
        raise ValueError(
            f"{rows.name}: column {labels[0]!r} has {len(set(real))} different whole numbers; say "
            "with task (--task) whether they are classes (classification) or scores (regression)"
        )
    return "classification"


def number_of(value: Any) -> float | None:
    """The number that a value is, or that its text says; None where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _tell(rows: Rows, task: Task, data: DataConfig) -> None:
    if task == "language":
        text = f" in column {data.text_columns[0]!r}" if data.layout == "text" else ""
        _log.info("%s: %d rows, layout %s%s", rows.name, len(rows), data.layout, text)
        return
    _log.info(
        "%s: %d rows, %s of %s by %s",
        rows.name,
        len(rows),
        task,
        _listed(data.text_columns),
        _listed(data.label_columns),
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))
