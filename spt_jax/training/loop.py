"""The training loop: steps, evaluation, checkpoints, and the record of what they cost."""

from __future__ import annotations

import itertools
import math
import os
import signal as signals
import socket
import statistics
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental.multihost_utils import reached_preemption_sync_point
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c
from tqdm import tqdm

from spt_jax.adaptation import ADAPTATION_FILE, AdaptationReport
from spt_jax.config import Form, TrainConfig
from spt_jax.forms import FORMS, has_sparse_parts
from spt_jax.layers import Attention, FeedForward, RoutedFFN
from spt_jax.models.common import check_batch
from spt_jax.processes import ProcessLost, exchange, is_first, is_lost, several
from spt_jax.sharding import BATCH, TENSOR, Devices
from spt_jax.training.checkpoint import (
    CheckpointError,
    Checkpoints,
    differences_between,
    weights_fingerprint,
)
from spt_jax.training.data import (
    Examples,
    batch_lengths,
    cut_batch,
    eval_batches,
    train_batches,
)
from spt_jax.training.metrics import check_metrics, evaluation_metrics
from spt_jax.training.objectives import Objective, check_targets, next_token
from spt_jax.training.optimizer import learning_rate_schedule
from spt_jax.training.step import (
    Partition,
    eval_step,
    partition,
    start,
    write_back,
)

_REMEMBERED = 200  # steps over which train_loss, step_ms and tokens/s are taken
_LOWER_IS_BETTER = ("eval_loss", "perplexity")
#: On resume; no result depends on the first three, and more steps or epochs extend a run.
_FREE_TO_CHANGE = ("checkpoint_every", "log_every", "mesh", "steps", "epochs")


