"""Training that is struck by faults, and what is left of it.

Each fault strikes the command in a process of its own; it is then resumed in this one, and must end
in the figures and the arrays of a run that nothing struck.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from spt_jax.finetune import job
from spt_jax.training import cross_entropy, supervised
from tests.reliability import runs
from tests.reliability.runs import EVERY, STEPS, Process, Run, message
from tests.spt_jax.training.test_checkpoint import raw, reopen, state_of, write

pytestmark = pytest.mark.timeout(3000)

RANDOM_KILLS = (1, 14)  # in short, in full
KILLED_WRITES = ((3,), (1, 2, 3, 4, 5, 6))


@pytest.fixture(scope="module")
def small_run(tmp_path_factory) -> Run:
    """A run to be."""
    return runs.make(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def straight(small_run) -> tuple[Run, float]:
    """A run that nothing strikes, and the seconds from its first checkpoint to its end."""
    moments: list[float] = []
    watch = small_run.at_first_checkpoint(lambda: moments.append(time.monotonic()))
    code, errors = small_run.finish()
    moments.append(time.monotonic())
    watch.join()
    assert code == 0, errors
    assert small_run.outcome()[0]["steps"] == STEPS
    return small_run, moments[1] - moments[0]


@pytest.fixture
def seed(request) -> int:
    return request.config.getoption("--fault-seed")


def strike(run: Run, act: Callable[[Process], Any], *more: str) -> tuple[int, str]:
    """Start a run and do something to it once a checkpoint is whole."""
    with run.start(*more) as process:
        assert process.wait_for_checkpoint(), process.errors()
        act(process)
        return process.end()


def resume(run: Run, expected: Run) -> str:
    """Go on, from the newest checkpoint that is whole, to the same end; what it said."""
    newest = max(run.completed(), default=None)
    code, errors = run.finish("--resume")
    assert code == 0, errors
    assert run.resumed_from() == newest
    assert run.outcome() == expected.outcome()
    return errors


def kill(run: Run, moment: Callable[[Process], bool], *more: str) -> bool:
    """Whether SIGKILL at a moment came before the end of the run."""
    with run.start(*more) as process:
        reached = moment(process)
        process.send(signal.SIGKILL)
        code, errors = process.end()
    assert not reached or code in (0, -signal.SIGKILL), errors
    return reached and code == -signal.SIGKILL


def kill_again(run: Run) -> bool:
    """Go on, and SIGKILL once a further checkpoint is whole; whether that came before the end."""
    before = run.completed()
    moment = lambda process: process.wait_for(lambda: run.completed() != before)  # noqa: E731
    return kill(run, moment, "--resume")


def test_sigkill_at_random_moments(straight, full, seed, tmp_path, record):
    expected, seconds = straight
    rng = random.Random(seed)
    wanted, tries, resumed, amid = RANDOM_KILLS[full], 0, [], 0
    while len(resumed) < wanted:
        delay = rng.uniform(0, seconds)
        tries += 1
        assert tries <= 2 * wanted + 5, "runs end before they can be killed"

        def moment(process: Process, delay: float = delay) -> bool:
            reached = process.wait_for_write()
            time.sleep(delay)
            return reached

        run = expected.elsewhere(tmp_path / f"run-{tries}")
        if not kill(run, moment):
            continue
        half = any("tmp" in name for name in run.names())
        if kill_again(run):
            amid += half
            resume(run, expected)
            resumed.append(run.resumed_from() or 0)
            print(f"seed {seed}: killed {delay:.3f} s after the first write began")
    record(
        "faults",
        fault=f"SIGKILL at random moments (seed {seed}), {amid} of them amid a write",
        times=len(resumed),
        ended="killed",
        resumed=f"from the newest whole checkpoint (step {', '.join(map(str, resumed))})",
        message="going on from checkpoint …",
    )


def test_sigkill_amid_a_write(straight, full, tmp_path, record):
    expected, _ = straight
    resumed, halves = [], 0
    for number in KILLED_WRITES[full]:
        for attempt in range(5):
            run = expected.elsewhere(tmp_path / f"run-{number}-{attempt}")
            assert kill(run, lambda process, number=number: process.wait_for_write(number))
            half = [name for name in run.names() if "tmp" in name]
            if half:  # else the write was over before the signal came
                break
        assert half, "the signal never came amid a write"
        errors = resume(run, expected)
        assert f"passing over half-written checkpoint {run.checkpoints / half[0]}" in errors
        halves += 1
        resumed.append(run.resumed_from() or 0)
        assert (resumed[-1] > 0) == (number > 1)
    record(
        "faults",
        fault="SIGKILL amid the write of a checkpoint",
        times=halves,
        ended="killed",
        resumed=f"from the checkpoint before (step {', '.join(map(str, resumed))})",
        message="passing over half-written checkpoint …",
    )


def test_sigterm(straight, full, seed, tmp_path, record):
    expected, seconds = straight
    rng = random.Random(seed)
    stopped = []
    for number in range(9 if full else 3):
        run = expected.elsewhere(tmp_path / f"run-{number}")
        delay = rng.uniform(0, 0.4 * seconds)

        def act(process: Process, delay: float = delay) -> None:
            time.sleep(delay)
            process.send(signal.SIGTERM)

        code, errors = strike(run, act)
        if f"evaluation at step {STEPS}" in errors and code != 128 + signal.SIGTERM:
            continue  # the signal came too late
        assert code == 128 + signal.SIGTERM, (errors, f"seed {seed}, after {delay:.3f} s")
        said = message(errors)
        step = max(run.completed())
        assert f"stopped by SIGTERM at step {step} of {STEPS}" in said  # no step is lost
        assert "--resume" in said
        resume(run, expected)
        stopped.append(step)
        if len(stopped) == (3 if full else 1):
            break
    assert stopped, "runs end before they can be stopped"
    record(
        "faults",
        fault=f"SIGTERM at random moments (seed {seed})",
        times=len(stopped),
        ended=f"exit code {128 + signal.SIGTERM}",
        resumed=f"from the step at which it came ({', '.join(map(str, stopped))}): none is lost",
        message=shown(said, run),
    )


def shown(said: str, run: Run) -> str:
    """A message with its paths as a user would shorten them."""
    return said.replace(str(run.out), "OUT").replace(str(run.data), "DATA")


def largest(directory: Path) -> Path:
    return max(runs.files_of(directory / "state"), key=lambda path: path.stat().st_size)


def truncate(directory: Path) -> None:
    path = largest(directory)
    os.truncate(path, path.stat().st_size // 2)


def flip(directory: Path) -> None:
    flip_bit(largest(directory), 0.5)


def delete(directory: Path) -> None:
    largest(directory).unlink()


def flip_bit(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    bit = int(place * 8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage"),
    [("cut to half", truncate), ("with one bit flipped", flip), ("deleted", delete)],
)
def test_damaged_checkpoint(name, damage, straight, tmp_path, record):
    expected, _ = straight
    run = expected.elsewhere(tmp_path / "run")
    shutil.copytree(expected.out, run.out)
    (run.out / "metrics.json").unlink()
    damage(run.checkpoints / str(STEPS))
    code, errors = run.finish("--resume")
    assert code == 0, errors
    (said,) = (line for line in errors.splitlines() if "passing over" in line)
    assert f"passing over checkpoint {run.checkpoints / str(STEPS)}, which cannot be re" in said
    assert run.resumed_from() == STEPS - EVERY
    assert run.outcome() == expected.outcome()
    record(
        "faults",
        fault=f"largest file of the newest checkpoint {name}",
        times=1,
        ended="-",
        resumed="from the checkpoint before",
        message=shown(said, run),
    )


def test_random_damage_is_seen_or_harmless(full, seed, tmp_path, record):
    """Every file of a checkpoint cut, flipped and deleted at random, and read again."""
    write(tmp_path / "whole")
    rng = random.Random(seed)
    kinds = ("cut", "flipped", "deleted")
    seen = dict.fromkeys(kinds, 0)
    files = [p.relative_to(tmp_path / "whole") for p in runs.files_of(tmp_path / "whole" / "3")]
    for round_ in range(40 if full else 4):
        for file in files:
            kind = kinds[round_ % 3]
            directory = tmp_path / "damaged"
            shutil.copytree(tmp_path / "whole", directory)
            path, place = directory / file, rng.random()
            if kind == "cut":
                os.truncate(path, int(place * path.stat().st_size))
            elif kind == "flipped":
                flip_bit(path, place)
            else:
                path.unlink()
            what = f"{file} {kind} at {place} (seed {seed})"
            messages: list[str] = []
            with reopen(directory, messages) as checkpoints:
                state, progress = checkpoints.restore_latest(state_of(0))
            step = 2 if messages else 3
            assert (progress, raw(state)) == ({"step": step}, raw(state_of(step))), what
            assert all("passing over checkpoint" in said for said in messages), what
            seen[kind] += bool(messages)
            shutil.rmtree(directory)
    assert min(seen.values()) > 0
    record(
        "faults",
        fault=f"any file of a checkpoint cut, flipped in one bit, or deleted (seed {seed})",
        times=(round_ + 1) * len(files),
        ended="-",
        resumed=f"from the checkpoint before ({sum(seen.values())} times), or from this one, whole "
        "in all that counts",
        message="passing over checkpoint …, which cannot be read (…)",
    )


def full_for(process: Process) -> None:
    """From now on no file of the process may grow past a kilobyte, as on a disk that is full."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, 1000))


