"""Text for language models: files to documents, documents to rows of tokens.

A row holds several documents as segments. Position `p` of a segment has token `p` as its input and
token `p + 1` as its label, so a document of n tokens takes n - 1 positions and every token but its
first is a label. Its weight says whether the loss counts that label.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from tokenizers import Tokenizer

from spt_jax.models.common import check_token_ids
from spt_jax.models.tokenizer import begun_once
from spt_jax.training.data import Examples, check_texts, decode_text
from spt_jax.training.records import check_messages, decode_file, json_array, json_values

_HEADING = re.compile(r" = (?!= ).*[^ =] = ?")  # and not " = = Section = = "
#: What a record may hold for the chat template beside its messages.
_FOR_TEMPLATES: dict[str, type] = {"tools": list, "documents": list, "chat_template_kwargs": dict}
_ENCODED_AT_ONCE = 512  # documents; an encoding is many times larger than its ids


@dataclass(frozen=True, eq=False)
class Document:
    """A text in tokens.

    Attributes:
        ids: token ids, special tokens included.
        predicted: which of them the loss counts as targets; the first never is one.
    """

    ids: Int[np.ndarray, " n"] = field(repr=False)
    predicted: Bool[np.ndarray, " n"] = field(repr=False)

    def __len__(self) -> int:
        return len(self.ids)


def read_text(path: str | os.PathLike[str]) -> list[str]:
    """Documents of a text file in UTF-8.

    WikiText's level-1 headings (lines ` = Title = `) each begin a document. A file without any is
    one document.

    Raises:
        ValueError: the file is blank, not UTF-8, or holds JSON records.
    """
    text = decode_file(path)
    if _holds_records(text):
        raise ValueError(
            f"{path} holds JSON records, not text: read_jsonl reads them, and a command does where "
            "the name ends in .jsonl or .json"
        )
    documents = _split_articles(text)
    if not documents:
        raise ValueError(f"{path} is empty: there is no text in it")
    return documents


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Records of a file of JSON lines, blank ones skipped, or of one JSON array of objects.

    Returns:
        Objects with either a string `text`, or a list `messages` of objects with string `role`
        and `content`, at least one of them by the role "assistant"; a message with `tool_calls` may
        lack content. Beside messages there may be lists `tools` and `documents`, and an object
        `chat_template_kwargs`, for the chat template. A field that is null is left out.

    Raises:
        ValueError: the file is blank or not UTF-8, or a record is anything else.
    """
    records = [checked_record(value, where) for value, where in json_values(path)]
    if not records:
        raise ValueError(f"{path} is empty: there is no record in it")
    return records


