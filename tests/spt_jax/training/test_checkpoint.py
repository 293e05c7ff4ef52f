from __future__ import annotations

import gc
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spt_jax.training import CheckpointError, Checkpoints, weights_fingerprint


def state_of(step: int):
    return {
        "w": jnp.arange(1000.0) + step,
        "half": jnp.full((3, 2), step, jnp.bfloat16),
        "count": jnp.asarray(step),
        "nested": ({"key": jax.random.key(step)},),
    }


def write(directory: Path, steps=(1, 2, 3), *, best=None, identity=None, **options) -> None:
    options = {"identity": identity or {"seed": 0}, "log": lambda _: None, **options}
    with Checkpoints(directory, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_of(step), {"step": step}, best_step=best)


def reopen(directory: Path, messages: list[str], *, identity=None) -> Checkpoints:
    options = {"identity": identity or {"seed": 0}, "resume": True, "log": messages.append}
    return Checkpoints(directory, **options)


def raw(tree):
    return weights_fingerprint(tree)


def test_round_trip_is_exact(tmp_path):
    write(tmp_path)
    messages = []
    with reopen(tmp_path, messages) as checkpoints:
        state, progress = checkpoints.restore_latest(state_of(0))
        assert checkpoints.last_good == tmp_path / "3"
    assert progress == {"step": 3}
    assert messages == []
    assert raw(state) == raw(state_of(3)) != raw(state_of(2))
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, state_of(3))
    assert jax.random.bits(state["nested"][0]["key"]) == jax.random.bits(jax.random.key(3))


def test_saved_arrays_are_copies(tmp_path):
    """The step donates its state, so its memory is written over while a save goes on."""
    bump = jax.jit(lambda x: x + 1, donate_argnums=0)
    with Checkpoints(tmp_path, identity={}, log=print) as checkpoints:
        x = jnp.zeros(1 << 20)
        checkpoints.save(1, {"x": x}, {}, best_step=None)
        for _ in range(20):
            x = bump(x)
    with Checkpoints(tmp_path, identity={}, resume=True, log=print) as checkpoints:
        state, _ = checkpoints.restore_latest({"x": x})
    assert not np.any(state["x"])


def test_keeps_the_last_two_and_the_best(tmp_path):
    write(tmp_path, range(1, 7), best=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "5", "6"]


def largest_file(directory: Path) -> Path:
    files = [p for p in (directory / "state").rglob("*") if p.is_file()]
    return max(files, key=lambda p: p.stat().st_size)


