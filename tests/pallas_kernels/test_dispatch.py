"""The dispatcher never runs anything but what was asked for."""

import logging
from unittest import mock

import jax
import pytest

from pallas_kernels import (
    best_implementation,
    devices,
    dispatch,
    triton,
    why_not_mosaic,
    why_not_triton,
)
from pallas_kernels.dispatch import call, resolve
from pallas_kernels.mosaic import interpreted

BACKENDS = {"xla": len, "reference": max}


@pytest.mark.parametrize(("name", "expected"), [(None, len), ("xla", len), ("reference", max)])
def test_resolves(name, expected):
    assert resolve("op", name, BACKENDS) is expected


@pytest.mark.parametrize("name", ["cuda", "", "XLA"])
def test_unknown_name(name):
    with pytest.raises(ValueError, match=r"op: unknown implementation.*mosaic, triton, xla, ref"):
        resolve("op", name, BACKENDS)


@pytest.mark.parametrize("name", ["mosaic", "triton"])
def test_missing_backend(name):
    with pytest.raises(NotImplementedError, match=f"op: .*'{name}'.*available: xla, reference"):
        resolve("op", name, BACKENDS)


def test_default_does_not_fall_back():
    with pytest.raises(NotImplementedError, match=r"'xla'.*available: reference"):
        resolve("op", None, {"reference": max})


def test_says_why_not_mosaic():
    with interpreted():  # stands for a Hopper GPU
        assert why_not_mosaic() is None
        assert why_not_mosaic("float16") is None
        assert "got float32" in why_not_mosaic("float32")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="tells of a CPU")
def test_says_that_the_device_has_no_kernels(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "the device is cpu" in why_not_mosaic()
    assert "8.0 or later" in why_not_triton()
    assert "the device is cpu" in why_not_triton()


@pytest.fixture
def gpu(monkeypatch):
    """Stands for a GPU of some compute capability, on a machine with or without the packages."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch._log_xla.cache_clear()

    def stand_for(capability, packages=None):
        monkeypatch.setattr(devices, "compute_capability", lambda: capability)
        monkeypatch.setattr(triton, "unfit_packages", lambda *names: packages)

    return stand_for


GPU_BACKENDS = {"mosaic": min, "triton": sum, **BACKENDS}


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((7, 5), len),
        *(((8, minor), sum) for minor in (0, 6, 9)),
        ((9, 0), min),
        *(((major, 0), sum) for major in (10, 12)),
        (None, len),
    ],
)
def test_the_best_for_a_gpu(gpu, capability, expected):
    gpu(capability)
    assert resolve("op", None, GPU_BACKENDS) is expected
    assert GPU_BACKENDS[best_implementation("float16")] is expected
    assert GPU_BACKENDS[best_implementation("int32")] is len
    fits = resolve("op", None, GPU_BACKENDS, {"mosaic": lambda: "no", "triton": lambda: "no"})
    assert fits is len


@pytest.mark.parametrize(
    ("capability", "packages", "reason"),
    [
        ((7, 5), None, "of compute capability 7.5"),
        ((8, 0), "it needs triton", "it needs triton"),
        ((12, 0), "it needs triton", "it needs triton"),
    ],
)
def test_says_once_that_a_gpu_gets_xla(gpu, caplog, capability, packages, reason):
    gpu(capability, packages)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert resolve("op", None, GPU_BACKENDS) is len
            assert resolve("another", None, GPU_BACKENDS) is len
    (record,) = caplog.records
    assert reason in record.getMessage()
    with pytest.raises(NotImplementedError, match=f"op: .*'triton' cannot run: .*{reason}"):
        resolve("op", "triton", GPU_BACKENDS)


def test_hopper_runs_triton_if_asked(gpu):
    gpu((9, 0))
    assert resolve("op", "triton", GPU_BACKENDS) is sum
    assert why_not_triton() is None
    assert "got int32" in why_not_triton("int32")


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (None, "needs triton 3.7 or later, before 3.10, which is not installed: pip install"),
        ("3.6.0", "and found 3.6.0: pip install 'jax-triton>=0.4.1,<0.5' 'triton>=3.7,<3.10'"),
        ("3.10.0", "and found 3.10.0"),
        ("3.9.0", None),
        ("3.7", None),
    ],
)
def test_says_which_packages_to_install(version, message):
    triton.unfit_packages.cache_clear()
    error = triton.importlib.metadata.PackageNotFoundError
    found = {"return_value": version} if version else {"side_effect": error}
    with mock.patch.object(triton.importlib.metadata, "version", **found):
        reason = triton.unfit_packages("triton")
    triton.unfit_packages.cache_clear()
    assert reason is message or message in reason


def test_layers_share_a_trace():
    traced = []

    def run(x, y, *, factor):
        traced.append(factor)
        return x * factor if y is None else x * factor + y

    @jax.jit
    def layers(x):
        for _ in range(3):
            x = call("op", run, {"x": x, "y": None}, factor=2)
        return call("op", run, {"x": x, "y": x}, factor=3)

    gradient = jax.grad(lambda x: layers(x).sum())(jax.numpy.arange(4.0))
    assert gradient.tolist() == [32.0] * 4
    assert traced == [2, 3]