def read_tfds_text(
    name: str,
    split: str,
    data_dir: str | os.PathLike[str] | None = None,
    feature: str = "text",
) -> list[str]:
    """Documents of a TFDS data set that is prepared on disk.

    Each row is a document; but where rows are the lines of articles, as in WikiText, they are
    joined and split at the headings as in `read_text`.

    Args:
        name: data set and configuration, such as `wikitext/wikitext_2_raw_v1`; its newest version
            is read unless one is given.
        split: TFDS split, slices such as `train[:100]` included.
        data_dir: TFDS data directory; None for TFDS's own.
        feature: the feature that holds the text.

    Raises:
        ValueError: the data set has no such split or feature, or no text in it.
        OSError: the data set is not there, or not in a random-access format.
    """
    # slow to import
    import tensorflow_datasets as tfds

    root = Path(data_dir if data_dir is not None else tfds.core.constants.DATA_DIR).expanduser()
    folders = [root / name, *sorted((root / name).glob("[0-9]*"), key=_version)]
    folders = [folder for folder in folders if (folder / "dataset_info.json").exists()]
    if not folders:
        present = sorted(
            {str(p.parent.relative_to(root)) for p in root.glob("**/dataset_info.json")}
        )
        raise OSError(
            f"{name} is not in the TFDS data directory {root} (it has "
            f"{', '.join(present) or 'no data set'}); prepare it there with tfds.builder(NAME, "
            'data_dir=..., file_format="array_record").download_and_prepare(), where NAME of a '
            "Hugging Face data set begins with huggingface:"
        )
    described = f"{name} {split}"
    builder = tfds.builder_from_directory(folders[-1])
    try:
        rows = builder.as_data_source(split=split)
    except NotImplementedError as error:
        raise OSError(
            f"{folders[-1]} is in a format without random access; convert it with tfds "
            "convert_format --out_file_format=array_record"
        ) from error
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(
            f"cannot read {described}: {error}; splits are {', '.join(builder.info.splits)}"
        ) from error
    if feature not in builder.info.features:
        raise ValueError(
            f"{described}: no feature {feature!r}; it has {', '.join(builder.info.features)}"
        )
    try:
        examples = rows.__getitems__(range(len(rows))) if len(rows) else []
    except (RuntimeError, IndexError) as error:
        raise OSError(
            f"cannot read {described}: {error}; remove {folders[-1]} and prepare it again"
        ) from error
    texts = [
        decode_text(example[feature], f"{described}: {feature} of example {index}")
        for index, example in enumerate(examples)
    ]
    if any(map(_HEADING.match, texts)):
        documents = _split_articles("\n".join(text.removesuffix("\n") for text in texts))
    else:
        documents = [text for text in texts if text.strip()]
    if not documents:
        raise ValueError(f"{described} is empty: there is no text in it")
    return documents


def cut_texts(texts: Sequence[str], share: float) -> tuple[list[str], list[str]]:
    r"""The first `share` of the characters, up to the end of a line, and the rest.

    Args:
        texts: documents, of which one may be cut in two.
        share: in [0, 1].

    Example:
        >>> cut_texts(["one\ntwo\n", "three\nfour\n"], 0.25)
        (['one\n'], ['two\n', 'three\nfour\n'])
    """
    wanted, seen = share * sum(map(len, texts)), 0
    head: list[str] = []
    tail: list[str] = []
    for text in texts:
        inside = max(0, round(wanted) - seen)
        end = len(text) if inside >= len(text) else (text.rfind("\n", 0, inside + 1) + 1 or inside)
        seen += len(text)
        for part, texts_of_part in ((text[:end], head), (text[end:], tail)):
            if part.strip():
                texts_of_part.append(part)
    return head, tail


def encode_documents(
    texts: Iterable[str], tokenizer: Tokenizer, *, name: str, eos_id: int | None = None
) -> list[Document]:
    """Tokenize documents whole; every token is predicted.

    Args:
        texts: one a document.
        tokenizer: left as it is; its own truncation and padding are not used. The special tokens
            that it adds by itself are kept, but for a start that the text has already.
        name: what messages call the texts.
        eos_id: token to end each document with, unless the tokenizer has put it there.

    Raises:
        ValueError: there is no document, or one that is no string or of less than 2 tokens.
    """
    texts = texts if isinstance(texts, str) else list(texts)
    check_texts(texts, name)
    if not texts:
        raise ValueError(f"{name} is empty: there is no document in it")
    tokenizer = unlimited(tokenizer)
    documents = []
    for start in range(0, len(texts), _ENCODED_AT_ONCE):
        for encoding in tokenizer.encode_batch_fast(texts[start : start + _ENCODED_AT_ONCE]):
            ids = begun_once(encoding.ids, encoding.special_tokens_mask)
            if eos_id is not None and ids[-1:] != [eos_id]:
                ids.append(eos_id)
            documents.append(Document(np.array(ids, np.int32), np.ones(len(ids), bool)))
            _check_length(documents[-1], len(documents) - 1, name)
    return documents


