"""The command, on a tiny random model: its figures, files and error messages."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import capture
from experiments.attention_capture import Rule
from spt_jax import cli
from tests.spt_jax.models.builders import write_readable_checkpoint

SIZES = ["--length", "64", "--rows", "2", "--ffn-length", "32", "--ffn-rows", "4"]
FIGURES = {
    f"{granularity}_{kind}_{direction}"
    for granularity in ("token", "tile")
    for kind in ("capture", "oracle")
    for direction in ("causal", "bidirectional")
}


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    directory = write_readable_checkpoint(
        tmp_path_factory.mktemp("model") / "tiny", num_positions=64, num_layers=1
    )
    return directory


def run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["experiments.capture", *map(str, arguments)])
    cli.run(capture.main)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_figures_tables_and_plots_of_the_defaults(tiny_model, tmp_path, monkeypatch, capsys):
    run(monkeypatch, "--model", tiny_model, *SIZES, "--no-sweep", "--out", tmp_path)
    figures = json.loads((tmp_path / "metrics.json").read_text())["figures"]
    assert figures.keys() >= FIGURES
    for direction in ("causal", "bidirectional"):
        for granularity in ("token", "tile"):
            kept = figures[f"{granularity}_capture_{direction}"]
            assert 0 < kept <= figures[f"{granularity}_oracle_{direction}"] + 1e-6
    for name in ("routed_error", "routed_centered_error", "routed_token_error"):
        oracle, default, random = (figures[f"{name}_{w}"] for w in ("oracle", "default", "random"))
        assert 0 < default < random
        assert oracle > 0
    assert figures["routed_error_oracle"] <= figures["routed_error_default"] + 1e-6
    assert 1 <= figures["routed_load_balance_default"] <= 2

    heads = rows_of(tmp_path / "attention.csv")
    # of both masks: three kinds of tokens and match_count, three kinds of tiles; four heads
    assert len(heads) == 2 * (4 + 3) * 4
    shares = [
        float(row["share"])
        for row in heads
        if (row["granularity"], row["kind"], row["mask"]) == ("token", "oracle", "causal")
    ]
    assert np.mean(shares) == pytest.approx(figures["token_oracle_causal"])
    layers = {row["routing"]: row for row in rows_of(tmp_path / "ffn.csv")}
    assert float(layers["fitted"]["relative_error"]) == figures["routed_error_default"]
    for name in ("attention", "heads", "ffn"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
    output = capsys.readouterr().out
    assert "match_count, C=8 E=16" in output
    assert f"{figures['token_capture_causal']:.3f}" in output
    assert f"{figures['routed_error_default']:.3f}" in output


def test_what_a_sweep_measures():
    rules = list(capture.attention_rules(sweep=True))
    assert len(set(rules)) == len(rules)
    assert set(capture.attention_rules(sweep=False)) <= set(rules)
    tiles = {(r.key_group, d) for r, d in rules if r.granularity == "tile" and r.kind == "pq"}
    oracles = {(r.key_group, d) for r, d in rules if r.granularity == "tile" and r.kind == "oracle"}
    assert tiles == oracles
    assert Rule() in dict(rules)
    shares = [(c.num_blocks, c.active_blocks) for c in capture.ffn_configs(48, sweep=True)]
    assert shares == [(4, 2), (8, 4), (16, 8), (4, 1), (4, 3)]  # 48 units do not split into 32


def test_rows_to_measure_are_not_those_that_calibrate():
    ids = np.arange(1000, dtype=np.int32)
    one, two = capture.two_sets(capture.Texts(ids), 50, 7)
    assert one.shape == two.shape == (7, 50)
    assert not set(one.ravel()) & set(two.ravel())
    one, two = capture.two_sets(capture.Texts(ids, ids + 1000), 50, 7)
    assert one.shape == two.shape == (7, 50)
    assert one.max() < 1000 <= two.min()
    with pytest.raises(ValueError, match=r"100 tokens, and 7 rows of 50 .* a longer --eval-file"):
        capture.two_sets(capture.Texts(ids, ids[:100]), 50, 7)


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("short", [], "the text has 1 tokens, and 4 rows of 64 need 256"),
        ("", [], "holds no text"),
        (None, [], "does not exist"),
        ("short", ["--length", 65], "--length 65 is above the 64 positions"),
        ("short", ["--rows", 0], "--rows must be at least 1"),
        ("short", ["--measure", "loss"], "--measure 'loss' is unknown; choose from perplexity"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    text, arguments, message, tiny_model, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "text.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "--model", tiny_model, "--text-file", path, *SIZES, *arguments)
    assert stopped.value.code == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert message in errors[0]
