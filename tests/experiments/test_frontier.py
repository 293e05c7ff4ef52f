"""The frontier of loss and time: a run on a small decoder, and mistakes told in one line."""

from __future__ import annotations

import csv
import json
import sys

import pytest

from experiments import frontier
from spt_jax import AdaptationReport, budget, cli


def run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["frontier", *map(str, arguments)])
    cli.run(frontier.main)


def test_more_budget_saves_more_and_costs_more(small_decoder, monkeypatch, tmp_path, capsys):
    def timed(layers, shares, config, lora, shape, advance, *, use_cache):
        return {path: {1.0: 1.0} | {s: s for s in shares[path]} for path in layers}

    monkeypatch.setattr(budget, "timed", timed)
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog sat on the log. " * 60)
    out, page = tmp_path / "out", tmp_path / "frontier.md"
    run(
        monkeypatch, "--model", small_decoder, "--text-file", text, "--length", 24, "--rows", 8,
        "--budgets", "0,100", "--out", out, "--report", page,
    )  # fmt: skip
    with (out / "frontier.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["budget"]) for row in rows] == [0, 100]
    none, all_ = ({name: row[name] for name in ("saved", "routed_ffn_layers")} for row in rows)
    assert none == {"saved": "0", "routed_ffn_layers": "0"} or float(none["saved"]) == 0
    assert float(all_["saved"]) > 0.3
    assert int(all_["routed_ffn_layers"]) > 0
    record = json.loads((out / "metrics.json").read_text())
    assert record["figures"]["added_0"] == 0
    assert record["figures"]["added_100"] != 0
    reports = [AdaptationReport.from_json(report) for report in record["reports"]]
    assert [report.saved > 0 for report in reports] == [False, True]
    assert (out / "frontier.png").stat().st_size > 1000
    assert "| 100 |" in page.read_text()
    assert "python -m experiments.frontier" in page.read_text()
    assert "budget, nats" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budgets", "0.1,-1"], "--budgets takes numbers from 0 on, got '0.1,-1'"),
        (["--budgets", "x"], "--budgets takes numbers from 0 on, got 'x'"),
        (["--rows", "1"], "--rows must be at least 2, got 1"),
        (["--model", "minilm", "--length", "5000"], "--length 5000 is above the 512 positions"),
    ],
)
def test_a_mistake_is_named(arguments, message, monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit):
        run(monkeypatch, *arguments, "--out", tmp_path / "out")
    assert message in capsys.readouterr().err
