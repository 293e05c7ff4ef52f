"""Every format, and every row that cannot be used."""

from __future__ import annotations

import builtins
import json

import pytest

from spt_jax.finetune import BadRow, FinetuneConfig
from spt_jax.finetune.columns import find_columns
from spt_jax.finetune.config import DataConfig
from spt_jax.finetune.conversations import question_of, record_of
from spt_jax.finetune.labels import as_array, classes_of, label_of, texts_of
from spt_jax.finetune.prepare import read_content
from spt_jax.finetune.rows import Row, Rows, read_lines, read_rows

VALUES = [{"text": 'a "b", c', "label": "x"}, {"text": "two\nlines", "label": "y"}]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def files(tmp_path):
    csv = 'text,label\n"a ""b"", c",x\n\n"two\nlines",y\n'
    lines = "\n".join(map(json.dumps, VALUES))
    found = [
        write(tmp_path / "a.csv", "﻿" + csv),
        write(tmp_path / "a.tsv", csv.replace("text,label", "text\tlabel").replace(",x", "\tx")
              .replace(",y", "\ty")),
        write(tmp_path / "a.jsonl", lines + "\n"),
        write(tmp_path / "a.json", json.dumps(VALUES, indent=1)),
    ]  # fmt: skip
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(VALUES), tmp_path / "a.parquet")
    return [*found, tmp_path / "a.parquet"]


def test_all_formats_hold_the_same_rows(files):
    for file in files:
        assert [dict(row.values) for row in read_rows(file).rows] == VALUES, file
    assert read_rows(files[0]).rows[1].where.endswith("a.csv, line 4")
    assert read_rows(files[2]).rows[1].where.endswith("a.jsonl, line 2")
    assert read_rows(files[3]).rows[1].where.endswith("a.json, record 2")
    assert read_rows(files[4]).rows[1].where.endswith("a.parquet, row 2")