class Interrupted(RuntimeError):
    """Training stopped on a signal, after it had saved a checkpoint.

    Attributes:
        signal: number of the signal.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


class NonFiniteLoss(FloatingPointError):
    """The loss or its gradient became NaN or infinite."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run reached and what it cost.

    Attributes:
        steps: optimizer steps taken.
        epochs: passes over the training examples.
        stopped_early: whether patience ran out.
        resumed_from: step of the checkpoint that the run went on from.
        metrics: evaluation of the parameters that the model ends with; empty without `eval_data`.
        metrics_step: the step they were taken at.
        best_step: step of the best evaluation.
        train_loss: mean over the last steps, 200 at most.
        step_ms: median time of a step over the last steps, without compilation and evaluation;
            with `group_by_length` these are steps of different lengths.
        tokens_per_s: tokens that are not padding, over the last steps.
        padded_tokens_per_s: all positions, padding included.
        compile_s: time to compile the step, with `group_by_length` for each length.
        wall_s: time of this call.
        peak_bytes: highest memory use of the device if this run set it, else the compiler's.
        peak_bytes_source: "device" or "compiler".
        compiled_peak_bytes: what the compiler plans for a step, the longest: arguments, outputs,
            temporaries.
        trainable_parameters: scalars that train.
        total_parameters: scalars of all parameters.
        adapt_s: time that adapting the model took, before this call; None where nothing sparse was
            fitted.
    """

    steps: int
    epochs: float
    stopped_early: bool
    resumed_from: int | None
    metrics: dict[str, float]
    metrics_step: int | None
    best_step: int | None
    train_loss: float
    step_ms: float
    tokens_per_s: float
    padded_tokens_per_s: float
    compile_s: float
    wall_s: float
    peak_bytes: int
    peak_bytes_source: str
    compiled_peak_bytes: int
    trainable_parameters: int
    total_parameters: int
    adapt_s: float | None = None

    def figures(self) -> dict[str, Any]:
        """All of it by plain names, the evaluation metrics beside the rest; JSON."""
        flat = asdict(self)
        return flat.pop("metrics") | flat


def train(
    model: nnx.Module,
    train_data: Examples,
    config: TrainConfig,
    out_dir: Path | str,
    *,
    objective: Objective,
    eval_data: Examples | Mapping[str, Examples] | None = None,
    metrics: Sequence[str] = (),
    identity: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    log: Callable[[str], None] | None = None,
    progress_bar: bool | None = None,
) -> TrainResult:
    """Train `model` in place.

    Where several processes share `config.mesh`, all of them call this with the same arguments and
    an `out_dir` that all see. The first one logs and writes events; all write checkpoints.

    Args:
        model: follows `model.forward(...) -> (outputs, aux)`.
        train_data: training examples.
        config: how to train.
        out_dir: gets `checkpoints/`, `tensorboard/` and, of an adapted model, `adaptation.json`.
        objective: what is minimised: `next_token`, or `supervised(loss)` with a task loss.
        eval_data: examples to evaluate on; if several splits by name, each metric's name ends in
            `_` and that of its split.
        metrics: names for `evaluation_metrics`, the most important first; `eval_loss` comes
            without asking. Each is taken of the form `config.evaluate_as` and, with that form at
            the end of its name, of every form that the model has.
        identity: what else must be the same for a checkpoint to be resumed, such as the options
            of the model; JSON.
        resume: go on from the newest good checkpoint in `out_dir`, if there is one. More steps or
            epochs than before extend the run: the learning rate then follows the schedule of the
            longer run from that step on, so that the result is that of one long run only with
            `schedule="constant"` and a warm-up in steps.
        overwrite: delete the checkpoints in `out_dir`.
        log: takes messages; None prints them to standard error.
        progress_bar: None shows one on a terminal, and sparse log lines elsewhere.

    Returns:
        What the run reached and cost. The model then holds the trained parameters, in float32.

    Raises:
        Interrupted: SIGTERM or SIGINT came; a checkpoint is saved.
        NonFiniteLoss: the loss or its gradient is not finite; the model is as it was.
        CheckpointError: checkpoints cannot be written, belong to another run, or are beyond the
            steps asked for.
        ProcessLost: another process of the run is gone.
        ValueError: arguments contradict each other, the mesh, the model, or other processes; or a
            token id or type is outside the model's tables, or a label that counts none of its
            classes.
    """
    began = time.perf_counter()
    log = (log or partial(tqdm.write, file=sys.stderr)) if is_first() else _silence
    splits: Mapping[str, Examples] = (
        eval_data
        if isinstance(eval_data, Mapping)
        else {}
        if eval_data is None
        else {"": eval_data}
    )
    _check_kinds(train_data, *splits.values())
    monitor = _monitor(config, splits, metrics)
    total = config.total_steps(len(train_data))
    forms: tuple[Form, ...] = FORMS if has_sparse_parts(model) else ("dense",)
    found: AdaptationReport | None = getattr(model, "adaptation", None)
    adaptation = found if found is not None and found.layers else None
    devices = Devices(config.mesh)
    _check_mesh(model, config, devices)
    parts = _partition(model, config)
    data = {"train": train_data, **{f"eval {name}".strip(): x for name, x in splits.items()}}
    for examples in data.values():
        check_batch(model, examples.columns, examples.name)
    _check_labels(parts, objective, metrics if splits else (), *data.values())
    identity = {
        "base_weights": weights_fingerprint(parts.frozen),
        "data": {name: weights_fingerprint(dict(x.columns)) for name, x in data.items()},
        "config": {k: v for k, v in asdict(config).items() if k not in _FREE_TO_CHANGE},
        **(identity or {}),
    }
    if adaptation is not None:
        identity["adaptation"] = {line.path: line.choice for line in adaptation.layers}
    if several():
        start_of = {
            "trainable": weights_fingerprint(parts.params),
            "resume": resume,
            "steps": total,
        }
        _check_processes(identity | start_of)
    checkpoints = Checkpoints(
        Path(out_dir) / "checkpoints",
        identity=identity,
        resume=resume,
        overwrite=overwrite,
        log=log,
    )
    if adaptation is not None and is_first():
        adaptation.save(Path(out_dir) / ADAPTATION_FILE)

    parts = replace(parts, frozen=devices.put(parts.frozen))
    state, run_step = start(parts, config, total_steps=total, objective=objective)
    state = devices.put(state)
    batches = train_batches(
        train_data,
        config.batch_size,
        seed=config.seed,
        group_by_length=config.group_by_length,
        rows=devices.rows(config.batch_size),
    )
    progress = _Progress(total)

    with _losses_told(checkpoints), checkpoints, _stop_signal() as stop, devices:
        restored = checkpoints.restore_latest(state) if resume else None
        if restored is not None:
            state, record = restored
            progress = _Progress(**record)
            batches.set_state(progress.data)
            log(f"going on from checkpoint {checkpoints.last_good}")
            _tell_extension(int(state.step), progress.total, total, config, log)
            progress.total = total
        elif resume:
            log(f"no checkpoint to go on from in {checkpoints.directory}: starting at step 0")
        step = first = int(state.step)
        saved = first if restored is not None else None

        peak_before = device_peak_bytes()
        jitted = jax.jit(run_step, donate_argnums=0, out_shardings=devices.outputs(state))
        compiling = time.perf_counter()
        compiled = {
            sample["input_ids"].shape[1]: jitted.lower(
                state, parts.frozen, devices.batch(sample, config.batch_size)
            ).compile()
            for sample in _samples(train_data, config, devices)
        }
        compile_s = time.perf_counter() - compiling
        evaluate_splits = partial(
            _evaluate_forms,
            {form: _evaluation_step(parts, objective, metrics, devices, form) for form in forms},
            judged=config.evaluate_as if config.evaluate_as in forms else "dense",
            frozen=parts.frozen,
            devices=devices,
            splits=splits,
            batch_size=config.eval_batch_size or config.batch_size,
            names=metrics,
            stop=stop,
        )

        with _Reporter(Path(out_dir), config, first, total, log, progress_bar) as report:
            mark, under_way = time.perf_counter(), None

            def settle() -> None:
                """Wait for the step under way and book it."""
                nonlocal mark, under_way
                if under_way is None:
                    return
                number, length, on_device = under_way
                under_way = None
                values = {name: x.item() for name, x in jax.device_get(on_device).items()}
                now = time.perf_counter()
                if not values.pop("finite"):
                    raise NonFiniteLoss(_not_finite(number, values, checkpoints))
                positions = config.batch_size * length
                tokens = values.pop("tokens")
                progress.add_step(values["loss"], tokens, positions, (now - mark) * 1e3)
                mark = now
                report.step(number, values, progress)

            while True:
                finished = step == total or progress.strikes >= (config.patience or math.inf)
                evaluating = (
                    bool(splits)
                    and progress.evaluated != step
                    and (finished or _evaluation_due(step, config, len(train_data)))
                )
                saving = finished or evaluating or _multiple(step, config.checkpoint_every)
                if saving or stop():
                    settle()
                    if evaluating and (values := evaluate_splits(state.params)) is not None:
                        losses = [x for name, x in values.items() if name.startswith("eval_loss")]
                        if not all(map(math.isfinite, losses)):
                            raise NonFiniteLoss(_not_finite(step, values, checkpoints))
                        progress.add_evaluation(step, values, monitor)
                        report.evaluation(step, values)
                        finished |= progress.strikes >= (config.patience or math.inf)
                    if saved != step:
                        progress.data = batches.get_state()
                        best = progress.best_step
                        checkpoints.save(step, state, asdict(progress), best_step=best)
                        saved = step
                    if signal := stop():
                        checkpoints.wait()
                        raise Interrupted(
                            f"stopped by {signals.Signals(signal).name} at step {step} of {total}; "
                            f"the checkpoint {checkpoints.last_good} is saved, go on from it with "
                            "--resume",
                            signal,
                        )
                    if finished:
                        break
                    mark = time.perf_counter()
                batch = next(batches)
                length = batch["input_ids"].shape[1]
                batch = devices.batch(batch, config.batch_size)
                state, on_device = compiled[length](state, parts.frozen, batch)
                step += 1
                settle()  # the step before: the device always has the next one at hand
                under_way = step, length, on_device

        checkpoints.wait()
        best = config.result == "best"
        if best and progress.best_step is not None and progress.best_step != step:
            state, _ = checkpoints.restore(progress.best_step, state)
    write_back(model, state.params)

    compiled_peak = max(map(compiled_peak_bytes, compiled.values()))
    device_peak = device_peak_bytes()
    peak, source = compiled_peak, "compiler"
    if device_peak is not None and device_peak > (peak_before or 0):
        peak, source = device_peak, "device"
    seconds = sum(progress.step_ms) / 1e3
    return TrainResult(
        steps=step,
        epochs=step * config.batch_size / len(train_data),
        stopped_early=step < total,
        resumed_from=None if restored is None else first,
        metrics=progress.best_metrics if best else progress.metrics,
        metrics_step=progress.best_step if best else progress.evaluated,
        best_step=progress.best_step,
        train_loss=statistics.fmean(progress.losses),
        step_ms=statistics.median(progress.step_ms),
        tokens_per_s=sum(progress.tokens) / seconds,
        padded_tokens_per_s=sum(progress.positions) / seconds,
        compile_s=compile_s,
        wall_s=time.perf_counter() - began,
        peak_bytes=peak,
        peak_bytes_source=source,
        compiled_peak_bytes=compiled_peak,
        trainable_parameters=parts.num_trainable,
        total_parameters=parts.num_parameters,
        adapt_s=None if adaptation is None else adaptation.seconds,
    )


def evaluate(
    model: nnx.Module,
    data: Examples,
    *,
    objective: Objective,
    metrics: Sequence[str] = (),
    batch_size: int = 32,
) -> dict[str, float]:
    """Metrics of a model as it is.

    Args:
        model: what `objective` takes.
        data: examples to evaluate on.
        objective: gives the loss and, for metrics other than perplexity, outputs.
        metrics: names for `evaluation_metrics`; `eval_loss` comes without asking.
        batch_size: examples a step.

    Returns:
        Metrics by name.

    Raises:
        ValueError: a token id or type is outside the model's tables, a label that counts is none
            of its classes, or a metric does not go with its outputs.
    """
    _check_kinds(data)
    check_batch(model, data.columns, data.name)
    graphdef, state = nnx.split(model)
    parts = Partition({}, {}, state, lambda _, state: nnx.merge(graphdef, state))
    run = evaluator(parts, data, objective=objective, metrics=metrics, batch_size=batch_size)
    return run(parts.params)


def evaluator(
    parts: Partition,
    data: Examples,
    *,
    objective: Objective,
    metrics: Sequence[str] = (),
    batch_size: int = 32,
    form: Form | None = None,
) -> Callable[[Mapping[str, jax.Array]], dict[str, float]]:
    """As `evaluate`, for parameters that change: it compiles once.

    Args:
        parts: the model, cut.
        data: as for `evaluate`.
        objective: as for `evaluate`.
        metrics: as for `evaluate`.
        batch_size: as for `evaluate`.
        form: that is judged; None for the one that the model has.

    Returns:
        A function of `Partition.params`, as they stand, that gives metrics by name.
    """
    _check_kinds(data)
    _check_labels(parts, objective, metrics, data)
    devices = Devices(None)
    step = _evaluation_step(parts, objective, metrics, devices, form)

    def run(params: Mapping[str, jax.Array]) -> dict[str, float]:
        values = _evaluate(
            step,
            params,
            frozen=parts.frozen,
            devices=devices,
            splits={"": data},
            batch_size=batch_size,
            names=metrics,
            stop=lambda: None,
        )
        assert values is not None
        return values

    return run


def _evaluation_step(
    parts: Partition,
    objective: Objective,
    metrics: Sequence[str],
    devices: Devices,
    form: Form | None = None,
) -> Any:
    with_outputs = any(name != "perplexity" for name in metrics)
    return jax.jit(
        partial(
            eval_step,
            merge=parts.merge,
            objective=objective,
            with_outputs=with_outputs,
            form=form,
        ),
        out_shardings=devices.everywhere,
    )


@dataclass
class _Progress:
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
        self.losses = [*self.losses, loss][-_REMEMBERED:]
        self.tokens = [*self.tokens, tokens][-_REMEMBERED:]
        self.positions = [*self.positions, positions][-_REMEMBERED:]
        self.step_ms = [*self.step_ms, ms][-_REMEMBERED:]

    def add_evaluation(self, step: int, metrics: dict[str, float], monitor: str) -> None:
        value = metrics[monitor]
        sign = -1 if monitor.startswith(_LOWER_IS_BETTER) else 1
        self.evaluated, self.metrics = step, metrics
        if self.best is None or sign * value > sign * self.best:
            self.best, self.best_step, self.best_metrics, self.strikes = value, step, metrics, 0
        else:
            self.strikes += 1


class _Board:
    """TensorBoard events. Where they cannot be written, it says so and training goes on.

    Written by the caller itself: the queue of tensorboardX's own writer blocks once a full disk has
    ended the thread that empties it.
    """

    def __init__(self, directory: Path, purge_step: int, log: Callable[[str], None]) -> None:
        self._directory, self._log = directory, log
        self._file: FileIO | None = None
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        if not is_first():
            return
        with self._telling():
            directory.mkdir(parents=True, exist_ok=True)
            self._file = (directory / name).open("xb", buffering=0)
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(session_log=SessionLog(status=SessionLog.START), step=purge_step))

    def add_scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        entries = [Summary.Value(tag=f"{group}/{n}", simple_value=x) for n, x in values.items()]
        self._write(Event(summary=Summary(value=entries), step=step))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, event: Event) -> None:
        """Append a TFRecord: length, checksum, bytes, checksum."""
        event.wall_time = time.time()
        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        checksums = (struct.pack("<I", masked_crc32c(x)) for x in (length, content))
        with self._telling():
            if self._file is not None:
                self._file.write(length + next(checksums) + content + next(checksums))

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.close()
            self._file = None
            self._log(
                f"cannot write TensorBoard events under {self._directory}: {error}; training goes "
                "on without them"
            )


class _Reporter:
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
        self._board = _Board(out_dir / "tensorboard", start + 1, log)
        self._log = log
        self._every = 0 if shown else config.log_every or max(1, total // 10)
        self._total = total

    def __enter__(self) -> _Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._board.close()

    def step(self, step: int, values: Mapping[str, float], progress: _Progress) -> None:
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
        self._board.add_scalars("evaluation", values, step)
        shown = ", ".join(
            f"{name} {value:.4f}{_other_form(values, name)}"
            for name, value in values.items()
            if form_of(name) is None
        )
        self._log(f"evaluation at step {step}: {shown}")


def form_of(metric: str) -> Form | None:
    """The form in a metric's name; None for the metric of the form that is judged."""
    return next((form for form in FORMS if metric.endswith(f"_{form}")), None)


