"""How experiments measure programs; each of them says the same thing by the same word.

*Peak MB* is what the compiler plans for one call, in 10^6 bytes: arguments, results and
temporaries, where a donated argument and the result in its place count once. It is `PEAK` in one
line, and `peak_bytes` in figures. *Device MB* is the high-water mark that a device reports.

*Times* are of calls that are waited for, after one that is not kept. Programs that are compared
take turns, and a table shows the median over the turns and the interquartile range beside it.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from spt_jax.training.memory import compiled_peak_bytes as peak_bytes
from spt_jax.training.memory import device_peak_bytes

__all__ = [
    "FAILURES",
    "OUT_OF_MEMORY",
    "PEAK",
    "calls_for",
    "device_peak_bytes",
    "failure_of",
    "in_threads",
    "median_and_spread",
    "peak_bytes",
    "times_ms",
]

#: Footnote of tables.
PEAK = "Peak MB: what the compiler plans for a call, its arguments, results and temporaries."
#: What a program that cannot be compiled or run raises: JAX's errors are among these.
FAILURES = (RuntimeError, ValueError)
OUT_OF_MEMORY = "out of memory"
COMPILER_THREADS = 8


def times_ms(
    call: Callable[[], Any], repeats: int, *, calls: int = 1, warm_up: bool = True
) -> list[float]:
    """Times of a call.

    Args:
        call: returns arrays, which are waited for.
        repeats: number of times.
        calls: that are queued for each of them, which is their mean.
        warm_up: whether a call comes before them. It pays for what ran before.
    """
    if warm_up:
        jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            result = call()
        jax.block_until_ready(result)
        times.append(1e3 * (time.perf_counter() - start) / calls)
        del result
    return times


def calls_for(call: Callable[[], Any], least_ms: float) -> int:
    """Calls to queue for a time that lasts long enough."""
    return max(1, math.ceil(least_ms / times_ms(call, 1)[0]))


def median_and_spread(times: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The median, and the interquartile range.

    Example:
        >>> median_and_spread([1.0, 2.0, 3.0, 4.0, 9.0])
        (3.0, 2.0)
    """
    low, middle, high = np.percentile(times, (25, 50, 75))
    return float(middle), float(high - low)


def failure_of(error: Exception) -> str:
    """Why a program could not run, in one line."""
    text = " ".join(str(error).split())
    if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
        return OUT_OF_MEMORY
    return f"{type(error).__name__}: {text[:200]}"


def in_threads[Item, Result](
    function: Callable[[Item], Result], items: Sequence[Item]
) -> Iterator[tuple[Item, Result]]:
    """Each item with `function(item)`, in order; several are under way at a time.

    For compilation, of which much runs outside of Python.
    """
    with ThreadPoolExecutor(min(COMPILER_THREADS, os.cpu_count() or 1)) as pool:
        yield from zip(items, pool.map(function, items), strict=True)
