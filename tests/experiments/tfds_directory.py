"""A TFDS directory that holds small GLUE tasks, written without TensorFlow."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from experiments.glue_tasks import GlueTask

WORDS = ("the", "cat", "sat", "on", "mat", "because", "nobody", "saw", "it", "there", "today")


def write_task(
    root: Path, task: GlueTask, splits: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
    """Write rows with the task's columns and `label` to `root/glue/<task>/2.0.0`."""
    directory = root / "glue" / task.name / "2.0.0"
    directory.mkdir(parents=True)
    label: Any = np.float32 if task.num_labels is None else np.int64
    features = tfds.features.FeaturesDict(
        {**dict.fromkeys(task.columns, tfds.features.Text()), "label": label}
    )
    features.save_config(directory)
    serializer = ExampleSerializer(features.get_serialized_info())
    for split, rows in splits.items():
        path = directory / f"glue-{split}.array_record-00000-of-00001"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for row in rows:
            writer.write(serializer.serialize_example(features.encode_example(row)))
        writer.close()
    info = {
        "name": "glue",
        "configName": task.name,
        "version": "2.0.0",
        "moduleName": "tensorflow_datasets.text.glue",
        "fileFormat": "array_record",
        "splits": [
            {
                "name": split,
                "shardLengths": [str(len(rows))],
                "numBytes": "1",
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
            for split, rows in splits.items()
        ],
    }
    (directory / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")


def random_rows(task: GlueTask, number: int, seed: int) -> list[dict[str, Any]]:
    """Sentences of random words, and labels that take turns."""
    rng = np.random.default_rng(seed)
    return [
        {name: " ".join(rng.choice(WORDS, 6)) for name in task.columns}
        | {"label": i % task.num_labels if task.num_labels else i % 6}
        for i in range(number)
    ]
