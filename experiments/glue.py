"""Fine-tune an encoder on GLUE with SPT, LoRA or all its weights, and compare them in one table.

    python -m experiments.glue                                         # built-in task, no network
    python -m experiments.glue --task mrpc --method spt,lora --epochs 3 --data-dir DIR --out OUT

The first command trains for about three minutes on 2 CPU cores and reaches a Matthews correlation
above 0.75 with either method. Beside the table a run writes, under --out, checkpoints, TensorBoard
events and, last, metrics.json with every number of the table. A stopped run goes on with --resume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

import spt_jax
from experiments import acceptability
from experiments.glue_tasks import TASKS, GlueTask, Split, read_split
from experiments.methods import (
    Method,
    MethodOptions,
    form_note,
    results_table,
    speed_note,
    write_metrics,
)
from spt_jax import cli
from spt_jax.finetune.job import Job
from spt_jax.finetune.prepare import without_unread_types
from spt_jax.models.config import ModelConfig, read_config
from spt_jax.models.hub import CONFIG_FILES, find_files
from spt_jax.processes import first_goes_first
from spt_jax.training import (
    Examples,
    TrainResult,
    tokenize,
)

TaskName = Literal[
    "acceptability", "cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli", "all"
]

DEFAULT_MAX_LENGTH = 128
BUILT_IN = GlueTask(
    name="acceptability", columns=("sentence",), num_labels=2, metrics=("matthews", "accuracy")
)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The pretrained model, and how it is given the texts."""

    model: str = "minilm"
    """Hugging Face directory or hub id; minilm is the model that the set-up installs."""
    data_dir: Path | None = None
    """TFDS data directory; a task that is not there is downloaded into it."""
    max_length: int | None = None
    """Longer examples are cut; by default 128 or, if that is less, what the model has positions
    for."""
    pad_to_max_length: bool = False
    """Pad to --max-length, not to the longest example of the task."""


@dataclass(frozen=True, kw_only=True)
class Options(Inputs, MethodOptions):
    """Options of the experiment."""

    task: TaskName = "acceptability"
    """GLUE task; acceptability is a small demonstration task that needs no data; all runs all of
    GLUE."""
    out: Path = Path("runs/glue")
    """Folder for checkpoints, TensorBoard events and metrics.json."""

    @property
    def default_epochs(self) -> float:
        """One epoch of the built-in task, three of the others."""
        return 1.0 if self.task == BUILT_IN.name else 3.0


@dataclass(frozen=True)
class Data:
    """Tokenized splits of a task."""

    train: Examples
    validation: Mapping[str, Examples]


def load_data(task: GlueTask, options: Inputs, tokenizer: Tokenizer, config: ModelConfig) -> Data:
    """Read and tokenize all splits of a task, to one sequence length."""

    def read(split: str) -> Split:
        if task is not BUILT_IN:
            return read_split(task, split, options.data_dir)
        rows = acceptability.examples(split)
        labels = np.array([row["label"] for row in rows], np.int32)
        return Split(f"{task.name} {split}", [[str(row["sentence"]) for row in rows]], labels)

    def tokens(split: str) -> Examples:
        part = read(split)
        examples = tokenize(
            part.texts,
            part.labels,
            tokenizer,
            name=part.name,
            max_length=(
                min(DEFAULT_MAX_LENGTH, config.max_length)
                if options.max_length is None
                else options.max_length
            ),
            max_positions=config.max_length,
            pad_to_max_length=options.pad_to_max_length,
            pad_id=config.padding_id,
            vocab_size=config.vocab_size,
        )
        return without_unread_types(examples, config)

    with first_goes_first():  # it may download
        train = tokens("train")
    return Data(train, {name: tokens(s) for name, s in task.validation.items()})


def named_task(name: str) -> GlueTask:
    """A task of GLUE, or the built-in one."""
    return BUILT_IN if name == BUILT_IN.name else TASKS[name]


def read_model_config(options: Inputs) -> ModelConfig:
    """The sizes of the pretrained model."""
    return read_config(find_files(options.model, files=CONFIG_FILES))


def job_of(task: GlueTask, method: Method, options: Options, out: Path) -> Job:
    """The training of one method on a task."""
    return Job(
        source=options.model,
        task="regression" if task.num_labels is None else "classification",
        num_labels=task.num_labels or 1,
        spt=options.spt_config(method),
        train=options.train_config(method),
        dtype=options.dtype,
        out=out,
        resume=options.resume,
        overwrite=options.overwrite,
    )


def train_method(
    task: GlueTask, method: Method, options: Options, data: Data, out: Path
) -> TrainResult:
    """Adapt, train and evaluate one method."""
    job = job_of(task, method, options, out)
    rngs = nnx.Rngs(options.seed)
    model = job.load(rngs)
    job.adapt(model, data.train, rngs=rngs)
    return job.fit(model, data.train, data.validation, task.metrics)


def run_task(
    task: GlueTask, options: Options, tokenizer: Tokenizer, out: Path, console: Console
) -> dict[str, dict[str, Any]]:
    """Train and evaluate every method on a task; returns the figures of each."""
    data = load_data(task, options, tokenizer, read_model_config(options))
    console.print(
        f"{task.name}: {len(data.train)} training examples, length {data.train.length}, "
        f"{data.train.num_truncated} cut"
    )
    if task is BUILT_IN:
        console.print("(the built-in demonstration task: was a sentence's word order scrambled?)")
    results: dict[str, TrainResult] = {}
    for method in options.methods:
        console.print(f"\n{task.name}, {method}")
        results[method] = train_method(task, method, options, data, out / method)
    figures = {method: result.figures() for method, result in results.items()}
    console.print(results_table(f"{task.name}, validation", results))
    for note in filter(None, (speed_note(results), form_note(results))):
        console.print(note)
    write_metrics(out, "glue", options, figures)
    return figures


def summarize(
    by_task: Mapping[str, Mapping[str, Mapping[str, Any]]], methods: Sequence[Method]
) -> tuple[Table, dict[str, dict[str, float]]]:
    """Official metrics of all tasks and their average, one row a method.

    A task with several metrics counts by their mean.
    """
    table = Table(title="GLUE, validation")
    table.add_column("method")
    for name in [*by_task, "average"]:
        table.add_column(name, justify="right")
    figures: dict[str, dict[str, float]] = {}
    for method in methods:
        scores = {name: TASKS[name].score(results[method]) for name, results in by_task.items()}
        scores["average"] = float(np.mean(list(scores.values())))
        figures[method] = scores
        table.add_row(method, *(f"{score:.4f}" for score in scores.values()))
    return table, figures


def main() -> None:
    """Run the experiment."""
    options = cli.parse(Options, "experiments.glue", __doc__)
    methods = options.methods
    options.start()
    console = cli.console()
    options.out.mkdir(parents=True, exist_ok=True)  # fails now, not at the end of a long run
    tokenizer = spt_jax.load_tokenizer(options.model)
    console.print(cli.device_line(options.dtype))
    if options.task != "all":
        run_task(named_task(options.task), options, tokenizer, options.out, console)
        return
    for task in TASKS.values():
        for split in task.validation.values():
            read_split(task, split, options.data_dir)
    by_task = {
        name: run_task(task, options, tokenizer, options.out / name, console)
        for name, task in TASKS.items()
    }
    table, figures = summarize(by_task, methods)
    console.print(table)
    write_metrics(options.out, "glue", options, figures)


if __name__ == "__main__":
    cli.run(main)
