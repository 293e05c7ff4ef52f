"""Compare methods and ablations of SPT over GLUE tasks and seeds, in one table.

    python -m experiments.glue_table --data-dir DIR                   # five tasks, one seed
    python -m experiments.glue_table --data-dir DIR --seeds 0,1,2 --report glue.md
    python -m experiments.glue_table --report-only --report glue.md   # trains nothing

By default the tasks are RTE, MRPC, CoLA, STS-B and SST-2.
All methods get the same tasks, seeds, lengths, batches and steps: three epochs of a task or, of one
with more than 60,000 examples, 500 steps, which of SST-2 is a quarter of an epoch. The first
command trains 2,400 steps of each of seven methods with MiniLM, some 50 minutes a method on a CPU
core; spt should come out within a point of lora on average.

A cell of the table is one method on one task from one seed, a run of its own in
`--out/TASK/METHOD/seed-N`. The same command goes on where it was stopped: finished cells are read
back, the one under way goes on from its checkpoint. Checkpoints of a finished cell are deleted. At
the end come a table, metrics.json and, with --report, a page in Markdown; that page is written anew
after each cell, with the missing ones marked.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

import spt_jax
from experiments import glue
from experiments.glue import Data, Inputs, load_data, named_task, read_model_config, train_method
from experiments.glue_tasks import TASKS
from experiments.methods import DESCRIPTIONS, Method, Recipe, parse_methods, write_metrics
from experiments.reports import bullets, how, machine, page, versions
from spt_jax import cli
from spt_jax.config import SparseAttentionConfig
from spt_jax.training import (
    Interrupted,
    NonFiniteLoss,
    differences_between,
    write_json_atomic,
    write_text_atomic,
)

#: Tasks with more than 60,000 training examples.
LONG_TASKS = ("sst2", "qqp", "mnli", "qnli")
BASELINE: Method = "lora"
MISSING = "missing"
_CONFIGURATION = "configuration.json"
_RECORD = "metrics.json"
_CHECKPOINTS = "checkpoints"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One method on one task from one seed."""

    task: str
    method: Method
    seed: int

    def __str__(self) -> str:
        return f"{self.task}, {self.method}, seed {self.seed}"

    def folder(self, out: Path) -> Path:
        """Where it is kept under `out`."""
        return out / self.task / self.method / f"seed-{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Options(Inputs, Recipe):
    """Options of the experiment."""

    tasks: str = "rte,mrpc,cola,stsb,sst2"
    """GLUE tasks, separated by commas; acceptability is a small one that needs no data."""
    methods: str = ",".join(name for name in DESCRIPTIONS if name != "spt-routed-ffn")
    """Methods, separated by commas: full, lora, spt and ablations of spt."""
    seeds: str = "0"
    """Seeds, separated by commas."""
    long_task_steps: int | None = 500
    """Steps of sst2, qqp, mnli and qnli, in place of --epochs; None trains them as the others."""
    eval_every: int | None = 1_000_000
    """Steps between evaluations; as it is, each cell is evaluated at its end."""
    group_by_length: bool = True
    """Put examples of like length into a batch and pad it less: faster where lengths differ."""
    min_keys: int = 8
    """A query attends to at least so many keys: the share --density of 64."""
    granularity: Literal["auto", "token", "tile", "dense"] = "token"
    """Which keys those are; auto keeps all of them at such lengths."""
    max_length: int | None = 64
    """Longer examples are cut; None takes what experiments.glue takes."""
    out: Path = Path("runs/glue-table")
    """Folder of the cells and of metrics.json."""
    report: Path | None = None
    """Markdown file that gets the table, and how it was made."""
    report_only: bool = False
    """Train nothing: make the table of the cells that are finished."""
    overwrite: bool = False
    """Train cells that are there with other options anew; without it, they are an error."""

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All cells, in the order in which they are trained: one seed of the whole table first."""
        return tuple(
            Cell(task=task, method=method, seed=seed)
            for seed in self.seed_numbers
            for task in self.task_names
            for method in self.method_names
        )

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks named by `tasks`, in order."""
        return cli.known_names(
            self.tasks,
            (*TASKS, glue.BUILT_IN.name),
            what="task",
            where=f" in --tasks {self.tasks}",
        )

    @property
    def method_names(self) -> tuple[Method, ...]:
        """The methods named by `methods`, in order."""
        return parse_methods(self.methods, "--methods")

    @property
    def seed_numbers(self) -> tuple[int, ...]:
        """The seeds, in order."""
        names = cli.distinct_names(self.seeds)
        for name in names:
            if not name.isdecimal():
                raise ValueError(f"--seeds takes whole numbers from 0 on, got {name!r}")
        return tuple(map(int, names))

    def cell_options(self, cell: Cell) -> glue.Options:
        """The options with which `experiments.glue` would train a cell."""
        shared = {f.name: getattr(self, f.name) for f in (*fields(Recipe), *fields(Inputs))}
        if self.steps is None and cell.task in LONG_TASKS:
            shared["steps"] = self.long_task_steps
        return glue.Options(
            **shared,
            task=cell.task,  # type: ignore[arg-type]
            method=cell.method,
            seed=cell.seed,
            out=cell.folder(self.out),
            resume=(cell.folder(self.out) / _CHECKPOINTS).exists(),
        )

    def configuration(self, cell: Cell) -> dict[str, Any]:
        """All that the result of a cell depends on, but for the data themselves; JSON."""
        options = self.cell_options(cell)
        spt = options.spt_config(cell.method)
        configuration = {
            **asdict(cell),
            **{name: getattr(self, name) for name in ("model", "dtype", "max_length")},
            "pad_to_max_length": self.pad_to_max_length,
            "spt": None if spt is None else asdict(spt),
            "train": asdict(options.train_config(cell.method)),
        }
        return json.loads(json.dumps(configuration))

    def check(self) -> None:
        """Raise a ValueError for any mistake in the options, before anything is read."""
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give --epochs or --steps, not both")
        if self.report_only and self.overwrite:
            raise ValueError("--report-only trains nothing, so there is nothing to --overwrite")
        for cell in self.cells:
            self.cell_options(cell).check()


