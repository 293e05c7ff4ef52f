"""The dispatcher never runs anything but what was asked for."""

import jax
import pytest

from pallas_kernels import why_not_mosaic
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
def test_says_that_the_device_has_no_mosaic():
    assert "the device is cpu" in why_not_mosaic()


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