def unlimited(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer, or a copy of it if it has truncation or padding, without both."""
    if tokenizer.truncation or tokenizer.padding:
        tokenizer = Tokenizer.from_str(tokenizer.to_str())
        tokenizer.no_truncation()
        tokenizer.no_padding()
    return tokenizer


def pack(
    documents: Sequence[Document],
    length: int,
    *,
    pad_id: int,
    name: str,
    vocab_size: int | None = None,
) -> Examples:
    """Rows of `length` positions for training, each of them filled with several documents.

    A document of more than `length + 1` tokens is cut into pieces that share one token: the last
    label of a piece is the first input of the next. So every token but a document's first is a
    label exactly once. Pieces in which nothing is predicted are left out.

    Args:
        documents: at least 2 tokens each.
        length: positions of a row.
        pad_id: token that fills rows up.
        name: what messages call the documents.
        vocab_size: token ids must be below it.

    Returns:
        Columns input_ids, label, attention_mask, weight (1 where the label is predicted, else 0)
        and segment_ids (1, 2, ... in a row, 0 for padding), `[rows, length]`. The same documents
        give the same rows. `num_truncated` counts the documents that were cut: of a conversation,
        later pieces lack the question.

    Raises:
        ValueError: no document, one of less than 2 tokens, `length` below 2, ids outside the
            vocabulary, or nothing is predicted.
    """
    return strided_windows(
        documents, length, length, pad_id=pad_id, name=name, vocab_size=vocab_size
    )


def strided_windows(
    documents: Sequence[Document],
    length: int,
    stride: int,
    *,
    pad_id: int,
    name: str,
    vocab_size: int | None = None,
) -> Examples:
    """Rows of `length` positions for evaluation with context.

    Each document is cut into windows of `length` positions that begin `stride` apart. A window
    scores only what none before it did, so every token but a document's first is counted once,
    with at least `length - stride` tokens before it in the window if the document has them. Short
    windows share a row.

    Args:
        documents: at least 2 tokens each.
        length: positions of a row.
        stride: at most `length`, at which this is `pack`; smaller means more context and more
            work, in proportion `length / stride`.
        pad_id: token that fills rows up.
        name: what messages call the documents.
        vocab_size: token ids must be below it.

    Returns:
        Columns as those of `pack`.

    Raises:
        ValueError: as `pack`, or a stride that is not in 1..length.
    """
    if length < 2:
        raise ValueError(f"{name}: length must be at least 2 tokens, got {length}")
    if not 1 <= stride <= length:
        raise ValueError(
            f"{name}: stride {stride} is not in 1..{length}; above length {length} it would leave "
            "tokens out"
        )
    ids, predicted, lengths = _joined(documents, name, vocab_size)

    # of each window: where it starts in ids, its positions, and the first that it scores
    positions = lengths - 1
    counts = 1 + np.maximum(0, -(-(positions - length) // stride))
    nth = _ranges(counts)
    starts = np.repeat(np.cumsum(lengths) - lengths, counts) + nth * stride
    sizes = np.minimum(length, np.repeat(positions, counts) - nth * stride)
    scored = np.where(nth > 0, length - stride, 0)

    targets = np.concatenate([[0], np.cumsum(predicted)])
    kept = targets[starts + sizes + 1] > targets[starts + scored + 1]
    if not kept.any():
        raise ValueError(f"{name}: no token is predicted, so there is nothing to learn from")
    starts, sizes, scored = starts[kept], sizes[kept], scored[kept]
    num_cut = int(np.count_nonzero(positions > length))

    rows, columns, segments, num_rows = _best_fit(sizes, length)
    within = _ranges(sizes)
    source = np.repeat(starts, sizes) + within
    target = np.repeat(rows * length + columns, sizes) + within

    def filled(value: int, dtype: type, values: np.ndarray) -> np.ndarray:
        out: np.ndarray = np.full(num_rows * length, value, dtype)
        out[target] = values
        return out.reshape(num_rows, length)

    counted = predicted[source + 1] & (within >= np.repeat(scored, sizes))
    segment_ids = filled(0, np.int32, np.repeat(segments, sizes))
    return Examples(
        {
            "input_ids": filled(pad_id, np.int32, ids[source]),
            "label": filled(pad_id, np.int32, ids[source + 1]),
            "attention_mask": (segment_ids > 0).astype(np.int32),
            "segment_ids": segment_ids,
            "weight": filled(0, np.float32, counted),
        },
        name,
        num_cut,
    )


def _holds_records(text: str) -> bool:
    """Whether a text is an object or an array of them in JSON, or JSON lines."""
    if array := json_array(text):
        return all(isinstance(record, dict) for record in array)
    start = text.lstrip()
    for part in (start.partition("\n")[0], start) if start[:1] == "{" else ():
        with contextlib.suppress(json.JSONDecodeError, RecursionError):
            json.loads(part)
            return True
    return False


def _split_articles(text: str) -> list[str]:
    """The parts that level-1 headings begin; a heading stands between blank lines."""
    lines = text.split("\n")
    blank = [True, *(not line.strip() for line in lines), True]
    starts = [
        index
        for index, line in enumerate(lines)
        if blank[index] and blank[index + 2] and _HEADING.fullmatch(line)
    ]
    parts = itertools.pairwise([0, *starts, len(lines)])
    documents = ["\n".join(lines[start:end]) for start, end in parts]
    return [document for document in documents if document.strip()]


def checked_record(record: Any, where: str) -> dict[str, Any]:
    """A record as `read_jsonl` returns it.

    Args:
        record: what JSON has.
        where: what messages call its place.

    Raises:
        ValueError: it has neither a text nor a conversation, or both.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{where}: an object is needed, got {json.dumps(record)[:40]}")
    record = {name: value for name, value in record.items() if value is not None}
    if ("text" in record) == ("messages" in record):
        which = "both" if "text" in record else f"neither, but {', '.join(record) or 'nothing'}"
        raise ValueError(f'{where}: give either "text" or "messages"; it has {which}')
    if "text" in record:
        if not isinstance(record["text"], str) or not record["text"].strip():
            raise ValueError(f'{where}: "text" must be a string that is not blank')
        return record
    check_messages(record["messages"], where)
    for name, kind in _FOR_TEMPLATES.items():
        if not isinstance(record.get(name, kind()), kind):
            word = "a list" if kind is list else "an object"
            raise ValueError(f'{where}: "{name}" must be {word}')
    return record


def _version(folder: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", folder.name))


def _check_length(document: Document, index: int, name: str) -> None:
    if len(document) < 2:
        raise ValueError(
            f"{name}: document {index} has {len(document)} tokens; at least 2 are needed, as the "
            "first is not predicted. Remove it"
        )


def _joined(
    documents: Sequence[Document], name: str, vocab_size: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if not documents:
        raise ValueError(f"{name} is empty: there is no document in it")
    for index, document in enumerate(documents):
        _check_length(document, index, name)
    ids = np.concatenate([document.ids for document in documents])
    check_token_ids(ids, vocab_size, name)
    predicted = np.concatenate([document.predicted for document in documents])
    return ids, predicted, np.array([len(document) for document in documents])


def _ranges(sizes: np.ndarray) -> np.ndarray:
    """`0 .. size - 1` of each size, one after the other."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _best_fit(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Best-fit decreasing bin packing.

    Returns:
        Row, column and number in its row (from 1) of each piece, and how many rows there are.
    """
    rows, columns, segments = (np.zeros(len(sizes), np.int64) for _ in range(3))
    members: list[int] = []  # pieces of each row
    with_room: dict[int, list[int]] = {}  # rows by the room that is left in them
    rooms: list[int] = []  # the keys of it, sorted
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        at = bisect.bisect_left(rooms, size)
        if at < len(rooms):
            room = rooms[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        else:
            row, room = len(members), capacity
            members.append(0)
        members[row] += 1
        rows[piece], columns[piece], segments[piece] = row, capacity - room, members[row]
        if left := room - size:
            if left not in with_room:
                bisect.insort(rooms, left)
            with_room.setdefault(left, []).append(row)
    return rows, columns, segments, len(members)
