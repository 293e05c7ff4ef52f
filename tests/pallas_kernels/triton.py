"""Running Triton kernels in tests: on the GPU where there is one, else in Triton's interpreter."""

import collections
import os

import jax
import pytest

from pallas_kernels import devices, triton
from pallas_kernels.triton import interpreting
from tests.jaxprs import equations

if (devices.compute_capability() or (0, 0)) < (8, 0):
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

#: Why no kernel runs here; None if they do.
MISSING = triton.unfit_device()
needs_triton = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def half():
    """The half type that kernels compute rightly here."""
    return "float16" if interpreting() else "bfloat16"


def launches(function, *arguments):
    """How often the jaxpr of a function runs each kernel, by the kernel's name."""
    kernel = "custom_vmap_call"
    found = equations(jax.make_jaxpr(function)(*arguments).jaxpr, whole=(kernel,))
    names = (
        str(e.source_info.name_stack).split("/")[-1] for e in found if e.primitive.name == kernel
    )
    return dict(collections.Counter(names))
