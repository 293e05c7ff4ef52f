"""What the Triton kernels share: where they run, and how they are launched.

Triton and jax-triton come with the extras for GPUs alone, so a module that holds kernels is only
imported by what runs them. With TRITON_INTERPRET=1 in the environment, Triton's own switch, kernels
run in its interpreter, on the CPU; it has to be set before anything imports Triton.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import os
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import devices

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
LOG2_E = 1.4426950408889634
LEAST_DOT = 16  # rows, columns and depth of a product, at least

#: Packages that launch the kernels: the least version of each, and the first that is too new.
#: jax-triton 0.4.1 takes jax from 0.11 on, with jax 0.12 only as `_jax_triton` prepares it, and
#: Triton from 3.7 on.
PACKAGES = {"jax-triton": ((0, 4, 1), (0, 5)), "triton": ((3, 7), (3, 10))}
INSTALL = "pip install 'jax-triton>=0.4.1,<0.5' 'triton>=3.7,<3.10'"

#: Least compute capability, and PTX that any CUDA which knows the GPU assembles: 12.4 and later,
#: and 12.8 for Blackwell. Triton's own choice may be newer than the assembler of the installed jax.
PTX_VERSIONS = {(10, 0): 87, (8, 0): 84}
#: Held by the one kernel that runs in the interpreter, which keeps its grid and place in globals.
_interpreter = threading.Lock()


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def unfit_packages(*names: str) -> str | None:
    """Which of these `PACKAGES` is missing or does not fit, and the remedy; None if all fit."""
    for name in names:
        least, limit = PACKAGES[name]
        wanted = f"{name} {_dotted(least)} or later, before {_dotted(limit)}"
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return f"it needs {wanted}, which is not installed: {INSTALL}"
        if not least <= _release(found) < limit:
            return f"it needs {wanted}, and found {found}: {INSTALL}"
    return None


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def unfit_device() -> str | None:
    """Why Triton kernels cannot run on the default device; None if they can."""
    if interpreting():
        return unfit_packages("triton")
    capability = devices.compute_capability()
    if capability is None or capability < (8, 0):
        return (
            "it needs a GPU of compute capability 8.0 or later (A100, L4, RTX 30 and newer); the "
            f"device is {devices.describe()}"
        )
    return unfit_packages(*PACKAGES)


def unfit_dtype(*arrays: jax.Array | jax.ShapeDtypeStruct) -> str | None:
    """Why Triton kernels cannot take arrays of these types; None if they can."""
    found = {a.dtype for a in arrays}
    if len(found) != 1 or not found <= set(map(jnp.dtype, DTYPES)):
        names = ", ".join(sorted(map(str, found)))
        return f"it takes bfloat16, float16 or float32, one for all arrays, and got {names}"
    if interpreting() and found == {jnp.dtype(jnp.bfloat16)}:
        return "Triton's interpreter computes bfloat16 wrongly; take float16 or float32 there"
    return None


def precision() -> Literal["ieee", "tf32"]:
    """How float32 matrices are multiplied: in TF32 only where JAX is configured to.

    That is with `jax_default_matmul_precision` "tensorfloat32".
    """
    asked = str(jax.config.jax_default_matmul_precision).lower()
    return "tf32" if asked in ("tensorfloat32", "tf32_tf32_f32") else "ieee"


def xla_precision(dtype: Any) -> jax.lax.Precision | None:
    """The same for products that XLA computes, of matrices of a type."""
    exact = jnp.dtype(dtype) == jnp.float32 and precision() == "ieee"
    return jax.lax.Precision.HIGHEST if exact else None


def imported(module: str, name: str) -> Callable[..., Any]:
    """A function of a module that needs Triton, which is imported when the function is called."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    return run


def power_of_two(n: int, least: int = LEAST_DOT) -> int:
    """The next power of two, and at least `least`."""
    return max(least, 1 << (n - 1).bit_length())