Finished = Mapping[Cell, Mapping[str, Any]]  # what the metrics.json of each cell holds


def read_cells(options: Options) -> dict[Cell, dict[str, Any]]:
    """The finished cells.

    Raises:
        ValueError: a cell was begun with other options; with --overwrite it counts as missing.
    """
    finished = {}
    for cell in options.cells:
        folder = cell.folder(options.out)
        begun = _begun(folder)
        if begun is None:
            continue
        if differences := list(differences_between(begun, options.configuration(cell))):
            if options.overwrite:
                continue
            raise ValueError(
                f"{folder} was trained with other options: {'; '.join(differences)}. Give the same "
                "options as then, choose another --out, or train such cells anew with --overwrite"
            )
        if (folder / _RECORD).exists():
            finished[cell] = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    return finished


def _begun(folder: Path) -> dict[str, Any] | None:
    """The configuration with which a cell was begun, if it was."""
    path = folder / _CONFIGURATION
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def train_cell(cell: Cell, options: Options, data: Data) -> dict[str, Any]:
    """Train a cell, or go on with it; returns what its metrics.json holds."""
    folder, configuration = cell.folder(options.out), options.configuration(cell)
    if _begun(folder) not in (None, configuration):  # --overwrite, or read_cells had refused it
        shutil.rmtree(folder)
    write_json_atomic(folder / _CONFIGURATION, configuration)
    cell_options = options.cell_options(cell)
    result = train_method(named_task(cell.task), cell.method, cell_options, data, folder)
    write_metrics(
        folder,
        "glue",
        cell_options,
        {cell.method: result.figures()},
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        examples={"train": len(data.train), "length": data.train.length},
    )
    _delete_checkpoints(folder)
    return json.loads((folder / _RECORD).read_text(encoding="utf-8"))


def _delete_checkpoints(folder: Path) -> None:
    shutil.rmtree(folder / _CHECKPOINTS, ignore_errors=True)


