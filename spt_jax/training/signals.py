"""A run that a signal stops."""

from __future__ import annotations

import itertools
import os
import signal as signals
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jax.experimental.multihost_utils import reached_preemption_sync_point

from spt_jax.processes import several


class Interrupted(RuntimeError):
    """Training stopped on a signal, after it had saved a checkpoint.

    Attributes:
        signal: number of the signal.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


@contextmanager
def stop_signal() -> Iterator[Callable[[], int | None]]:
    """Tell the number of the first SIGTERM or SIGINT; a second one acts as it always does.

    Several processes stop at the same step, by JAX's preemption service: it tells them all of a
    SIGTERM to any of them, as long as all ask equally often.
    """
    in_main = threading.current_thread() is threading.main_thread()  # which alone handles signals
    if several():
        with _stop_of_all(in_main) as stop:
            yield stop
    elif in_main:
        with _stop_of_one() as stop:
            yield stop
    else:
        yield lambda: None


@contextmanager
def _stop_of_all(in_main: bool) -> Iterator[Callable[[], int | None]]:
    received: list[int] = []
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


@contextmanager
def _stop_of_one() -> Iterator[Callable[[], int | None]]:
    received: list[int] = []
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
