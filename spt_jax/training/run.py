"""A run under way: steps, and between them evaluations and checkpoints."""

from __future__ import annotations

import math
import signal as signals
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, NoReturn

import jax

from spt_jax.config import TrainConfig
from spt_jax.training.checkpoint import CheckpointError, Checkpoints
from spt_jax.training.data import train_batches
from spt_jax.training.evaluation import evaluate_forms, evaluation_step
from spt_jax.training.optimizer import learning_rate_schedule
from spt_jax.training.plan import Plan
from spt_jax.training.progress import Progress, Reporter
from spt_jax.training.results import NonFiniteLoss
from spt_jax.training.signals import Interrupted
from spt_jax.training.step import TrainState


class Run:
    """A run under way.

    Attributes:
        state: what trains.
        step: steps taken.
        progress: what is saved beside the state.
        programs: the step, for each length of sequences.
    """

    def __init__(
        self,
        plan: Plan,
        state: TrainState,
        checkpoints: Checkpoints,
        stop: Callable[[], int | None],
    ) -> None:
        config = plan.config
        self.state, self.step, self.programs = state, 0, dict[int, jax.stages.Compiled]()
        self.progress = Progress(plan.total)
        self._plan, self._checkpoints, self._stop = plan, checkpoints, stop
        self._batches = train_batches(
            plan.train_data,
            config.batch_size,
            seed=config.seed,
            group_by_length=config.group_by_length,
            rows=plan.devices.rows(config.batch_size),
        )
        self._saved: int | None = None  # step of the last checkpoint
        # The step that the device is at: its number, length of sequences, and metrics to come.
        self._under_way: tuple[int, int, dict[str, jax.Array]] | None = None
        self._mark = 0.0  # when it began
        self._evaluate_splits = _split_evaluation(plan, stop)

    def restore(self, log: Callable[[str], None]) -> int | None:
        """Go on from the newest good checkpoint; its step, or None where there is none."""
        restored = self._checkpoints.restore_latest(self.state)
        if restored is None:
            log(f"no checkpoint to go on from in {self._checkpoints.directory}: starting at step 0")
            return None
        self.state, record = restored
        self.progress = Progress(**record)
        self._batches.set_state(self.progress.data)
        log(f"going on from checkpoint {self._checkpoints.last_good}")
        self.step = self._saved = int(self.state.step)
        total = self._plan.total
        _tell_extension(self.step, self.progress.total, total, self._plan.config, log)
        self.progress.total = total
        return self.step

    def train(self, report: Reporter) -> None:
        """Take all steps, with evaluations and checkpoints between them."""
        self._mark = time.perf_counter()
        while not self._pause(report):
            self._advance(report)

    def chosen_state(self) -> TrainState:
        """The last state or, where the best was asked for, that of the best evaluation."""
        best = self.progress.best_step
        if self._plan.config.result == "best" and best is not None and best != self.step:
            return self._checkpoints.restore(best, self.state)[0]
        return self.state

    def _pause(self, report: Reporter) -> bool:
        """Evaluate, save and stop where that is due; whether the run is at its end."""
        plan = self._plan
        finished = self.step == plan.total or self._out_of_patience()
        evaluating = (
            bool(plan.splits)
            and self.progress.evaluated != self.step
            and (finished or _evaluation_due(self.step, plan.config, len(plan.train_data)))
        )
        saving = finished or evaluating or _multiple(self.step, plan.config.checkpoint_every)
        if not (saving or self._stop()):
            return False
        self._settle(report)
        if evaluating:
            self._evaluate(report)
            finished = finished or self._out_of_patience()
        self._save()
        if signal := self._stop():
            self._interrupt(signal)
        self._mark = time.perf_counter()
        return finished

    def _advance(self, report: Reporter) -> None:
        """Begin a step, and book the one before: the device always has the next one at hand."""
        plan = self._plan
        rows = next(self._batches)
        length = rows["input_ids"].shape[1]
        batch = plan.devices.batch(rows, plan.config.batch_size)
        self.state, metrics = self.programs[length](self.state, plan.parts.frozen, batch)
        self.step += 1
        self._settle(report)
        self._under_way = self.step, length, metrics

    def _settle(self, report: Reporter) -> None:
        """Wait for the step under way and book it."""
        if self._under_way is None:
            return
        number, length, on_device = self._under_way
        self._under_way = None
        values = {name: x.item() for name, x in jax.device_get(on_device).items()}
        now = time.perf_counter()
        if not values.pop("finite"):
            raise NonFiniteLoss(_not_finite(number, values, self._checkpoints))
        positions = self._plan.config.batch_size * length
        tokens = values.pop("tokens")
        self.progress.add_step(values["loss"], tokens, positions, (now - self._mark) * 1e3)
        self._mark = now
        report.step(number, values, self.progress)

    def _evaluate(self, report: Reporter) -> None:
        """Evaluate, unless a signal comes meanwhile."""
        values = self._evaluate_splits(self.state.params)
        if values is None:
            return
        losses = [x for name, x in values.items() if name.startswith("eval_loss")]
        if not all(map(math.isfinite, losses)):
            raise NonFiniteLoss(_not_finite(self.step, values, self._checkpoints))
        self.progress.add_evaluation(self.step, values, self._plan.monitor)
        report.evaluation(self.step, values)

    def _save(self) -> None:
        if self._saved != self.step:
            self.progress.data = self._batches.get_state()
            record, best = asdict(self.progress), self.progress.best_step
            self._checkpoints.save(self.step, self.state, record, best_step=best)
            self._saved = self.step

    def _interrupt(self, signal: int) -> NoReturn:
        self._checkpoints.wait()
        raise Interrupted(
            f"stopped by {signals.Signals(signal).name} at step {self.step} of {self._plan.total}; "
            f"the checkpoint {self._checkpoints.last_good} is saved, go on from it with --resume",
            signal,
        )

    def _out_of_patience(self) -> bool:
        return self.progress.strikes >= (self._plan.config.patience or math.inf)


