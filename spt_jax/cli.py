"""Command-line conduct shared by all programs."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import tyro
from rich.console import Console

from pallas_kernels import best_implementation, why_not_mosaic, why_not_triton
from spt_jax.processes import ProcessLost, is_first
from spt_jax.training import CheckpointError, Interrupted, NonFiniteLoss

#: Set to anything to see the traceback of an error that is reported in one line.
TRACEBACK_VARIABLE = "SPT_JAX_TRACEBACK"

#: What errors of the operating system say of a file.
_REMEDIES = {
    errno.ENOENT: "does not exist; check the path",
    errno.EEXIST: "is a file; choose another directory",
    errno.ENOTDIR: "lies below a file; choose another directory",
    errno.EISDIR: "is a directory; give a file",
    errno.EACCES: "is not accessible; choose another, or change its permissions",
    errno.EROFS: "cannot be written, its disk is read-only; choose another directory",
    errno.ENOSPC: "cannot be written, its disk is full; make room, then go on with --resume",
}


def parse[T](
    options: type[T],
    module: str,
    description: str | None,
    *,
    args: Sequence[str] | None = None,
    default: T | None = None,
    config: Sequence[Any] = (),
) -> T:
    """The options of the command line.

    Args:
        options: their dataclass.
        module: such as "experiments.glue".
        description: what --help shows above them.
        args: arguments; None for those of the process.
        default: what holds where nothing is given; None for the dataclass's own.
        config: markers of `tyro.conf`.

    Raises:
        ValueError: an option is unknown, lacks its value, or has a wrong one.
    """
    shown = io.StringIO()
    given: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(shown):
            return tyro.cli(
                options,
                prog=module,
                description=description,
                args=args,
                config=config or None,
                **given,
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
    # a title with a rule, what is wrong, and another rule or an empty line; on a terminal in colour
    # and in a frame
    plain = re.sub(r"\x1b\[[\d;]*m", "", shown.getvalue())
    text = "\n".join(line.strip(" |│╭╮╰╯") for line in plain.splitlines())
    parts = [part.strip() for part in re.split(r"^.*[-─]{5,}$", text, flags=re.MULTILINE)]
    what = " ".join(parts[min(1, len(parts) - 1)].split("\n\n")[0].split())
    raise ValueError(f"{what.rstrip('.')}; python -m {module} --help lists the options")


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


def console(width: int = 120) -> Console:
    """Where tables go: standard output, of the first process.

    Args:
        width: characters of a line where it is no terminal.
    """
    return Console(width=None if sys.stdout.isatty() else width, quiet=not is_first())


def run(main: Callable[[], None]) -> None:
    """Call `main`, as a program.

    A mistake in what the user asked for ends in one line on standard error and exit code 2,
    training that failed in exit code 1, and a signal in 128 plus its number. Anything else is a
    defect of the program and keeps its traceback.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("spt_jax").setLevel(logging.INFO)
    sys.unraisablehook = _unraisable
    try:
        main()
    except Interrupted as error:
        _exit(error, 128 + error.signal)
    except NonFiniteLoss as error:
        _exit(error, 1)
    except ProcessLost as error:
        _say(error)
        os._exit(1)  # JAX would wait for the lost process, and abort
    except (ValueError, NotImplementedError, OSError, CheckpointError) as error:
        _exit(error, 2)
    except KeyboardInterrupt:
        stopped = KeyboardInterrupt(
            "stopped by SIGINT outside training: what was written before is kept, and nothing of "
            "what was under way; start again, with --resume where a run has checkpoints"
        )
        _exit(stopped, 130)


def _said(error: BaseException) -> str:
    """What an error says; of one of the operating system's, the file and a remedy."""
    if isinstance(error, OSError) and error.filename is not None and error.errno in _REMEDIES:
        return f"{error.filename} {_REMEDIES[error.errno]}"
    return str(error)


def _unraisable(unraisable: Any) -> None:
    """Keep silent on what comes too late for Orbax, which gave up a checkpoint on a full disk."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _exit(error: BaseException, code: int) -> None:
    _say(error)
    sys.exit(code)


def _say(error: BaseException) -> None:
    if os.environ.get(TRACEBACK_VARIABLE):
        raise error
    message = " ".join(_said(error).split()) or type(error).__name__
    print(f"error: {message}", file=sys.stderr, flush=True)


def device_line(dtype: str) -> str:
    """What a run trains on, in which type, with which kernels; on a GPU, why with no faster ones.

    Args:
        dtype: type that it computes in.
    """
    devices, kernels = jax.devices(), best_implementation(dtype)
    line = f"{len(devices)} x {devices[0].device_kind}, {dtype}, kernels {kernels}"
    if devices[0].platform != "gpu" or kernels != "xla":
        return line
    reasons = {"mosaic": why_not_mosaic(dtype), "triton": why_not_triton(dtype)}
    return line + "".join(f"; not {name}: {why}" for name, why in reasons.items() if why)
