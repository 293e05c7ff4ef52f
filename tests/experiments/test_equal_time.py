"""Equal time: rows without padding, and mistakes told in one line."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from experiments import cli, equal_time
from experiments.equal_time import Options, rows_of, split


def test_every_token_but_the_first_is_a_label_once():
    rows = rows_of(np.arange(10), 3, "text").columns
    assert rows["input_ids"].ravel().tolist() == list(range(9))
    assert rows["label"].ravel().tolist() == list(range(1, 10))
    assert rows["weight"].all()
    assert rows["attention_mask"].all()


def test_what_is_held_out_is_not_trained_on():
    options = Options(model="m", eval_tokens=8)
    train, evaluation = split(np.arange(30), 4, options)
    assert evaluation.columns["input_ids"].ravel().tolist() == list(range(21, 29))
    assert train.columns["label"].max() == 20
    with pytest.raises(ValueError, match="the text has 10 tokens, and rows of 4 need 14"):
        split(np.arange(10), 4, options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "full"], "unknown method 'full' in --method; choose from spt, lora"),
        (["--lengths", "64,x"], "--lengths takes numbers above 1, got '64,x'"),
        (["--seconds", "0"], "--seconds must be above 0, got 0"),
    ],
)
def test_a_mistake_is_named(arguments, message, monkeypatch, capsys, tmp_path):
    words = ["equal_time", "--model", "m", *arguments, "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):
        cli.run(equal_time.main)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
