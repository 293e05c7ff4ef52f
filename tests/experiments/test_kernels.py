"""The benchmark runs, on small shapes, and writes what it prints."""

from __future__ import annotations

import csv
import json
import sys

import pytest

from experiments import cli, kernels


def test_figures_are_written_and_printed(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(kernels, "LARGE", kernels.FFNShape(64, 16, 32))
    monkeypatch.setattr(kernels, "MINILM", kernels.FFNShape(48, 16, 32))
    monkeypatch.setattr(kernels, "ATTENTION", kernels.AttentionShape(256, 2, 16, 1 / 4))
    monkeypatch.setattr(sys, "argv", ["kernels", "--rounds", "2", "--out", str(tmp_path)])
    cli.run(kernels.main)
    figures = json.loads((tmp_path / "metrics.json").read_text())["figures"]
    for name in (
        "routed_ffn_half_speedup",
        "routed_ffn_quarter_speedup",
        "sparse_attention_speedup",
        "sparse_attention_peak_ratio",
    ):
        assert figures[name] > 0
    with (tmp_path / "kernels.csv").open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert float(rows["routed_ffn_half"]["speedup"]) == figures["routed_ffn_half_speedup"]
    assert figures["routed_ffn_half"]["step_ms"] > 0
    assert f"{figures['sparse_attention_speedup']:.2f}" in capsys.readouterr().out
    assert (tmp_path / "kernels.png").stat().st_size > 1000


def test_a_mistake_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["kernels", "--rounds", "0", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        cli.run(kernels.main)
    assert stop.value.code == 2
    assert "rounds must be at least 1, got 0" in capsys.readouterr().err
