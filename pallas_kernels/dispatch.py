"""Chooses the implementation of a kernel, and traces it once for all layers of a model."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
from jax.typing import DTypeLike

from pallas_kernels import mosaic

Implementation = Literal["mosaic", "triton", "xla", "reference"]


def why_not_mosaic(dtype: DTypeLike = "bfloat16") -> str | None:
    """Why Mosaic kernels cannot take arrays of a type on the default device; None if they can.

    Where they can, `implementation=None` is `mosaic` for the shapes that a kernel fits, else `xla`.

    Args:
      dtype: Type of the arrays.
    """
    return mosaic.unfit_device() or mosaic.unfit_dtype(jax.ShapeDtypeStruct((), dtype))


def resolve(
    op: str,
    implementation: str | None,
    backends: Mapping[str, Callable[..., Any]],
    unfit: Callable[[], str | None] = lambda: None,
) -> Callable[..., Any]:
    """Returns the function that runs an op.

    A named implementation is that implementation or an error, never another one. Without a name it
    is `mosaic` where device and arguments fit, else `xla`.

    Args:
      op: Name of the op, for error messages.
      implementation: Name of an implementation, or None for the best supported one.
      backends: The implementations that the op has, by name.
      unfit: Says why `mosaic` cannot take the arguments; None if it can.

    Returns:
      An entry of `backends`.

    Raises:
      ValueError: The name is not that of any implementation.
      NotImplementedError: The op has no such implementation, or it cannot run here.
    """
    choices = get_args(Implementation)
    if implementation is not None and implementation not in choices:
        raise ValueError(
            f"{op}: unknown implementation {implementation!r}; choose one of "
            f"{', '.join(choices)}, or None for the best supported one."
        )
    if implementation in ("mosaic", None) and "mosaic" in backends:
        reason = mosaic.unfit_device() or unfit()
        if implementation is None:
            implementation = "mosaic" if reason is None else "xla"
        elif reason is not None:
            raise NotImplementedError(
                f"{op}: implementation 'mosaic' cannot run: {reason}. Take 'xla', or None for the "
                "best supported one."
            )
    implementation = implementation or "xla"
    if implementation not in backends:
        raise NotImplementedError(
            f"{op}: implementation {implementation!r} is not available; available: "
            f"{', '.join(backends)}."
        )
    return backends[implementation]


def call(op: str, run: Callable[..., Any], arrays: Mapping[str, Any], **options: Any) -> Any:
    """Runs an implementation as a function of its own, which layers of equal sizes share.

    Inlined anew into each layer, a kernel would be traced and lowered again every time, which takes
    seconds for Mosaic.

    Args:
      op: Name of the op, and of the function in profiles.
      run: What `resolve` returned.
      arrays: Its arguments that are arrays, pytrees of arrays or None, by name.
      options: The others, hashable.
    """
    if mosaic.interpreting():  # has effects, which some transformations of functions refuse
        return run(**arrays, **options)
    return _function(op, run, tuple(sorted(options.items())))(dict(arrays))


@functools.cache
def _function(
    op: str, run: Callable[..., Any], options: tuple[tuple[str, Any], ...]
) -> Callable[[dict[str, Any]], Any]:
    def function(arrays: dict[str, Any]) -> Any:
        return run(**arrays, **dict(options))

    function.__name__ = function.__qualname__ = op
    return jax.jit(function)
