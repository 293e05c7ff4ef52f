"""What a program takes of memory, as the compiler plans it and as the device tells."""

from __future__ import annotations

from typing import Any

import jax


def device_peak_bytes() -> int | None:
    """The most memory that was in use on the device so far, where it tells."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def peak_of_run(before: int | None, planned: int) -> tuple[int, str]:
    """The most memory that a run took, and who says so: "device" or "compiler".

    Args:
        before: the device's peak when the run began.
        planned: what the compiler planned, which counts where the run did not raise that peak.
    """
    peak = device_peak_bytes()
    return (planned, "compiler") if peak is None or peak <= (before or 0) else (peak, "device")


def compiled_peak_bytes(compiled: jax.stages.Compiled) -> int:
    """What the compiler plans for a program: arguments, results and temporaries."""
    memory: Any = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
