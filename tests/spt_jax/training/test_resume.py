from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def start(out: Path, *how: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.spt_jax.training.interrupted_run", str(out), *map(str, how)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_and_resumed_runs_end_bit_for_bit_alike(tmp_path):
    straight = start(tmp_path / "straight")
    moments = [("write", 1), (random.Random().uniform(0, 0.5),), ("write", 3)]
    for moment in moments:
        killed = start(tmp_path / "killed", *moment)
        _, errors = killed.communicate(timeout=300)
        assert killed.returncode == -signal.SIGKILL, errors
    resumed = start(tmp_path / "killed")
    found, expected = (run.communicate(timeout=300) for run in (resumed, straight))
    assert (resumed.returncode, straight.returncode) == (0, 0), (found, expected)
    assert "passing over half-written checkpoint" in found[1]  # the last kill was amid a write
    found, expected = (json.loads(output) for output, _ in (found, expected))
    assert expected["resumed_from"] is None
    assert 0 < found["resumed_from"] < 60, moments
    assert found["exact"] == expected["exact"], moments
    assert expected["exact"]["metrics"]["matthews"] > 0.5
