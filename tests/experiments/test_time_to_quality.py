"""Time to quality: rows without padding, curves, a run, and mistakes told in one line."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from experiments import time_to_quality
from experiments.time_to_quality import Options, best_rows, rows_of, split
from spt_jax import cli


def test_every_token_but_the_first_is_a_label_once():
    rows = rows_of(np.arange(10), 3, "text").columns
    assert rows["input_ids"].ravel().tolist() == list(range(9))
    assert rows["label"].ravel().tolist() == list(range(1, 10))
    assert rows["weight"].all()
    assert rows["attention_mask"].all()


def test_what_is_held_out_is_not_trained_on():
    options = Options(model="m", eval_tokens=8)
    train, evaluation = split(np.arange(30), None, 4, options)
    assert evaluation.columns["input_ids"].ravel().tolist() == list(range(21, 29))
    assert train.columns["label"].max() == 20
    train, evaluation = split(np.arange(30), np.arange(100, 150), 4, options)
    assert evaluation.columns["input_ids"].ravel().tolist() == list(range(100, 108))
    assert train.columns["label"].max() == 28
    with pytest.raises(ValueError, match="the text has 1 tokens, and rows of 4 need 5"):
        split(np.arange(10), None, 4, options)
    with pytest.raises(ValueError, match="the evaluation text has 3 tokens"):
        split(np.arange(10), np.arange(3), 4, options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "full"], "unknown method 'full' in --methods; choose from spt, lora"),
        (["--lengths", "64,x"], "--lengths takes numbers above 1, got '64,x'"),
        (["--seconds", "0"], "--seconds must be above 0, got 0"),
        (["--budgets", "0.1,much"], "--budgets takes numbers from 0 on, got 'much'"),
        (["--budgets=-1"], "--budgets takes numbers from 0 on, got '-1'"),
        (["--learning-rates", "1e-3,0"], "--learning-rates takes numbers above 0, got '1e-3,0'"),
    ],
)
def test_a_mistake_is_named(arguments, message, monkeypatch, capsys, tmp_path):
    words = ["time_to_quality", "--model", "m", *arguments, "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):
        cli.run(time_to_quality.main)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_best_rate_counts_and_the_way_to_lora_is_measured():
    def row(method, rate, losses, calibrated_s=0.0):
        curve = [(10.0 * i, loss) for i, loss in enumerate(losses)]
        return {
            "length": 8, "method": method, "learning_rate": rate, "curve": curve,
            "loss_dense": losses[-1], "calibrated_s": calibrated_s, "chosen": "",
        }  # fmt: skip

    rows = [
        row("lora", 1e-3, [4.0, 3.0, 2.5]),
        row("lora", 1e-2, [4.0, 3.5, 2.8]),
        row("spt", 1e-3, [4.0, 2.75, 2.25], calibrated_s=3.0),
        row("spt", 1e-2, [4.0, 3.9, 3.8], calibrated_s=3.0),
        {"length": 8, "method": "spt", "failure": "out of memory"},
    ]
    lora, spt = best_rows(rows)
    assert (lora["learning_rate"], spt["learning_rate"]) == (1e-3, 1e-3)
    assert lora["seconds_to_lora"] == 20.0
    assert spt["seconds_to_lora_uncalibrated"] == 15.0
    assert spt["seconds_to_lora"] == 18.0


def test_a_run_learns_and_says_what_it_took(small_decoder, monkeypatch, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog sat on the log. " * 60)
    words = ["time_to_quality", "--model", str(small_decoder), "--text-file", str(text)]
    words += ["--methods", "lora,spt-routed-ffn", "--lengths", "32", "--seconds", "0.6"]
    words += ["--budgets", "0"]
    words += ["--learning-rates", "1e-2", "--step-tokens", "64", "--eval-tokens", "64"]
    words += ["--evaluations", "2", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    cli.run(time_to_quality.main)
    figures = json.loads((tmp_path / "out" / "metrics.json").read_text())["figures"]
    assert list(figures) == ["s32_lora", "s32_spt-routed-ffn", "s32_spt, budget 0"]
    assert figures["s32_spt, budget 0"]["chosen"] == "nothing: it trains as lora does"
    assert figures["s32_spt-routed-ffn"]["chosen"] == "1 x ffn, 0.5 of the blocks"
    for found in figures.values():
        assert found["loss_dense"] < found["loss_before"] == found["curve"][0][1]
        assert len(found["curve"]) == 3
        assert found["peak_bytes"] > 0
    assert figures["s32_lora"]["seconds_to_lora"] > 0
    assert figures["s32_spt-routed-ffn"]["loss_sparse"] > 0
    assert "loss_sparse" not in figures["s32_lora"]
    assert (tmp_path / "out" / "time_to_quality.png").stat().st_size > 1000
    assert "0.6 s of training, mean loss of a token" in capsys.readouterr().out
