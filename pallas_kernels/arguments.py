"""Arrays held against the shapes and types of annotations, where a function is called or traced."""

from __future__ import annotations

import functools
import inspect
import operator
import typing
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from jaxtyping import AbstractArray


def match(op: str, arrays: Mapping[str, tuple[Any, Any]], **sizes: int) -> None:
    """Holds arrays against jaxtyping's annotations, in which a name stands for one size.

    Args:
      op: For messages.
      arrays: Array and annotation by name; None passes where the annotation says so.
      sizes: Those that are known beforehand, by name.

    Raises:
      ValueError: An array is of another rank, size or type.
    """
    for name, (array, hint) in arrays.items():
        kind = _kind(hint)
        if array is None and kind is not hint:
            continue
        names, shape = kind.dim_str.split(), getattr(array, "shape", None)
        expected = _expected(kind, sizes)
        if names[:1] == ["..."] and shape is not None:
            names, shape = names[1:], shape[max(0, len(shape) - len(names) + 1) :]
        if (
            shape is None
            or str(array.dtype) not in kind.dtypes
            or len(shape) != len(names)
            or any(sizes.setdefault(n, size) != size for n, size in zip(names, shape, strict=True))
        ):
            raise ValueError(f"{op}: {name} is {_found(array)}; expected {expected}.")


def at_least_one(op: str, **sizes: int) -> None:
    """Raises a ValueError where a size is below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{op}: {name} must be at least 1, got {size}.")


def checked[**P, T](**sizes: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Has a function hold its arguments against its annotations, by `match`.

    Args:
      sizes: Where sizes stand that are known beforehand: attributes of arguments, such as
        "self.width".
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        op = function.__qualname__.removesuffix(".__init__").removesuffix(".__call__")

        @functools.cache  # at the first call: annotations may name what comes later in a module
        def contract() -> tuple[inspect.Signature, dict[str, Any]]:
            signature, hints = inspect.signature(function), typing.get_type_hints(function)
            return signature, {n: hints[n] for n in signature.parameters if _kind(hints.get(n))}

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            signature, hints = contract()
            given = signature.bind(*args, **kwargs).arguments
            known = {
                name: operator.attrgetter(where)(SimpleNamespace(**given))
                for name, where in sizes.items()
            }
            match(op, {n: (given[n], hint) for n, hint in hints.items() if n in given}, **known)
            return function(*args, **kwargs)

        return call

    return decorate


def _kind(hint: Any) -> Any:
    """The annotation of a single array in `hint`, which may be a union; or None."""
    kinds = [t for t in (hint, *typing.get_args(hint)) if isinstance(t, type)]
    kinds = [t for t in kinds if issubclass(t, AbstractArray)]
    return kinds[0] if len(kinds) == 1 else None  # keys of random numbers are one of several


def _found(array: Any) -> str:
    if hasattr(array, "shape"):
        return f"{array.dtype}{list(array.shape)}"
    return "None" if array is None else f"a {type(array).__name__}"


def _expected(kind: Any, sizes: Mapping[str, int]) -> str:
    """For instance "float [B, S] = [2, S]"."""
    names = kind.dim_str.split()
    known = [str(sizes.get(name, name)) for name in names]
    text = f"{kind.__name__.partition('[')[0].lower()} [{', '.join(names)}]"
    return text if known == names else f"{text} = [{', '.join(known)}]"