@pytest.mark.full
def test_file_size_limit(straight, tmp_path, record):
    expected, _ = straight
    run = expected.elsewhere(tmp_path / "run")
    code, errors = strike(run, full_for)
    assert code == 2, errors
    said = message(errors)
    assert f"the last good checkpoint is {run.checkpoints / str(max(run.completed()))}" in said
    assert "Make room" in said
    resume(run, expected)
    record(
        "faults",
        fault="writes fail from some moment on (RLIMIT_FSIZE)",
        times=1,
        ended=f"exit code {code}",
        resumed="from the last good checkpoint, once there was room",
        message=shown(said, run),
    )


@pytest.fixture
def small_disk(tmp_path, straight) -> Iterator[Callable[[str], None]]:
    """Mounts a file system at `tmp_path / "disk"`, or changes its size."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(*options: str) -> subprocess.CompletedProcess[str]:
        command = ["mount", "-t", "tmpfs", *options, "tmpfs", str(disk)]
        return subprocess.run(command, capture_output=True, text=True)

    run, _ = straight
    size = sum(p.stat().st_blocks * 512 for p in run.checkpoints.joinpath(str(STEPS)).rglob("*"))
    if (done := mount("-o", f"size={int(1.7 * size)}")).returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield lambda size: mount("-o", f"remount,size={size}").check_returncode()
    subprocess.run(["umount", str(disk)], check=True)


def test_full_disk(straight, small_disk, tmp_path, record):
    expected, _ = straight
    run = expected.elsewhere(tmp_path / "disk" / "run")
    code, errors = strike(run, lambda _: None)
    assert code == 2, errors
    said = message(errors)
    last = max(run.completed())
    assert last < STEPS
    assert f"the last good checkpoint is {run.checkpoints / str(last)}" in said
    small_disk("64m")
    resume(run, expected)
    record(
        "faults",
        fault="file system full (tmpfs with room for one checkpoint)",
        times=1,
        ended=f"exit code {code}",
        resumed="from the last good checkpoint, once there was room",
        message=shown(said, run),
    )


def test_vanishing_data(straight, tmp_path, record):
    expected, _ = straight
    shutil.copytree(expected.data, tmp_path / "data")
    run = Run(expected.model, tmp_path / "data", tmp_path / "run")

    watch = run.at_first_checkpoint(lambda: run.data.rename(tmp_path / "gone"))
    code, errors = run.finish()
    watch.join()
    assert code == 0, errors  # all of it was read before the first step
    assert not run.data.exists()
    assert run.outcome() == expected.outcome()
    (run.out / "metrics.json").unlink()
    shutil.rmtree(run.checkpoints / str(STEPS))
    code, errors = run.finish("--resume")
    assert code == 2, errors
    said = message(errors)
    assert f"is not in the TFDS data directory {run.data}" in said
    (tmp_path / "gone").rename(run.data)
    resume(run, expected)
    record(
        "faults",
        fault="data directory gone in mid-run, and still at a resumption",
        times=1,
        ended=f"not at all; at the resumption exit code {code}",
        resumed="from the newest checkpoint, once the data was back",
        message=shown(said, run),
    )


def nan_at(step: int) -> Callable[..., Any]:
    """Cross-entropy whose gradient, not its value, is NaN at a step."""
    factors = iter([1.0] * (step - 1) + [np.nan])

    @jax.custom_vjp
    def poisoned(x):
        return x

    def backward(_, gradient):
        kind = jax.ShapeDtypeStruct((), np.float32)
        return (gradient * jax.pure_callback(lambda: np.float32(next(factors, 1.0)), kind),)

    poisoned.defvjp(lambda x: (x, None), backward)
    whole = cross_entropy
    return lambda outputs, labels, weights: whole(poisoned(outputs), labels, weights)


def test_nan_gradients(straight, full, seed, tmp_path, monkeypatch, record):
    expected, _ = straight
    rng = random.Random(seed)
    steps = sorted(rng.sample(range(EVERY + 1, STEPS + 1), 5 if full else 1))
    for step in steps:
        run = expected.elsewhere(tmp_path / str(step))
        with monkeypatch.context() as patch:
            objective = supervised(nan_at(step))
            patch.setattr(job, "OBJECTIVES", {**job.OBJECTIVES, "classification": objective})
            code, errors = run.finish()
        assert code == 1, errors
        said = message(errors)
        assert f"nan at step {step}; the parameters were not changed" in said
        assert "loss is" not in said
        last = (step - 1) // EVERY * EVERY
        assert f"The last good checkpoint is {run.checkpoints / str(last)}." in said
        resume(run, expected)
    record(
        "faults",
        fault=f"NaN gradients at step {', '.join(map(str, steps))} (seed {seed})",
        times=len(steps),
        ended=f"exit code {code}",
        resumed="from the last good checkpoint, without the fault",
        message=shown(said, run),
    )


def finish_pair(run: Run, *more: str) -> None:
    """Both processes, to their end."""
    with run.start_pair(*more) as pair:
        for process in pair:
            code, errors = process.end()
            assert code == 0, errors


@pytest.fixture(scope="module")
def straight_pair(small_run, tmp_path_factory) -> Run:
    """A run of two processes that nothing strikes."""
    run = small_run.elsewhere(tmp_path_factory.mktemp("pair") / "straight")
    finish_pair(run)
    return run


def same_but_peaks(run: Run) -> tuple[dict[str, Any], str]:
    """The outcome without the compiler's peak, which differs for programs of its cache."""
    figures, digest = run.outcome()
    return {name: x for name, x in figures.items() if name not in runs.PEAKS}, digest