def _other_form(values: Mapping[str, float], name: str) -> str:
    """A metric of the form that differs from the judged one, in brackets."""
    others = [(f, values.get(f"{name}_{f}", values[name])) for f in FORMS]
    return "".join(f" ({form} form {x:.4f})" for form, x in others if x != values[name])


def _evaluate_forms(
    steps: Mapping[Form, Callable[..., Any]], params: Any, *, judged: Form, **options: Any
) -> dict[str, float] | None:
    """Metrics as `judged` by their names, and of each form as `NAME_FORM`."""
    found: dict[Form, dict[str, float]] = {}
    for form, step in steps.items():
        values = _evaluate(step, params, **options)
        if values is None:
            return None
        found[form] = values
    named = {f"{name}_{form}": x for form, values in found.items() for name, x in values.items()}
    return found[judged] | named


def _evaluate(
    step: Callable[..., tuple[jax.Array, jax.Array, jax.Array | None]],
    params: Any,
    *,
    frozen: nnx.State,
    devices: Devices,
    splits: Mapping[str, Examples],
    batch_size: int,
    names: Sequence[str],
    stop: Callable[[], int | None],
) -> dict[str, float] | None:
    """Metrics over all splits; None if a signal came meanwhile."""
    values: dict[str, float] = {}
    for split, examples in splits.items():
        losses, weights, outputs = 0.0, 0.0, []
        for batch in eval_batches(examples, batch_size, devices.rows(batch_size)):
            if stop():
                return None
            batch_loss, batch_weight, output = step(
                params, frozen, devices.batch(batch, batch_size)
            )
            losses, weights = losses + float(batch_loss), weights + float(batch_weight)
            if output is not None:
                outputs.append(np.asarray(output))
        loss = losses / weights
        predicted = np.concatenate(outputs)[: len(examples)] if outputs else None
        found = evaluation_metrics(names, loss, predicted, examples.columns["label"])
        values |= {name + (f"_{split}" if split else ""): value for name, value in found.items()}
    return values


