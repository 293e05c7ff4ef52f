"""Assertions by the one tolerance table, `experiments.tolerance`."""

from experiments.tolerance import tolerance, worst

__all__ = ["assert_close", "tolerance"]


def assert_close(actual, expected, reduction: int = 1, **options) -> None:
    """Asserts that arrays differ by less than the tolerance; arguments as those of `worst`."""
    found = worst(actual, expected, reduction, **options)
    assert found.share <= 1, found.text