def resume_pair(run: Run) -> None:
    newest = max(run.completed(), default=None)
    finish_pair(run, "--resume")
    assert run.resumed_from() == newest


def test_one_of_two_processes_killed(straight, full, seed, tmp_path, record, request):
    rng = random.Random(seed)
    resumed, seconds = [], []
    for number, which in enumerate([1, 0, 1, 0, 1] if full else [1]):
        run = straight[0].elsewhere(tmp_path / f"run-{number}")
        with run.start_pair() as pair:
            assert pair[0].wait_for_checkpoint(), pair[0].errors()
            time.sleep(rng.uniform(0, 1))
            pair[which].send(signal.SIGKILL)
            struck = time.monotonic()
            code, errors = pair[1 - which].end()
            seconds.append(time.monotonic() - struck)
            killed, _ = pair[which].end()
        if max(run.completed()) == STEPS and code == 0:
            continue  # the signal came too late
        assert killed == -signal.SIGKILL
        assert seconds[-1] < 60
        if code == 1:
            assert "another process of the run ended or cannot be reached: the" in message(errors)
        else:  # JAX was the first to notice
            assert code == -signal.SIGABRT, errors
            assert "another task died" in errors
        resume_pair(run)
        if full:
            assert same_but_peaks(run) == same_but_peaks(request.getfixturevalue("straight_pair"))
        loss = straight[0].figures()["eval_loss"]  # of one process: as if both had had its devices
        assert run.figures()["eval_loss"] == pytest.approx(loss, rel=1e-3)
        resumed.append(run.resumed_from())
    assert resumed, "runs end before they can be struck"
    record(
        "faults",
        fault=f"one of two processes killed (seed {seed})",
        times=len(resumed),
        ended=f"the other within {max(seconds):.0f} s, with exit code 1, or aborted by JAX if it "
        "was the first to notice",
        resumed=f"by two processes, from the last whole checkpoint (step "
        f"{', '.join(map(str, resumed))})",
        message="another process of the run ended or cannot be reached: the last good checkpoint "
        "is …, or JAX's: … This most likely indicates that another task died …",
    )