def _split_evaluation(
    plan: Plan, stop: Callable[[], int | None]
) -> Callable[[Any], dict[str, float] | None]:
    """Metrics of parameters over all splits, in all forms; None where a signal came meanwhile."""
    parts, devices, config = plan.parts, plan.devices, plan.config
    return partial(
        evaluate_forms,
        {
            form: evaluation_step(parts, plan.objective, plan.metrics, devices, form)
            for form in plan.forms
        },
        judged=plan.judged,
        frozen=parts.frozen,
        devices=devices,
        splits=plan.splits,
        batch_size=config.eval_batch_size or config.batch_size,
        names=plan.metrics,
        stop=stop,
    )


def _tell_extension(
    step: int, before: int | None, total: int, config: TrainConfig, log: Callable[[str], None]
) -> None:
    """Say that a run has other steps than before; raise a CheckpointError where it is past them."""
    if step > total:
        raise CheckpointError(
            f"the checkpoint is at step {step}, beyond the {total} steps asked for; ask for at "
            "least as many, or start afresh with --overwrite"
        )
    if before not in (None, total):
        rate = learning_rate_schedule(config, total)(step)
        log(
            f"the run has {total} steps instead of {before}: from step {step} on the learning rate "
            f"follows the schedule of {total} steps and is {float(rate):.2g}"
        )


def _multiple(step: int, every: int | None) -> bool:
    return every is not None and step > 0 and step % every == 0


def _evaluation_due(step: int, config: TrainConfig, num_examples: int) -> bool:
    if config.eval_every is not None:
        return _multiple(step, config.eval_every)
    seen = step * config.batch_size
    return step > 0 and seen // num_examples > (seen - config.batch_size) // num_examples


def _not_finite(step: int, values: Mapping[str, float], checkpoints: Checkpoints) -> str:
    checkpoints.wait()
    wrong = {name: value for name, value in values.items() if not math.isfinite(value)}
    shown = ", ".join(f"{name} is {value}" for name, value in wrong.items())
    good = checkpoints.last_good
    return (
        f"{shown} at step {step}; the parameters were not changed by it. "
        + (f"The last good checkpoint is {good}. " if good else "There is no checkpoint yet. ")
        + "Try a lower learning rate, a longer warm-up or float32"
    )
