"""Fine-tunes a language model with LoRA and with SPT for the same time, and compares losses.

    python -m experiments.equal_time --model ID_OR_DIR --text-file FILE --lengths 2048,8192

Every method trains for --seconds at each length of a row; calibration, and compilation, which is of
all methods at once, are counted apart. What is compared is the mean loss on held-out text of the
adapter merged into the dense model, which is what people deploy, beside that of SPT's sparse form
as trained and of the untouched model. Rows are cut from one stream of tokens and have no padding,
so that dense attention has no mask, which cuDNN's would have to read.
Writes equal_time.csv after every method and, last, metrics.json to --out.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np
from flax import nnx
from rich.table import Table
from tqdm import tqdm

import spt_jax
from experiments import cli
from experiments.corpora import cpython_documentation
from experiments.kernels import FAILURES, failure_of, in_threads
from experiments.methods import Method, MethodOptions, device_line, write_metrics
from experiments.reports import write_csv
from spt_jax.layers import RoutedFFN, SparseAttention
from spt_jax.models import Decoder
from spt_jax.training import (
    Examples,
    encode_documents,
    evaluate,
    next_token,
    partition,
    read_text,
    start,
    train_batches,
    write_back,
)
from spt_jax.training.loop import compiled_peak_bytes

METHODS: tuple[Method, ...] = tuple(name for name in get_args(Method) if name != "full")
WARMUP_STEPS = 10
MOST_STEPS = 1_000_000  # the time is over before


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the comparison."""

    model: str
    """Hugging Face directory or hub id of a causal language model."""
    text_file: Path | None = None
    """UTF-8 text to fine-tune on; by default CPython's documentation."""
    method: str = "lora,spt"
    """Methods to compare, separated by commas: lora, spt, and ablations of spt."""
    lengths: str = "2048,8192"
    """Tokens of a row, separated by commas."""
    seconds: float = 15.0
    """Time that each method trains for."""
    step_tokens: int = 16384
    """Tokens of an optimizer step: so many rows as they make, at least one."""
    eval_tokens: int = 32768
    """Tokens at the end of the text that are held out, at least one row."""
    calibration_tokens: int = 8192
    """Tokens that SPT is calibrated on, at least one row."""
    learning_rate: float = 2e-4
    """Learning rate, constant after ten steps."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype, and that of frozen weights."""
    seed: int = 0
    """Seed of adapters and the order of rows."""
    out: Path = Path("runs/equal-time")
    """Folder for the results."""

    def check(self) -> None:
        """Raise a ValueError for any mistake in the options."""
        cli.known_names(self.method, METHODS, what="method", where=" in --method")
        for name in ("seconds", "step_tokens", "eval_tokens", "calibration_tokens"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be above 0, got {getattr(self, name)}"
                )
        self.row_lengths()

    def row_lengths(self) -> list[int]:
        """Tokens of a row."""
        words = cli.distinct_names(self.lengths)
        if not all(word.isdecimal() and int(word) > 1 for word in words):
            raise ValueError(f"--lengths takes numbers above 1, got {self.lengths!r}")
        return [int(word) for word in words]


def unmasked(model: Any, batch: Any, dropout_key: jax.Array | None) -> Any:
    """`next_token` of rows without padding."""
    return next_token(model, {**batch, "attention_mask": None}, dropout_key)


def rows_of(ids: np.ndarray, length: int, name: str) -> Examples:
    """Rows of `length` tokens, one after the other; what is left over is dropped."""
    number = (len(ids) - 1) // length
    inputs, labels = (
        ids[shift : number * length + shift].reshape(number, length).astype(np.int32)
        for shift in (0, 1)
    )
    ones = np.ones_like(inputs)
    return Examples(
        {
            "input_ids": inputs,
            "label": labels,
            "attention_mask": ones,
            "weight": ones.astype(np.float32),
        },
        name,
    )


def read_tokens(options: Options) -> np.ndarray:
    """All tokens of the text, documents one after the other."""
    texts = cpython_documentation() if options.text_file is None else read_text(options.text_file)
    tokenizer = spt_jax.load_tokenizer(options.model)
    documents = encode_documents(texts, tokenizer, name="text")
    return np.concatenate([document.ids for document in documents])


