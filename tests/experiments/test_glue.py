"""The command, on a tiny random model: its results, its resumption and its error messages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments import glue
from experiments.glue_tasks import TASKS
from spt_jax import cli
from tests.experiments.tfds_directory import random_rows, write_task
from tests.processes import UNOPTIMIZED
from tests.spt_jax.models.builders import edited, write_checkpoint, write_readable_checkpoint

STEPS = ["--steps", "6", "--eval-every", "3", "--batch-size", "8", "--max-length", "32"]
STEPS += ["--serve", "none"]  # so small a model saves no time


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    directory = write_readable_checkpoint(
        tmp_path_factory.mktemp("model") / "tiny", num_positions=64
    )
    return directory


def run(monkeypatch, *arguments: object) -> None:
    """The command in this process."""
    monkeypatch.setattr(sys, "argv", ["experiments.glue", *map(str, arguments)])
    cli.run(glue.main)


def start(*arguments: object, **environment: str) -> subprocess.Popen:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "experiments.glue", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes, env=os.environ | environment)


def figures(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())["figures"]


TIMES = (
    "step_ms",
    "adapt_s",
    "tokens_per_s",
    "padded_tokens_per_s",
    "compile_s",
    "wall_s",
    "resumed_from",
)


def without_times(results: dict) -> dict:
    return {m: {k: v for k, v in r.items() if k not in TIMES} for m, r in results.items()}


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    """An uninterrupted run of all methods."""
    out = tmp_path_factory.mktemp("glue") / "run"
    process = start("--model", tiny_model, "--method", "spt,lora,full", *STEPS, "--out", out)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return out, output


def test_a_run_ends_in_a_table_and_its_numbers_in_metrics_json(finished):
    out, output = finished
    assert "float32, kernels " in output
    assert "built-in demonstration task" in output
    assert "\r" not in output  # no progress bar off a terminal
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["seed"] == 0
    assert metrics["configuration"]["method"] == "spt,lora,full"
    assert {"jax", "flax", "optax"} <= metrics["versions"].keys()
    assert metrics["device"]["platform"]
    for method in ("spt", "lora", "full"):
        result = metrics["figures"][method]
        row = next(line for line in output.splitlines() if f"│ {method} " in line)
        assert f"{result['matthews']:.4f}" in row
        assert f"{result['trainable_parameters']:,}" in row
        assert result["step_ms"] > 0
        assert result["tokens_per_s"] > 0
        assert result["peak_bytes"] > 0
        assert list((out / method / "tensorboard").glob("events*"))
    numbers = {
        method: metrics["figures"][method]["trainable_parameters"]
        for method in ("spt", "lora", "full")
    }
    assert numbers["lora"] < numbers["spt"] < numbers["full"]
    assert numbers["full"] == metrics["figures"]["full"]["total_parameters"]


def test_a_finished_run_is_kept(finished, tiny_model, monkeypatch, capsys, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    arguments = ["--model", tiny_model, "--method", "spt", *STEPS, "--out", out]
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *arguments)
    assert stop.value.code == 2
    assert "--resume" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *arguments, "--resume", "--rank", 4)
    assert stop.value.code == 2
    assert "rank" in capsys.readouterr().err
    expected = without_times(figures(out))["spt"]
    run(monkeypatch, *arguments, "--resume")
    assert without_times(figures(out)) == {"spt": expected}


def pickle_only(directory: Path) -> Path:
    write_checkpoint(directory)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    return directory


def unknown_type(directory: Path) -> Path:
    return edited(directory, config=lambda raw: raw.update(model_type="t5"))


def misshapen(directory: Path) -> Path:
    def cut(tensors):
        name = next(n for n in tensors if n.endswith("layer.1.intermediate.dense.weight"))
        tensors[name] = tensors[name][:-1].copy()

    return edited(directory, tensors=cut)


def missing(directory: Path) -> Path:
    def remove(tensors):
        del tensors[next(n for n in tensors if n.endswith("layer.0.output.dense.bias"))]

    return edited(directory, tensors=remove)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "spt,dora"], "unknown method 'dora'"),
        (["--task", "snli"], "snli"),
        (["--learning-rate", "0"], "learning_rate must be above 0, got 0"),
        (["--max-length", "65"], "max_length 65 is above the 64 positions"),
        (["--max-length", "0"], "max_length and multiple_of must be at least 1, got 0"),
        (["--max-length", "2"], "max_length 2 leaves no room for text beside 2 special tokens"),
        (["--task", "mrpc", "--data-dir", "{tmp}"], "glue/mrpc is not in the TFDS data directory"),
        (["--out", "{tmp}/file/out"], "file"),
        (["--model", "{tmp}/nowhere"], "nowhere"),
        (["--model", "{tmp}/file"], "is a file; give the directory"),
    ],
)
def test_a_mistake_is_named_in_one_line(
    arguments, message, tiny_model, tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").write_text("not a directory")
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    model = [] if "--model" in given else ["--model", tiny_model]
    out = [] if "--out" in given else ["--out", tmp_path / "out"]
    began = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *model, *out, *given)
    errors = capsys.readouterr().err
    assert time.monotonic() - began < 10
    assert stop.value.code == 2
    assert message in errors
    assert "Traceback" not in errors


def fit_tokenizer(directory):
    """Give the model of a directory as many words as MiniLM's tokenizer has."""
    config = json.loads((directory / "config.json").read_text())
    config["vocab_size"] = 30522
    (directory / "config.json").write_text(json.dumps(config))
    if (weights := directory / "model.safetensors").exists():
        tensors = load_file(weights)
        (name,) = (name for name in tensors if name.endswith("word_embeddings.weight"))
        tensors[name] = np.resize(tensors[name], (30522, tensors[name].shape[1]))
        save_file(tensors, weights)
    return directory


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (pickle_only, "safetensors"),
        (unknown_type, "'t5'"),
        (misshapen, "intermediate.dense.weight"),
        (missing, "output.dense.bias"),
    ],
)
def test_a_bad_checkpoint_is_named_in_one_line(
    make, message, tiny_model, tmp_path, monkeypatch, capsys
):
    directory = fit_tokenizer(make(tmp_path / "model"))
    shutil.copy(tiny_model / "tokenizer.json", directory)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--model", directory, "--out", tmp_path / "out")
    errors = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert message in errors
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize(
    ("rows", "batch_size", "options"),
    [(1, 1, ()), (1, 2, ("--group-by-length",)), (3, 2, ()), (3, 16, ())],
)
def test_any_batch_size_and_number_of_rows(
    rows, batch_size, options, tiny_model, tmp_path, monkeypatch
):
    task = TASKS["stsb"]
    splits = {name: random_rows(task, rows, seed=0) for name in ("train", "validation")}
    write_task(tmp_path / "data", task, splits)
    run(
        monkeypatch,
        "--task", "stsb", "--data-dir", tmp_path / "data", "--model", tiny_model,
        "--method", "lora", "--steps", 2, "--batch-size", batch_size, *options,
        "--max-length", 32, "--out", tmp_path / "out",
    )  # fmt: skip
    found = figures(tmp_path / "out")["lora"]
    assert found["steps"] == 2
    assert np.isfinite(found["eval_loss"])


