"""Equal time: rows without padding, the baseline's attention, and mistakes told in one line."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from experiments import cli, equal_time
from experiments.equal_time import Options, loss_of, rows_of, set_dense_attention, split
from spt_jax.models.config import parse_config
from spt_jax.models.decoder import Decoder
from tests.tolerance import assert_close

RAW = {
    "model_type": "llama", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}  # fmt: skip


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


def test_the_baselines_attention_gives_the_models_loss():
    from flax import nnx

    model = Decoder(parse_config(RAW), task="causal-lm", rngs=nnx.Rngs(0))
    ids = np.random.default_rng(0).integers(0, 50, 65)
    data, options = rows_of(ids, 32, "text"), Options(model="m", step_tokens=32)
    expected = loss_of(model, data, options)
    set_dense_attention(model, "xla")
    assert model.layers[0].attention.sparse.causal
    assert_close(np.float32(loss_of(model, data, options)), np.float32(expected), 32)
    set_dense_attention(model, None)
    assert model.layers[0].attention.sparse is None


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
