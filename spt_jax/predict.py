"""Predictions of a fine-tuned model for rows of a file.

    python -m spt_jax.predict --model runs/reviews/adapter --input new.csv --output predicted.jsonl

The model is a directory that `spt_jax.finetune` wrote, of an adapter or a whole model, or any
model that `load_pretrained` loads. Every row of the output has the columns of the input and, beside
them, `prediction`: a class, with probabilities, a list of classes, a score, or a text.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float
from tqdm import tqdm

from spt_jax import cli
from spt_jax.config import Form
from spt_jax.finetune.columns import find_inputs
from spt_jax.finetune.config import DataConfig, Layout
from spt_jax.finetune.conversations import question_of
from spt_jax.finetune.encoding import Encoder
from spt_jax.finetune.labels import texts_of
from spt_jax.finetune.loading import Loaded, load_trained
from spt_jax.finetune.prepare import encode_texts
from spt_jax.finetune.rows import Row, Rows, read_lines, read_rows, usable
from spt_jax.generation import generate
from spt_jax.models import DecoderConfig, load_tokenizer
from spt_jax.training import Examples, write_text_atomic
from spt_jax.training.data import batch_lengths, cut_batch

Prediction = dict[str, Any]
Input = str | tuple[str, str] | Mapping[str, Any]

_TEXT = ".txt"
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_LINES = (".jsonl", ".ndjson")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the command."""

    model: str
    """Directory of an adapter or of a model, or a hub id."""
    input: Path
    """Rows: .csv, .tsv, .jsonl, .json, .parquet, or text, of which every line is one."""
    output: Path
    """File to write: .jsonl, .csv or .tsv."""
    base_model: str | None = None
    """Base model, in place of the one that the adapter names."""
    text_columns: tuple[str, ...] = ()
    """Columns with texts, in place of those of the training file."""
    layout: Layout | None = None
    """What a row is, in place of what those of the training file were."""
    batch_size: int = 32
    """Rows that are computed together."""
    max_new_tokens: int = 128
    """Tokens of a completion at most."""
    temperature: float = 0.0
    """Divisor of the logits before sampling; 0 takes the most likely token."""
    seed: int = 0
    """Seed of the sampling."""
    form: Form | None = None
    """Form of the model; by default the one that it was judged in."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype, and that of weights."""
    skip_bad_rows: bool = False
    """Leave rows out that cannot be used, and count them."""


