"""Running Mosaic kernels in tests: on the GPU where there is one, else in Pallas' interpreter."""

import collections
import contextlib
from unittest import mock

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from pallas_kernels import mosaic
from tests.jaxprs import equations


@contextlib.contextmanager
def running():
    """Runs the kernels called within; without a GPU in the interpreter, where no race may occur."""
    if on_hopper():
        yield
        return
    with mosaic.interpreted(plgpu.InterpretGPUParams(detect_races=True)):
        yield
        jax.effects_barrier()
    assert not gpu_callbacks.get_races().races_found


def on_hopper():
    """Whether the kernels run on a GPU here."""
    return mosaic.unfit_device() is None


def named(cases, one):
    """Names of cases as parameters; one of them is for other versions of jax too."""
    return [pytest.param(n, marks=[pytest.mark.versions] * (n == one)) for n in cases]


def traced():
    """Within, functions are traced as for a Hopper GPU."""
    return mock.patch.object(mosaic, "unfit_device", return_value=None)


def launches(function, *arguments):
    """How often the jaxpr of a function, traced as for a Hopper GPU, launches each kernel."""
    with traced():
        return names(jax.make_jaxpr(function)(*arguments).jaxpr)


def names(jaxpr):
    """How often a jaxpr launches each kernel, by name."""
    kernel = "mpmd_map"  # what plgpu.kernel becomes
    found = equations(jaxpr, whole=(kernel,))
    return dict(collections.Counter(e.params["name"] for e in found if e.primitive.name == kernel))
