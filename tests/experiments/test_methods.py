"""What the methods' experiments say of a device."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import jax
import pytest

from experiments.methods import (
    MethodOptions,
    form_note,
    results_table,
    speed_note,
    write_metrics,
)
from pallas_kernels import devices, triton
from spt_jax import cli
from spt_jax.training import TrainResult


@pytest.mark.parametrize(
    ("kind", "capability", "dtype", "kernels"),
    [
        ("cpu", None, "float32", "xla"),
        ("NVIDIA H100", "9.0", "bfloat16", "mosaic"),
        ("NVIDIA L4", "8.9", "float32", "triton"),
        ("Tesla T4", "7.5", "float32", "xla; not mosaic: it needs a GPU of compute capability 9"),
        ("NVIDIA H100", "9.0", "float32", "xla; not mosaic: it takes bfloat16 or float16"),
    ],
)
def test_the_device_is_told(kind, capability, dtype, kernels, monkeypatch):
    platform = "cpu" if capability is None else "gpu"
    device = SimpleNamespace(device_kind=kind, compute_capability=capability, platform=platform)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(jax, "devices", lambda *_: [device, device])
    monkeypatch.setattr(devices, "default_device", lambda: device)
    monkeypatch.setattr(triton, "unfit_packages", lambda *_: None)
    assert cli.device_line(dtype).startswith(f"2 x {kind}, {dtype}, kernels {kernels}")


def result(step_ms, **metrics):
    return TrainResult(
        steps=3, epochs=1.0, stopped_early=False, resumed_from=None, metrics=metrics,
        metrics_step=3, best_step=3, train_loss=1.0, step_ms=step_ms, tokens_per_s=10.0,
        padded_tokens_per_s=10.0, compile_s=1.0, wall_s=2.0, peak_bytes=2_000_000,
        peak_bytes_source="compiler", compiled_peak_bytes=2_000_000, trainable_parameters=7,
        total_parameters=9,
    )  # fmt: skip


RESULTS = {
    "spt": result(
        50.0, perplexity=20.5, eval_loss=3.02, perplexity_dense=20.5, eval_loss_dense=3.02,
        perplexity_sparse=103.0, eval_loss_sparse=4.63,
    ),
    "lora": result(
        80.0, perplexity=18.1, eval_loss=2.9, perplexity_dense=18.1, eval_loss_dense=2.9
    ),
}  # fmt: skip


def test_tables_have_both_forms():
    table = results_table("t", RESULTS)
    headers = [str(column.header) for column in table.columns]
    assert headers[:4] == ["method", "perplexity, dense", "perplexity, sparse", "train loss"]
    assert [list(c.cells) for c in table.columns[1:3]] == [
        ["20.5000", "18.1000"],
        ["103.0000", "-"],
    ]


def test_speed_is_told_with_what_it_cost():
    assert speed_note(RESULTS) == (
        "an spt step is 1.60x as fast as a lora step; perplexity 20.5000 beside 18.1000"
    )
    slower = RESULTS | {"lora": result(40.0, perplexity=18.1)}
    assert speed_note(slower).startswith("an spt step is 1.25x as slow as a lora step; perplexity")
    assert speed_note({"lora": RESULTS["lora"]}) is None


def test_a_sparse_form_that_is_worse_is_told():
    assert form_note(RESULTS) == (
        "sparse, the loss is higher than dense (spt by 1.61): serve the adapter dense"
    )
    assert form_note({"lora": RESULTS["lora"]}) is None
    near = result(1.0, eval_loss_near_dense=1.0, eval_loss_near_sparse=1.05)
    assert form_note({"spt": near}) is None


def test_the_judged_form_is_an_option(monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", "--as", "sparse"])
    options = cli.parse(MethodOptions, "x", None)
    assert options.train_config("spt").evaluate_as == "sparse"
    assert MethodOptions().train_config("lora").evaluate_as == "dense"


def test_methods_name_their_parts():
    def parts(method, **options):
        spt = MethodOptions(**options).spt_config(method)
        return spt.attention is not None, spt.ffn is not None

    assert parts("spt") == parts("spt-routed-ffn", ffn="dense") == (True, True)
    assert parts("spt", ffn="dense") == parts("spt-dense-ffn") == (True, False)
    assert parts("spt-dense-attention", ffn="dense") == (False, True)
    assert parts("lora") == (False, False)


def test_an_infinite_figure_is_null_and_one_that_is_nan_refused(tmp_path):
    figures = {"lora": {"perplexity": math.inf, "eval_loss": 800.0}}
    write_metrics(tmp_path, "wikitext", MethodOptions(), figures)
    found = json.loads((tmp_path / "metrics.json").read_text())["figures"]
    assert found == {"lora": {"perplexity": None, "eval_loss": 800.0}}
    with pytest.raises(ValueError, match=r"figures\.lora\.eval_loss = nan"):
        write_metrics(tmp_path, "wikitext", MethodOptions(), {"lora": {"eval_loss": math.nan}})


def test_an_interrupt_outside_training_is_told(capsys):
    def adapting():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        cli.run(adapting)
    assert stopped.value.code == 130
    said = capsys.readouterr().err
    assert said.startswith("error: stopped by SIGINT outside training: what was written before is")
    assert "--resume" in said