def split(ids: np.ndarray, length: int, options: Options) -> tuple[Examples, Examples]:
    """Rows to train and to evaluate on.

    Raises:
        ValueError: the text is too short.
    """
    held_out = max(1, options.eval_tokens // length) * length + 1
    least = held_out + length + 1
    if len(ids) < least:
        raise ValueError(
            f"the text has {len(ids)} tokens, and rows of {length} need {least}; give a longer "
            "--text-file, or shorter --lengths"
        )
    train, evaluation = ids[:-held_out], ids[-held_out:]
    return rows_of(train, length, "training text"), rows_of(evaluation, length, "evaluation text")


def load(source: str | Path, options: Options) -> Decoder:
    """The dense model."""
    model = spt_jax.load_pretrained(
        source, task="causal-lm", dtype=options.dtype, param_dtype=options.dtype
    )
    assert isinstance(model, Decoder)
    return model


def loss_of(model: Decoder, data: Examples, options: Options) -> float:
    """Mean loss of a token."""
    batch_size = max(1, options.step_tokens // data.length)
    found = evaluate(model, data, objective=unmasked, batch_size=batch_size)
    return found["eval_loss"]


@dataclass(kw_only=True)
class Training:
    """A method about to train.

    Attributes:
        model: adapted.
        parts: it, cut in what trains and what is frozen.
        state: before the first step.
        step: the training step.
        batches: endless.
        first: of them.
        calibrated_s: time that adapting took.
    """

    model: Decoder
    parts: Any
    state: Any
    step: Any
    batches: Iterator[Any]
    first: Any
    calibrated_s: float


def prepared(method: Method, train: Examples, options: Options) -> Training:
    """The model with a method's adapter, and its training step."""
    model = load(options.model, options)
    begun = time.perf_counter()
    config = MethodOptions().spt_config(method)
    assert config is not None
    few = np.arange(min(len(train), max(1, options.calibration_tokens // train.length)))
    calibration = train.take(few).columns
    rngs = nnx.Rngs(options.seed)
    model = spt_jax.adapt(model, config, calibration_batch=calibration, rngs=rngs)
    calibrated_s = time.perf_counter() - begun
    train_config = spt_jax.TrainConfig(
        steps=MOST_STEPS, learning_rate=options.learning_rate, schedule="constant",
        warmup=WARMUP_STEPS, seed=options.seed,
    )  # fmt: skip
    batch_size = max(1, options.step_tokens // train.length)
    batches = train_batches(train, batch_size, seed=options.seed)
    parts = partition(model, "adapter")
    state, step = start(parts, train_config, total_steps=MOST_STEPS, objective=unmasked)
    first = jax.device_put(next(batches))
    return Training(
        model=model, parts=parts, state=state, step=step, batches=batches, first=first,
        calibrated_s=calibrated_s,
    )  # fmt: skip


def compiled_step(training: Training) -> tuple[jax.stages.Compiled, float]:
    """The step as a program, and the seconds that compiling it took."""
    begun = time.perf_counter()
    jitted = jax.jit(training.step, donate_argnums=0)
    arguments = training.state, training.parts.frozen, training.first
    return jitted.lower(*arguments).compile(), time.perf_counter() - begun


def trained(
    training: Training, compiled: jax.stages.Compiled, evaluation: Examples, options: Options
) -> dict[str, Any]:
    """Train for the time given, and evaluate; losses in nats a token.

    The loss as trained is of sparse models alone: LoRA's is dense as it is.
    """
    model, state, batch = training.model, training.state, training.first
    steps, trained_s, finite = 0, 0.0, True
    while trained_s < options.seconds and finite:
        begun = time.perf_counter()
        state, metrics = compiled(state, training.parts.frozen, batch)
        batch = jax.device_put(next(training.batches))
        finite = bool(metrics["finite"])  # waits for the step
        trained_s += time.perf_counter() - begun
        steps += 1
    if not finite:
        raise RuntimeError(f"the loss of step {steps} is not finite; lower --learning-rate")
    write_back(model, state.params)
    losses = {}
    if any(isinstance(m, SparseAttention | RoutedFFN) for _, m in nnx.iter_modules(model)):
        losses["loss_as_trained"] = loss_of(model, evaluation, options)
    with tempfile.TemporaryDirectory() as folder:
        logging.getLogger("spt_jax.export").setLevel(logging.ERROR)  # that it is dense is wanted
        spt_jax.save_pretrained(model, Path(folder) / "merged")
        merged = load(Path(folder) / "merged", options)
    return {
        "steps": steps,
        "trained_s": trained_s,
        "step_ms": 1e3 * trained_s / steps,
        "loss_dense": loss_of(merged, evaluation, options),
        **losses,
    }


def run(options: Options) -> Iterator[dict[str, Any]]:
    """One row for each length and method; one that fails says why."""
    ids = read_tokens(options)
    lengths = options.row_lengths()
    config = load(options.model, options).config
    if max(lengths) > config.max_length:
        raise ValueError(
            f"--lengths {max(lengths)} is above the {config.max_length} positions of the model"
        )
    if any(window is not None for window in config.windows):
        raise ValueError("the model attends in windows, which SPT's attention does not know")
    methods = cli.known_names(options.method, METHODS, what="method")
    for length in lengths:
        train, evaluation = split(ids, length, options)
        untouched = load(options.model, options)
        before = loss_of(untouched, evaluation, options)
        del untouched
        ready = [_tried(prepared, method, train, options) for method in methods]
        # All are compiled before any trains: compilation would slow its steps.
        programs = [*in_threads(_compiled, ready)]
        for method, (training, found) in zip(methods, programs, strict=True):
            row = {"length": length, "method": method, "loss_before": before}
            if isinstance(training, str) or isinstance(found, str):
                yield row | {"failure": found}
                continue
            row["calibrated_s"] = training.calibrated_s
            compiled, row["compiled_s"] = found
            row["planned_bytes"] = compiled_peak_bytes(compiled)
            try:
                yield row | trained(training, compiled, evaluation, options)
            except FAILURES as error:
                yield row | {"failure": failure_of(error)}
        del ready, programs
        jax.clear_caches()


def _tried[**P, Result](
    function: Callable[P, Result], *args: P.args, **kwargs: P.kwargs
) -> Result | str:
    """What a function returns, or why it failed."""
    try:
        return function(*args, **kwargs)
    except FAILURES as error:
        return failure_of(error)


def _compiled(training: Training | str) -> tuple[jax.stages.Compiled, float] | str:
    return training if isinstance(training, str) else _tried(compiled_step, training)


def main() -> None:
    """Run the comparison."""
    options = cli.parse(Options, "experiments.equal_time", __doc__)
    options.check()
    options.out.mkdir(parents=True, exist_ok=True)
    console = cli.console()
    console.print(device_line(options.dtype))
    rows: list[dict[str, Any]] = []
    with tqdm(disable=not sys.stderr.isatty(), unit="run") as bar:
        for row in run(options):
            rows.append(row)
            write_csv(options.out / "equal_time.csv", rows)
            bar.update()
    table = Table(title=f"{options.seconds:g} s of training, mean loss of a token")
    names = ("step_ms", "calibrated_s", "compiled_s")
    losses = ("loss_before", "loss_dense", "loss_as_trained")
    for name in ("length", "method", "steps", *names, *losses, "planned_bytes", "failure"):
        table.add_column(name.replace("_", " "))
    for row in rows:
        cells = [str(row["length"]), row["method"], str(row.get("steps", ""))]
        cells += [f"{row[n]:.1f}" if n in row else "" for n in names]
        cells += [f"{row[n]:.4f}" if n in row else "" for n in losses]
        table.add_row(*cells, str(row.get("planned_bytes", "")), row.get("failure", ""))
    console.print(table)
    figures = {f"s{row['length']}_{row['method']}": row for row in rows}
    write_metrics(options.out, "equal_time", options, figures)
    if failures := [row for row in rows if "failure" in row]:
        first = failures[0]
        sys.exit(
            f"error: {len(failures)} runs failed, the first: {first['method']} at "
            f"{first['length']} tokens: {first['failure']}"
        )


if __name__ == "__main__":
    cli.run(main)
