"""Everything that is measured on a GPU, in one prepared run of nine minutes.

    make gpu-run PYTHON=... OUT=runs/gpu-run
    python -m experiments.gpu_run --phases smoke,attention --out DIR
    python -m experiments.gpu_run --model ID_OR_DIR --text-file FILE
    python -m experiments.gpu_run --rehearse

The run goes in phases, each a command or a few under a time limit. After every phase, its rows and
figures stand in DIR/PHASE.csv and DIR/PHASE.json, and all that there is by then in DIR/metrics.json
and DIR/gpu-run.md, a page ready to commit. A phase that is over its limit is stopped with all that
it started, and keeps what it had written; one that fails does not stop the others; one that cannot
run, or does not fit what is left of --budget-s, is named with the reason. What a command printed is
in DIR/PHASE/JOB/log.txt. The exit code is 1 if a phase failed or was cut short.

--rehearse goes through all of it on a CPU, at tiny sizes, the kernels of `smoke`, `triton` and
`counters` in their interpreters, and says so in everything that it writes. docs/gpus.md has the
phases in a table.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
from rich.table import Table

from experiments.gpu_phases import PHASES, Job, LeftOut, Phase, Setting
from experiments.measurement import PEAK
from experiments.methods import write_metrics
from experiments.reports import bullets, here_and_now, how, page, write_csv
from pallas_kernels import why_not_mosaic, why_not_triton
from spt_jax import cli
from spt_jax.training import environment, write_json_atomic
from spt_jax.training.metrics import write_text_atomic

Status = Literal["done", "failed", "cut short", "left out"]

#: How many times as long as on a GPU a rehearsal may take.
PATIENCE = 10
PROBE_LIMIT_S = 60
REHEARSAL = "**A rehearsal at tiny sizes on a CPU: nothing on this page is a measurement.**"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the run."""

    phases: str = ",".join(PHASES)
    """Phases to run, separated by commas, in the order of the table."""
    budget_s: float = 540.0
    """Seconds in all; a phase that is estimated to take more than what is left is left out."""
    model: str = "smollm2"
    """Causal language model of the phase training: a Hugging Face directory or hub id; smollm2 is
    the model that the set-up installs."""
    text_file: Path | None = None
    """UTF-8 text that it is fine-tuned on; by default CPython's documentation."""
    rehearse: bool = False
    """Go through everything at tiny sizes on a CPU."""
    out: Path = Path("runs/gpu-run")
    """Folder for tables, figures and the page."""

    def check(self) -> list[Phase]:
        """The phases to run.

        Raises:
            ValueError: an option is wrong.
        """
        if not self.budget_s > 0:
            raise ValueError(f"--budget-s must be above 0, got {self.budget_s:g}")
        if self.text_file is not None and not self.text_file.is_file():
            raise ValueError(f"--text-file {self.text_file} does not exist; check the path")
        names = cli.known_names(self.phases, PHASES, what="phase", where=" in --phases")
        return [phase for name, phase in PHASES.items() if name in names]


@dataclass
class Outcome:
    """What became of a phase.

    Attributes:
        phase: it.
        status: whether it ran to its end.
        seconds: that it took.
        remarks: what went wrong or was left out, each in one line.
        rows: of its table, all of them text.
        commands: what ran: words, exit code (None if it was stopped) and seconds.
        figures: of its commands, by their names.
    """

    phase: Phase
    status: Status = "done"
    seconds: float = 0.0
    remarks: list[str] = field(default_factory=list)
    rows: list[dict[str, str]] = field(default_factory=list)
    commands: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """What JSON files hold of it."""
        return {
            "answers": self.phase.answers,
            "status": self.status,
            "seconds": round(self.seconds, 1),
            "remarks": self.remarks,
            "commands": self.commands,
            "figures": self.figures,
        }


