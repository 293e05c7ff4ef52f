"""A model adapted at the start of a run, and the line that says what it runs on."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from flax import nnx

from pallas_kernels import best_implementation, why_not_mosaic, why_not_triton
from spt_jax.adapt import adapt
from spt_jax.adaptation import ADAPTATION_FILE, AdaptationReport
from spt_jax.config import SPTConfig
from spt_jax.training import Examples


def adapted[Model: nnx.Module](
    model: Model,
    config: SPTConfig,
    calibration: Examples,
    out: Path,
    *,
    rngs: nnx.Rngs,
    resume: bool,
    training_tokens: int | None = None,
) -> Model:
    """The model adapted, and its choices told; a run that goes on makes those of its beginning.

    Args:
        model: dense; changed in place.
        config: what to add.
        calibration: what is measured on.
        out: folder of the run.
        rngs: of LoRA's factors and random fits.
        resume: whether the run goes on.
        training_tokens: see `adapt`.
    """
    record, choices = out / ADAPTATION_FILE, None
    if resume and config.has_budget and record.is_file():
        choices = AdaptationReport.load(record)
    return adapt(
        model,
        config,
        calibration_batch=calibration.columns,
        rngs=rngs,
        choices=choices,
        training_tokens=training_tokens,
    )


def calibration_rows(data: Examples, number: int, *, seed: int) -> Examples:
    """Random training examples to calibrate on.

    Args:
        data: to draw from.
        number: of rows at most.
        seed: of the choice.
    """
    return data.take(np.random.default_rng(seed).permutation(len(data))[:number])


def device_line(dtype: str) -> str:
    """What a run trains on, in which type, with which kernels; on a GPU, why with no faster ones.

    Args:
        dtype: type that it computes in.
    """
    devices, kernels = jax.devices(), best_implementation(dtype)
    line = f"{len(devices)} x {devices[0].device_kind}, {dtype}, kernels {kernels}"
    if devices[0].platform != "gpu" or kernels != "xla":
        return line
    reasons = {"mosaic": why_not_mosaic(dtype), "triton": why_not_triton(dtype)}
    return line + "".join(f"; not {name}: {why}" for name, why in reasons.items() if why)
