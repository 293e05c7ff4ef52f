"""What the methods' experiments say of a device."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import pytest

from experiments.methods import device_line
from pallas_kernels import devices, triton


@pytest.mark.parametrize(
    ("kind", "capability", "dtype", "kernels"),
    [
        ("cpu", None, "float32", "xla"),
        ("NVIDIA H100", "9.0", "bfloat16", "mosaic"),
        ("NVIDIA L4", "8.9", "float32", "triton"),
        ("Tesla T4", "7.5", "float32", "xla; not mosaic: it needs a GPU of compute capability 9"),
        ("NVIDIA H100", "9.0", "float32", "xla; not mosaic: it takes bfloat16 or float16"),
    ],
)
def test_the_device_is_told(kind, capability, dtype, kernels, monkeypatch):
    platform = "cpu" if capability is None else "gpu"
    device = SimpleNamespace(device_kind=kind, compute_capability=capability, platform=platform)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(jax, "devices", lambda *_: [device, device])
    monkeypatch.setattr(devices, "default_device", lambda: device)
    monkeypatch.setattr(triton, "unfit_packages", lambda *_: None)
    assert device_line(dtype).startswith(f"2 x {kind}, {dtype}, kernels {kernels}")
