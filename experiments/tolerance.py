"""The one tolerance table: how far a result may be from its reference, by type and reduction."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

# What a result may lose besides its sum's growth, in units of its type's rounding error.
ROUNDINGS = 8


def tolerance(dtype: Any, reduction: int = 1, sums: int = 1) -> float:
    """Returns the relative error allowed for a sum of `reduction` products.

    Rounding errors of a sum add up like a random walk, so the tolerance grows with the square
    root. In the half types sums accumulate in float32 and only what enters and leaves them is
    rounded, so float32's part grows with the sum's length, and theirs with the number of `sums`
    that follow each other.
    """
    unit = ROUNDINGS * float(jnp.finfo(dtype).eps) / 2
    if jnp.finfo(dtype).bits < 32:
        return unit * math.sqrt(sums) + tolerance("float32", reduction)
    return unit * math.sqrt(reduction)


class Worst(NamedTuple):
    """The element of a result that is farthest beyond what it is allowed, or nearest to it.

    Attributes:
      share: its error over the error allowed; above 1 it is wrong, infinite if it is not finite.
      text: where it is, and what it is instead of what.
    """

    share: float
    text: str


def worst(
    actual: Any,
    expected: Any,
    reduction: int = 1,
    *,
    sums: int = 1,
    dtype: Any = None,
    least: float = 0,
) -> Worst:
    """Compares arrays by the tolerance times the root mean square expected.

    Args:
      actual: Result under test.
      expected: Reference, of the same shape.
      reduction: Terms of the longest sum behind an element.
      sums: Sums behind it, one after the other, between which values are rounded to the type.
      dtype: Type whose tolerance applies; by default that of `actual`.
      least: Magnitude of what is summed, which stands for the root mean square where sums cancel.

    Raises:
      ValueError: The shapes differ.
    """
    dtype = actual.dtype if dtype is None else dtype
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if actual.shape != expected.shape:
        raise ValueError(f"a result of shape {actual.shape} instead of {expected.shape}")
    if not actual.size:
        return Worst(0.0, "nothing to compare")
    if not np.isfinite(actual).all():
        return Worst(math.inf, "result is not finite")
    if not np.isfinite(expected).all():
        return Worst(math.inf, "reference is not finite")
    error = np.abs(actual - expected)
    scale = max(least, np.sqrt(np.mean(expected**2)))
    # An element may be several times the root mean square, so it is also allowed its own share.
    limit = tolerance(dtype, reduction, sums) * (scale + np.abs(expected))
    at = np.unravel_index(np.argmax(error - limit), error.shape)
    where = tuple(map(int, at))
    share = float(error[at] / limit[at]) if error[at] else 0.0
    return Worst(
        share,
        f"at {where}: {actual[at]} instead of {expected[at]}, {error[at]:.3g} apart, allowed "
        f"{limit[at]:.3g}",
    )
