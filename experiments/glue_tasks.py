"""The tasks of GLUE: columns, labels, splits and official metrics, read through TFDS.

GLUE is the benchmark of Wang et al., arXiv 1804.07461; metrics are those of its leaderboard.
"""

from __future__ import annotations

import contextlib
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from spt_jax.errors import summary
from spt_jax.training.data import check_labels, decode_text

_DOWNLOAD_HOST = "https://dl.fbaipublicfiles.com/"
_VALIDATION = MappingProxyType({"": "validation"})


@dataclass(frozen=True, kw_only=True)
class GlueTask:
    """One task.

    Attributes:
        name: its TFDS configuration, `glue/<name>`.
        columns: one text column, or two for sentence pairs.
        num_labels: classes; None for a score.
        metrics: official metrics, the one that ranks checkpoints first.
        validation: labelled splits to evaluate on, by the suffix that their metrics get.
        score_range: lowest and highest score.
    """

    name: str
    columns: tuple[str, ...]
    num_labels: int | None
    metrics: tuple[str, ...]
    validation: Mapping[str, str] = field(default=_VALIDATION)
    score_range: tuple[float, float] = (0.0, 5.0)

    def score(self, figures: Mapping[str, Any]) -> float:
        """One number for the task: the mean of its official metrics, as on the leaderboard.

        Example:
            >>> TASKS["mrpc"].score({"accuracy": 0.75, "f1": 0.85, "eval_loss": 0.5})
            0.8
        """
        keys = [
            metric + (f"_{split}" if split else "")
            for metric in self.metrics
            for split in self.validation
        ]
        return float(np.mean([figures[key] for key in keys]))


_PAIR = ("sentence1", "sentence2")
_MNLI_SPLITS = {"matched": "validation_matched", "mismatched": "validation_mismatched"}

TASKS: Mapping[str, GlueTask] = MappingProxyType(
    {
        task.name: task
        for task in (
            GlueTask(name="cola", columns=("sentence",), num_labels=2, metrics=("matthews",)),
            GlueTask(name="sst2", columns=("sentence",), num_labels=2, metrics=("accuracy",)),
            GlueTask(name="mrpc", columns=_PAIR, num_labels=2, metrics=("accuracy", "f1")),
            GlueTask(
                name="qqp",
                columns=("question1", "question2"),
                num_labels=2,
                metrics=("accuracy", "f1"),
            ),
            GlueTask(name="stsb", columns=_PAIR, num_labels=None, metrics=("pearson", "spearman")),
            GlueTask(
                name="mnli",
                columns=("premise", "hypothesis"),
                num_labels=3,
                metrics=("accuracy",),
                validation=MappingProxyType(_MNLI_SPLITS),
            ),
            GlueTask(
                name="qnli", columns=("question", "sentence"), num_labels=2, metrics=("accuracy",)
            ),
            GlueTask(name="rte", columns=_PAIR, num_labels=2, metrics=("accuracy",)),
            GlueTask(name="wnli", columns=_PAIR, num_labels=2, metrics=("accuracy",)),
        )
    }
)


@dataclass(frozen=True)
class Split:
    """Texts, one list a column, and labels of a split."""

    name: str
    texts: list[list[str]] = field(repr=False)
    labels: np.ndarray = field(repr=False)


def read_split(task: GlueTask, split: str, data_dir: str | os.PathLike[str] | None = None) -> Split:
    """Read a labelled split.

    Args:
        task: one of `TASKS`.
        split: its TFDS name, slices such as `train[:100]` included.
        data_dir: TFDS data directory; None for TFDS's own. A task that is not there is downloaded
            into it.

    Raises:
        ValueError: no such split, an empty split, a missing column, or labels that are hidden or
            out of range.
        OSError: the task is neither there nor can be downloaded.
    """
    name = f"glue/{task.name} {split}"
    builder = _builder(task, data_dir)
    remedy = f"if its files are damaged, remove {builder.data_dir} and prepare it again"
    if (found := builder.info.splits.get(split)) is not None and not found.num_examples:
        raise ValueError(f"{name} is empty: there is no example in it")
    try:
        rows = builder.as_data_source(split=split)
        examples = rows.__getitems__(range(len(rows))) if len(rows) else []
    except (ValueError, KeyError, IndexError, TypeError, RuntimeError, OSError) as error:
        raise ValueError(f"cannot read {name}: {summary(error)}; {remedy}") from error
    if not examples:
        raise ValueError(f"{name} is empty: there is no example in it")
    for column in (*task.columns, "label"):
        if column not in examples[0]:
            raise ValueError(f"{name}: no column {column!r}; it has {', '.join(examples[0])}")
    for index, example in enumerate(examples):
        if None in example.values():  # what TFDS makes of a record without bytes
            raise ValueError(f"{name}: example {index} has no content; {remedy}")
    labels = check_labels(
        [example["label"] for example in examples],
        name=name,
        num_labels=task.num_labels,
        score_range=task.score_range,
    )
    texts = [
        [decode_text(x[column], f"{name}: {column} of example {i}") for i, x in enumerate(examples)]
        for column in task.columns
    ]
    return Split(name, texts, labels)


def _builder(task: GlueTask, data_dir: str | os.PathLike[str] | None) -> Any:
    # not needed by the built-in task, and slow to import
    import tensorflow_datasets as tfds

    root = Path(data_dir if data_dir is not None else tfds.core.constants.DATA_DIR).expanduser()
    folder = root / "glue" / task.name
    versions = sorted(folder.glob("*/dataset_info.json"))
    if versions:
        try:
            return tfds.builder_from_directory(versions[-1].parent)
        except Exception as error:  # whatever TFDS meets in its files
            raise ValueError(
                f"cannot read glue/{task.name}: {versions[-1]} or features.json is damaged "
                f"({summary(error)}); remove {versions[-1].parent} and prepare it again"
            ) from error
    try:
        _ping(_DOWNLOAD_HOST)
        import tensorflow_datasets.text.glue  # registers the builder

        builder = tfds.builder(f"glue/{task.name}", data_dir=root, file_format="array_record")
        builder.download_and_prepare()
    except Exception as error:
        present = sorted(p.parents[1].name for p in root.glob("glue/*/*/dataset_info.json"))
        held = f"it has {', '.join(present)}" if present else "it has no GLUE task"
        raise OSError(
            f"glue/{task.name} is not in the TFDS data directory {root} ({held}), and cannot be "
            f"downloaded: {summary(error)}"
        ) from error
    return builder


def _ping(url: str) -> None:
    """Fail within seconds where there is no network; TFDS itself retries for minutes."""
    with contextlib.suppress(urllib.error.HTTPError):  # an answer, whatever it says
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5).close()
