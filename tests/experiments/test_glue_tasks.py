from __future__ import annotations

import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest

from experiments import glue_tasks
from experiments.glue_tasks import TASKS, read_split
from spt_jax.training import glue_metrics

SIZES = ("cola", "sst2", "mrpc", "rte", "stsb")
PAIRS = {"mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"}


def test_the_table_names_every_task_with_its_official_metrics():
    assert {name: task.metrics for name, task in TASKS.items()} == {
        "cola": ("matthews",),
        "sst2": ("accuracy",),
        "mrpc": ("accuracy", "f1"),
        "qqp": ("accuracy", "f1"),
        "stsb": ("pearson", "spearman"),
        "mnli": ("accuracy",),
        "qnli": ("accuracy",),
        "rte": ("accuracy",),
        "wnli": ("accuracy",),
    }
    assert {name for name, task in TASKS.items() if len(task.columns) == 2} == PAIRS
    assert {name for name, task in TASKS.items() if task.num_labels != 2} == {"stsb", "mnli"}
    for task in TASKS.values():
        outputs = np.eye(3)[:, : task.num_labels or 1]
        found = glue_metrics(task.metrics, outputs, np.array([0, 1, 1]))
        assert list(found) == list(task.metrics)


def test_mnli_has_two_validation_splits():
    assert TASKS["mnli"].validation == {
        "matched": "validation_matched",
        "mismatched": "validation_mismatched",
    }
    assert TASKS["cola"].validation == {"": "validation"}


@pytest.fixture
def holding(monkeypatch):
    """Make `read_split` see these rows."""

    class Rows(list):
        def __getitems__(self, indices):
            return [self[i] for i in indices]

    def hold(*rows):
        builder = SimpleNamespace(
            as_data_source=lambda split: Rows(rows),
            data_dir="cola/1.0.0",
            info=SimpleNamespace(splits={}),
        )
        monkeypatch.setattr(glue_tasks, "_builder", lambda task, data_dir: builder)

    return hold


def test_rows_become_columns(holding):
    holding(
        {"sentence1": "é".encode(), "sentence2": b"b", "label": 1, "idx": 0},
        {"sentence1": b"c", "sentence2": b"d", "label": 0, "idx": 1},
    )
    split = read_split(TASKS["rte"], "train")
    assert split.name == "glue/rte train"
    assert split.texts == [["é", "c"], ["b", "d"]]
    assert split.labels.tolist() == [1, 0]
    assert split.labels.dtype == np.int32


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        ("cola", [], "glue/cola train is empty"),
        ("cola", [{"text": b"a", "label": 1}], "no column 'sentence'; it has text, label"),
        ("cola", [{"sentence": b"a"}], "no column 'label'; it has sentence"),
        ("cola", [{"sentence": b"a", "label": -1}], "all labels are -1, that is, hidden"),
        ("cola", [{"sentence": b"a", "label": 2}], r"label 2 of example 0 is no class in 0\.\.1"),
        (
            "stsb",
            [{"sentence1": b"a", "sentence2": b"b", "label": 5.5}],
            r"label 5\.5 of example 0 is no score in 0\.0\.\.5\.0",
        ),
    ],
)
def test_bad_rows(holding, task, rows, message):
    holding(*rows)
    with pytest.raises(ValueError, match=message):
        read_split(TASKS[task], "train")


def test_absent_data_without_network(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    (tmp_path / "glue" / "cola" / "2.0.0").mkdir(parents=True)
    (tmp_path / "glue" / "cola" / "2.0.0" / "dataset_info.json").write_text("{}")
    with pytest.raises(OSError, match=r"glue/qqp is not in .*\(it has cola\), and cannot be down"):
        read_split(TASKS["qqp"], "train", tmp_path)
    with pytest.raises(OSError, match="it has no GLUE task"):
        read_split(TASKS["qqp"], "train", tmp_path / "nowhere")


@pytest.mark.data
@pytest.mark.parametrize("name", SIZES)
def test_reads_the_real_task(data_dir, name):
    task = TASKS[name]
    began = time.perf_counter()
    split = read_split(task, "train[:50]", data_dir)
    assert time.perf_counter() - began < 20
    assert [len(column) for column in split.texts] == [50] * len(task.columns)
    assert all(text.strip() for column in split.texts for text in column)
    assert len(np.unique(split.labels)) >= 2
    assert len(read_split(task, "validation", data_dir).labels) > 200
    with pytest.raises(ValueError, match="hidden"):
        read_split(task, "test", data_dir)
    with pytest.raises(ValueError, match=r"Unknown split 'dev'.*train"):
        read_split(task, "dev", data_dir)
    with pytest.raises(ValueError, match=f"glue/{name}"):
        read_split(task, "train[:0]", data_dir)
