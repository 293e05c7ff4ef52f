"""Training from beginning to end: a plan, a compiled step, a run, and what came of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from spt_jax.adaptation import ADAPTATION_FILE
from spt_jax.config import TrainConfig
from spt_jax.processes import ProcessLost, is_first, is_lost
from spt_jax.sharding import Devices
from spt_jax.training.checkpoint import Checkpoints
from spt_jax.training.data import Examples, batch_lengths, cut_batch, eval_batches
from spt_jax.training.memory import compiled_peak_bytes, device_peak_bytes, peak_of_run
from spt_jax.training.objectives import Objective
from spt_jax.training.plan import Plan, planned
from spt_jax.training.progress import Reporter
from spt_jax.training.results import TrainResult
from spt_jax.training.run import Run
from spt_jax.training.signals import stop_signal
from spt_jax.training.step import TrainState, start, write_back


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
    record: Callable[[Mapping[str, float], int], None] | None = None,
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
        record: takes what TensorBoard gets, figures by name such as `train/loss`, and the step;
            what it raises is told, and it is called no more.

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
    plan = planned(
        model,
        train_data,
        config,
        objective=objective,
        eval_data=eval_data,
        metrics=metrics,
        identity=identity,
        resume=resume,
    )
    out = Path(out_dir)
    checkpoints = Checkpoints(
        out / "checkpoints", identity=plan.identity, resume=resume, overwrite=overwrite, log=log
    )
    if plan.adaptation is not None and is_first():
        plan.adaptation.save(out / ADAPTATION_FILE)
    devices = plan.devices
    plan = replace(plan, parts=replace(plan.parts, frozen=devices.put(plan.parts.frozen)))
    state, step = start(plan.parts, config, total_steps=plan.total, objective=objective)
    with _losses_told(checkpoints), checkpoints, stop_signal() as stop, devices:
        run = Run(plan, devices.put(state), checkpoints, stop)
        del state
        resumed_from = run.restore(log) if resume else None
        peak_before = device_peak_bytes()
        compiling = time.perf_counter()
        run.programs = _compiled(plan, run.state, step)
        compile_s = time.perf_counter() - compiling
        with Reporter(out, config, run.step, plan.total, log, progress_bar, record) as report:
            run.train(report)
        checkpoints.wait()
        params = run.chosen_state().params
    write_back(model, params)
    compiled_peak = max(map(compiled_peak_bytes, run.programs.values()))
    peak, source = peak_of_run(peak_before, compiled_peak)
    return TrainResult(
        steps=run.step,
        epochs=run.step * config.batch_size / len(train_data),
        stopped_early=run.step < plan.total,
        resumed_from=resumed_from,
        **run.progress.outcome(best=config.result == "best"),
        **run.progress.averages(),
        compile_s=compile_s,
        wall_s=time.perf_counter() - began,
        peak_bytes=peak,
        peak_bytes_source=source,
        compiled_peak_bytes=compiled_peak,
        trainable_parameters=plan.parts.num_trainable,
        total_parameters=plan.parts.num_parameters,
        adapt_s=None if plan.adaptation is None else plan.adaptation.seconds,
    )


def _compiled(
    plan: Plan, state: TrainState, step: Callable[..., Any]
) -> dict[int, jax.stages.Compiled]:
    """The step as a program for each length of sequences."""
    devices = plan.devices
    jitted = jax.jit(step, donate_argnums=0, out_shardings=devices.outputs(state))
    return {
        sample["input_ids"].shape[1]: jitted.lower(
            state, plan.parts.frozen, devices.batch(sample, plan.config.batch_size)
        ).compile()
        for sample in _samples(plan.train_data, plan.config, devices)
    }


def _samples(
    examples: Examples, config: TrainConfig, devices: Devices
) -> Iterator[dict[str, np.ndarray]]:
    """This process' rows of a batch of each sequence length that training may meet."""
    sample = next(eval_batches(examples, config.batch_size, devices.rows(config.batch_size)))
    lengths = batch_lengths(examples) if config.group_by_length else (examples.length,)
    return (cut_batch(sample, length) for length in lengths)


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


def _silence(message: str) -> None:
    """The log of processes but the first."""
