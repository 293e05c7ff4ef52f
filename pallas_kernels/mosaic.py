"""What the Mosaic GPU kernels share: where they run, and how they multiply.

Every kernel runs in two places: on a Hopper GPU, and in Pallas' interpreter, which simulates a
GPU's memories, threads and barriers on a CPU. `interpreted` chooses the latter.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import devices

LOG2_E = 1.4426950408889634
WARPGROUP_ROWS = 64  # of one wgmma instruction
DTYPES = (jnp.bfloat16, jnp.float16)

_interpreting = contextvars.ContextVar("interpreting", default=False)


@contextlib.contextmanager
def interpreted(params: plgpu.InterpretGPUParams | None = None) -> Iterator[None]:
    """Runs Mosaic kernels that are traced within in Pallas' interpreter, on the CPU.

    Args:
      params: Options of the interpreter, such as race detection.
    """
    token = _interpreting.set(True)
    try:
        with plgpu.force_gpu_interpret_mode(params or plgpu.InterpretGPUParams()):
            yield
    finally:
        _interpreting.reset(token)


def interpreting() -> bool:
    """Whether Mosaic kernels run in Pallas' interpreter."""
    return _interpreting.get()


def unfit_device() -> str | None:
    """Why Mosaic kernels cannot run on the default device; None if they can."""
    if interpreting():
        return None
    capability = devices.compute_capability()
    if capability is not None and capability[0] == 9:
        return None
    return (
        "it needs a GPU of compute capability 9 (Hopper: H100, H200, GH200), since its kernels "
        f"use Hopper's wgmma and TMA instructions; the device is {devices.describe()}"
    )


def unfit_dtype(*arrays: jax.Array | jax.ShapeDtypeStruct) -> str | None:
    """Why Mosaic kernels cannot take arrays of these types; None if they can."""
    found = {a.dtype for a in arrays}
    if len(found) == 1 and found <= set(map(jnp.dtype, DTYPES)):
        return None
    names = ", ".join(sorted(map(str, found)))
    return f"it takes bfloat16 or float16, one for all arrays, and got {names}"


def axis(name: str) -> str:
    """The name of an axis of a kernel's grid or threads.

    Were it the name of an axis of the mesh around a `shard_map`, Pallas would take that one.
    """
    return f"spt_jax {name}"


def axes(*names: str) -> tuple[str, ...]:
    """As `axis`, of a grid."""
    return tuple(map(axis, names))


def axis_index(name: str) -> jax.Array:
    """Where on an axis of the grid, or in which thread, the kernel runs."""
    return jax.lax.axis_index(axis(name))


def transforms(width: int, dtype: Any) -> tuple[Any, ...]:
    """Layout in shared memory of a matrix whose rows have `width` elements.

    Rows are swizzled over 128, 64 or 32 bytes, the widest that divides them, as the tensor core
    and the bulk copies want.

    Args:
      width: Elements of a row; a multiple of 32 bytes.
      dtype: Their type.
    """
    size = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(8 * size * width)
    return (
        plgpu.TilingTransform((8, swizzle // size)),  # type: ignore[abstract]
        plgpu.SwizzleTransform(swizzle),  # type: ignore[abstract]
    )


def matrix(shape: Sequence[int], dtype: Any) -> Any:
    """Shared memory for matrices that the tensor core multiplies; the last axis is the row."""
    return plgpu.SMEM(tuple(shape), dtype, transforms=transforms(shape[-1], dtype))


def zeros(shape: tuple[int, int]) -> jax.Array:
    """A float32 accumulator of zeros in registers."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def dot(a_ref: Any, b_ref: Any) -> jax.Array:
    """`a @ b` in float32 in registers, of matrices in shared memory."""

    def multiply(acc_ref: Any) -> jax.Array:
        plgpu.wgmma(acc_ref, a_ref, b_ref)
        return acc_ref[...]

    return pl.run_scoped(multiply, plgpu.ACC((a_ref.shape[0], b_ref.shape[1]), jnp.float32))


def dots(*pairs: tuple[Any, Any]) -> list[jax.Array]:
    """The products of several pairs, as `dot`, with one wait for all."""

    def multiply(*acc_refs: Any) -> list[jax.Array]:
        for acc_ref, (a_ref, b_ref) in zip(acc_refs, pairs, strict=True):
            plgpu.wgmma(acc_ref, a_ref, b_ref)
        return [acc_ref[...] for acc_ref in acc_refs]

    shapes = [(a_ref.shape[0], b_ref.shape[1]) for a_ref, b_ref in pairs]
    return pl.run_scoped(multiply, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def dot_add(acc: jax.Array, a: Any, b_ref: Any) -> jax.Array:
    """`acc + a @ b` in registers; a is in registers or shared memory, b in shared memory."""
    if interpreting():  # knows neither operands nor initial accumulators in registers
        a, b = a[...], b_ref[...]
        plgpu.commit_smem()  # the loads above are done before their memory is handed back
        product = jnp.dot(a, b, preferred_element_type=jnp.float32)
        return acc + product

    def multiply(acc_ref: Any) -> None:
        plgpu.wgmma(acc_ref, a, b_ref)

    return pl.run_state(multiply)(plgpu.ACC.init(acc))


def rows(vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Spreads a value for each row over the columns."""
    return jax.lax.broadcast_in_dim(vector, shape, [0])


def columns(vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Spreads a value for each column over the rows."""
    return jax.lax.broadcast_in_dim(vector, shape, [1])


def iota(shape: tuple[int, int], axis: int) -> jax.Array:
    """Row or column numbers in an accumulator's layout, int32."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)
