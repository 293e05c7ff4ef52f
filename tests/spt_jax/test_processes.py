import socket

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spt_jax import processes
from spt_jax.processes import exchange, first_goes_first, is_first, put, start_processes, to_host
from tests.processes import free_address


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, 2), "num_processes needs a coordinator"),
        ((None, None, 0), "process_id needs a coordinator"),
        (("host:1",), "coordinator host:1 needs num_processes and process_id"),
        (("host", 2, 0), "coordinator 'host' is no address with a port"),
        (("host:1", 2, 2), r"process_id must be in 0\.\.1 for 2 processes, got 2"),
        (("host:1", 2, -1), r"process_id must be in 0\.\.1 for 2 processes, got -1"),
        (("auto", None, 0), 'coordinator "auto" finds process_id by itself'),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        start_processes(*arguments)


def test_a_coordinator_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr(processes, "ASSEMBLY_S", 0.5)
    address = free_address()
    with pytest.raises(ConnectionError, match=f"cannot reach the coordinator {address}"):
        start_processes(address, 2, 1)


def test_a_process_waits_for_the_coordinator(monkeypatch):
    joined = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: joined.update(arguments))
    with socket.create_server(("localhost", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
        start_processes(address, 2, 1)
    assert joined["coordinator_address"] == address
    assert (joined["num_processes"], joined["process_id"]) == (2, 1)


@pytest.mark.parametrize("address", [None, "localhost:1"])
def test_errors_of_jax_say_what_to_do(address, monkeypatch):
    def fail(**arguments):
        raise (ValueError if address is None else RuntimeError)("what JAX says\nand more")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    if address is None:
        with pytest.raises(ValueError, match=r"no cluster in the environment \(what JAX says"):
            start_processes("auto")
    else:
        with pytest.raises(ConnectionError, match="localhost:1: RuntimeError: what JAX says"):
            start_processes(address, 2, 0)


def test_one_process_alone():
    start_processes(None)
    assert is_first()
    assert exchange({"a": [1]}) == [{"a": [1]}]
    with first_goes_first():
        pass


def test_arrays_go_to_a_place_and_back():
    place = NamedSharding(jax.make_mesh((1,), ("x",)), P("x"))
    array = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    assert put(array, place).sharding == place
    np.testing.assert_array_equal(to_host(put(array, place)), array)
    key = jax.random.key(3)
    np.testing.assert_array_equal(to_host(key), jax.random.key_data(key))
    assert put(key, None).dtype == key.dtype


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("UNKNOWN: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:35721", True),
        ("UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats)", True),
        ("NCCL operation ncclGroupEnd() failed: remote process exited", True),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 5 bytes", False),
    ],
)
def test_which_errors_mean_that_a_process_is_gone(text, lost, monkeypatch):
    assert not processes.is_lost(ValueError(text))  # of one process alone, none
    monkeypatch.setattr(processes, "several", lambda: True)
    assert processes.is_lost(ValueError(text)) == lost
