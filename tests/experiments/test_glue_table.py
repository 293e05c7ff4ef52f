"""The table of methods, tasks and seeds, on a tiny random model and two tiny tasks."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from experiments import glue, glue_table
from experiments.glue_table import Cell, Options, Score, summarize
from experiments.glue_tasks import TASKS
from experiments.methods import DESCRIPTIONS
from spt_jax import cli
from spt_jax.training import TrainResult, evaluation, evaluation_metrics
from tests.experiments.tfds_directory import random_rows, write_task
from tests.spt_jax.models.builders import write_readable_checkpoint

TABLE = {"--tasks": "mrpc,stsb", "--methods": "lora,full", "--seeds": "0,1"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[str]:
    """Options that name a tiny model, its data and a tiny budget."""
    root = tmp_path_factory.mktemp("glue-table")
    model = write_readable_checkpoint(
        root / "tiny", num_positions=32, width=8, num_heads=2, hidden=16,
        num_layers=1,
    )  # fmt: skip
    for name in ("mrpc", "stsb"):
        task = TASKS[name]
        rows = {"train": random_rows(task, 16, 0), "validation": random_rows(task, 8, 1)}
        write_task(root / "data", task, rows)
    return [
        "--model", str(model), "--data-dir", str(root / "data"),
        "--steps", "2", "--batch-size", "4", "--max-length", "16",
    ]  # fmt: skip


def run(*arguments: object) -> None:
    """The command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["experiments.glue_table", *map(str, arguments)])
        cli.run(glue_table.main)


class Training:
    """Stands for `train_method`: takes no time, and remembers what was asked of it."""

    def __init__(self) -> None:
        self.cells: list[str] = []

    def __call__(self, task, method, options, data, out) -> TrainResult:
        self.cells.append(f"{task.name} {method} {options.seed}")
        (out / "checkpoints" / "2").mkdir(parents=True)
        config = options.train_config(method)
        value = 0.5 + 0.1 * options.seed + (0.02 if method == "full" else 0.0)
        return TrainResult(
            steps=config.total_steps(len(data.train)),
            epochs=config.total_steps(len(data.train)) * config.batch_size / len(data.train),
            stopped_early=False,
            resumed_from=None,
            metrics={name: value + 0.01 * i for i, name in enumerate(task.metrics)},
            metrics_step=2,
            best_step=2,
            train_loss=0.5,
            step_ms=100.0 + len(task.name) + options.seed,
            tokens_per_s=1e3,
            padded_tokens_per_s=2e3,
            compile_s=1.0,
            wall_s=1.0,
            peak_bytes=3_000_000,
            peak_bytes_source="compiler",
            compiled_peak_bytes=3_000_000,
            trainable_parameters=10 if method == "lora" else 100,
            total_parameters=110 if method == "lora" else 100,
        )


@pytest.fixture
def training(monkeypatch) -> Training:
    """No cell is trained for real."""
    training = Training()
    monkeypatch.setattr(glue_table, "train_method", training)
    return training


def flags(**changes: str) -> list[str]:
    return [word for pair in (TABLE | changes).items() for word in pair]


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory) -> Path:
    """A finished table."""
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glue_table, "train_method", Training())
        run(*inputs, *flags(), "--out", out, "--report", out / "report" / "glue.md")
    return out


def test_the_table_its_numbers_and_its_page(finished, inputs, capsys):
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["missing"] == []
    assert list(metrics["figures"]) == ["lora", "full"]
    lora, full = metrics["figures"].values()
    cell = json.loads((finished / "mrpc" / "lora" / "seed-1" / "metrics.json").read_text())
    reached = cell["figures"]["lora"]
    expected = 100 * (reached["accuracy"] + reached["f1"]) / 2
    assert lora["scores"]["mrpc"]["by_seed"]["1"] == pytest.approx(expected)
    difference = full["average"]["mean"] - lora["average"]["mean"]
    assert full["difference_to_lora"]["mean"] == pytest.approx(difference)
    assert lora["difference_to_lora"]["mean"] is None
    assert full["trainable_parameters"] == full["total_parameters"] > lora["trainable_parameters"]
    assert lora["step_ms_by_task"] == {"mrpc": 104.5, "stsb": 104.5}
    assert lora["step_ms"] == 104.5
    assert lora["peak_bytes"] == 3_000_000
    assert not list(finished.glob("**/checkpoints"))

    page = (finished / "report" / "glue.md").read_text()
    average = lora["average"]
    assert f"| {average['mean']:.1f} ± {average['std']:.1f} |  |" in page
    assert f"| {full['difference_to_lora']['mean']:+.1f} ± " in page
    assert "missing" not in page
    assert "mrpc accuracy and f1, stsb pearson and spearman" in page
    assert "mrpc: 2 steps, 0.50 epochs of 16 examples, length 16." in page
    assert "Peak learning rate: 0.001 for lora; 5e-05 for full." in page
    for text in (
        f"`lora`: {DESCRIPTIONS['lora']}",
        "jax 0.",
        "cores",
        "--seeds 0,1",
        f"Trained {cell['finished'][:10]}",
    ):
        assert text in page
    assert inputs[3] not in page  # --data-dir is of this machine

    run("--report-only", *inputs, *flags(), "--out", finished, "--report", finished / "again.md")
    assert (finished / "again.md").read_text() == page
    assert f"{average['mean']:.1f} ± {average['std']:.1f}" in capsys.readouterr().out


