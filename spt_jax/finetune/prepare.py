"""Rows of files to rows of tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from spt_jax.finetune.columns import check_layout, find_columns
from spt_jax.finetune.config import FinetuneConfig, ResolvedConfig
from spt_jax.finetune.conversations import record_of
from spt_jax.finetune.encoding import Encoder, cut_note
from spt_jax.finetune.labels import (
    as_array,
    check_classes,
    classes_of,
    label_of,
    texts_of,
)
from spt_jax.finetune.rows import Row, Rows, evaluation_split, read_rows, usable
from spt_jax.models import DecoderConfig, load_tokenizer
from spt_jax.models.config import ModelConfig
from spt_jax.models.encoder_config import EncoderConfig
from spt_jax.training import Document, Examples, cut_texts, pack, strided_windows, tokenize

#: Rows of documents are no shorter than this, and else as long as the longest document needs.
_LEAST_ROW = 512
_ROW_MULTIPLE = 64

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Content:
    """What was read, of one kind.

    Attributes:
        resolved: the run, columns and all.
        train: texts with labels, or records of a language model.
        evaluation: likewise; empty for none.
        classes: names of the classes; empty where there are none.
        left_out: how many rows cannot be used.
    """

    resolved: ResolvedConfig
    train: Sequence[Any]
    evaluation: Sequence[Any]
    classes: tuple[str, ...]
    left_out: int


@dataclass(frozen=True)
class Data:
    """Rows of tokens.

    Attributes:
        train: rows to train on.
        evaluation: rows to evaluate on; None for none.
        length: tokens of a row at most.
        cut: examples or documents longer than a row, of both.
    """

    train: Examples
    evaluation: Examples | None
    length: int
    cut: int


def read_content(config: FinetuneConfig) -> Content:
    """Read all files, find columns, and check every row.

    Raises:
        BadRow: a row cannot be used; the message gives file, place and reason.
        ValueError: a file cannot be read, or its columns are not plain.
    """
    skip = config.data.skip_bad_rows
    rows = read_rows(config.data.train_file, skip_bad=skip)
    task, data = find_columns(rows, config.data, config.task)
    if data.eval_file is None:
        data = replace(data, eval_file=evaluation_split(data.train_file))
    resolved = config.resolved(task, data)
    other = None if data.eval_file is None else read_rows(data.eval_file, skip_bad=skip)

    def value(row: Row) -> Any:
        if task == "language":
            return record_of(row, data)
        return texts_of(row, data.text_columns), label_of(row, task, data)

    values, rows = usable(rows, value, skip_bad=skip)
    classes: tuple[str, ...] = ()
    if task in ("classification", "multi-label"):
        classes = classes_of([label for _, label in values], data)
    left_out = len(rows.left_out)
    if other is None:
        train, evaluation = _held_out(values, resolved)
    else:
        if task == "language":
            check_layout(other, data)

        def known(row: Row) -> Any:
            found = value(row)
            if classes:
                check_classes(found[1], row, classes)
            return found

        train = values
        evaluation, other = usable(other, known, skip_bad=skip)
        left_out += len(other.left_out)
    _tell(rows, other, train, evaluation, classes)
    return Content(resolved, train, evaluation, classes, left_out)


def _held_out(values: Sequence[Any], resolved: ResolvedConfig) -> tuple[list[Any], list[Any]]:
    """Values to train on and random ones to evaluate on; of few texts the end of the last."""
    share = resolved.config.data.eval_share
    if not share:
        return list(values), []
    if resolved.config.data.layout == "text" and len(values) * share < 1:
        train, evaluation = cut_texts(values, 1 - share)
    else:
        number = max(1, round(share * len(values)))
        order = np.random.default_rng(resolved.train.seed).permutation(len(values))
        chosen = set(order[:number].tolist())
        train = [value for i, value in enumerate(values) if i not in chosen]
        evaluation = [value for i, value in enumerate(values) if i in chosen]
    if not train or not evaluation:
        raise ValueError(
            f"{resolved.config.data.train_file} has too little to hold {share:g} of it out for "
            "evaluation; give eval_file (--eval-file), or eval_share 0 for no evaluation"
        )
    return train, evaluation


def _tell(
    rows: Rows,
    other: Rows | None,
    train: Sequence[Any],
    evaluation: Sequence[Any],
    classes: Sequence[str],
) -> None:
    for name, left_out in ((x.name, x.left_out) for x in (rows, other) if x is not None):
        if left_out:
            _log.warning(
                "%s: %d rows are left out, the first: %s", name, len(left_out), left_out[0]
            )
    held_out = "" if other is not None or not evaluation else ", held out"
    kinds = f"; classes {', '.join(classes)}" if classes else ""
    _log.info("%d to train on, %d to evaluate on%s%s", len(train), len(evaluation), held_out, kinds)


def encode(content: Content, source: str, config: ModelConfig) -> Data:
    """Rows of tokens, told how many are cut.

    Args:
        content: what was read.
        source: directory or id of the model.
        config: of the model.

    Raises:
        ValueError: the length does not go with the model, or a text cannot be encoded.
    """
    length = content.resolved.row_length(config.max_length)
    if content.resolved.task == "language":
        return _documents(content, source, config, length)
    tokenizer = load_tokenizer(source)
    name = content.resolved.config.data.train_file.name

    def examples(values: Sequence[Any], name: str) -> Examples:
        found = encode_texts(
            [texts for texts, _ in values],
            as_array([label for _, label in values], content.classes),
            tokenizer,
            config,
            name=name,
            max_length=length,
        )
        if found.num_truncated:
            _log.info(
                "%s: %d of %d texts are longer than %d tokens and cut (max_length)",
                name,
                found.num_truncated,
                len(found),
                length,
            )
        return found

    train = examples(content.train, f"{name} (training)")
    evaluation = None
    if content.evaluation:
        evaluation = examples(content.evaluation, f"{name} (evaluation)")
    cut = train.num_truncated + (evaluation.num_truncated if evaluation else 0)
    return Data(train, evaluation, length, cut)


def encode_texts(
    texts: Sequence[tuple[str, ...]],
    labels: np.ndarray,
    tokenizer: Tokenizer,
    config: ModelConfig,
    *,
    name: str,
    max_length: int,
) -> Examples:
    """Texts or pairs of texts as a model takes them.

    Args:
        texts: one or two an example.
        labels: one an example, or one of each class.
        tokenizer: of the model.
        config: of the model.
        name: what messages call them.
        max_length: longer ones are cut.
    """
    examples = tokenize(
        [list(column) for column in zip(*texts, strict=True)],
        labels,
        tokenizer,
        name=name,
        max_length=max_length,
        max_positions=config.max_length,
        pad_id=config.padding_id,
        vocab_size=config.vocab_size,
    )
    return without_unread_types(examples, config)


def without_unread_types(examples: Examples, config: ModelConfig) -> Examples:
    """Examples without token types, unless the model tells several apart."""
    if isinstance(config, EncoderConfig) and config.num_token_types > 1:
        return examples
    columns = {n: column for n, column in examples.columns.items() if n != "token_type_ids"}
    return replace(examples, columns=columns)


def _documents(content: Content, source: str, config: ModelConfig, length: int) -> Data:
    if not isinstance(config, DecoderConfig):
        raise ValueError(
            f"{source} is a {config.model_type} encoder, not a causal language model, which texts "
            "and conversations need; give another model, or label_columns for classes or scores"
        )
    encoder = Encoder(source, config, plain_chat=content.resolved.config.plain_chat)
    train = encoder(content.train, "training text")
    evaluation = encoder(content.evaluation, "evaluation text") if content.evaluation else []
    length = _row_length([*train, *evaluation], length)
    sizes: dict[str, Any] = {"pad_id": config.padding_id, "vocab_size": config.vocab_size}
    train_data = pack(train, length, name="training text", **sizes)
    eval_data = None
    if evaluation:
        stride = max(1, length // 2)
        eval_data = strided_windows(evaluation, length, stride, name="evaluation text", **sizes)
    for data, documents in ((train_data, train), (eval_data, evaluation)):
        if data is not None and (told := cut_note(data, documents)):
            _log.info("%s", told)
    _log.info(
        "%s tokens to learn in %d rows of %d",
        f"{int(train_data.columns['weight'].sum()):,}",
        len(train_data),
        length,
    )
    cut = train_data.num_truncated + (eval_data.num_truncated if eval_data else 0)
    return Data(train_data, eval_data, length, cut)


def _row_length(documents: Sequence[Document], most: int) -> int:
    """Tokens of a row: no more than the longest document needs, if that is less than `most`."""
    longest = max(map(len, documents))
    return min(most, max(_LEAST_ROW, -(-longest // _ROW_MULTIPLE) * _ROW_MULTIPLE))
