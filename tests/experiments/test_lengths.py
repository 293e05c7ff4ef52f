"""SPT's step beside LoRA's at several lengths."""

import csv
import json
import sys

import pytest

import spt_jax
from experiments import lengths
from spt_jax import budget
from spt_jax.cli import run
from tests.spt_jax.finetune.models import write_decoder

SENTENCE = "Tiny models read these words, and nothing is learnt from them. "


def experiment(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["experiments.lengths", *map(str, arguments)])
    lengths.main()


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(SENTENCE * 60)
    return file


def test_a_row_a_length_and_lora_where_nothing_is_sparse(tmp_path, monkeypatch, text):
    """Parts that save no time, or all of it, whatever this machine says."""

    def timed(layers, shares, config, lora, shape, advance, *, use_cache):
        saves = shape[1] > 32
        return {p: {1.0: 1.0} | {s: s if saves else 1.0 for s in shares[p]} for p in layers}

    monkeypatch.setattr(budget, "timed", timed)
    monkeypatch.setattr(spt_jax.SPTConfig, "budget", lambda *_, **__: 100.0)
    model, out = write_decoder(tmp_path / "model"), tmp_path / "out"
    experiment(
        monkeypatch, "--models", model, "--text-file", text, "--lengths", "32,64", "--rows", 4,
        "--step-tokens", 128, "--turns", 2, "--out", out, "--report", tmp_path / "page.md",
    )  # fmt: skip
    short, long = csv.DictReader((out / "lengths.csv").read_text().splitlines())
    assert (short["rows"], long["rows"]) == ("4", "2")
    assert short["routed_ffn_layers"] == "0"
    assert float(short["speed"]) == 1
    assert long["routed_ffn_layers"] == "1"
    assert float(long["ffn_share"]) < 1
    assert float(long["spt_ms"]) > 0
    assert long["spt_bytes"] != long["lora_bytes"]
    assert (out / "model.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((out / "metrics.json").read_text())["figures"]
    assert figures[f"{model}_64"] == float(long["speed"])
    page = (tmp_path / "page.md").read_text()
    assert "as LoRA" in page
    assert "--lengths 32,64" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lengths", "32,x"], "--lengths takes whole numbers"),
        (["--models", ","], "--models"),
        (["--turns", "0"], "--turns must be at least 1, got 0"),
        (["--lengths", "100000"], "100000 is above the 512 positions of minilm"),
    ],
)
def test_bad_options_are_named(monkeypatch, capsys, options, message):
    monkeypatch.setattr(sys, "argv", ["experiments.lengths", *options])
    with pytest.raises(SystemExit):
        run(lengths.main)
    assert message in capsys.readouterr().err
