"""Several processes, on one machine or many, that train one model together.

Each is started with the same command and holds its own devices; `jax.distributed` makes them one.
Everything here is also right for one process alone.
"""

from __future__ import annotations

import json
import logging
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from spt_jax.errors import summary

#: Seconds without a sign of life after which a process counts as lost.
HEARTBEAT_S = 30
#: Seconds in which all processes must have come together.
ASSEMBLY_S = 120

_AUTOMATIC = "auto"
_log = logging.getLogger(__name__)
#: What errors say of collectives, or of the service behind them, when a process is gone.
_LOST = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|coordination|heartbeat|barrier|unavailable",
    re.IGNORECASE,
)


class ProcessLost(RuntimeError):
    """Another process of the run ended, or cannot be reached any more."""


def start_processes(
    coordinator: str | None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Join the other processes of a run; must come before anything else that JAX does.

    Args:
        coordinator: address and port, "host:port", at which process 0 can be reached by all; "auto"
            takes all three from the environment of a cluster that JAX knows, such as Slurm, Open
            MPI or Kubernetes; None does nothing, and the process stays alone.
        num_processes: how many processes there are.
        process_id: which of them this is, from 0.

    Raises:
        ValueError: the arguments contradict each other, or there is no such environment.
        ConnectionError: not all processes came together in time.
    """
    numbers = {"num_processes": num_processes, "process_id": process_id}
    given = ", ".join(name for name, number in numbers.items() if number is not None)
    if coordinator is None:
        if given:
            raise ValueError(f"{given} needs a coordinator, such as 10.0.0.1:12345")
        return
    arguments: dict[str, Any] = {}
    if coordinator != _AUTOMATIC:
        if num_processes is None or process_id is None:
            raise ValueError(
                f"coordinator {coordinator} needs num_processes and process_id; auto finds all "
                "three in the environment of a cluster"
            )
        if not re.fullmatch(r"(\S+):(\d+)", coordinator):
            raise ValueError(
                f"coordinator {coordinator!r} is no address with a port, such as 10.0.0.1:12345"
            )
        if not 0 <= process_id < num_processes:
            raise ValueError(
                f"process_id must be in 0..{num_processes - 1} for {num_processes} processes, got "
                f"{process_id}"
            )
        arguments = {"coordinator_address": coordinator, **numbers}
        if process_id > 0:
            _wait_for(coordinator)
        elif num_processes > 1:
            _log.info("process 0 waits at %s for %d more", coordinator, num_processes - 1)
    elif given:
        raise ValueError(f'coordinator "{_AUTOMATIC}" finds {given} by itself; leave that out')
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=ASSEMBLY_S,
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=HEARTBEAT_S,
        )
    except ValueError as error:
        raise ValueError(
            f"found no cluster in the environment ({error}); give the coordinator's address, "
            "num_processes and process_id"
        ) from None
    except RuntimeError as error:
        if "must be called before" in str(error):  # a mistake of the program, not of its user
            raise
        raise ConnectionError(
            f"the processes of the run cannot come together at {coordinator}: {summary(error)}"
        ) from None


def _wait_for(coordinator: str) -> None:
    """Wait until process 0 listens; JAX would end the program if it never does."""
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + ASSEMBLY_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline or isinstance(error, socket.gaierror):
                raise ConnectionError(
                    f"cannot reach the coordinator {coordinator} ({summary(error)}): start "
                    "process 0 there, and see that no firewall keeps others out"
                ) from None
        time.sleep(0.2)


def is_first() -> bool:
    """Whether this process writes what is written once: logs, tables, records."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def several() -> bool:
    """Whether there are other processes."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def exchange(value: Any) -> list[Any]:
    """What each process gave, in order, to all of them; JSON. All must call it."""
    if not several():
        return [value]
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.array(content.size)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: content.size] = content
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


@contextmanager
def first_goes_first() -> Iterator[None]:
    """Let process 0 do something, such as a download, before the others find it done."""
    if not is_first():
        exchange(None)
    try:
        yield
    finally:
        if is_first():
            exchange(None)


def to_host(array: jax.Array) -> np.ndarray:
    """An array whole in this process' memory. All must call it where no process holds it whole."""
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def put(array: Any, place: jax.sharding.Sharding | None) -> jax.Array:
    """`device_put` of an array that every process holds whole, each its own part."""
    if place is None or place.is_fully_addressable:
        return jax.device_put(array, place)
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        data = put(jax.random.key_data(array), place)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return jax.device_put(array, place)  # from other places on the same devices
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, place, lambda index: host[index])


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process is gone."""
    return several() and _LOST.search(str(error)) is not None
