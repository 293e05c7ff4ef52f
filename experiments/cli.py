"""Command-line conduct shared by the experiments."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

from spt_jax.training import CheckpointError, Interrupted, NonFiniteLoss

#: Set to anything to see the traceback of an error that is reported in one line.
TRACEBACK_VARIABLE = "SPT_JAX_TRACEBACK"


def distinct_names(text: str) -> tuple[str, ...]:
    """Names separated by commas, each once.

    Example:
        >>> distinct_names("rte, mrpc,rte")
        ('rte', 'mrpc')
    """
    return tuple(dict.fromkeys(name.strip() for name in text.split(",")))


def known_names(text: str, known: Iterable[str], *, what: str, where: str = "") -> tuple[Any, ...]:
    """Names separated by commas, each once, all of them known.

    Args:
        text: value of an option.
        known: names to choose from.
        what: what a message calls a name.
        where: where it says that the name stands.

    Raises:
        ValueError: there is no such name.
    """
    choices, names = tuple(known), distinct_names(text)
    for name in names:
        if name not in choices:
            raise ValueError(f"unknown {what} {name!r}{where}; choose from {', '.join(choices)}")
    return names


def run(main: Callable[[], None]) -> None:
    """Call `main`, as a program.

    A mistake in what the user asked for ends in one line on standard error and exit code 2,
    training that failed in exit code 1, and a signal in 128 plus its number. Anything else is a
    defect of the program and keeps its traceback.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("spt_jax").setLevel(logging.INFO)
    try:
        main()
    except Interrupted as error:
        _exit(error, 128 + error.signal)
    except NonFiniteLoss as error:
        _exit(error, 1)
    except (ValueError, NotImplementedError, OSError, CheckpointError) as error:
        _exit(error, 2)
    except KeyboardInterrupt as error:
        _exit(error, 130)


def _exit(error: BaseException, code: int) -> None:
    if os.environ.get(TRACEBACK_VARIABLE):
        raise error
    message = " ".join(str(error).split()) or type(error).__name__
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
