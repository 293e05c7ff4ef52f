"""Text to arrays in memory, arrays to batches.

Training batches come from a grain pipeline whose position is a small JSON object: a run that is
stopped goes on with the very batch that it would have had next.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import grain
import jax
import numpy as np
from jaxtyping import Num
from tokenizers import Tokenizer

from spt_jax.models.common import check_token_ids

_PAD_TOKENS = ("[PAD]", "<pad>")
#: Batches whose examples are sorted by length together.
GROUPED_BATCHES = 16
#: Sequence lengths at most that batches by length are cut to; a training step is compiled for each.
MOST_LENGTHS = 4
_LENGTH_UNIT = 16
#: Examples after which an endless order ends. One of grain's own has as many as an index can count,
#: which it divides by the batch size in floating point: in batches of 1 that is one too many.
_ENDLESS = 2**52
_ALL = slice(None)


@dataclass(frozen=True)
class Examples:
    """A split in memory: arrays with one row an example, all of one sequence length.

    Attributes:
        columns: at least input_ids and attention_mask `[n, S]` and label `[n]` or `[n, S]`;
            optionally token_type_ids and segment_ids `[n, S]`, and weight, shaped as label. Where
            an example has several labels, label is `[n, C]`, 0 or 1, and weight `[n]`.
        name: what messages call it.
        num_truncated: examples that were cut to fit the maximal length.

    Raises:
        ValueError: a column is missing, is no array of numbers, or has the wrong shape, or there is
            no example.
    """

    columns: Mapping[str, np.ndarray] = field(repr=False)
    name: str
    num_truncated: int = 0

    def __post_init__(self) -> None:
        for column in ("input_ids", "attention_mask", "label"):
            if column not in self.columns:
                raise ValueError(
                    f"{self.name}: no column {column!r}; it has {', '.join(self.columns)}"
                )
        for column, array in self.columns.items():
            if not isinstance(array, np.ndarray | jax.Array):
                raise ValueError(
                    f"{self.name}: column {column!r} is a {type(array).__name__}; give a NumPy "
                    "array, of rows padded to one length"
                )
            if array.dtype.kind not in "biuf":
                raise ValueError(
                    f"{self.name}: column {column!r} holds {array.dtype}, not numbers; labels are "
                    "classes numbered from 0, or scores"
                )
        rows = {column: len(array) for column, array in self.columns.items()}
        if len(set(rows.values())) > 1:
            raise ValueError(f"{self.name}: columns differ in their number of rows: {rows}")
        if not len(self):
            raise ValueError(f"{self.name} is empty: there is no example in it")
        self._check_shapes()

    def _check_shapes(self) -> None:
        ids, label = self.columns["input_ids"], self.columns["label"]
        if ids.ndim != 2 or ids.dtype.kind not in "iu":
            raise ValueError(
                f"{self.name}: input_ids must be integers [examples, sequence], got {ids.dtype} "
                f"{ids.shape}"
            )
        if not self._is_multi_label and label.shape not in (ids.shape[:1], ids.shape):
            raise ValueError(
                f"{self.name}: label has shape {label.shape}; give one an example, {ids.shape[:1]},"
                f" or one a token, {ids.shape}; several labels or scores an example are not "
                f"supported but for classes beside a weight of shape {ids.shape[:1]}"
            )
        shapes = {"weight": label.shape[:1] if self._is_multi_label else label.shape}
        shapes |= dict.fromkeys(("attention_mask", "token_type_ids", "segment_ids"), ids.shape)
        for column, shape in shapes.items():
            if column in self.columns and (found := self.columns[column].shape) != shape:
                raise ValueError(f"{self.name}: {column} has shape {found}, expected {shape}")

    @property
    def _is_multi_label(self) -> bool:
        label, weight = self.columns["label"], self.columns.get("weight")
        return label.ndim == 2 and weight is not None and weight.ndim == 1

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    @property
    def length(self) -> int:
        """Sequence length S, padding included."""
        return self.columns["input_ids"].shape[1]

    def take(self, indices: np.ndarray | slice) -> Examples:
        """These rows, in this order."""
        columns = {name: array[indices] for name, array in self.columns.items()}
        return replace(self, columns=columns)


def check_labels(
    labels: Sequence[float] | np.ndarray,
    *,
    name: str,
    num_labels: int | None = None,
    score_range: tuple[float, float] = (-np.inf, np.inf),
) -> np.ndarray:
    """Labels as int32 classes or float32 scores.

    Args:
        labels: one an example.
        name: what messages call the split.
        num_labels: number of classes; None for scores.
        score_range: lowest and highest score allowed.

    Raises:
        ValueError: a label is hidden (-1 throughout), out of range or not a number, or an example
            has several.
    """
    _check_numbers(labels, name)
    array = np.asarray(labels)
    if not array.size:
        raise ValueError(f"{name} is empty: there is no label in it")
    if (array == -1).all() and (num_labels is not None or score_range[0] > -1):
        raise ValueError(
            f"{name}: all labels are -1, that is, hidden; train and evaluate on a labelled split"
        )
    low, high = score_range if num_labels is None else (0, num_labels - 1)
    wrong = ~((array >= low) & (array <= high) & np.isfinite(array))
    if num_labels is not None:
        wrong |= array != np.round(array)
    if wrong.any():
        index = int(wrong.argmax())
        kind = "score" if num_labels is None else "class"
        raise ValueError(
            f"{name}: label {array[index]} of example {index} is no {kind} in {low}..{high}"
        )
    return array.astype(np.float32 if num_labels is None else np.int32)


def _check_numbers(labels: Sequence[Any] | np.ndarray, name: str) -> None:
    if isinstance(labels, np.ndarray) and labels.ndim == 1 and labels.dtype.kind in "biuf":
        return
    for index, label in enumerate(labels):
        if np.ndim(label):
            raise ValueError(
                f"{name}: example {index} has the labels {label!r}; several labels or scores an "
                "example are not supported"
            )
        if not isinstance(label, numbers.Real | np.bool_):
            raise ValueError(
                f"{name}: label {label!r} of example {index} is no number; number the classes from "
                "0"
            )


def check_texts(texts: Sequence[Any], name: str) -> None:
    """Raise a ValueError unless these are strings.

    Args:
        texts: a column of a split, or documents.
        name: what the message calls them.
    """
    if isinstance(texts, str):
        raise ValueError(f"{name}: one string was given where a list of texts is needed")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(
                f"{name}: text {index} is {text!r}, not a string; fill it in or remove it"
            )


def decode_text(text: bytes | None, where: str) -> str:
    """The text of a data set's feature.

    Args:
        text: its bytes; None where a damaged file has none.
        where: what messages call it.

    Raises:
        ValueError: there is no text, or it is not UTF-8.
    """
    if text is None:
        raise ValueError(f"{where} has no content: a file is damaged; prepare the data set again")
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is not UTF-8 at byte {error.start}; convert it and prepare the data set again"
        ) from None


def tokenize(
    texts: Sequence[Sequence[str]],
    labels: Sequence[float] | np.ndarray,
    tokenizer: Tokenizer,
    *,
    name: str,
    max_length: int,
    max_positions: int | None = None,
    multiple_of: int = 16,
    pad_to_max_length: bool = False,
    pad_id: int | None = None,
    vocab_size: int | None = None,
) -> Examples:
    """Tokenize a split in one call.

    Args:
        texts: one sequence of strings, or two for sentence pairs.
        labels: one an example, see `check_labels`; or 0 or 1 for each of C classes, `[n, C]`.
        tokenizer: left as it is; its own truncation and padding are not used.
        name: what messages call the split.
        max_length: longer examples are cut, the longer sentence first, and counted.
        max_positions: positions of the model.
        multiple_of: the sequence length is the smallest multiple of this that holds the longest
            example, or `max_length` if that is smaller.
        pad_to_max_length: take `max_length` as the sequence length whatever the examples.
        pad_id: id that fills rows up where the tokenizer has no padding token.
        vocab_size: token ids must be below it.

    Raises:
        ValueError: no example, a text that is no string, a label that is no number, columns of
            different lengths, `max_length` above the positions of the model, or ids outside its
            vocabulary.
    """
    if max_length < 1 or multiple_of < 1:
        raise ValueError(
            f"max_length and multiple_of must be at least 1, got {max_length} and {multiple_of}"
        )
    if max_positions is not None and max_length > max_positions:
        raise ValueError(
            f"max_length {max_length} is above the {max_positions} positions of the model; "
            f"choose at most {max_positions}"
        )
    if len(texts) not in (1, 2):
        raise ValueError(f"{name}: one or two text columns, got {len(texts)}")
    for column in texts:
        check_texts(column, name)
    counts = [len(column) for column in texts] + [len(labels)]
    if len(set(counts)) > 1:
        raise ValueError(f"{name}: texts and labels differ in number: {counts}")
    if not counts[0]:
        raise ValueError(f"{name} is empty: there is no example in it")
    several = isinstance(labels, np.ndarray) and labels.ndim == 2
    if not several:
        _check_numbers(labels, name)

    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    padding = tokenizer.padding
    tokenizer.no_padding()
    special = tokenizer.num_special_tokens_to_add(is_pair=len(texts) == 2)
    if max_length <= special:
        raise ValueError(
            f"max_length {max_length} leaves no room for text beside {special} special tokens"
        )
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    inputs = list(texts[0]) if len(texts) == 1 else list(zip(*texts, strict=True))
    encodings = tokenizer.encode_batch(inputs)

    pad_ids = (tokenizer.token_to_id(token) for token in _PAD_TOKENS)
    own = padding["pad_id"] if padding else next((i for i in pad_ids if i is not None), pad_id)
    if own is None:
        raise ValueError(
            f"the tokenizer has no padding token; looked for {_PAD_TOKENS}; give pad_id"
        )
    lengths = np.array([len(encoding) for encoding in encodings])
    longest = -(-int(lengths.max()) // multiple_of) * multiple_of
    length = max_length if pad_to_max_length else min(longest, max_length)
    inside = np.arange(length) < lengths[:, None]
    input_ids = np.full(inside.shape, own, np.int32)
    token_type_ids = np.zeros(inside.shape, np.int32)
    input_ids[inside] = np.concatenate([encoding.ids for encoding in encodings])
    token_type_ids[inside] = np.concatenate([encoding.type_ids for encoding in encodings])
    check_token_ids(input_ids, vocab_size, name)
    columns = {
        "input_ids": input_ids,
        "attention_mask": inside.astype(np.int32),
        "token_type_ids": token_type_ids,
        "label": np.asarray(labels),
    } | ({"weight": np.ones(len(labels), np.float32)} if several else {})
    return Examples(columns, name, sum(bool(encoding.overflowing) for encoding in encodings))


def train_batches(
    examples: Examples,
    batch_size: int,
    *,
    seed: int,
    group_by_length: bool = False,
    rows: np.ndarray | slice = _ALL,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Endless batches in a new random order each epoch.

    A batch may hold the end of one epoch and the start of the next, so batches are always full
    and every example is seen once an epoch, however many there are.

    Args:
        examples: what to draw from.
        batch_size: examples of a batch.
        seed: of the order.
        group_by_length: sort the examples of 16 batches by length before they are cut into
            batches, which then come in random order, each cut to the first of `batch_lengths` that
            holds it.
        rows: those of each batch that are gathered; the order of examples is that of whole batches.

    Returns:
        An iterator with `get_state` and `set_state`; the state is a JSON object.
    """

    def gather(indices: np.ndarray) -> dict[str, np.ndarray]:
        return _with_weight(examples.take(indices[rows]))

    order = grain.MapDataset.range(len(examples)).shuffle(seed)
    order = order.repeat(_ENDLESS // len(examples))
    if group_by_length:
        valid, lengths = _valid_lengths(examples.columns["attention_mask"]), batch_lengths(examples)

        def gather_and_cut(indices: np.ndarray) -> dict[str, np.ndarray]:
            longest = valid[indices].max()
            return cut_batch(gather(indices), next(n for n in lengths if n >= longest))

        windows = order.batch(batch_size * GROUPED_BATCHES)
        by_length = grain.experimental.FlatMapMapDataset(windows, _BatchesByLength(valid, seed))
        batches = by_length.map(gather_and_cut)
    else:
        batches = order.batch(batch_size).map(gather)
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(batches.to_iter_dataset(options))


def batch_lengths(examples: Examples) -> tuple[int, ...]:
    """Sequence lengths of batches grouped by length: a few, about evenly spaced, the last is S.

    Example:
        >>> columns = {"input_ids": np.ones((1, 128), np.int32), "label": np.ones(1)}
        >>> batch_lengths(Examples({**columns, "attention_mask": columns["input_ids"]}, "x"))
        (32, 64, 96, 128)
    """
    full = examples.length
    step = -(-full // (MOST_LENGTHS * _LENGTH_UNIT)) * _LENGTH_UNIT
    return (*range(step, full, step), full)


class _BatchesByLength(grain.experimental.FlatMapTransform):
    """Cuts the indices of a window into batches of examples of like length, in random order."""

    max_fan_out = GROUPED_BATCHES

    def __init__(self, lengths: np.ndarray, seed: int) -> None:
        self._lengths = lengths
        self._seed = seed

    def flat_map(self, element: np.ndarray) -> Sequence[np.ndarray]:
        ordered = element[np.argsort(self._lengths[element], kind="stable")]
        rng = np.random.default_rng([self._seed, *element])
        return list(rng.permutation(ordered.reshape(GROUPED_BATCHES, -1)))


def _valid_lengths(mask: np.ndarray) -> np.ndarray:
    """Positions up to the last valid one of each row."""
    return np.where(mask.any(1), mask.shape[1] - np.argmax(mask[:, ::-1] != 0, axis=1), 0)


def cut_batch(batch: Mapping[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
    """The first `length` positions of all columns that have positions."""
    full = batch["attention_mask"].shape[1]
    weight = batch.get("weight")
    several = weight is not None and np.ndim(weight) == 1  # one weight for C labels
    whole = {"label"} if several else set()
    return {
        name: x[:, :length] if x.ndim > 1 and x.shape[1] == full and name not in whole else x
        for name, x in batch.items()
    }


def eval_batches(
    examples: Examples, batch_size: int, rows: np.ndarray | slice = _ALL
) -> Iterator[dict[str, np.ndarray]]:
    """All examples once, in order; the last batch is filled with copies of weight 0.

    Args:
        examples: what to go through.
        batch_size: examples of a batch.
        rows: those of each batch that are gathered.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    for start in range(0, len(examples), batch_size):
        indices = np.arange(start, start + batch_size)[rows]
        batch = _with_weight(examples.take(np.minimum(indices, len(examples) - 1)))
        real = (indices < len(examples)).reshape(-1, *[1] * (batch["weight"].ndim - 1))
        yield batch | {"weight": batch["weight"] * real.astype(np.float32)}


def _with_weight(examples: Examples) -> dict[str, Num[np.ndarray, "..."]]:
    columns = dict(examples.columns)
    if "weight" not in columns:
        columns["weight"] = np.ones(columns["label"].shape, np.float32)
    return columns