def test_finished_cells_are_not_trained_again(finished, inputs, training, tmp_path):
    out = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(out / "stsb" / "full" / "seed-1")
    run("--report-only", *inputs, *flags(), "--out", out, "--report", out / "glue.md")
    assert not training.cells
    figures = json.loads((out / "metrics.json").read_text())
    assert figures["missing"] == ["stsb, full, seed 1"]
    page = (out / "glue.md").read_text()
    assert "Not finished: 1 of 8 cells." in page
    assert "(1 of 2 seeds)" in next(x for x in page.splitlines() if x.startswith("| full"))
    run(*inputs, *flags(**{"--seeds": "0"}), "--out", out)
    assert not training.cells
    run(*inputs, *flags(), "--out", out)
    assert training.cells == ["stsb full 1"]
    again, before = (json.loads((d / "metrics.json").read_text()) for d in (out, finished))
    for method in ("lora", "full"):  # the same seed gives the same numbers
        assert again["figures"][method]["scores"] == before["figures"][method]["scores"]


def test_changed_options_are_refused_and_named(finished, inputs, training, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "run")
    changed = [*inputs, *flags(**{"--seeds": "0", "--methods": "lora"}), "--out", out, "--rank", 4]
    for arguments in (changed, [*changed, "--report-only"]):
        with pytest.raises(SystemExit) as stop:
            run(*arguments)
        assert stop.value.code == 2
        errors = capsys.readouterr().err
        assert "spt.lora.rank was 16, now 4" in errors
        assert "--overwrite" in errors
    assert not training.cells
    run(*changed, "--overwrite")
    assert training.cells == ["mrpc lora 0", "stsb lora 0"]
    run(*changed, "--overwrite")  # goes on: these cells are the same now
    assert len(training.cells) == 2
    # the rank of LoRA is nothing to full
    run(*inputs, *flags(**{"--methods": "full"}), "--rank", 4, "--out", out)
    assert len(training.cells) == 2


