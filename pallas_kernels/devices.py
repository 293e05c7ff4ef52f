"""The device that kernels are traced for."""

from typing import Any

import jax


def default_device() -> Any:
    """The device that computations run on unless they are told otherwise."""
    device: Any = jax.config.jax_default_device
    if device is None or isinstance(device, str):
        device = jax.devices(device)[0]
    return device


def compute_capability() -> tuple[int, int] | None:
    """Compute capability of the default device; None if it is no CUDA GPU."""
    capability = getattr(default_device(), "compute_capability", None)
    if capability is None or "." not in str(capability):
        return None
    major, minor = str(capability).split(".")
    return int(major), int(minor)


def describe() -> str:
    """Kind and, of a CUDA GPU, compute capability of the default device, for messages."""
    capability = compute_capability()
    kind = default_device().device_kind
    if capability is None:
        return kind
    return f"{kind}, of compute capability {capability[0]}.{capability[1]}"
