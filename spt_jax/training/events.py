"""TensorBoard events of a run."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from spt_jax.processes import is_first


class Board:
    """TensorBoard events. Where they cannot be written, it says so and training goes on.

    Written by the caller itself: the queue of tensorboardX's own writer blocks once a full disk has
    ended the thread that empties it.
    """

    def __init__(self, directory: Path, purge_step: int, log: Callable[[str], None]) -> None:
        self._directory, self._log = directory, log
        self._file: FileIO | None = None
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        if not is_first():
            return
        with self._telling():
            directory.mkdir(parents=True, exist_ok=True)
            self._file = (directory / name).open("xb", buffering=0)
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(session_log=SessionLog(status=SessionLog.START), step=purge_step))

    def add_scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Write values of a step, under GROUP/NAME."""
        entries = [Summary.Value(tag=f"{group}/{n}", simple_value=x) for n, x in values.items()]
        self._write(Event(summary=Summary(value=entries), step=step))

    def close(self) -> None:
        """End the file."""
        if self._file is not None:
            self._file.close()

    def _write(self, event: Event) -> None:
        """Append a TFRecord: length, checksum, bytes, checksum."""
        event.wall_time = time.time()
        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        checksums = (struct.pack("<I", masked_crc32c(x)) for x in (length, content))
        with self._telling():
            if self._file is not None:
                self._file.write(length + next(checksums) + content + next(checksums))

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.close()
            self._file = None
            self._log(
                f"cannot write TensorBoard events under {self._directory}: {error}; training goes "
                "on without them"
            )