def truncate(step: Path) -> None:
    path = largest_file(step)
    os.truncate(path, path.stat().st_size // 2)


def flip(step: Path) -> None:
    path = largest_file(step)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def delete_arrays(step: Path) -> None:
    largest_file(step).unlink()


def delete_state(step: Path) -> None:
    shutil.rmtree(step / "state")


def delete_record(step: Path) -> None:
    shutil.rmtree(step / "record")


def empty_record(step: Path) -> None:
    (step / "record" / "metadata").write_text("")


def halve_record(step: Path) -> None:
    path = step / "record" / "metadata"
    os.truncate(path, path.stat().st_size // 2)


def empty_all(step: Path) -> None:
    for path in step.rglob("*"):
        if path.is_file():
            os.truncate(path, 0)


DAMAGES = (
    truncate,
    flip,
    delete_arrays,
    delete_state,
    delete_record,
    empty_record,
    halve_record,
    empty_all,
)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("written")
    write(directory)
    return directory


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(written, tmp_path, damage):
    directory = tmp_path / "run"
    shutil.copytree(written, directory)
    damage(directory / "3")
    messages = []
    with reopen(directory, messages) as checkpoints:
        state, progress = checkpoints.restore_latest(state_of(0))
        assert progress == {"step": 2}
        assert raw(state) == raw(state_of(2))
        assert len(messages) == 1
        assert f"passing over checkpoint {directory / '3'}, which cannot be read" in messages[0]
        assert (directory / "unreadable" / "3").is_dir()
        checkpoints.save(3, state_of(3), {"again": True}, best_step=None)
    with reopen(directory, messages) as checkpoints:
        assert checkpoints.restore_latest(state_of(0))[1] == {"again": True}


def test_abandoned_reads_say_nothing_later(written, tmp_path, monkeypatch):
    """Reads that one damaged file gave up are not reported by the collector, then or later."""
    said = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: said.append(str(unraisable)))
    files = [p.relative_to(written) for p in (written / "3" / "state").rglob("*") if p.is_file()]
    for number, file in enumerate(files):
        directory = tmp_path / str(number)
        shutil.copytree(written, directory)
        path = directory / file
        os.truncate(path, path.stat().st_size // 2)
        with reopen(directory, []) as checkpoints:
            checkpoints.restore_latest(state_of(0))
        gc.collect()
    assert said == []


def test_all_damaged(written, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(written, directory)
    for step in ("2", "3"):
        truncate(directory / step)
    messages = []
    with reopen(directory, messages) as checkpoints:
        assert checkpoints.restore_latest(state_of(0)) is None
    assert len(messages) == 2


def test_half_written_checkpoint_is_named_and_removed(written, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(written, directory)
    half = directory / "4.orbax-checkpoint-tmp-1"
    shutil.copytree(directory / "3", half)
    messages = []
    with reopen(directory, messages) as checkpoints:
        assert checkpoints.restore_latest(state_of(0))[1] == {"step": 3}
    assert messages == [f"passing over half-written checkpoint {half}"]
    assert not half.exists()


def test_refuses_what_it_would_overwrite(written):
    with pytest.raises(CheckpointError, match=r"earlier run \(2, 3\).*--resume.*--overwrite"):
        Checkpoints(written, identity={"seed": 0})


def test_overwrite(written, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(written, directory)
    write(directory, [1], overwrite=True)
    assert [p.name for p in directory.iterdir()] == ["1"]


def test_another_run_is_refused_by_name(written):
    options = {"seed": 1, "model": {"rank": 8}}
    with (
        reopen(written, [], identity=options) as checkpoints,
        pytest.raises(
            CheckpointError, match=r"model was None, now \{'rank': 8\}; seed was 0, now 1"
        ),
    ):
        checkpoints.restore_latest(state_of(0))


def test_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write checkpoints under .*file/run"):
        Checkpoints(tmp_path / "file" / "run", identity={})


@pytest.fixture
def full_disk():
    """Writes fail from a certain file size on, as they do on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))

    yield fill
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_full_disk_leaves_earlier_checkpoints_intact(tmp_path, full_disk):
    checkpoints = Checkpoints(tmp_path, identity={"seed": 0}, log=print)
    checkpoints.save(1, state_of(1), {"step": 1}, best_step=None)
    checkpoints.wait()
    noise = jax.random.normal(jax.random.key(0), (1000,))  # does not compress

    def save() -> None:
        with checkpoints:
            checkpoints.save(2, state_of(2) | {"w": noise}, {"step": 2}, best_step=None)

    full_disk()
    with pytest.raises(CheckpointError) as caught:
        save()
    resource.setrlimit(resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE)[1:] * 2)
    message = str(caught.value)
    assert f"cannot write checkpoint {tmp_path / '2'}" in message
    assert f"the last good checkpoint is {tmp_path / '1'}" in message
    assert "Make room" in message
    with reopen(tmp_path, []) as again:
        state, progress = again.restore_latest(state_of(0))
    assert progress == {"step": 1}
    assert raw(state) == raw(state_of(1))


def test_fingerprint_sees_names_shapes_types_and_bits():
    base = {"a": np.zeros((2, 3), np.float32), "b": jax.random.key(0)}
    others = [
        base | {"a": np.zeros((3, 2), np.float32)},
        base | {"a": np.zeros((2, 3), np.int32)},
        base | {"a": np.full((2, 3), -0.0, np.float32)},
        base | {"b": jax.random.key(1)},
        {"c": base["a"], "b": base["b"]},
    ]
    found = {weights_fingerprint(x) for x in [base, *others]}
    assert len(found) == 6
    assert weights_fingerprint(dict(reversed(base.items()))) == weights_fingerprint(base)
