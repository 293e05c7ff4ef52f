"""Bad input of every kind ends in one line that names the value and the remedy, soon, in little
memory, and with exit code 2."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.reliability.bad_inputs import CASES, LIMIT_BYTES, LIMIT_S, BadInput

pytestmark = pytest.mark.timeout(900)

REPOSITORY = Path(__file__).parents[2]
LONGEST = 1500  # characters of a message; a shape or two and a list of choices
COMMANDS = {
    "unknown option": "experiments.glue --epoch 3",
    "unknown method": "experiments.glue --method dora",
    "no such model": "experiments.glue --model {tmp}/nowhere",
    "no such text file": "experiments.wikitext --text-file {tmp}/nowhere.txt",
    "contradicting options": "experiments.wikitext --text-file a --dataset b",
    "required option missing": "experiments.mmlu --data-dir {tmp}",
    "folder without questions": "experiments.mmlu --model minilm --data-dir {tmp}",
    "data directory without the task": "experiments.glue --task rte --data-dir {tmp}",
}
#: Runs a command, and prints its exit code, seconds on a processor and most kilobytes of memory.
#: The kilobytes of a process that this one starts are at least this one's, with which it begins.
MEASURED = """
import json, os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, used = os.wait4(process.pid, 0)
seconds = used.ru_utime + used.ru_stime
print(json.dumps([os.waitstatus_to_exitcode(status), seconds, used.ru_maxrss]))
"""
IN_SHORT = ("unknown option", "no such model")


@pytest.fixture(scope="module")
def tried(tmp_path_factory) -> tuple[dict[tuple[str, str], dict], str]:
    """What came of every kind, and the process' standard error."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.reliability.bad_inputs", tmp_path_factory.mktemp("bad")],
        capture_output=True,
        text=True,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {(case["area"], case["kind"]): case for case in found}, done.stderr


def error_line(errors: str) -> str:
    """The line; before it there may be log lines."""
    assert "Traceback" not in errors, errors
    *_, last = errors.strip().splitlines() or [""]
    assert last.startswith("error: "), errors
    assert sum(line.startswith("error: ") for line in errors.splitlines()) == 1, errors
    assert len(last) <= LONGEST
    return last.removeprefix("error: ")


def named(case: BadInput) -> str:
    return f"{case.area}: {case.kind}"


def test_there_are_many_kinds():
    assert len(CASES) >= 100
    assert len(set(map(named, CASES))) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=named)
def test_bad_input(case, tried, record):
    found, errors = tried
    assert (case.area, case.kind) in found, f"the process ended before: {errors}"
    result = found[case.area, case.kind]
    assert result["code"] == 2, result["errors"]
    said = error_line(result["errors"])
    for words in case.says:
        assert words in said
    # time on a processor, where others keep this process waiting
    assert min(result["s"], result["cpu_s"]) < LIMIT_S
    assert result["bytes"] < LIMIT_BYTES
    record(
        "bad_input",
        area=case.area,
        kind=case.kind,
        message=said.replace(result["folder"], "…").replace(f"{REPOSITORY}/", ""),
        s=f"{result['s']:.1f}",
        MB=f"{result['bytes'] / 1e6:.0f}",
    )


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=() if kind in IN_SHORT else pytest.mark.full) for kind in COMMANDS],
)
def test_command_line(kind, tmp_path, record):
    command = [sys.executable, "-m", *shlex.split(COMMANDS[kind].format(tmp=tmp_path))]
    began = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-c", MEASURED, *command, "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    seconds, errors = time.monotonic() - began, process.stderr
    code, cpu_s, kilobytes = json.loads(process.stdout)
    assert code == 2, errors
    assert len(errors.strip().splitlines()) == 1, errors
    said = error_line(errors)
    assert min(seconds, cpu_s) < LIMIT_S
    assert 1024 * kilobytes < LIMIT_BYTES
    record(
        "commands",
        command=f"`python -m {COMMANDS[kind].format(tmp='DIR')}`",
        message=said.replace(str(tmp_path), "DIR"),
        s=f"{seconds:.1f}",
        MB=f"{1024 * kilobytes / 1e6:.0f}",
    )


def test_the_checks_notice():
    """A traceback, two lines of error, or none, fail."""
    for errors in ("", "Traceback", "error: a\nerror: b", "error: a\nmore", "error: " + "x" * 2000):
        with pytest.raises(AssertionError):
            error_line(errors)


def test_a_process_that_takes_too_much_is_noticed(tmp_path):
    """Memory beyond the limit ends an attempt, with another exit code than 2."""
    program = (
        "import sys; from pathlib import Path; from tests.reliability import bad_inputs as b;"
        "case = b.BadInput('', '', lambda _: bytearray(3 << 30), ());"
        "print(b.attempt(case, Path(sys.argv[1]) / 'x')['code'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True,
        cwd=REPOSITORY,
    )  # fmt: skip
    assert done.stdout.split() == ["1"]
