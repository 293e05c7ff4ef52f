from __future__ import annotations

import json
import math
import os

import jax.numpy as jnp
import numpy as np
import pytest

from spt_jax.training import (
    cross_entropy,
    environment,
    evaluation_metrics,
    glue_metrics,
    mean_squared_error,
    write_json_atomic,
)


def test_classification_metrics_by_hand():
    labels = np.array([1, 1, 1, 0, 0, 0, 0, 0])
    predicted = np.array([1, 1, 0, 1, 0, 0, 0, 0])  # 2 hits, 1 miss, 1 false alarm, 4 rejections
    found = glue_metrics(["matthews", "accuracy", "f1"], np.eye(2)[predicted], labels)
    assert list(found) == ["matthews", "accuracy", "f1"]
    assert found["accuracy"] == 6 / 8
    assert found["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert found["matthews"] == pytest.approx((2 * 4 - 1 * 1) / math.sqrt(3 * 3 * 5 * 5))


def test_correlations_by_hand():
    outputs = np.array([[0.0], [1.0], [8.0]])
    found = glue_metrics(["pearson", "spearman"], outputs, np.array([1.0, 2.0, 3.0]))
    assert found["spearman"] == pytest.approx(1)
    # deviations -3, -2, 5 and -1, 0, 1
    assert found["pearson"] == pytest.approx(8 / math.sqrt(38 * 2))


def test_constant_predictions_score_zero():
    assert glue_metrics(["matthews"], np.eye(2)[[1, 1, 1]], np.array([0, 1, 1])) == {"matthews": 0}
    constant = glue_metrics(["pearson", "spearman"], np.ones((3, 1)), np.array([0.0, 1.0, 2.0]))
    assert constant == {"pearson": 0, "spearman": 0}


def test_unknown_metric():
    with pytest.raises(ValueError, match=r"unknown metrics \['bleu'\]; choose from \['accuracy'"):
        glue_metrics(["bleu"], np.ones((2, 2)), np.ones(2))


def test_perplexity_needs_no_outputs():
    found = evaluation_metrics(["perplexity"], math.log(7), None, np.zeros(1))
    assert found == {"perplexity": pytest.approx(7), "eval_loss": math.log(7)}


def test_a_perplexity_beyond_float64_is_infinite():
    assert evaluation_metrics(["perplexity"], 709.0, None, np.zeros(1))["perplexity"] < math.inf
    found = evaluation_metrics(["perplexity"], 710.0, None, np.zeros(1))
    assert found == {"perplexity": math.inf, "eval_loss": 710.0}


def test_losses_by_hand():
    logits = jnp.array([[2.0, 0.0], [0.0, 0.0], [0.0, jnp.inf]], jnp.bfloat16)
    loss, weight = cross_entropy(logits, jnp.array([0, 1, 0]), jnp.array([1.0, 0.5, 0.0]))
    assert loss.dtype == jnp.float32
    assert float(weight) == 1.5
    assert float(loss) == pytest.approx(math.log(1 + math.exp(-2)) + math.log(2) / 2, rel=1e-6)
    loss, weight = mean_squared_error(
        jnp.array([[1.0], [5.0]]), jnp.array([3.0, 0.0]), jnp.array([1.0, 0.0])
    )
    assert (float(loss), float(weight)) == (4, 1)


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "metrics.json"
    write_json_atomic(path, {"a": 1})
    with pytest.raises(ValueError, match=r"metrics\.json.*figures\.spt\[1\] = nan"):
        write_json_atomic(path, {"figures": {"spt": [1.0, math.nan]}})

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json_atomic(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["metrics.json"]


def test_environment_is_json():
    found = json.loads(json.dumps(environment()))
    assert found["device"]["platform"] in ("cpu", "gpu", "tpu")
    assert found["versions"].keys() >= {"jax", "flax", "optax"}
