"""Metrics of a model on examples, in each of its forms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from spt_jax.config import Form
from spt_jax.forms import FORMS
from spt_jax.models.common import check_batch
from spt_jax.sharding import Devices
from spt_jax.training.checks import check_kinds, check_labels
from spt_jax.training.data import Examples, eval_batches
from spt_jax.training.metrics import evaluation_metrics
from spt_jax.training.objectives import Objective
from spt_jax.training.step import Partition, eval_step


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
    check_kinds(data)
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
    check_kinds(data)
    check_labels(parts, objective, metrics, data)
    devices = Devices(None)
    step = evaluation_step(parts, objective, metrics, devices, form)

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


def evaluation_step(
    parts: Partition,
    objective: Objective,
    metrics: Sequence[str],
    devices: Devices,
    form: Form | None = None,
) -> Any:
    """`eval_step` of a batch on devices, as a program."""
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


def form_of(metric: str) -> Form | None:
    """The form in a metric's name; None for the metric of the form that is judged."""
    return next((form for form in FORMS if metric.endswith(f"_{form}")), None)


def evaluate_forms(
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