def _samples(
    examples: Examples, config: TrainConfig, devices: Devices
) -> Iterator[dict[str, np.ndarray]]:
    """This process' rows of a batch of each sequence length that training may meet."""
    sample = next(eval_batches(examples, config.batch_size, devices.rows(config.batch_size)))
    lengths = batch_lengths(examples) if config.group_by_length else (examples.length,)
    return (cut_batch(sample, length) for length in lengths)


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


def _check_kinds(*splits: Any) -> None:
    for split in splits:
        if not isinstance(split, Examples):
            raise ValueError(
                f"training and evaluation take Examples, not {type(split).__name__}; make them "
                "with tokenize, pack or Examples(columns, name)"
            )


def _check_labels(
    parts: Partition, objective: Objective, metrics: Sequence[str], *splits: Examples
) -> None:
    """Raise a ValueError where labels or metrics do not go with the model's outputs."""
    step = partial(eval_step, merge=parts.merge, objective=objective)
    sample = next(eval_batches(splits[0], 1))
    outputs = jax.eval_shape(step, parts.params, parts.frozen, sample)[2]
    columns = None if outputs is None else outputs.shape[-1]
    check_metrics(metrics, columns)
    if objective is next_token:
        model: Any = jax.eval_shape(parts.merge, parts.params, parts.frozen)
        columns = jax.eval_shape(lambda model: model.output_kernel(), model).shape[1]
    for split in splits:
        check_targets(objective, split, columns)


