"""Figures of a run shown by trackio or Weights & Biases while it goes on."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from spt_jax.finetune.config import Tracker

Record = Callable[[Mapping[str, float], int], None]


def check_tracker(tracker: Tracker) -> None:
    """Raise a ModuleNotFoundError unless a tracker's package is installed."""
    if importlib.util.find_spec(tracker) is None:
        raise ModuleNotFoundError(
            f"tracker {tracker} is not installed: pip install 'spt-jax[{tracker}]', or leave "
            "tracker out; TensorBoard events are written without it"
        )


@contextmanager
def tracked(
    tracker: Tracker, project: str, name: str, config: Mapping[str, Any]
) -> Iterator[Record]:
    """A run of a tracker; gives what takes figures by their names, and the step.

    Args:
        tracker: its package; all of them have `init`, `log` and `finish` in common.
        project: to which the run belongs.
        name: of the run.
        config: what is kept beside it.
    """
    package = importlib.import_module(tracker)
    package.init(project=project, name=name, config=dict(config))
    try:
        yield lambda values, step: package.log(dict(values), step=step)
    finally:
        package.finish()