def test_no_traceback_reaches_the_user(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "experiments.glue", "--model", "no-such/model"]
    done = subprocess.run(
        [*command, "--out", tmp_path], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.data
@pytest.mark.parametrize(
    ("task", "steps", "length"),
    [("rte", 5, 64)]
    + [
        pytest.param(task, 20, 128, marks=pytest.mark.slow)
        for task in ("cola", "rte", "mrpc", "stsb", "sst2")
    ],
)
def test_real_glue_runs(task, steps, length, data_dir, tmp_path):
    # compiled as for users: a model of full size takes more time to run than to compile
    flags = os.environ.get("XLA_FLAGS", "").replace(UNOPTIMIZED, "")
    process = start(
        "--task", task, "--data-dir", data_dir, "--method", "spt", "--steps", steps,
        "--max-length", length, "--out", tmp_path, XLA_FLAGS=flags,
    )  # fmt: skip
    output, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    result = figures(tmp_path)["spt"]
    assert result["steps"] == steps
    assert f"{task}, validation" in output


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("task", "epochs", "bars"),
    [
        ("mrpc", 3, {"accuracy": 0.78, "f1": 0.85}),
        ("stsb", 2, {"pearson": 0.80}),
    ],
)
def test_spt_learns_real_tasks(task, epochs, bars, data_dir, tmp_path):
    process = start(
        "--task", task, "--data-dir", data_dir, "--method", "spt", "--epochs", epochs,
        "--out", tmp_path,
    )  # fmt: skip
    _, errors = process.communicate(timeout=1700)
    assert process.returncode == 0, errors
    result = figures(tmp_path)["spt"]
    for metric, bar in bars.items():
        assert result[metric] > bar, result