def test_text_is_documents_or_lines(tmp_path):
    file = write(tmp_path / "a.txt", "one\n\ntwo\n")
    assert [row.values["text"] for row in read_rows(file).rows] == ["one\n\ntwo\n"]
    assert [row.values["text"] for row in read_lines(file).rows] == ["one", "two"]
    with pytest.raises(ValueError, match=r"blank\.txt is empty"):
        read_lines(write(tmp_path / "blank.txt", "\n"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "text,label\nx\n", r"a\.csv, line 2: 1 fields, but there are 2 columns"),
        ("a.csv", 'text,label\n"x"y,z\n', r"a\.csv, line 2: .*write quotes"),
        ("a.csv", "text,text\na,b\n", r"a\.csv, line 1: .*'text' stands there twice"),
        ("a.csv", "text,\na,b\n", r"a\.csv, line 1: .*one has no name"),
        ("a.csv", "text,label\n", r"a\.csv has no row"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2 is not JSON"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', r"a\.jsonl, line 2: an object is needed, got list"),
        ("a.json", '[{"text": "a"}, 3]', r"a\.json, record 2: an object is needed, got int"),
        ("a.parquet", "no", r"a\.parquet is no Parquet file"),
    ],
)
def test_a_bad_file_or_row_is_named(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        read_rows(write(tmp_path / name, text))


def test_bad_rows_are_left_out_and_counted_on_demand(tmp_path):
    file = write(tmp_path / "a.csv", "text,label\nx\ny,z\n")
    rows = read_rows(file, skip_bad=True)
    assert len(rows) == len(rows.left_out) == 1
    lines = "text,label\n" + "good,a\nbad,b\n" * 5 + ",a\n"
    data = DataConfig(train_file=write(tmp_path / "b.csv", lines))
    with pytest.raises(BadRow, match=r"b\.csv, line 12: column 'text' is blank"):
        read_content(FinetuneConfig(data=data))
    data = DataConfig(train_file=data.train_file, skip_bad_rows=True)
    content = read_content(FinetuneConfig(data=data))
    assert (len(content.train), len(content.evaluation), content.left_out) == (9, 1, 1)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    real = builtins.__import__

    def fail(name, *arguments, **options):
        if name.startswith("pyarrow"):
            raise ModuleNotFoundError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(ModuleNotFoundError, match=r"spt-jax\[parquet\]"):
        read_rows(write(tmp_path / "a.parquet", ""))


def rows_of(*values):
    return Rows([Row(value, f"f, line {i}") for i, value in enumerate(values, 1)], "f")


def options(**given):
    return DataConfig(train_file="f", **given)


@pytest.mark.parametrize(
    ("values", "task", "texts"),
    [
        ({"text": "a", "label": "x"}, "classification", ("text",)),
        ({"body": "a", "label": "3"}, "classification", ("body",)),
        ({"premise": "a", "hypothesis": "b", "label": 1}, "classification",
         ("premise", "hypothesis")),
        ({"sentence": "a", "score": "0.5"}, "regression", ("sentence",)),
        ({"text": "a", "labels": ["x"]}, "multi-label", ("text",)),
        ({"text": "a"}, "language", ("text",)),
        ({"messages": []}, "language", ()),
        ({"conversations": [], "id": 3}, "language", ()),
        ({"instruction": "a", "input": "", "output": "b"}, "language", ()),
        ({"prompt": "a", "completion": "b"}, "language", ()),
    ],
)  # fmt: skip
def test_columns_are_guessed(values, task, texts):
    found, data = find_columns(rows_of(values), options(), None)
    assert (found, data.text_columns) == (task, texts)


def test_what_is_not_plain_is_asked_for():
    with pytest.raises(ValueError, match="several columns may be the label"):
        find_columns(rows_of({"text": "a", "label": "b", "score": 1}), options(), None)
    with pytest.raises(ValueError, match="no column may be the text"):
        find_columns(rows_of({"a": "a", "b": "b", "label": "b"}), options(), None)
    given = options(label_columns=("topic",))
    with pytest.raises(ValueError, match="no column 'topic'; its columns are 'text', 'label'"):
        find_columns(rows_of({"text": "a", "label": "b"}), given, None)
    many = [{"text": "a", "label": i} for i in range(60)]
    with pytest.raises(ValueError, match="60 different whole numbers"):
        find_columns(rows_of(*many), options(), None)


def test_labels_become_numbers():
    data = options(label_columns=("label",))
    rows = rows_of({"label": 10}, {"label": "9"}, {"label": 10.0}).rows
    labels = [label_of(row, "classification", data) for row in rows]
    assert classes_of(labels, data) == ("9", "10")
    assert as_array(labels, ("9", "10")).tolist() == [1, 0, 1]
    rows = rows_of({"label": "b, a"}, {"label": ""}, {"label": ["b"]}).rows
    labels = [label_of(row, "multi-label", data) for row in rows]
    assert classes_of(labels, data) == ("a", "b")
    assert as_array(labels, ("a", "b")).tolist() == [[1, 1], [0, 0], [0, 1]]
    data = options(label_columns=("rude", "loud"))
    (row,) = rows_of({"rude": "0", "loud": 1}).rows
    assert label_of(row, "multi-label", data) == ("loud",)
    with pytest.raises(ValueError, match="all rows are of the class 'x'"):
        classes_of(["x", "x"], options(label_columns=("label",)))


@pytest.mark.parametrize(
    ("task", "value", "message"),
    [
        ("classification", None, "line 1: column 'label' is missing"),
        ("classification", 1.5, "is 1.5, not a class"),
        ("regression", "high", "is 'high', not a number"),
        ("regression", "nan", "is 'nan', not a number"),
        ("multi-label", 3, "is 3; several classes are a list"),
    ],
)
def test_a_bad_label_is_named(task, value, message):
    (row,) = rows_of({"label": value}).rows
    with pytest.raises(BadRow, match=message):
        label_of(row, task, options(label_columns=("label",)))


def test_a_missing_text_is_named():
    with pytest.raises(BadRow, match="line 1: column 'text' is missing"):
        texts_of(*rows_of({}).rows, ("text",))


QUESTION = {"role": "user", "content": "Q"}
ANSWER = {"role": "assistant", "content": "A"}
LAYOUTS = {
    "messages": {"messages": [QUESTION, ANSWER]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    "alpaca": {"instruction": "Q", "input": "", "output": "A"},
    "prompt-completion": {"prompt": "Q", "completion": "A"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_layouts_are_conversations(layout):
    rows = rows_of(LAYOUTS[layout])
    _, data = find_columns(rows, options(), None)
    assert data.layout == layout
    assert record_of(rows.rows[0], data) == {"messages": [QUESTION, ANSWER]}
    assert question_of(rows.rows[0], data) == {"messages": [QUESTION]}


@pytest.mark.parametrize(
    ("layout", "values", "message"),
    [
        ("messages", {"messages": [QUESTION]}, "no message by the assistant"),
        ("messages", {"messages": [{"role": "usr", "content": "Q"}, ANSWER]}, "role 'usr'"),
        ("messages", {"messages": "[1"}, "holds no JSON"),
        ("messages", {}, "give either"),
        ("sharegpt", {"conversations": []}, "must be a list that is not empty"),
        ("sharegpt", {"conversations": [{"from": "x", "value": "Q"}]}, "turn 0 must be"),
        ("alpaca", {"instruction": "Q", "output": " "}, "column 'output' is"),
        ("alpaca", {"instruction": "Q", "input": 3, "output": "A"}, "column 'input' is 3"),
        ("prompt-completion", {"completion": "A"}, "column 'prompt' is missing"),
        ("text", {"text": ""}, "column 'text' is blank"),
    ],
)
def test_a_bad_conversation_is_named(layout, values, message):
    (row,) = rows_of(values).rows
    with pytest.raises(BadRow, match=f"f, line 1.*{message}|{message}.*f, line 1"):
        record_of(row, options(layout=layout, text_columns=("text",)))


def save_splits(path, *splits):
    import datasets

    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["bad", "good"]),
            "tags": datasets.List(datasets.ClassLabel(names=["a", "b"])),
        }
    )
    rows = [{"text": f"t{i}", "label": i % 2 if i else -1, "tags": [1, 0]} for i in range(4)]
    saved = {name: datasets.Dataset.from_list(rows, features=features) for name in splits}
    datasets.DatasetDict(saved).save_to_disk(path)


def test_a_directory_of_datasets_gives_names_of_classes(tmp_path):
    save_splits(tmp_path / "a", "train", "test")
    rows = read_rows(tmp_path / "a")
    assert [row.values.get("label") for row in rows.rows] == [None, "good", "bad", "good"]
    assert rows.rows[0].values["tags"] == ["b", "a"]
    assert rows.rows[1].where.endswith("a, row 2")
    assert len(read_rows(tmp_path / "a" / "test")) == 4
    data = DataConfig(train_file=tmp_path / "a", label_columns=("label",), skip_bad_rows=True)
    content = read_content(FinetuneConfig(data=data))
    assert (len(content.train), len(content.evaluation), content.left_out) == (3, 3, 2)
    assert content.resolved.config.data.eval_file == tmp_path / "a" / "test"


def test_another_directory_is_named(tmp_path):
    save_splits(tmp_path / "a", "test")
    with pytest.raises(ValueError, match=r"a has no split train, but test; give .*a/test"):
        read_rows(tmp_path / "a")
    with pytest.raises(ValueError, match="is no directory that datasets saved"):
        read_rows(tmp_path)