def predict(
    model: str | os.PathLike[str],
    inputs: Sequence[Input],
    *,
    base_model: str | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    form: Form | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> list[Prediction]:
    """Predictions of a fine-tuned model.

    Args:
        model: directory of an adapter or of a model that `finetune` wrote, or a hub id.
        inputs: texts, pairs of texts, or rows by the columns of the training file, as they came or
            with messages.
        base_model: in place of the one that an adapter names.
        batch_size: inputs that are computed together.
        max_new_tokens: tokens of a completion at most.
        temperature: divisor of the logits before sampling; 0 takes the most likely token.
        seed: of the sampling.
        form: sparse or dense; None for the one that the model was judged in.
        dtype: compute dtype, and that of weights.

    Returns:
        One an input: `prediction`, which is the name of a class, beside `probability` and
        `probabilities` by name; a list of names beside `probabilities`; a score; or a completion.

    Raises:
        BadRow: an input cannot be used.
        ValueError: there is no input, or the model is not found.

    Example:
        >>> from spt_jax.predict import predict
        >>> predict("runs/reviews/adapter", ["A superb film."])  # doctest: +SKIP
        [{'prediction': 'positive', 'probability': 0.99, 'probabilities': {...}}]
    """
    if isinstance(inputs, str) or not inputs:
        raise ValueError("inputs is one text or empty; give a list of inputs")
    loaded = load_trained(model, base_model=base_model, dtype=dtype, form=form)
    data = loaded.trained.data(Path("inputs"))
    if all(isinstance(x, str) for x in inputs):
        data = _of_texts(data, data.text_columns or ("text",))
    rows = [Row(_values(x, data.text_columns), f"input {i}") for i, x in enumerate(inputs)]
    _, predictions = predict_rows(
        loaded,
        Rows(rows, "inputs"),
        data,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    return predictions


def _of_texts(data: DataConfig, columns: tuple[str, ...]) -> DataConfig:
    """Options by which texts are read as such, or as what a user says in a conversation."""
    if data.layout in (None, "text"):
        return replace(data, text_columns=columns)
    return replace(data, layout="prompt-completion", text_columns=(), prompt_column=columns[0])


def _values(given: Input, columns: Sequence[str]) -> Mapping[str, Any]:
    if isinstance(given, Mapping):
        return given
    texts = (given,) if isinstance(given, str) else given
    return dict(zip(columns or ("text", "text_pair"), texts, strict=False))


def predict_rows(
    loaded: Loaded,
    rows: Rows,
    data: DataConfig,
    *,
    batch_size: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> tuple[Rows, list[Prediction]]:
    """The rows that can be used, and a prediction for each; see `predict`."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    trained = loaded.trained
    data = find_inputs(rows, data, trained.task)
    if trained.task == "language":
        questions, rows = usable(
            rows, lambda row: question_of(row, data), skip_bad=data.skip_bad_rows
        )
        prompts = _prompts(loaded, questions, max_new_tokens)
        found = _completions(loaded, prompts, batch_size, max_new_tokens, temperature, seed)
        return rows, [{"prediction": text} for text in found]
    texts, rows = usable(
        rows, lambda row: texts_of(row, data.text_columns), skip_bad=data.skip_bad_rows
    )
    examples = encode_texts(
        texts,
        np.zeros(len(texts), np.int32),
        load_tokenizer(loaded.source),
        loaded.config,
        name=rows.name,
        max_length=min(trained.max_length, loaded.config.max_length),
    )
    if examples.num_truncated:
        _log.info("%s: %d of %d texts are cut", rows.name, examples.num_truncated, len(examples))
    return rows, [_labelled(row, loaded) for row in logits_of(loaded, examples, batch_size)]


def logits_of(loaded: Loaded, examples: Examples, batch_size: int) -> Float[np.ndarray, "n C"]:
    """Outputs of a classification head, computed for examples of like length together.

    Args:
        loaded: the model.
        examples: in any order.
        batch_size: examples of a batch.

    Returns:
        In the order of the examples.
    """
    graphdef, state = nnx.split(loaded.model)

    @jax.jit
    def run(state: nnx.State, batch: Mapping[str, jax.Array]) -> jax.Array:
        return nnx.merge(graphdef, state)(**batch).astype(jnp.float32)

    columns = {n: x for n, x in examples.columns.items() if n != "label"}
    sizes = columns["attention_mask"].sum(1)
    order, lengths = np.argsort(sizes, kind="stable"), batch_lengths(examples)
    outputs: dict[int, np.ndarray] = {}
    for chosen in _batches(order, batch_size):
        filled = np.resize(chosen, batch_size)  # one program for each length
        length = next(n for n in lengths if n >= sizes[chosen].max())
        batch = cut_batch({n: x[filled] for n, x in columns.items()}, length)
        found = np.asarray(run(state, batch))
        outputs |= dict(zip(chosen.tolist(), found, strict=False))
    return np.stack([outputs[i] for i in range(len(examples))])


def _batches(order: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    starts = range(0, len(order), batch_size)
    for start in tqdm(starts, unit="batch", disable=None):
        yield order[start : start + batch_size]


def _labelled(logits: Float[np.ndarray, " C"], loaded: Loaded) -> Prediction:
    classes = loaded.trained.classes
    match loaded.trained.task:
        case "regression":
            return {"prediction": float(logits[0])}
        case "multi-label":
            shares = 1 / (1 + np.exp(-logits.astype(np.float64)))
            probabilities = _named(classes, shares)
            chosen = [name for name, share in probabilities.items() if share > 0.5]
            return {"prediction": chosen, "probabilities": probabilities}
        case _:
            shares = np.exp(logits.astype(np.float64) - logits.max())
            probabilities = _named(classes, shares / shares.sum())
            best = classes[int(logits.argmax())]
            return {
                "prediction": best,
                "probability": probabilities[best],
                "probabilities": probabilities,
            }


def _named(classes: Sequence[str], shares: np.ndarray) -> dict[str, float]:
    return {name: round(float(x), 6) for name, x in zip(classes, shares, strict=True)}


def _prompts(loaded: Loaded, questions: Sequence[Any], max_new_tokens: int) -> list[list[int]]:
    """Token ids, cut at the left to what leaves room for the completion."""
    assert isinstance(loaded.config, DecoderConfig)
    encoder = Encoder(loaded.source, loaded.config, plain_chat=loaded.trained.plain_chat)
    room = loaded.config.max_length - max_new_tokens
    if room < 1:
        raise ValueError(
            f"max_new_tokens {max_new_tokens} leaves no room in the {loaded.config.max_length} "
            "positions of the model"
        )
    prompts = [encoder.prompt(question) for question in questions]
    if cut := sum(len(prompt) > room for prompt in prompts):
        _log.info("%d of %d prompts lose their beginning beyond %d tokens", cut, len(prompts), room)
    return [prompt[-room:] for prompt in prompts]


def _completions(
    loaded: Loaded,
    prompts: Sequence[list[int]],
    batch_size: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[str]:
    tokenizer = load_tokenizer(loaded.source)
    order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
    texts: dict[int, str] = {}
    for number, chosen in enumerate(_batches(order, batch_size)):
        new = generate(
            loaded.model,
            [prompts[i] for i in chosen],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed + number,
            progress_bar=False,
        )
        decoded = tokenizer.decode_batch([[int(token) for token in ids] for ids in new])
        texts |= dict(zip(chosen.tolist(), decoded, strict=True))
    return [texts[i] for i in range(len(prompts))]


def write_predictions(path: Path, rows: Rows, predictions: Sequence[Prediction]) -> None:
    """Write rows and their predictions as JSON lines, CSV or TSV, by the file's ending.

    In CSV and TSV a probability has a column of its own, classes are joined by commas, and what
    else is no text or number is JSON.

    Raises:
        ValueError: the ending is another one.
    """
    check_output(path)
    if path.suffix.lower() in _LINES:
        lines = (
            json.dumps(dict(row.values) | prediction, ensure_ascii=False, default=str)
            for row, prediction in zip(rows.rows, predictions, strict=True)
        )
        write_text_atomic(path, "".join(f"{line}\n" for line in lines))
        return
    flat = [
        dict(row.values) | _flat(prediction)
        for row, prediction in zip(rows.rows, predictions, strict=True)
    ]
    names = list(dict.fromkeys(name for values in flat for name in values))
    shown = io.StringIO(newline="")
    writer = csv.DictWriter(shown, names, delimiter=_SEPARATORS[path.suffix.lower()])
    writer.writeheader()
    writer.writerows({name: _cell(x) for name, x in values.items()} for values in flat)
    write_text_atomic(path, shown.getvalue())


def _flat(prediction: Prediction) -> Prediction:
    flat = {name: x for name, x in prediction.items() if name != "probabilities"}
    if isinstance(flat["prediction"], list):
        flat["prediction"] = ",".join(flat["prediction"])
    probabilities = prediction.get("probabilities", {})
    return flat | {f"probability_{name}": x for name, x in probabilities.items()}


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value


def check_output(path: Path) -> None:
    """Raise a ValueError unless a file's ending is one that can be written."""
    if path.suffix.lower() not in (*_LINES, *_SEPARATORS):
        raise ValueError(f"{path}: the output is .jsonl, .csv or .tsv, by its ending")


def main() -> None:
    """Run the command."""
    options = cli.parse(Options, "spt_jax.predict", __doc__)
    check_output(options.output)
    is_text = options.input.suffix.lower() == _TEXT
    rows = (
        read_lines(options.input)
        if is_text
        else read_rows(options.input, skip_bad=options.skip_bad_rows)
    )
    loaded = load_trained(
        options.model, base_model=options.base_model, dtype=options.dtype, form=options.form
    )
    data = loaded.trained.data(options.input)
    if is_text:
        data = _of_texts(data, ("text",))
    data = replace(
        data,
        text_columns=options.text_columns or data.text_columns,
        layout=options.layout or data.layout,
        skip_bad_rows=options.skip_bad_rows,
    )
    rows, predictions = predict_rows(
        loaded,
        rows,
        data,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
    )
    write_predictions(options.output, rows, predictions)
    left_out = f", {len(rows.left_out)} rows left out" if rows.left_out else ""
    cli.console().print(f"{len(rows)} predictions in {options.output}{left_out}", soft_wrap=True)


if __name__ == "__main__":
    cli.run(main)
