"""Checkpoints of what trains, written by Orbax in the background.

A checkpoint holds two items: `state`, the arrays, and `record`, a JSON object with the progress of
the run, the identity of the run (base weights, data, configuration) and digests of the arrays
and of the progress.
Kept are the last two and the best one.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import inspect
import json
import logging
import shutil
import sys
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from spt_jax.errors import summary
from spt_jax.processes import exchange, is_first, several, to_host

_KEPT = 2
_TEMPORARY = ".orbax-checkpoint-tmp"
_T = TypeVar("_T")

# Orbax narrates each save at levels up to WARNING, and logs the tracebacks of errors that it raises
logging.getLogger("absl").addFilter(
    lambda record: (
        "orbax" not in record.pathname or (record.levelno >= logging.ERROR and not record.exc_info)
    )
)


def _is_of_orbax(record: logging.LogRecord) -> bool:
    """Whether a record tells of an error that came from Orbax."""
    trace = record.exc_info[2] if record.exc_info else None
    return any("orbax" in frame.f_code.co_filename for frame, _ in traceback.walk_tb(trace))


# Of the writes that one failed save gave up, each would say that nobody asked for its error.
logging.getLogger("asyncio").addFilter(lambda record: not _is_of_orbax(record))


class CheckpointError(OSError):
    """A checkpoint directory that cannot be written, or must not be used as asked."""


def weights_fingerprint(arrays: Any) -> str:
    """BLAKE2b over names, shapes, dtypes and bytes of the arrays of a pytree.

    Example:
        >>> weights_fingerprint({"w": np.zeros(2)}) == weights_fingerprint({"w": np.ones(2)})
        False
    """
    if isinstance(arrays, nnx.State):
        arrays = nnx.to_pure_dict(arrays)
    digest = hashlib.blake2b(digest_size=16)
    for name, array in sorted(_named(arrays).items()):
        host = np.ascontiguousarray(to_host(array))
        digest.update(f"{name} {host.dtype} {host.shape}\n".encode())
        digest.update(host.reshape(-1).view(np.uint8))
    return digest.hexdigest()


class Checkpoints:
    """The checkpoints of one run.

    All processes of a run make one, of the same directory, and call its methods together.

    Args:
        directory: made if it is not there.
        identity: what must be the same for a run to go on from a checkpoint; JSON.
        resume: go on from the newest checkpoint that can be read.
        overwrite: delete the checkpoints that are there.
        log: takes messages for the user.

    Raises:
        CheckpointError: the directory cannot be written, or it holds checkpoints and neither
            `resume` nor `overwrite` is given.
    """

    def __init__(
        self,
        directory: Path,
        *,
        identity: Mapping[str, Any],
        resume: bool = False,
        overwrite: bool = False,
        log: Callable[[str], None] = print,
    ) -> None:
        self.directory = directory.absolute()
        self._identity = json.loads(json.dumps(identity))
        self._log = log
        self._best: int | None = None
        self._last_good: int | None = None
        self._pending: int | None = None
        problem = self._prepare(resume, overwrite) if is_first() else None
        if problem := exchange(problem)[0]:
            raise CheckpointError(problem)
        self._check_shared()
        try:
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(preservation_policy=_LastAndBest(self)),
                item_handlers={
                    "state": ocp.StandardCheckpointHandler(),
                    "record": ocp.JsonCheckpointHandler(),
                },
            )
        except OSError as error:
            raise CheckpointError(self._cannot_write(error)) from error

    def _prepare(self, resume: bool, overwrite: bool) -> str | None:
        """Make the directory, and rid it of what is half-written; says what stands against it."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if overwrite and not resume:
                _empty(self.directory)
            present = sorted(p.name for p in self.directory.iterdir() if p.name[0].isdigit())
            if present and not resume:
                return (
                    f"{self.directory} holds checkpoints of an earlier run ({', '.join(present)}); "
                    "go on from them with --resume, delete them with --overwrite, or choose "
                    "another directory"
                )
            for name in present:
                if _TEMPORARY in name:
                    self._log(f"passing over half-written checkpoint {self.directory / name}")
                    shutil.rmtree(self.directory / name)
        except OSError as error:
            return self._cannot_write(error)
        return None

    def _check_shared(self) -> None:
        """Raise a CheckpointError where a process does not see what the first one writes."""
        if not several():
            return
        mark = self.directory / exchange(f".seen-by-all-{uuid.uuid4().hex}")[0]
        if is_first():
            mark.touch()
        exchange(None)
        seen = exchange(mark.exists())
        if is_first():
            mark.unlink()
        if blind := [str(number) for number, sees in enumerate(seen) if not sees]:
            raise CheckpointError(
                f"process {', '.join(blind)} does not see {self.directory} of process 0: choose a "
                "directory that all processes share"
            )

    def _cannot_write(self, error: OSError) -> str:
        return f"cannot write checkpoints under {self.directory}: {error}"

    def save(
        self, step: int, state: Any, progress: Mapping[str, Any], *, best_step: int | None
    ) -> None:
        """Start to write a checkpoint; waits for the one before.

        Args:
            step: number of the checkpoint.
            state: pytree of arrays, copied to the host before this returns; each process writes
                what its devices hold.
            progress: JSON object.
            best_step: the checkpoint to keep whatever its age.

        Raises:
            CheckpointError: the one before or this one could not be written.
        """
        self.wait()
        self._best = best_step
        arrays = _arrays(state)
        record = {
            "identity": self._identity,
            "progress": progress,
            "digest": weights_fingerprint(arrays),
            "record_digest": _json_digest([self._identity, progress]),
        }
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays), record=ocp.args.JsonSave(record)
        )
        self._pending = step
        self._guarded(lambda: self._manager.save(step, args=args, force=True))

    def wait(self) -> None:
        """Wait for the write under way.

        Raises:
            CheckpointError: it failed; earlier checkpoints are intact.
        """
        self._guarded(self._manager.wait_until_finished)
        if self._pending is not None:
            self._last_good, self._pending = self._pending, None

    @property
    def last_good(self) -> Path | None:
        """The newest checkpoint known to be whole."""
        return None if self._last_good is None else self.directory / str(self._last_good)

    def restore_latest(self, template: _T) -> tuple[_T, dict[str, Any]] | None:
        """State and progress of the newest checkpoint that can be read; None if there is none.

        Checkpoints that cannot be read are named and moved to `unreadable/`.

        Args:
            template: pytree of arrays that gives structure, shapes, dtypes and shardings.

        Raises:
            CheckpointError: the checkpoint belongs to another run.
        """
        for step in exchange(sorted(self._manager.all_steps(), reverse=True))[0]:
            with _abandoned_reads_quiet():
                try:
                    restored = self.restore(step, template)
                except CheckpointError:
                    raise
                except Exception as error:
                    self._log(
                        f"passing over checkpoint {self.directory / str(step)}, which cannot be "
                        f"read ({summary(error)})"
                    )
                    self._set_aside(step)
                    continue
            self._last_good = step
            return restored
        return None

    def restore(self, step: int, template: _T) -> tuple[_T, dict[str, Any]]:
        """State and progress of one checkpoint.

        Raises:
            CheckpointError: the checkpoint belongs to another run.
            Exception: it cannot be read.
        """
        names = _named(template)
        shapes = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for name, x in _arrays(template).items()
        }

        def read_record() -> dict[str, Any]:
            args = ocp.args.Composite(record=ocp.args.JsonRestore())
            record = self._manager.restore(step, args=args)["record"]
            found = record.get("record_digest")  # checkpoints had none at first
            if found is not None and found != _json_digest(
                [record["identity"], record["progress"]]
            ):
                raise ValueError("its record differs from the digest written with it")
            return record

        def read_arrays() -> dict[str, jax.Array]:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(shapes))
            return self._manager.restore(step, args=args)["state"]

        record = _together(read_record)
        self._check_identity(step, record["identity"])
        arrays = _together(read_arrays)
        if weights_fingerprint(arrays) != record["digest"]:
            raise ValueError("its arrays differ from the digest written with them")
        leaves = [
            jax.random.wrap_key_data(arrays[name], impl=jax.random.key_impl(x))
            if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
            else arrays[name]
            for name, x in names.items()
        ]
        return jax.tree.unflatten(jax.tree.structure(template), leaves), record["progress"]

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the write under way, and let go of the directory."""
        try:
            self.wait()
            self._manager.close()
        except Exception:
            if kind is None:  # else the error on its way out says more
                raise

    def _check_identity(self, step: int, found: Mapping[str, Any]) -> None:
        differences = list(differences_between(found, self._identity))
        if differences:
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} is of a different run: "
                + "; ".join(differences)
                + ". Give the same options as then, or start afresh with --overwrite"
            )

    def _guarded(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            target, self._pending = self.directory / str(self._pending), None
            kept = f"; the last good checkpoint is {self.last_good}" if self.last_good else ""
            raise CheckpointError(
                f"cannot write checkpoint {target}: {summary(error)}{kept}. "
                "Make room or choose another directory, then go on with --resume"
            ) from error

    def _set_aside(self, step: int) -> None:
        if is_first():
            target = self.directory / "unreadable" / str(step)
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(exist_ok=True)
            (self.directory / str(step)).rename(target)
        exchange(None)  # others wait
        self._manager.reload()


@contextlib.contextmanager
def _abandoned_reads_quiet() -> Iterator[None]:
    """What a failed read leaves behind is collected here, not in a later moment with a traceback.

    Orbax drops the other reads of a checkpoint once one of them fails, in cycles of references.
    Each of their coroutines raises when it is collected, and a read that ends then finds its event
    loop closed; Python reports both as exceptions ignored.
    """
    report = sys.unraisablehook

    def report_others(unraisable: Any) -> None:
        closed = str(unraisable.exc_value) == "Event loop is closed"
        if not (closed or inspect.iscoroutine(unraisable.object)):
            report(unraisable)

    sys.unraisablehook = report_others
    try:
        yield
    finally:
        gc.collect()
        sys.unraisablehook = report


class _LastAndBest(ocp.checkpoint_managers.PreservationPolicy):
    def __init__(self, owner: Checkpoints) -> None:
        self._owner = owner

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        last = {info.step for info in checkpoints[-_KEPT:]}
        return [info.step in last or info.step == self._owner._best for info in checkpoints]


def _json_digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _named(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def _arrays(tree: Any) -> dict[str, jax.Array]:
    """What is saved: arrays as they are, keys as their numbers."""
    keys = jax.dtypes.prng_key
    return {
        name: jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, keys) else x
        for name, x in _named(tree).items()
    }


def _together[T](read: Callable[[], T]) -> T:
    """What is read, if all processes can read it; else the error of this one, or of another."""
    error, value = None, None
    try:
        value = read()
    except Exception as problem:
        error = problem
    problems = exchange(None if error is None else summary(error))
    if error is not None:
        raise error
    if others := [text for text in problems if text]:
        raise ValueError(f"another process could not read it: {others[0]}")
    return value  # type: ignore[return-value]


def differences_between(found: Any, wanted: Any, name: str = "") -> Iterator[str]:
    """Where two JSON values differ, one sentence a place.

    Example:
        >>> list(differences_between({"lora": {"rank": 8}}, {"lora": {"rank": 16}}))
        ['lora.rank was 8, now 16']
    """
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        for key in sorted(found.keys() | wanted.keys()):
            inner = f"{name}.{key}" if name else key
            yield from differences_between(found.get(key), wanted.get(key), inner)
    elif found != wanted:
        yield f"{name} was {found!r}, now {wanted!r}"


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