@pytest.mark.full
def test_sigterm_to_one_of_two_processes(straight_pair, tmp_path, record):
    stopped = []
    for which in (0, 1):
        run = straight_pair.elsewhere(tmp_path / f"run-{which}")
        with run.start_pair() as pair:
            assert pair[0].wait_for_checkpoint(), pair[0].errors()
            pair[which].send(signal.SIGTERM)
            ends = [process.end() for process in pair]
        step = max(run.completed())
        for code, errors in ends:
            assert code == 128 + signal.SIGTERM, errors
            assert f"stopped by SIGTERM at step {step} of {STEPS}" in message(errors)
        resume_pair(run)
        assert same_but_peaks(run) == same_but_peaks(straight_pair)
        stopped.append(step)
    record(
        "faults",
        fault="SIGTERM to one of two processes",
        times=len(stopped),
        ended=f"both, with exit code {128 + signal.SIGTERM}",
        resumed=f"from the step at which both stopped ({', '.join(map(str, stopped))})",
        message=shown(message(ends[0][1]), run),
    )


def test_processes_of_different_runs(small_run, tmp_path):
    run = small_run.elsewhere(tmp_path / "run")
    options = runs.pair_options()
    with run.start(*options[0]) as first, run.start(*options[1], "--seed", "1") as second:
        ends = [process.end() for process in (first, second)]
    for code, errors in ends:
        assert code == 2, errors
        assert "process 1 differs from process 0 in base_weights, config.seed" in message(errors)
    assert not run.names()


def test_processes_that_do_not_share_a_directory(small_run, tmp_path):
    here, there = (small_run.elsewhere(tmp_path / name) for name in ("here", "there"))
    options = runs.pair_options()
    with here.start(*options[0]) as first, there.start(*options[1]) as second:
        ends = [process.end() for process in (first, second)]
    for code, errors in ends:
        assert code == 2, errors
        assert "process 1 does not see " in message(errors)
        assert "choose a directory that all processes share" in message(errors)
