"""Upkeep of codebooks while a tiny random model trains."""

from __future__ import annotations

import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import spt_jax
from experiments import codebook_upkeep
from experiments.codebook_upkeep import (
    UPKEEPS,
    MovingAverages,
    ema_update,
    layer_tokens,
    longest_rows,
)
from pallas_kernels import pq_encode
from spt_jax import cli
from spt_jax.training import Examples
from tests.spt_jax.models.builders import write_readable_checkpoint
from tests.spt_jax.toy import ToyModel


def vectors(seed: int = 0):
    """Vectors of 4 heads that share 2 codebooks of 3 subspaces, their codes, and valid tokens."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(2, 9, 4, 6)), jnp.float32)
    books = jnp.asarray(rng.normal(size=(2, 3, 5, 2)), jnp.float32)
    return x, books, pq_encode(x, books), jnp.asarray(rng.random((2, 9)) < 0.7)


def test_an_update_without_memory_is_the_mean_of_the_valid_vectors():
    x, books, codes, mask = vectors()
    new, counts = ema_update(books, jnp.zeros((2, 3, 5)), x, codes, mask, decay=0.0)
    for k, m, e in np.ndindex(2, 3, 5):
        chosen = (np.asarray(codes[:, :, 2 * k : 2 * k + 2, m]) == e) & np.asarray(mask)[..., None]
        members = np.asarray(x[:, :, 2 * k : 2 * k + 2, 2 * m : 2 * m + 2])[chosen]
        assert counts[k, m, e] == len(members)
        expected = members.mean(0) if len(members) else books[k, m, e]
        np.testing.assert_allclose(new[k, m, e], expected, rtol=1e-5, atol=1e-6)


def test_old_averages_decay():
    x, books, codes, mask = vectors()
    counts = jnp.full((2, 3, 5), 4.0)
    means, numbers = ema_update(books, jnp.zeros_like(counts), x, codes, mask, decay=0.0)
    new, new_counts = ema_update(books, counts, x, codes, mask, decay=0.75)
    np.testing.assert_allclose(new_counts, 3.0 + 0.25 * numbers, rtol=1e-6)
    expected = (3.0 * books + 0.25 * numbers[..., None] * means) / new_counts[..., None]
    np.testing.assert_allclose(new, expected, rtol=1e-5, atol=1e-6)


def quantization_error(module, layer) -> float:
    """Mean squared distance of queries to their codewords."""
    books = module.query_codebooks[...]
    codes = np.asarray(pq_encode(layer.q[None], books))[0]  # [T, N, M]
    heads, spaces = np.indices(codes.shape[1:])
    nearest = np.asarray(books)[heads, spaces, codes].reshape(layer.q.shape)
    return float(np.square(nearest - np.asarray(layer.q)).mean())


def test_moving_averages_follow_the_activations():
    model = ToyModel(rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    before, after = ({"input_ids": rng.integers(*ids, (8, 32))} for ids in ((0, 25), (25, 50)))
    attention = spt_jax.SparseAttentionConfig(
        codeword_width=2, num_codewords=8, granularity="token"
    )
    config = spt_jax.SPTConfig(serve=None, lora=None, attention=attention, ffn=None)
    spt_jax.adapt(model, config, calibration_batch=before)
    averages = MovingAverages(model, layer_tokens(model, before))
    tokens = layer_tokens(model, after)
    errors = []
    for _ in range(12):
        errors.append(
            [quantization_error(*pair) for pair in zip(averages.modules, tokens, strict=True)]
        )
        averages.update(tokens, decay=0.5)
    assert (np.array(errors[-1]) < 0.9 * np.array(errors[0])).all()
    # those of the model itself are left alone
    fitted = codebook_upkeep.sparse_attentions(model)
    assert jnp.abs(fitted[0].key_codebooks[...] - averages.modules[0].key_codebooks[...]).max() > 0


def test_longest_rows_have_no_padding():
    lengths = np.array([3, 8, 5, 9, 1])
    mask = (np.arange(12) < lengths[:, None]).astype(np.int32)
    ids = np.arange(60).reshape(5, 12)
    data = Examples({"input_ids": ids, "attention_mask": mask, "label": lengths}, "x")
    np.testing.assert_array_equal(longest_rows(data, 3), ids[[1, 2, 3], :5])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    model = write_readable_checkpoint(
        tmp_path_factory.mktemp("upkeep") / "tiny", num_positions=32, width=8,
        num_heads=2, hidden=16, num_layers=1,
    )  # fmt: skip
    return str(model)


def run(*arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["experiments.codebook_upkeep", *map(str, arguments)])
        cli.run(codebook_upkeep.main)


def test_the_command(tiny, tmp_path, capsys):
    run(
        "--model", tiny, "--steps", 4, "--measure-every", 2, "--ema-every", 1, "--batch-size", 4,
        "--rows", 4, "--max-length", 16, "--learning-rate", 0.1, "--out", tmp_path,
    )  # fmt: skip
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert [row["step"] for row in record["steps"]] == [0, 2, 4]
    first, _, last = record["steps"]
    assert first["frozen"] == first["loss"]
    for row in record["steps"]:
        assert all(0 < row[name] <= row["oracle"] + 1e-6 for name in UPKEEPS)
    assert len({last[name] for name in UPKEEPS}) > 1
    assert record["figures"] == {f"capture_{name}": last[name] for name in (*UPKEEPS, "oracle")}
    assert (tmp_path / "capture.png").stat().st_size > 1000
    assert "refitted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "all"], "choose one task"),
        (["--epochs", "2"], "give --steps, not --epochs"),
        (["--rows", "0"], "--rows must be at least 1"),
        (["--ema-decay", "1"], r"--ema-decay must lie in [0, 1), got 1.0"),
    ],
)
def test_a_mistake_is_named(arguments, message, tiny, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        run("--model", tiny, "--out", tmp_path, *arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
