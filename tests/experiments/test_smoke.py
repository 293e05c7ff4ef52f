"""The smoke test of the kernels passes what is right, and finds what is wrong."""

from __future__ import annotations

import csv
import json
import sys

import jax.numpy as jnp
import pytest

from experiments import smoke
from pallas_kernels import sparse_attention
from spt_jax import cli


@pytest.mark.parametrize("op", smoke.CHECKS)
def test_plain_jax_passes(op):
    results = smoke.CHECKS[op]("xla", jnp.float32, smoke.TINY)
    assert all(result.share <= 1 for result in results)


def _run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["smoke", "--rehearse", *map(str, arguments)])
    cli.run(smoke.main)


@pytest.mark.mosaic
def test_a_wrong_gradient_is_named(monkeypatch, tmp_path):
    def wrong(q, k, v, selection, *, implementation, **options):
        out = sparse_attention(q, k, v, selection, implementation="reference", **options)
        return out if implementation == "reference" else out + 0.5 * q

    monkeypatch.setattr(smoke, "sparse_attention", wrong)
    options = ["--implementation", "mosaic", "--only", "sparse_attention tile"]
    with pytest.raises(SystemExit) as stop:
        _run(monkeypatch, *options, "--out", tmp_path)
    assert (
        "results are wrong, the first: mosaic sparse_attention tile output: at (" in stop.value.code
    )
    rows = list(csv.DictReader((tmp_path / "smoke.csv").open()))
    assert [row["result"] for row in rows] == ["output", "dq", "dk", "dv"]
    assert [bool(row["failure"]) for row in rows] == [True, True, False, False]
    assert json.loads((tmp_path / "metrics.json").read_text())["figures"]["wrong"] == 2


def test_that_no_kernels_run_is_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["smoke", "--out", str(tmp_path)])
    reason = "the device is a toaster"
    for name in ("why_not_mosaic", "why_not_triton"):
        monkeypatch.setattr(smoke, name, lambda dtype: reason)
    with pytest.raises(SystemExit):
        cli.run(smoke.main)
    assert f"no kernels run here: mosaic: {reason}; triton: {reason}" in capsys.readouterr().err