def train_cells(
    options: Options, finished: Finished, console: Console, done: Callable[[Finished], None]
) -> dict[Cell, Mapping[str, Any]]:
    """Train what is missing; returns all cells.

    Args:
        options: what to train.
        finished: cells that are not trained again.
        console: says which cell is under way.
        done: called with all finished cells after each.

    Raises:
        Interrupted: a signal came; the cell under way has a checkpoint.
        NonFiniteLoss: some cells diverged. All others are trained.
    """
    cells = dict(finished)
    for cell in finished:
        _delete_checkpoints(cell.folder(options.out))  # of a run that was killed in between
    missing = [cell for cell in options.cells if cell not in finished]
    if not missing:
        return cells
    config = read_model_config(options)
    for cell in missing:
        spt = options.cell_options(cell).spt_config(cell.method)
        if spt is not None and spt.ffn is not None and config.hidden % spt.ffn.num_blocks:
            raise ValueError(
                f"{config.hidden} hidden units do not split into num_blocks={spt.ffn.num_blocks}"
            )
    tokenizer = spt_jax.load_tokenizer(options.model)
    data = {
        name: load_data(named_task(name), options, tokenizer, config)
        for name in dict.fromkeys(cell.task for cell in missing)
    }
    diverged = []
    for number, cell in enumerate(missing, start=len(finished) + 1):
        console.print(f"\n{cell} ({number} of {len(options.cells)})")
        try:
            cells[cell] = train_cell(cell, options, data[cell.task])
        except NonFiniteLoss as error:
            console.print(f"{cell}: {error}", markup=False)
            diverged.append(str(cell))
            continue
        except Interrupted as error:
            raise Interrupted(
                f"stopped in the cell {cell}, whose checkpoint is saved; the same command goes on",
                error.signal,
            ) from error
        done(cells)
    if diverged:
        raise NonFiniteLoss(f"not in the table, for their loss is not finite: {diverged}")
    return cells


@dataclass(frozen=True)
class Score:
    """Points of a method on a task, or their average over tasks, by seed."""

    by_seed: Mapping[int, float]

    @property
    def mean(self) -> float | None:
        """Over seeds; None without any."""
        return statistics.fmean(self.by_seed.values()) if self.by_seed else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds; None of fewer than two.

        Example:
            >>> Score({0: 70.0, 1: 72.0, 2: 74.0}).std
            2.0
        """
        return statistics.stdev(self.by_seed.values()) if len(self.by_seed) > 1 else None

    def figures(self) -> dict[str, Any]:
        """All of it; JSON."""
        return {"mean": self.mean, "std": self.std, "by_seed": dict(self.by_seed)}

    def shown(self, seeds: int, sign: str = "") -> str:
        """For a table; says where some of the `seeds` are missing.

        Example:
            >>> Score({0: 70.0, 1: 72.0}).shown(3)
            '71.0 ± 1.4 (2 of 3 seeds)'
        """
        if self.mean is None:
            return MISSING
        spread = "" if self.std is None else f" ± {self.std:.1f}"
        part = f" ({len(self.by_seed)} of {seeds} seeds)" if len(self.by_seed) < seeds else ""
        return f"{self.mean:{sign}.1f}{spread}{part}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method's row of the table.

    Attributes:
        scores: by task.
        average: over tasks, of the seeds that have all tasks.
        difference: of the average to the baseline's, seed by seed; empty for the baseline.
        step_ms: by task, the median over seeds; finished tasks only.
        peak_bytes: of a step as compiled, the highest over tasks; None without a finished cell.
        trainable_parameters: scalars that train.
        total_parameters: scalars of all parameters.
    """

    scores: Mapping[str, Score]
    average: Score
    difference: Score
    step_ms: Mapping[str, float]
    peak_bytes: int | None
    trainable_parameters: int | None
    total_parameters: int | None

    def figures(self) -> dict[str, Any]:
        """All of it, scores in points; JSON."""
        complete = self.step_ms.keys() == self.scores.keys()
        return {
            "average": self.average.figures(),
            f"difference_to_{BASELINE}": self.difference.figures(),
            "scores": {task: score.figures() for task, score in self.scores.items()},
            "step_ms": statistics.fmean(self.step_ms.values()) if complete else None,
            "step_ms_by_task": dict(self.step_ms),
            "peak_bytes": self.peak_bytes,
            "trainable_parameters": self.trainable_parameters,
            "total_parameters": self.total_parameters,
        }


