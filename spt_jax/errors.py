"""What an error says, for a message of one line."""

from __future__ import annotations

# Where Orbax refers to a description of the array that spans lines.
_DETAILS = " See full TensorStore details:"


def summary(error: BaseException, limit: int = 300) -> str:
    """The kind of an error and its first line, cut between words.

    Args:
        error: any exception.
        limit: most characters of the line.

    Example:
        >>> summary(ValueError("no such row"))
        'ValueError: no such row'
    """
    kind, lines = type(error).__name__, str(error).strip().splitlines()
    if not lines:
        return kind
    line = lines[0].partition(_DETAILS)[0]
    if len(line) > limit:
        line = line[: limit - 2].rsplit(" ", 1)[0] + " …"
    return f"{kind}: {line}"
