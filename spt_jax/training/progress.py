"""How far a run has come, and how it tells."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from spt_jax.config import TrainConfig
from spt_jax.forms import FORMS
from spt_jax.processes import is_first
from spt_jax.training.evaluation import form_of
from spt_jax.training.events import Board

_REMEMBERED = 200  # steps over which train_loss, step_ms and tokens/s are taken
_LOWER_IS_BETTER = ("eval_loss", "perplexity")


@dataclass
class Progress:
    """What a resumed run must know beside the arrays; saved with every checkpoint as JSON."""

    total: int | None = None  # steps that the run is to have
    data: dict[str, Any] = field(default_factory=dict)
    evaluated: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    best: float | None = None
    best_step: int | None = None
    best_metrics: dict[str, float] = field(default_factory=dict)
    strikes: int = 0
    losses: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)

    def add_step(self, loss: float, tokens: int, positions: int, ms: float) -> None:
        """Book a step: its loss, tokens without and with padding, and time."""
        self.losses = [*self.losses, loss][-_REMEMBERED:]
        self.tokens = [*self.tokens, tokens][-_REMEMBERED:]
        self.positions = [*self.positions, positions][-_REMEMBERED:]
        self.step_ms = [*self.step_ms, ms][-_REMEMBERED:]

    def add_evaluation(self, step: int, metrics: dict[str, float], monitor: str) -> None:
        """Book an evaluation, whose metric `monitor` says how good it is."""
        value = metrics[monitor]
        sign = -1 if monitor.startswith(_LOWER_IS_BETTER) else 1
        self.evaluated, self.metrics = step, metrics
        if self.best is None or sign * value > sign * self.best:
            self.best, self.best_step, self.best_metrics, self.strikes = value, step, metrics, 0
        else:
            self.strikes += 1

    def outcome(self, *, best: bool) -> dict[str, Any]:
        """The last evaluation or the best one, by its names in `TrainResult`."""
        return {
            "metrics": self.best_metrics if best else self.metrics,
            "metrics_step": self.best_step if best else self.evaluated,
            "best_step": self.best_step,
        }

    def averages(self) -> dict[str, Any]:
        """Loss and speed over the last steps, by their names in `TrainResult`."""
        seconds = sum(self.step_ms) / 1e3
        return {
            "train_loss": statistics.fmean(self.losses),
            "step_ms": statistics.median(self.step_ms),
            "tokens_per_s": sum(self.tokens) / seconds,
            "padded_tokens_per_s": sum(self.positions) / seconds,
        }


class Reporter:
    """Progress bar or log lines, and TensorBoard events."""

    def __init__(
        self,
        out_dir: Path,
        config: TrainConfig,
        start: int,
        total: int,
        log: Callable[[str], None],
        progress_bar: bool | None,
    ) -> None:
        shown = is_first() and (sys.stderr.isatty() if progress_bar is None else progress_bar)
        self._bar = tqdm(total=total, initial=start, disable=not shown, unit="step")
        self._board = Board(out_dir / "tensorboard", start + 1, log)
        self._log = log
        self._every = 0 if shown else config.log_every or max(1, total // 10)
        self._total = total

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._board.close()

    def step(self, step: int, values: Mapping[str, float], progress: Progress) -> None:
        """Show a step that `progress` has booked."""
        ms = statistics.median(progress.step_ms[-20:])
        speed = sum(progress.tokens[-20:]) / sum(progress.step_ms[-20:]) * 1e3
        self._bar.set_postfix_str(f"loss {values['loss']:.4f}, {speed:.0f} tokens/s", refresh=False)
        self._bar.update()
        self._board.add_scalars("train", {**values, "step_ms": ms, "tokens_per_s": speed}, step)
        if self._every and (step % self._every == 0 or step == self._total):
            left_s = round((self._total - step) * ms / 1e3)
            self._log(
                f"step {step}/{self._total}: loss {values['loss']:.4f}, {ms:.0f} ms/step, "
                f"{speed:.0f} tokens/s, {left_s // 60}:{left_s % 60:02d} left"
            )

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Show the metrics of an evaluation."""
        self._board.add_scalars("evaluation", values, step)
        shown = ", ".join(
            f"{name} {value:.4f}{_other_form(values, name)}"
            for name, value in values.items()
            if form_of(name) is None
        )
        self._log(f"evaluation at step {step}: {shown}")


def _other_form(values: Mapping[str, float], name: str) -> str:
    """A metric of the form that differs from the judged one, in brackets."""
    others = [(f, values.get(f"{name}_{f}", values[name])) for f in FORMS]
    return "".join(f" ({form} form {x:.4f})" for form, x in others if x != values[name])