def summarize(options: Options, cells: Finished) -> dict[Method, Row]:
    """The rows of the table, by method."""
    results = {cell: record["figures"][cell.method] for cell, record in cells.items()}

    def of(method: Method, task: str) -> dict[int, Mapping[str, Any]]:
        found = {c.seed: f for c, f in results.items() if (c.method, c.task) == (method, task)}
        return dict(sorted(found.items()))

    def scores_of(method: Method) -> dict[str, Score]:
        return {
            task: Score({s: 100 * named_task(task).score(f) for s, f in of(method, task).items()})
            for task in options.task_names
        }

    def average_of(method: Method) -> Score:
        columns = [score.by_seed for score in scores_of(method).values()]
        seeds = [s for s in options.seed_numbers if all(s in column for column in columns)]
        return Score({s: statistics.fmean(column[s] for column in columns) for s in seeds})

    baseline = average_of(BASELINE).by_seed
    rows: dict[Method, Row] = {}
    for method in options.method_names:
        average = average_of(method)
        by_task = {task: of(method, task).values() for task in options.task_names}
        every = [figures for column in by_task.values() for figures in column]
        rows[method] = Row(
            scores=scores_of(method),
            average=average,
            difference=Score(
                {s: x - baseline[s] for s, x in average.by_seed.items() if s in baseline}
                if method != BASELINE
                else {}
            ),
            step_ms={
                task: statistics.median(figures["step_ms"] for figures in column)
                for task, column in by_task.items()
                if column
            },
            peak_bytes=max((figures["compiled_peak_bytes"] for figures in every), default=None),
            trainable_parameters=every[0]["trainable_parameters"] if every else None,
            total_parameters=every[0]["total_parameters"] if every else None,
        )
    return rows


Lines = list[list[str]]  # a table, its header first


def score_lines(options: Options, rows: Mapping[Method, Row]) -> Lines:
    """Scores, their average and the difference of that to the baseline's."""
    seeds = len(options.seed_numbers)
    compared = BASELINE in rows
    lines = [["method", *options.task_names, "average", *[f"to {BASELINE}"] * compared]]
    for method, row in rows.items():
        scores = [score.shown(seeds) for score in (*row.scores.values(), row.average)]
        difference = "" if method == BASELINE else row.difference.shown(seeds, sign="+")
        lines.append([method, *scores, *[difference] * compared])
    return lines


def cost_lines(rows: Mapping[Method, Row], *, times: bool = True) -> Lines:
    """Memory and parameters, and the median step over tasks where `times` is set."""
    lines = [["method", *["step ms"] * times, "peak MB", "trainable parameters"]]
    for method, row in rows.items():
        step = f"{statistics.fmean(row.step_ms.values()):.0f}" if row.step_ms else MISSING
        memory = MISSING if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}"
        trained = MISSING if row.trainable_parameters is None else f"{row.trainable_parameters:,}"
        lines.append([method, *[step] * times, memory, trained])
    return lines


def terminal_table(title: str, lines: Lines) -> Table:
    """For the terminal."""
    table = Table(title=title)
    for number, header in enumerate(lines[0]):
        table.add_column(header, justify="right" if number else "left")
    for line in lines[1:]:
        table.add_row(*line)
    return table


