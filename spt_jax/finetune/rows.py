"""Rows of files: CSV, TSV, JSON lines, JSON arrays, Parquet and text; and of saved data sets."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spt_jax.training import read_text
from spt_jax.training.records import decode_file, json_values

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_JSON = (".jsonl", ".ndjson", ".json")
_SPLITS_FILE = "dataset_dict.json"
_UNLABELLED = -1  # a class that is not known
_MOST_FIELD_CHARACTERS = 2**31 - 1  # csv's own limit is 131,072


@dataclass(frozen=True)
class Row:
    """A row of a file.

    Attributes:
        values: by their columns; a text in a CSV file, else what JSON or Parquet have.
        where: its place, such as "reviews.csv, line 3".
    """

    values: Mapping[str, Any] = field(repr=False)
    where: str


@dataclass(frozen=True)
class Rows:
    """All rows of a file that can be used.

    Attributes:
        rows: in order.
        name: the file, as messages call it.
        left_out: what is wrong with those that are not there.
    """

    rows: Sequence[Row]
    name: str
    left_out: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of any row, in the order in which they are met."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row.values))


class BadRow(ValueError):
    """A row that cannot be used; the message gives file, place and reason."""


def read_rows(path: Path, *, skip_bad: bool = False) -> Rows:
    """Read a file by its ending.

    Args:
        path: .csv or .tsv with names of columns in the first line; .jsonl, .ndjson or .json with
            objects, one a line or in one array; .parquet; a directory of Hugging Face's
            `datasets`, of several splits "train"; anything else is UTF-8 text, whose documents
            become rows with the one column "text", see `read_text`.
        skip_bad: leave bad rows out.

    Raises:
        BadRow: a row is not what the format asks for, and is not to be left out.
        ValueError: the file cannot be read, or has no row that can be used.
        ModuleNotFoundError: a Parquet file needs pyarrow, or a directory `datasets`, which is not
            installed.
        OSError: the file cannot be opened.
    """
    suffix = path.suffix.lower()
    found: Iterator[Row | str]
    if path.is_dir():
        found = _saved(path)
    elif suffix in _SEPARATORS:
        found = _delimited(path, _SEPARATORS[suffix])
    elif suffix in _JSON:
        found = _json(path)
    elif suffix == ".parquet":
        found = _parquet(path)
    else:
        found = (Row({"text": text}, f"{path}, document {n}") for n, text in _documents(path))
    rows: list[Row] = []
    left_out: list[str] = []
    for row in found:
        if isinstance(row, Row):
            rows.append(row)
        elif skip_bad:
            left_out.append(row)
        else:
            raise BadRow(row)
    if not rows:
        reason = f"; the first of {len(left_out)} bad ones: {left_out[0]}" if left_out else ""
        raise ValueError(f"{path} has no row that can be used{reason}")
    return Rows(rows, str(path), left_out)


def read_lines(path: Path) -> Rows:
    """Rows of a text file, one a line that is not blank, with the one column "text".

    Raises:
        ValueError: the file is blank or not UTF-8.
    """
    lines = enumerate(decode_file(path).split("\n"), 1)
    rows = [Row({"text": line}, f"{path}, line {n}") for n, line in lines if line.strip()]
    if not rows:
        raise ValueError(f"{path} is empty: there is no text in it")
    return Rows(rows, str(path))


def usable[Value](
    rows: Rows, convert: Callable[[Row], Value], *, skip_bad: bool
) -> tuple[list[Value], Rows]:
    """What rows hold, and the rows that hold it.

    Args:
        rows: of a file.
        convert: gives what a row holds, or raises a BadRow.
        skip_bad: leave bad rows out.

    Raises:
        BadRow: a row is bad, and is not to be left out.
        ValueError: no row is left.
    """
    values, kept, left_out = [], [], list(rows.left_out)
    for row in rows.rows:
        try:
            values.append(convert(row))
        except BadRow as error:
            if not skip_bad:
                raise
            left_out.append(str(error))
            continue
        kept.append(row)
    if not values:
        raise ValueError(f"{rows.name} has no row that can be used; the first: {left_out[0]}")
    return values, Rows(kept, rows.name, left_out)


def evaluation_split(path: Path) -> Path | None:
    """The split to evaluate on of a data set's directory; None where there is none."""
    if not (path / _SPLITS_FILE).is_file():
        return None
    return next((path / name for name in ("validation", "test") if (path / name).is_dir()), None)