def variables(options: Options) -> dict[str, str]:
    """Environment of the commands. No program is of a cache, which does not know its memory."""
    found = {
        "PYTHONUNBUFFERED": "1",
        # A program that was stopped may hold its memory for a moment.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    found |= os.environ
    found["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    found["JAX_PLATFORMS"] = "cpu" if options.rehearse else ""  # references run on the CPU
    if options.rehearse:
        found["TRITON_INTERPRET"] = "1"
        found["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # compiling is what takes long
    return found


def run_limited(
    words: Sequence[str], *, limit_s: float, log: Path, environ: Mapping[str, str]
) -> int | None:
    """Run a command under a time limit, and stop it with all that it started when that is over.

    Args:
        words: the command.
        limit_s: seconds that it may take.
        log: file for all that it prints.
        environ: its environment.

    Returns:
        The exit code; None if it was stopped.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environ,
            start_new_session=True,
        )
        try:
            return process.wait(timeout=max(0.0, limit_s))
        except subprocess.TimeoutExpired:
            return None
        finally:  # also on Ctrl-C
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def last_words(log: Path) -> str:
    """What a command said last: its last error, or its last line."""
    lines = [
        line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
    ]
    errors = [line for line in lines if line.startswith("error: ")]
    said = (errors or [line for line in lines if line] or ["nothing"])[-1]
    return said.removeprefix("error: ")[:300]


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none if it is not there."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def run_phase(phase: Phase, options: Options, setting: Setting, left_s: float) -> Outcome:
    """Run a phase's commands in what is left of the budget, in seconds."""
    outcome = Outcome(phase)
    patience = PATIENCE if options.rehearse else 1
    if left_s < phase.estimate_s:
        outcome.status = "left out"
        outcome.remarks.append(
            f"takes about {phase.estimate_s} s, and {max(0.0, left_s):.0f} s of the budget are left"
        )
        return outcome
    start = time.monotonic()
    limit_s = patience * min(phase.limit_s, left_s)
    try:
        jobs = phase.jobs(setting)
    except LeftOut as reason:
        outcome.status = "left out"
        outcome.remarks.append(str(reason))
        return outcome
    for job in jobs:
        remaining_s = limit_s - (time.monotonic() - start)
        if remaining_s <= 0:
            outcome.remarks.append(f"{job.name}: not begun, the phase's time was over")
            outcome.status = "cut short" if outcome.status == "done" else outcome.status
            continue
        _run_job(job, outcome, options, remaining_s)
    outcome.seconds = time.monotonic() - start
    return outcome


def _run_job(job: Job, outcome: Outcome, options: Options, limit_s: float) -> None:
    folder = options.out / outcome.phase.name / job.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / job.table).unlink(missing_ok=True)  # of an earlier run
    (folder / "metrics.json").unlink(missing_ok=True)
    words = ["-m", job.module, *job.arguments]
    start = time.monotonic()
    code = run_limited(
        [sys.executable, *words, "--out", str(folder)],
        limit_s=limit_s,
        log=folder / "log.txt",
        environ=variables(options),
    )
    seconds = round(time.monotonic() - start, 1)
    outcome.commands.append(
        {"job": job.name, "words": ["python", *words], "exit_code": code, "seconds": seconds}
    )
    outcome.rows += [{"job": job.name, **row} for row in read_rows(folder / job.table)]
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError, KeyError):
        record = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        outcome.figures[job.name] = record["figures"]
    if code is None:
        outcome.status = "cut short" if outcome.status == "done" else outcome.status
        outcome.remarks.append(f"{job.name}: stopped after {seconds:.0f} s")
    elif code:
        outcome.status = "failed"
        outcome.remarks.append(f"{job.name}: {last_words(folder / 'log.txt')}")


def probe() -> None:
    """Print, as JSON, the device and why kernels do not run on it."""
    kinds = {"mosaic": why_not_mosaic, "triton": why_not_triton}
    dtype = "float32" if os.environ.get("TRITON_INTERPRET") else "bfloat16"
    missing = {name: why(dtype) for name, why in kinds.items()}
    print(json.dumps({"environment": environment(), "missing": missing}))


def look_around(options: Options) -> dict[str, Any]:
    """What `probe` says in a process of its own, which leaves the device free.

    Raises:
        ValueError: there is no GPU.
    """
    log = options.out / "probe.txt"
    code = run_limited(
        [sys.executable, "-c", "from experiments import gpu_run; gpu_run.probe()"],
        limit_s=PROBE_LIMIT_S * (PATIENCE if options.rehearse else 1),
        log=log,
        environ=variables(options),
    )
    if code != 0:
        raise ValueError(f"JAX does not start: {last_words(log)}")
    found = json.loads(log.read_text(encoding="utf-8").strip().splitlines()[-1])
    kind = found["environment"]["device"]["kind"]
    if not options.rehearse and found["environment"]["device"]["platform"] != "gpu":
        raise ValueError(
            f"JAX finds no GPU, only {kind}; install spt-jax[cuda13], or add --rehearse to go "
            "through the run on a CPU"
        )
    return found


def phase_table(outcome: Outcome) -> Table | None:
    """The rows of a phase, in the columns in which any has something; None without rows."""
    columns = [c for c in outcome.phase.columns if any(c.cell(row) for row in outcome.rows)]
    if not columns:
        return None
    table = Table()
    for column in columns:
        table.add_column(column.header)
    for row in outcome.rows:
        table.add_row(*(column.cell(row).replace("|", "/") for column in columns))
    return table


def summary(outcomes: Sequence[Outcome]) -> Table:
    """One row a phase."""
    table = Table()
    for header in ("phase", "what became of it", "s", "remarks"):
        table.add_column(header)
    for outcome in outcomes:
        remarks = "; ".join(outcome.remarks).replace("|", "/")
        seconds = f"{outcome.seconds:.0f}" if outcome.commands else ""
        table.add_row(outcome.phase.name, outcome.status, seconds, remarks)
    return table


def write_page(options: Options, outcomes: Sequence[Outcome], record: Mapping[str, Any]) -> None:
    """Write DIR/gpu-run.md."""
    parts: list[str | Table] = [REHEARSAL] if options.rehearse else []
    parts.append(summary(outcomes))
    for outcome in outcomes:
        if (table := phase_table(outcome)) is not None:
            parts += [f"## {outcome.phase.name}", outcome.phase.answers, table]
            if any(column.header == "peak MB" for column in table.columns):
                parts.append(PEAK)
            if outcome.status in ("cut short", "failed"):
                parts.append(f"{outcome.status}: {bullets(outcome.remarks)}".replace("* ", "", 1))
    title = "A rehearsal of the GPU run" if options.rehearse else "The prepared GPU run"
    parts.append(how("experiments.gpu_run", options, here_and_now(record)))
    write_text_atomic(options.out / "gpu-run.md", page(title, *parts))


def run(options: Options, phases: Sequence[Phase], report: Callable[[str], None]) -> list[Outcome]:
    """Run the phases, and write everything after each.

    Args:
        options: of the run.
        phases: what to run.
        report: gets a line on what became of each phase.
    """
    begun = time.monotonic()
    found = look_around(options)
    record = found["environment"]
    setting = Setting(
        rehearse=options.rehearse,
        model=options.model,
        text_file=options.text_file,
        missing=found["missing"],
    )
    patience = PATIENCE if options.rehearse else 1
    outcomes: list[Outcome] = []
    for phase in phases:
        left_s = options.budget_s - (time.monotonic() - begun) / patience
        outcome = run_phase(phase, options, setting, left_s)
        outcomes.append(outcome)
        marked: dict[str, Any] = {"rehearsal": options.rehearse}
        if outcome.rows:
            rows = [marked | row if options.rehearse else row for row in outcome.rows]
            write_csv(options.out / f"{phase.name}.csv", rows)
        else:  # of an earlier run
            (options.out / f"{phase.name}.csv").unlink(missing_ok=True)
        write_json_atomic(options.out / f"{phase.name}.json", marked | record | outcome.record())
        figures = {o.phase.name: o.record() for o in outcomes}
        write_metrics(options.out, "gpu_run", options, figures, **marked, **record)
        write_page(options, outcomes, record)
        text = "; ".join((outcome.status, *outcome.remarks))
        report(f"{phase.name}, {outcome.seconds:.0f} s: {text}")
    return outcomes


def main() -> None:
    """Run the phases."""
    options = cli.parse(Options, "experiments.gpu_run", __doc__)
    phases = options.check()
    options.out.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_platforms", "cpu")  # the GPU is the phases'
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # stops what runs, too
    outcomes = run(options, phases, lambda line: print(line, flush=True))
    unfinished = [o.phase.name for o in outcomes if o.status in ("failed", "cut short")]
    print(f"wrote {options.out / 'gpu-run.md'}")
    if unfinished:
        sys.exit(f"error: not finished: {', '.join(unfinished)}; {options.out}/PHASE has the logs")


if __name__ == "__main__":
    cli.run(main)