def write_report(path: Path, options: Options, cells: Finished) -> None:
    """Write the page: the table, memory, and how it was made; all from finished cells.

    Step times are left out: over the hours that a table takes, machines change their speed.
    """
    rows = summarize(options, cells)
    missing = [str(cell) for cell in options.cells if cell not in cells]
    parts: list[str | Table] = [
        "Scores on the validation sets, in points: "
        + ", ".join(f"{t} {' and '.join(named_task(t).metrics)}" for t in options.task_names)
        + ". Two metrics count by their mean. ± is the sample standard deviation over seeds; "
        f"`to {BASELINE}` is the difference of averages to it, seed by seed.",
        terminal_table("", score_lines(options, rows)),
        bullets(f"`{method}`: {DESCRIPTIONS[method]}" for method in options.method_names),
    ]
    if missing:
        parts.append(f"Not finished: {len(missing)} of {len(options.cells)} cells.")
    parts += [
        terminal_table("Memory", cost_lines(rows, times=False)),
        "What the compiler plans for a step: parameters, optimizer state and temporaries.",
        how("experiments.glue_table", options, _conditions(options, cells)),
    ]
    write_text_atomic(path, page("SPT, LoRA and full fine-tuning on GLUE", *parts))


def _conditions(options: Options, cells: Finished) -> list[str]:
    """Budgets, recipe, dates, machine and versions."""
    rates: dict[float, list[str]] = {}
    for cell in options.cells:
        rate = options.cell_options(cell).train_config(cell.method).learning_rate
        if cell.method not in rates.setdefault(rate, []):
            rates[rate].append(cell.method)
    length = options.max_length or glue.DEFAULT_MAX_LENGTH
    attention = SparseAttentionConfig(
        density=options.density, min_keys=options.min_keys, granularity=options.granularity
    )
    granularity = attention.granularity_at(length)
    keys: str = granularity
    if granularity != "dense":
        keys = (
            f"by {granularity}, density {options.density:g}, {attention.num_keys(length)} keys of "
            f"{length}, at least {attention.min_keys}"
        )
    lines = [
        f"Model {options.model}, {options.dtype}; batches of {options.batch_size}, texts of at "
        f"most {length} tokens; seeds {options.seeds}.",
        "Peak learning rate: "
        + "; ".join(f"{rate:g} for {', '.join(methods)}" for rate, methods in rates.items())
        + f". Factors on it: LoRA {options.lora_learning_rate_multiplier:g}, routers "
        f"{options.router_learning_rate_multiplier:g}, codewords "
        f"{options.codebook_learning_rate_multiplier:g}, head "
        f"{options.head_learning_rate_multiplier:g}.",
        f"LoRA rank {options.rank}, dropout {options.lora_dropout:g}; "
        f"{options.active_blocks} of {options.num_blocks} blocks; attention {keys}.",
    ]
    for task in options.task_names:
        of_task = {c: r for c, r in cells.items() if c.task == task}
        budgets = _distinct_texts(
            f"{r['figures'][c.method]['steps']} steps, {r['figures'][c.method]['epochs']:.2f} "
            f"epochs of {r['examples']['train']:,} examples, length {r['examples']['length']}"
            for c, r in of_task.items()
        )
        lines.append(f"{task}: {budgets or MISSING}.")
    records = cells.values()
    dates = sorted(record["finished"][:10] for record in records)
    lines += [
        f"Trained {' to '.join(sorted({dates[0], dates[-1]}))}."
        if dates
        else "No cell is finished.",
        f"Machine: {_distinct_texts(map(machine, records)) or MISSING}.",
        f"Versions: {_distinct_texts(map(versions, records)) or MISSING}.",
    ]
    return lines


def _distinct_texts(texts: Iterable[str]) -> str:
    return " or ".join(dict.fromkeys(texts))


def main() -> None:
    """Run the experiment."""
    options = cli.parse(Options, "experiments.glue_table", __doc__)
    console = cli.console(160)
    options.check()
    cells: Finished = read_cells(options)

    def report(cells: Finished) -> None:
        if options.report is not None:
            write_report(options.report, options, cells)

    report(cells)
    if not options.report_only:
        cells = train_cells(options, cells, console, report)
    rows = summarize(options, cells)
    console.print(terminal_table("GLUE, validation, points", score_lines(options, rows)))
    console.print(terminal_table("cost", cost_lines(rows)))
    write_metrics(
        options.out,
        "glue_table",
        options,
        {method: row.figures() for method, row in rows.items()},
        missing=[str(cell) for cell in options.cells if cell not in cells],
    )


if __name__ == "__main__":
    cli.run(main)