def launch(
    kernel: Any,
    inputs: Mapping[str, jax.Array | None],
    outputs: Mapping[str, jax.ShapeDtypeStruct | None],
    *,
    name: str,
    grid: tuple[int, ...],
    num_warps: int = 4,
    num_stages: int = 2,
    **constants: Any,
) -> dict[str, jax.Array]:
    """Runs a kernel. Under `jax.vmap` it runs once for each element.

    Args:
      kernel: A `triton.jit` function, whose parameters are the inputs, the outputs and constants.
      inputs: Arrays by parameter; None for those that the kernel does without.
      outputs: Shapes and types of the results by parameter; None for those that are not wanted.
      name: Name of the launch.
      grid: Programs along up to three axes.
      num_warps: Warps of a program.
      num_stages: Steps of a loop whose operands are loaded ahead.
      **constants: Parameters known at compile time.

    Returns:
      The results that are wanted, by parameter.
    """
    given = {key: array for key, array in inputs.items() if array is not None}
    wanted = {key: out for key, out in outputs.items() if out is not None}
    absent = dict.fromkeys([key for key in (*inputs, *outputs) if key not in given | wanted])

    def run(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        named = dict(zip(given, arrays, strict=True))
        if interpreting():
            return _interpret(kernel, named, wanted, grid, absent | constants)
        capability = devices.compute_capability()
        assert capability is not None
        ptx_version = next(ptx for least, ptx in PTX_VERSIONS.items() if capability >= least)
        return _jax_triton().triton_call(
            kernel=kernel,
            out_type=tuple(wanted.values()),
            grid=grid,
            name=name,
            num_warps=num_warps,
            num_stages=num_stages,
            compute_capability=10 * capability[0] + capability[1],
            backend_options={"ptx_version": ptx_version, "enable_fp_fusion": True},
            **named,
            **absent,
            **constants,
        )

    with jax.named_scope(name):
        results = jax.custom_batching.sequential_vmap(run)(*given.values())
    return dict(zip(wanted, results, strict=True))


@functools.cache
def _jax_triton() -> Any:
    """jax-triton, such that the installed jax can trace its calls."""
    import jax_triton
    from jax.interpreters import partial_eval
    from jax_triton import triton_lib

    primitive = triton_lib.triton_kernel_call_p
    rule: Any = partial_eval.dce_rules[primitive]
    if jax.__version_info__ >= (0, 12) and len(inspect.signature(rule).parameters) == 2:
        # jax 0.12 tells a rule for unused results which inputs are live, as a second argument.
        partial_eval.dce_rules[primitive] = lambda used, live, equation: rule(used, equation)
    return jax_triton


def _interpret(
    kernel: Any,
    inputs: Mapping[str, jax.Array],
    outputs: Mapping[str, jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    constants: Mapping[str, Any],
) -> tuple[jax.Array, ...]:
    """Runs a kernel in Triton's interpreter, as a callback of the compiled program."""
    from triton.runtime.interpreter import GridExecutor

    class Buffer:
        """An array as Triton takes it: an address and the name of a type."""

        def __init__(self, array: np.ndarray) -> None:
            self.dtype = str(array.dtype)
            self.data_ptr = lambda: array.ctypes.data

    class Executor(GridExecutor):
        """Leaves arrays where they are; Triton's own would move PyTorch's between devices."""

        def _init_args_hst(self, args: Any, kwargs: Any) -> Any:
            return args, kwargs

        def _restore_args_dev(self, *args: Any) -> None:
            pass

    def run(*arrays: Any) -> tuple[np.ndarray, ...]:
        given = [np.array(a) for a in arrays]
        results = [_unwritten(out.shape, out.dtype) for out in outputs.values()]
        buffers = dict(zip([*inputs, *outputs], map(Buffer, [*given, *results]), strict=True))
        with _interpreter:
            Executor(kernel.rewrite(), kernel.arg_names, grid)(**buffers, **constants)
        return tuple(results)

    return jax.pure_callback(run, tuple(outputs.values()), *inputs.values())


def _unwritten(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Memory as a kernel may find it: nothing that a result should hold."""
    value = np.nan if jnp.issubdtype(dtype, jnp.floating) else 99
    return np.full(shape, value, dtype)
