"""Tile sizes found by measuring, kept between processes.

Each kernel has a heuristic for its tile sizes. `autotune` tries the alternatives on the device and
keeps the fastest in a file, by device, version of jax, kernel and shapes; from then on the kernel
takes those.
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.devices import default_device

Key = tuple[str, str]  # A kernel and its shapes.

_forced: contextvars.ContextVar[dict[Key, Any]] = contextvars.ContextVar("forced")
_met: contextvars.ContextVar[dict[Key, list[Any]] | None] = contextvars.ContextVar(
    "met", default=None
)


def cache_path() -> Path:
    """The file of tile sizes: `tuning.json` in SPT_JAX_CACHE_DIR, or in the user's cache."""
    folder = os.environ.get("SPT_JAX_CACHE_DIR")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder or Path(home) / "spt_jax") / "tuning.json"


def choose(kernel: str, shapes: str, default: Any, candidates: Iterable[Any]) -> Any:
    """Tile sizes for a kernel: those that measuring found best for its shapes, else the default.

    Args:
      kernel: Name of the kernel.
      shapes: Everything that the choice depends on, as text.
      default: What the heuristic takes; a frozen dataclass.
      candidates: Alternatives for `autotune`.
    """
    key = kernel, shapes
    met = _met.get()
    if met is not None:
        met[key] = [default, *(c for c in candidates if c != default)]
    forced = _forced.get({})
    if key in forced:
        return forced[key]
    found = _read(cache_path()).get(_entry(key))
    try:
        return default if found is None else dataclasses.replace(default, **found)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{cache_path()}: tile sizes {found} of {kernel} are not valid ({error}); delete the "
            "file, and autotune again."
        ) from error


def autotune(
    function: Callable[..., Any],
    *arguments: Any,
    rounds: int = 5,
    report: Callable[[str], None] = lambda line: None,
) -> dict[Key, Any]:
    """Measures tile sizes for all kernels that a function launches, and keeps the fastest.

    The function is compiled anew for each alternative of each kernel, so take a single layer rather
    than a model. Alternatives that do not compile are passed over.

    Args:
      function: What to run, compilable by `jax.jit`; a training step, say.
      arguments: Its arguments.
      rounds: Timed rounds of each alternative, of which the median counts.
      report: Is told what was measured, a line an alternative.

    Returns:
      The tile sizes chosen, by kernel and shapes.

    Raises:
      ValueError: The function launches no kernel with tile sizes.
    """
    met: dict[Key, list[Any]] = {}
    token = _met.set(met)
    try:
        jax.clear_caches()
        jax.eval_shape(function, *arguments)
    finally:
        _met.reset(token)
    if not met:
        raise ValueError("autotune: the function launches no kernel whose tile sizes can be chosen")
    chosen: dict[Key, Any] = {}
    for key, candidates in met.items():
        times = {}
        for config in candidates:
            took = _time_ms(function, arguments, {**chosen, key: config}, rounds)
            report(f"{key[0]} {config}: {'does not compile' if took is None else f'{took:.3f} ms'}")
            if took is not None:
                times[config] = took
        if not times:
            raise ValueError(f"autotune: no tile sizes of {key[0]} compile for {key[1]}")
        chosen[key] = min(times, key=lambda config: times[config])
    _write(cache_path(), {_entry(key): dataclasses.asdict(c) for key, c in chosen.items()})
    jax.clear_caches()
    return chosen


def _time_ms(
    function: Callable[..., Any], arguments: Any, configs: dict[Key, Any], rounds: int
) -> float | None:
    """Median time of a call with the given tile sizes; None if it does not compile."""
    token = _forced.set(configs)
    try:
        jax.clear_caches()
        try:
            run = jax.jit(lambda *a: function(*a)).lower(*arguments).compile()
        except (NotImplementedError, ValueError, jax.errors.JaxRuntimeError):
            return None
        jax.block_until_ready(run(*arguments))
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            jax.block_until_ready(run(*arguments))
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)
    finally:
        _forced.reset(token)


def _entry(key: Key) -> str:
    """The name of a choice in the file."""
    return " | ".join((default_device().device_kind, jax.__version__, *key))


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        modified = path.stat().st_mtime_ns
    except FileNotFoundError:
        return {}
    return _parse(path, modified)


@functools.lru_cache(maxsize=1)
def _parse(path: Path, modified: int) -> dict[str, dict[str, Any]]:
    del modified  # a part of the key
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); delete it, and autotune again.") from error


def _write(path: Path, entries: dict[str, dict[str, Any]]) -> None:
    """Adds entries to the file, at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    everything = _read(path) | entries
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(everything, file, indent=2, sort_keys=True)
    Path(file.name).replace(path)
