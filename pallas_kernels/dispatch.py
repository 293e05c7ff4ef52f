"""Chooses the implementation of a kernel."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

Implementation = Literal["mosaic", "triton", "xla", "reference"]


def resolve(
    op: str, implementation: str | None, backends: Mapping[str, Callable[..., Any]]
) -> Callable[..., Any]:
    """Returns the function that runs an op.

    A named implementation is that implementation or an error, never another one.

    Args:
      op: Name of the op, for error messages.
      implementation: Name of an implementation, or None for the best supported one.
      backends: The implementations that the op has, by name.

    Returns:
      An entry of `backends`.

    Raises:
      ValueError: The name is not that of any implementation.
      NotImplementedError: The op has no such implementation.
    """
    name = "xla" if implementation is None else implementation
    choices = get_args(Implementation)
    if name not in choices:
        raise ValueError(
            f"{op}: unknown implementation {implementation!r}; choose one of "
            f"{', '.join(choices)}, or None for the best supported one."
        )
    if name not in backends:
        raise NotImplementedError(
            f"{op}: implementation {name!r} is not available; available: {', '.join(backends)}."
        )
    return backends[name]
