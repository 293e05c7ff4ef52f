"""A small run of `experiments.glue`, struck by faults as a process and resumed in this one."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from experiments import glue
from experiments.glue_tasks import TASKS
from spt_jax import cli
from tests.experiments.tfds_directory import random_rows, write_task
from tests.processes import free_address
from tests.spt_jax.models.builders import write_readable_checkpoint

STEPS, EVERY = 48, 6
TIMES = (
    "step_ms",
    "adapt_s",
    "tokens_per_s",
    "padded_tokens_per_s",
    "compile_s",
    "wall_s",
    "resumed_from",
)
PEAKS = ("peak_bytes", "compiled_peak_bytes")
PATIENCE_S = 300  # for anything that a process is to do


@dataclass(frozen=True)
class Run:
    """A run of the command: where its model, its data and its results lie."""

    model: Path
    data: Path
    out: Path

    def elsewhere(self, out: Path) -> Run:
        """The same run with other results."""
        return replace(self, out=out)

    @property
    def arguments(self) -> list[str]:
        """Options of the command."""
        options = {
            "model": self.model,
            "task": "rte",
            "data-dir": self.data,
            "method": "spt",
            "serve": "none",
            "steps": STEPS,
            "eval-every": EVERY,
            "batch-size": 8,
            "max-length": 32,
            "out": self.out,
        }
        return [word for name, value in options.items() for word in (f"--{name}", str(value))]

    @property
    def checkpoints(self) -> Path:
        """Where its checkpoints lie."""
        return self.out / "spt" / "checkpoints"

    def names(self) -> list[str]:
        """What lies there."""
        return os.listdir(self.checkpoints) if self.checkpoints.exists() else []

    def completed(self) -> list[int]:
        """Steps of the checkpoints that are whole."""
        return sorted(int(name) for name in self.names() if name.isdigit())

    def start(self, *more: str) -> Process:
        """The command in a process of its own."""
        return Process(self, more)

    @contextlib.contextmanager
    def start_pair(self, *more: str) -> Iterator[tuple[Process, Process]]:
        """The command in two processes that train together."""
        options = pair_options()
        with self.start(*more, *options[0]) as first, self.start(*more, *options[1]) as second:
            yield first, second

    def finish(self, *more: str) -> tuple[int, str]:
        """The command in this process: its exit code and what it wrote to standard error."""
        errors, code = io.StringIO(), 0
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stderr(errors),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            patch.setattr(sys, "argv", ["experiments.glue", *self.arguments, *more])
            patch.setattr(sys, "unraisablehook", sys.unraisablehook)  # which the command changes
            try:
                cli.run(glue.main)
            except SystemExit as stop:
                code = int(stop.code or 0)
        return code, errors.getvalue()

    def at_first_checkpoint(self, act: Callable[[], Any]) -> threading.Thread:
        """A thread that does something once the run has a checkpoint that is whole."""

        def watch() -> None:
            deadline = time.monotonic() + PATIENCE_S
            while not self.completed():
                assert time.monotonic() < deadline
                time.sleep(1e-3)
            act()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        return thread

    def figures(self) -> dict[str, Any]:
        """What it wrote to metrics.json."""
        return json.loads((self.out / "metrics.json").read_text())["figures"]["spt"]

    def resumed_from(self) -> int | None:
        """Step of the checkpoint that it went on from."""
        return self.figures()["resumed_from"]

    def outcome(self) -> tuple[dict[str, Any], str]:
        """What faults must not change: figures but times, and the digest of what was trained."""
        record = json.loads((self.checkpoints / str(STEPS) / "record" / "metadata").read_text())
        figures = {name: x for name, x in self.figures().items() if name not in TIMES}
        return figures, record["digest"]


def pair_options() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Options by which two processes find each other."""
    shared = ("--coordinator", free_address(), "--num-processes", "2", "--process-id")
    return (*shared, "0"), (*shared, "1")


class Process:
    """A run under way."""

    def __init__(self, run: Run, more: tuple[str, ...]) -> None:
        self._run = run
        self._process = subprocess.Popen(
            [sys.executable, "-m", "experiments.glue", *run.arguments, *more],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._lines: list[str] = []
        assert self._process.stderr is not None
        self._reader = threading.Thread(target=self._lines.extend, args=[self._process.stderr])
        self._reader.start()

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def wait_for(self, holds: Callable[[], bool]) -> bool:
        """Whether it holds before the process ends."""
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            if self._process.poll() is not None:
                return False
            assert time.monotonic() < deadline, self.errors()
            time.sleep(5e-4)
        return True

    def wait_for_write(self, number: int = 1) -> bool:
        """Whether it begins to write so many checkpoints, before it ends."""
        seen: set[str] = set()

        def begun() -> bool:
            seen.update(name for name in self._run.names() if "tmp" in name)
            return len(seen) >= number

        return self.wait_for(begun)

    def wait_for_checkpoint(self) -> bool:
        """Whether a checkpoint is whole before it ends."""
        return self.wait_for(lambda: bool(self._run.completed()))

    def send(self, signal: int) -> None:
        """Send a signal."""
        self._process.send_signal(signal)

    def end(self) -> tuple[int, str]:
        """Its exit code, once it ends, and what it wrote to standard error."""
        code = self._process.wait(PATIENCE_S)
        self._reader.join()
        return code, self.errors()

    def errors(self) -> str:
        """What it wrote to standard error."""
        return "".join(self._lines)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()


def message(errors: str) -> str:
    """The one line by which the command says why it stopped."""
    assert "Traceback" not in errors, errors
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, errors
    return lines[0].removeprefix("error: ")


def make(directory: Path) -> Run:
    """A tiny encoder with MiniLM's tokenizer, and data that it can read."""
    model = write_readable_checkpoint(directory / "model", num_positions=64, num_layers=1)
    task = TASKS["rte"]
    splits = {"train": random_rows(task, 200, 0), "validation": random_rows(task, 40, 1)}
    write_task(directory / "data", task, splits)
    return Run(model, directory / "data", directory / "straight")


def files_of(directory: Path) -> Iterator[Path]:
    """All files below a directory, in order."""
    return iter(sorted(path for path in directory.rglob("*") if path.is_file()))
