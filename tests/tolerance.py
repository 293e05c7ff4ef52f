"""The one tolerance table: how far a result may be from its reference, by type and reduction."""

import math

import jax.numpy as jnp
import numpy as np

# What a result may lose besides its sum's growth, in units of its type's rounding error.
ROUNDINGS = 8


def tolerance(dtype, reduction: int = 1, sums: int = 1) -> float:
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


def assert_close(
    actual, expected, reduction: int = 1, *, sums: int = 1, dtype=None, least: float = 0
) -> None:
    """Asserts that arrays differ by less than the tolerance times the root mean square expected.

    Args:
      actual: Result under test.
      expected: Reference, of the same shape.
      reduction: Terms of the longest sum behind an element.
      sums: Sums behind it, one after the other, between which values are rounded to the type.
      dtype: Type whose tolerance applies; by default that of `actual`.
      least: Magnitude of what is summed, which stands for the root mean square where sums cancel.
    """
    dtype = actual.dtype if dtype is None else dtype
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if not actual.size:
        return
    error = np.abs(actual - expected)
    scale = max(least, np.sqrt(np.mean(expected**2)))
    # An element may be several times the root mean square, so it is also allowed its own share.
    limit = tolerance(dtype, reduction, sums) * (scale + np.abs(expected))
    assert np.isfinite(actual).all(), "result is not finite"
    worst = np.unravel_index(np.argmax(error - limit), error.shape)
    assert (error <= limit).all(), (
        f"at {worst}: {actual[worst]} instead of {expected[worst]}, {error[worst]:.3g} apart, "
        f"allowed {limit[worst]:.3g}"
    )