def test_a_stopped_table_goes_on(inputs, monkeypatch, capsys, tmp_path):
    out = tmp_path / "run"
    cells = {"--seeds": "0", "--tasks": "mrpc", "--methods": "lora"}
    arguments = [*inputs, *flags(**cells), "--out", out]
    arguments += ["--eval-every", 1, "--report", out / "glue.md"]
    folder = out / "mrpc" / "lora" / "seed-0"
    calls = itertools.count(1)

    def evaluate(*arguments):
        if next(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluation_metrics(*arguments)

    monkeypatch.setattr(evaluation, "evaluation_metrics", evaluate)
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 128 + signal.SIGTERM
    errors = capsys.readouterr().err
    assert "stopped in the cell mrpc, lora, seed 0" in errors
    assert "the same command goes on" in errors
    assert list((folder / "checkpoints").glob("1"))
    assert "| lora | missing |" in (out / "glue.md").read_text()
    assert not (out / "metrics.json").exists()

    run(*arguments)
    record = json.loads((folder / "metrics.json").read_text())
    assert record["figures"]["lora"]["resumed_from"] == 1
    assert not (folder / "checkpoints").exists()
    assert list((folder / "tensorboard").glob("events*"))
    assert "missing" not in (out / "glue.md").read_text()


@pytest.mark.slow
def test_every_method_trains(inputs, tmp_path):
    blocks = ["--num-blocks", 2, "--active-blocks", 1, "--serve", "none"]
    run(*inputs, "--tasks", "mrpc", *blocks, "--out", tmp_path)
    figures = json.loads((tmp_path / "metrics.json").read_text())["figures"]
    assert figures.keys() == DESCRIPTIONS.keys()
    numbers = {method: row["trainable_parameters"] for method, row in figures.items()}
    # routers train, codebooks do not
    assert numbers["lora"] == numbers["spt-dense-ffn"] < numbers["spt-dense-attention"]
    assert numbers["spt-dense-attention"] == numbers["spt"] < numbers["full"]


def test_ablations_differ_from_spt_in_one_thing():
    options = glue.Options(lora_dropout=0.1, router_learning_rate_multiplier=0.5)
    spt = options.spt_config("spt")
    assert spt is not None
    assert spt.lora is not None
    assert spt.lora.dropout == 0.1
    configs = {method: options.spt_config(method) for method in DESCRIPTIONS if method != "full"}
    assert configs["lora"].attention is configs["lora"].ffn is None
    assert configs["spt-dense-attention"].attention is None
    assert configs["spt-dense-ffn"].ffn is None
    assert configs["spt-match-count"].attention.rule == "match_count"
    assert configs["spt-random-router"].ffn.calibration == "random"
    for method, config in configs.items():
        assert config.lora == spt.lora
        parts = [(config.attention, spt.attention), (config.ffn, spt.ffn)]
        changed = sum(mine != its for mine, its in parts)
        assert changed == {"spt": 0, "spt-routed-ffn": 0, "lora": 2}.get(method, 1)
        train = options.train_config(method)
        assert train == options.train_config("spt")
        assert train.learning_rate_multipliers.router == 0.5
    assert options.spt_config("full") is None
    assert options.train_config("full").learning_rate < options.train_config("spt").learning_rate


def test_mean_and_deviation():
    score = Score({0: 70.0, 1: 72.0, 4: 77.0})
    assert score.mean == pytest.approx(73.0)
    assert score.std == pytest.approx(13**0.5)  # (9 + 1 + 16) / 2
    assert score.shown(3) == "73.0 ± 3.6"
    assert Score({0: 70.0}).shown(1, sign="+") == "+70.0"
    assert Score({}).shown(1) == "missing"


def test_averages_and_differences_are_taken_seed_by_seed():
    options = Options(tasks="mrpc,cola", methods="lora,spt", seeds="0,1,2")
    costs = {
        "step_ms": 1.0, "compiled_peak_bytes": 1, "trainable_parameters": 1, "total_parameters": 1
    }  # fmt: skip

    def record(method, **metrics):
        return {"figures": {method: metrics | costs}}

    cells = {}
    for seed, base in enumerate((0.5, 0.6, 0.7)):
        for method, gain in (("lora", 0.0), ("spt", 0.01 * (seed + 1))):
            name = {"method": method, "seed": seed}
            cells[Cell(task="mrpc", **name)] = record(method, accuracy=base, f1=base + 0.1)
            if (method, seed) != ("spt", 2):
                cells[Cell(task="cola", **name)] = record(method, matthews=base + gain)
    rows = summarize(options, cells)
    assert rows["lora"].scores["mrpc"].by_seed == pytest.approx({0: 55.0, 1: 65.0, 2: 75.0})
    assert rows["lora"].average.by_seed == pytest.approx({0: 52.5, 1: 62.5, 2: 72.5})
    assert rows["lora"].average.std == pytest.approx(10.0)
    assert rows["spt"].average.by_seed == pytest.approx({0: 53.0, 1: 63.5})
    assert rows["spt"].difference.by_seed == pytest.approx({0: 0.5, 1: 1.0})  # seeds of both


def test_budgets_are_equal_and_long_tasks_are_cut():
    options = Options(epochs=2.0)
    assert len(options.cells) == 5 * 7
    train = {cell: options.configuration(cell)["train"] for cell in options.cells}
    for task, steps in (("rte", None), ("sst2", 500)):
        budgets = {
            (t["epochs"], t["steps"], t["batch_size"]) for c, t in train.items() if c.task == task
        }
        assert budgets == {(2.0, steps, 32)}
    uncut = Options(long_task_steps=None)
    assert {uncut.configuration(cell)["train"]["steps"] for cell in uncut.cells} == {None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "rte,snli"], "unknown task 'snli' in --tasks rte,snli; choose from cola"),
        (["--methods", "spt,dora"], "unknown method 'dora' in --methods spt,dora"),
        (["--seeds", "0,-1"], "--seeds takes whole numbers from 0 on, got '-1'"),
        (["--epochs", "1"], "give --epochs or --steps, not both"),
        (["--report-only", "--overwrite"], "nothing to --overwrite"),
        (["--lora-dropout", "1"], "LoRA dropout must lie in [0, 1), got 1"),
        (["--router-learning-rate-multiplier", "-1"], "router learning-rate multiplier"),
        (["--num-blocks", "3", "--methods", "spt"], "16 hidden units do not split into num_b"),
        (["--tasks", "mrpc,cola"], "glue/cola is not in the TFDS data directory"),
        (["--data-dir", "{tmp}/nowhere"], "it has no GLUE task"),
        (["--max-length", "33"], "max_length 33 is above the 32 positions"),
    ],
)
def test_a_mistake_is_named_before_anything_is_trained(
    arguments, message, inputs, training, tmp_path, capsys
):
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    with pytest.raises(SystemExit) as stop:
        run(*inputs, "--tasks", "mrpc", "--out", tmp_path / "out", *given)
    errors = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in errors
    assert not training.cells