def _saved(path: Path) -> Iterator[Row]:
    """Rows of a directory that `datasets` saved, classes by their names."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{path}: reading a directory of Hugging Face's datasets needs that package; install "
            "it with pip install 'spt-jax[datasets]', or save the rows as Parquet"
        ) from None
    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ValueError(f"{path} is no directory that datasets saved: {reason}") from None
    if isinstance(found, datasets.DatasetDict):
        if "train" not in found:
            raise ValueError(
                f"{path} has no split train, but {', '.join(found)}; give one's directory, as "
                f"{path / next(iter(found))}"
            )
        found = found["train"]
    names = {
        column: feature.names
        for column, feature in ((n, _classes(f)) for n, f in found.features.items())
        if isinstance(feature, datasets.ClassLabel)
    }
    for number, values in enumerate(found, 1):
        present = {
            name: _named(value, names[name]) if name in names else value
            for name, value in values.items()
            if value is not None and not (name in names and value == _UNLABELLED)
        }
        yield Row(present, f"{path}, row {number}")


def _classes(feature: Any) -> Any:
    """A column's feature, or that of what its lists hold."""
    return getattr(feature, "feature", feature)


def _named(value: Any, names: Sequence[str]) -> Any:
    return [names[i] for i in value] if isinstance(value, list) else names[value]


def _documents(path: Path) -> Iterator[tuple[int, str]]:
    return enumerate(read_text(path), 1)


def _delimited(path: Path, separator: str) -> Iterator[Row | str]:
    """Rows, or what is wrong with one."""
    csv.field_size_limit(_MOST_FIELD_CHARACTERS)
    reader = csv.reader(
        io.StringIO(decode_file(path), newline=""), delimiter=separator, strict=True
    )
    names: list[str] | None = None
    begin = 1
    while True:
        begin = reader.line_num + 1
        where = f"{path}, line {begin}"
        try:
            values = next(reader, None)
        except csv.Error as error:
            yield f"{where}: {error}; write quotes inside a quoted field twice"
            return  # what follows may be part of the broken field
        if values is None:
            return
        if not values:
            continue
        if names is None:
            names = [name.strip() for name in values]
            _check_header(path, names)
        elif len(values) != len(names):
            yield (
                f"{where}: {len(values)} fields, but there are {len(names)} columns "
                f"({', '.join(names)}); put fields that hold {separator!r} into double quotes"
            )
        else:
            yield Row(dict(zip(names, values, strict=True)), where)


def _check_header(path: Path, names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not all(names):
        wrong = f"{twice[0]!r} stands there twice" if twice else "one has no name"
        raise ValueError(
            f"{path}, line 1: names of columns are needed, each once, but {wrong}: "
            f"{', '.join(map(repr, names))}"
        )


def _json(path: Path) -> Iterator[Row | str]:
    for value, where in json_values(path):
        if isinstance(value, dict):
            yield Row({name: x for name, x in value.items() if x is not None}, where)
        else:
            yield f"{where}: an object is needed, got {type(value).__name__} {value!r:.40}"


def _parquet(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{path}: reading Parquet needs pyarrow; install it with pip install "
            "'spt-jax[parquet]', or convert the file to JSON lines"
        ) from None
    try:
        table = parquet.read_table(path)
    except ArrowInvalid as error:
        raise ValueError(f"{path} is no Parquet file that can be read: {error}") from None
    for number, values in enumerate(table.to_pylist(), 1):
        present = {name: x for name, x in values.items() if x is not None}
        yield Row(present, f"{path}, row {number}")
