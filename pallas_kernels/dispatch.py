"""Chooses the implementation of a kernel, and traces it once for all layers of a model."""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
from jax.typing import DTypeLike

from pallas_kernels import devices, mosaic, triton

Implementation = Literal["mosaic", "triton", "xla", "reference"]


#: What the kernels of an implementation share, of those that need certain GPUs.
_FOR_GPUS = {"mosaic": mosaic, "triton": triton}


def why_not_mosaic(dtype: DTypeLike = "bfloat16") -> str | None:
    """Why Mosaic kernels cannot take arrays of a type on the default device; None if they can.

    Where they can, `implementation=None` is `mosaic` for the shapes that a kernel fits, else `xla`.

    Args:
      dtype: Type of the arrays.
    """
    return mosaic.unfit_device() or mosaic.unfit_dtype(jax.ShapeDtypeStruct((), dtype))


def why_not_triton(dtype: DTypeLike = "bfloat16") -> str | None:
    """Why Triton kernels cannot take arrays of a type on the default device; None if they can.

    They are what `implementation=None` takes on GPUs before Hopper and after it.

    Args:
      dtype: Type of the arrays.
    """
    return triton.unfit_device() or triton.unfit_dtype(jax.ShapeDtypeStruct((), dtype))


def best_implementation(dtype: DTypeLike = "bfloat16") -> str:
    """What `implementation=None` takes on the default device, where a kernel fits the shapes.

    Args:
      dtype: Type of the arrays.

    Returns:
      "mosaic", "triton" or "xla".
    """
    array = jax.ShapeDtypeStruct((), dtype)
    return _best(
        "kernels",
        dict.fromkeys((*_FOR_GPUS, "xla"), len),
        lambda name: _FOR_GPUS[name].unfit_device() or _FOR_GPUS[name].unfit_dtype(array),
    )


def resolve(
    op: str,
    implementation: str | None,
    backends: Mapping[str, Callable[..., Any]],
    unfit: Mapping[str, Callable[[], str | None]] | None = None,
) -> Callable[..., Any]:
    """Returns the function that runs an op.

    A named implementation is that implementation or an error, never another one. Without a name it
    is `mosaic` on a Hopper GPU and `triton` on any other of compute capability 8.0 or later, where
    the arguments fit, else `xla`; that a GPU other than Hopper gets `xla` is logged once for each
    reason.

    Args:
      op: Name of the op, for error messages.
      implementation: Name of an implementation, or None for the best supported one.
      backends: The implementations that the op has, by name.
      unfit: Says of `mosaic` and `triton` why they cannot take the arguments; None if they can.

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
    unfit = unfit or {}

    def reason_against(name: str) -> str | None:
        return _FOR_GPUS[name].unfit_device() or unfit.get(name, lambda: None)()

    if implementation is None:
        implementation = _best(op, backends, reason_against)
    elif implementation in _FOR_GPUS and implementation in backends:
        reason = reason_against(implementation)
        if reason is not None:
            raise NotImplementedError(
                f"{op}: implementation {implementation!r} cannot run: {reason}. Take 'xla', or "
                "None for the best supported one."
            )
    if implementation not in backends:
        raise NotImplementedError(
            f"{op}: implementation {implementation!r} is not available; available: "
            f"{', '.join(backends)}."
        )
    return backends[implementation]


def _best(
    op: str,
    backends: Mapping[str, Callable[..., Any]],
    reason_against: Callable[[str], str | None],
) -> str:
    """The name of the best implementation for the default device."""
    if "mosaic" in backends and reason_against("mosaic") is None:
        return "mosaic"
    capability = devices.compute_capability()
    if "triton" in backends and capability is not None and capability[0] != 9:
        reason = reason_against("triton")
        if reason is None:
            return "triton"
        _log_xla(reason)
    return "xla"


@functools.cache
def _log_xla(reason: str) -> None:
    """Says why a GPU other than Hopper gets `xla`, once."""
    logging.getLogger(__name__).warning(
        "kernels run as implementation 'xla', more slowly than 'triton' would: %s", reason
    )


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