def _check_mesh(model: nnx.Module, config: TrainConfig, devices: Devices) -> None:
    """Raise a ValueError where the mesh does not divide the batches or the model."""
    if config.mesh is None and several():
        raise ValueError(
            f"there are {jax.process_count()} processes: say how they share the work, such as "
            "mesh=MeshConfig(), which cuts batches"
        )
    share = devices.size(*BATCH)
    sizes = {
        "batch_size / accumulation": config.batch_size // config.accumulation,
        "eval_batch_size": config.eval_batch_size or config.batch_size,
    }
    for name, size in sizes.items():
        if size % share:
            raise ValueError(
                f"{name} is {size}, and the mesh cuts batches into {share} parts (data times "
                "fsdp); choose a multiple of that"
            )
    cut = devices.size(TENSOR)
    for path, module in nnx.iter_modules(model):
        name = ".".join(map(str, path))
        if isinstance(module, Attention) and module.num_kv_heads % cut:
            raise ValueError(
                f"{name} has {module.num_kv_heads} key/value heads, which {cut} devices (tensor) "
                "cannot share evenly"
            )
        if isinstance(module, FeedForward | RoutedFFN):
            blocks = module.config.num_blocks if isinstance(module, RoutedFFN) else 1
            if (units := module.up.out_features // blocks) % cut:
                raise ValueError(
                    f"{name} has {units} hidden units{' a block' * (blocks > 1)}, which {cut} "
                    "devices (tensor) cannot share evenly"
                )


def _check_processes(run: Mapping[str, Any]) -> None:
    """Raise a ValueError where processes are about to train something else than the first one."""
    first, *others = exchange(run)
    for number, other in enumerate(others, 1):
        if names := [text.partition(" was ")[0] for text in differences_between(other, first)]:
            raise ValueError(
                f"process {number} differs from process 0 in {', '.join(names)}; give the same "
                "options, model and data to all"
            )


def _silence(message: str) -> None:
    """The log of processes but the first."""


def _monitor(config: TrainConfig, splits: Mapping[str, Examples], metrics: Sequence[str]) -> str:
    names = [*metrics, "eval_loss"]
    choices = [name + (f"_{split}" if split else "") for split in splits for name in names]
    if not splits and (config.patience or config.monitor or config.result == "best"):
        raise ValueError('patience, monitor and result="best" need evaluation examples')
    if config.monitor is not None and config.monitor not in choices:
        raise ValueError(f"monitor {config.monitor!r} is not evaluated; choose from {choices}")
    return config.monitor or (choices[0] if choices else "")


def _partition(model: Any, config: TrainConfig) -> Partition:
    if not config.remat:
        return partition(model, config.trainable)
    if not hasattr(model, "remat"):
        raise ValueError(f"{type(model).__name__} has no option remat; train with remat=False")
    before, model.remat = model.remat, True
    try:
        return partition(model, config.trainable)
    finally:
        model.remat = before


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


@contextmanager
def _losses_told(checkpoints: Checkpoints) -> Iterator[None]:
    """Say plainly that another process is gone, and what is left of the run."""
    try:
        yield
    except Exception as error:
        if not is_lost(error):
            raise
        good = checkpoints.last_good
        kept = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
        raise ProcessLost(
            f"another process of the run ended or cannot be reached: {kept}. Start all processes "
            "again, with --resume to go on from the last good checkpoint"
        ) from error


@contextmanager
def _stop_signal() -> Iterator[Callable[[], int | None]]:
    """Tell the number of the first SIGTERM or SIGINT; a second one acts as it always does.

    Several processes stop at the same step, by JAX's preemption service: it tells them all of a
    SIGTERM to any of them, as long as all ask equally often.
    """
    received: list[int] = []
    in_main = threading.current_thread() is threading.main_thread()  # which alone handles signals
    if several():
        asked = itertools.count()

        def preempted() -> int | None:
            if not received and reached_preemption_sync_point(next(asked)):
                received.append(signals.SIGTERM)
            return received[0] if received else None

        before = signals.getsignal(signals.SIGINT)
        if in_main:
            signals.signal(signals.SIGINT, lambda *_: os.kill(os.getpid(), signals.SIGTERM))
        try:
            yield preempted
        finally:
            if in_main:
                signals.signal(signals.SIGINT, before)
        return
    if not in_main:
        yield lambda: None
        return
    handlers = {number: signals.getsignal(number) for number in (signals.SIGTERM, signals.SIGINT)}

    def restore() -> None:
        for number, handler in handlers.items():
            signals.signal(number, handler)

    def receive(number: int, frame: Any) -> None:
        received.append(number)
        restore()

    for number in handlers:
        signals.signal(number, receive)
    try:
        yield lambda: received[0] if received else None
    finally:
        restore()


def device_peak_bytes() -> int | None:
    """The most memory that was in use on the device so far, where it tells."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def compiled_peak_bytes(compiled: jax.stages.Compiled) -> int:
    """What the compiler plans for a program: arguments, results and temporaries."""
    memory: Any = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
