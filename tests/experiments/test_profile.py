"""Profiles of tiny blocks."""

from __future__ import annotations

import csv
import itertools
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import profile
from experiments.blocks import BlockStep, ModelStep
from experiments.profile import (
    Measurement,
    Options,
    Program,
    Work,
    longest,
    ratios,
    training_step,
    workloads,
)
from spt_jax import cli
from spt_jax.config import RoutedFFNConfig, SparseAttentionConfig
from spt_jax.layers import RoutedFFN
from spt_jax.models.presets import bert_config, llama_config, one_layer, opt_config
from spt_jax.training import TrainState, train_step

TINY = {
    "bert-large": bert_config(width=32, heads=2, hidden=64, layers=2, vocabulary=50),
    "opt-2048": opt_config(width=32, heads=2, hidden=64, layers=2, vocabulary=50),
    "llama-4096": llama_config(
        width=32, heads=2, kv_heads=1, hidden=64, layers=2, vocabulary=50
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def tiny_blocks(monkeypatch):
    monkeypatch.setattr(profile, "PRESETS", TINY)


def step_of(name, module, method, **options):
    whole = module == "model"
    return (ModelStep if whole else BlockStep)(
        config=one_layer(TINY[name]),
        part="block" if whole else module,
        batch=2,
        length=16,
        method=method,
        dense_attention="xla",
        dtype=jnp.float32,
        attention=SparseAttentionConfig(min_keys=4, granularity="token"),
        **options,
    )


def trained_of(state):
    return state.params if isinstance(state, TrainState) else state[0]


def trained_norm(state):
    return sum(float(jnp.square(x).sum()) for x in jax.tree.leaves(trained_of(state)))


@pytest.mark.parametrize(
    ("name", "module", "method"),
    [
        *itertools.product(["opt-2048"], ["mha", "ffn", "block"], ["full", "lora", "spt"]),
        *itertools.product(TINY, ["model"], ["spt"]),
        ("bert-large", "model", "full"),
        ("llama-4096", "block", "spt"),
    ],
)
def test_a_step_trains_what_the_method_trains(name, module, method):
    step = step_of(name, module, method)
    run, arguments = training_step(step)
    state, frozen, inputs = jax.jit(arguments)(jax.random.key(0))
    after, result = jax.jit(run)(state, frozen, inputs)
    before, trained = trained_of(state), trained_of(after)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((trained, result)))
    moved = [
        bool((a != b).any())
        for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(before), strict=True)
    ]
    assert any(moved)
    if module == "model":
        assert result["finite"]
        assert result["tokens"] == 2 * 16
    else:
        assert result.shape == inputs.shape
        assert jnp.abs(result).max() > 0
    scalars = sum(x.size for x in jax.tree.leaves(before))
    everything = scalars + sum(x.size for x in jax.tree.leaves(frozen))
    assert scalars < everything if method != "full" else scalars > 0.9 * everything


@pytest.mark.parametrize("module", ["ffn", "block"])
def test_a_step_takes_every_product(module):
    """Those of the forward pass too: the result depends on all, so that none is left out."""
    config = opt_config(width=128, heads=2, hidden=512)
    step = replace(step_of("opt-2048", module, "full"), config=config, length=64)
    run, arguments = training_step(step)
    compiled = jax.jit(run).lower(*jax.eval_shape(arguments, jax.random.key(0))).compile()
    products = step.operations()[1]
    assert products < compiled.cost_analysis()["flops"] < 1.1 * products


@pytest.mark.parametrize("name", ["bert-large", "opt-2048"])
def test_a_model_takes_the_product_s_step_and_lora_leaves_its_heads_alone(name):
    step = step_of(name, "model", "lora", lora_form="skinny")
    run, arguments = training_step(step)
    assert run.func is train_step
    _, told = jax.jit(run)(*jax.jit(arguments)(jax.random.key(0)))
    assert np.isfinite(told["loss"])


@pytest.mark.parametrize(("name", "method"), [("bert-large", "full"), ("llama-4096", "spt")])
def test_the_halves_make_the_block(name, method):
    """The parts have the block's operations and, run one after the other, its output."""
    block, mha, ffn = (step_of(name, module, method) for module in ("block", "mha", "ffn"))
    np.testing.assert_allclose(
        block.operations(), np.add(mha.operations(), ffn.operations()), rtol=1e-12
    )
    (trained, x), frozen = block.arguments(jax.random.key(0))
    whole, _ = block.run((trained, x), frozen)
    layer = block._merge(trained, frozen)[0]
    rotary = block._rotary_angles()
    options = (None, None, None) if name == "bert-large" else (None, None, rotary, None)
    half, _ = layer.attend(x, *options)
    other, _ = layer.feed_forward(half, None, None)
    np.testing.assert_allclose(whole, other, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("compiled_anew")
def test_rematerialization_changes_memory_alone():
    step = replace(step_of("opt-2048", "block", "lora"), config=TINY["opt-2048"], length=64)
    results, peaks = [], []
    for remat in (False, True):
        work = Work(block="opt-2048", module="block", step=replace(step, remat=remat))
        program = Program(work, seed=0)
        peaks.append(program.planned_bytes)
        run, arguments = training_step(work.step)
        results.append(jax.jit(run)(*jax.jit(arguments)(jax.random.key(0)))[1])
    np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-6)
    assert peaks[1] < peaks[0]


def measured(method, ms, planned, **options):
    work = Work(block="opt-2048", module="ffn", step=step_of("opt-2048", "ffn", method, **options))
    return Measurement(work, times_ms=[ms, ms + 1, ms + 3], planned_bytes=planned)


def test_ratios_take_the_best_form_of_lora():
    found = [
        measured("full", 11.0, 800),
        measured("lora", 7.0, 500),
        measured("lora", 5.0, 600, lora_form="merged"),
        measured("spt", 2.0, 400),
    ]
    full, slow, fast, spt = ratios(found)
    assert full["speedup_over_full"] == 1
    assert slow["speedup_over_lora"] == 6 / 8
    assert fast["memory_of_lora"] == 600 / 500
    assert spt["speedup_over_full"] == 12 / 3
    assert spt["speedup_over_lora"] == 6 / 3
    assert spt["memory_of_full"] == 400 / 800
    assert spt["memory_of_lora"] == 400 / 500
    assert spt["operations_lora"] == pytest.approx(2)  # half of the blocks
    assert spt["operations_full"] == pytest.approx(3)  # and no gradient of weights


def test_sweeps_and_their_order():
    options = Options(
        block="opt-2048,bert-large", module="mha,ffn,model", method="lora,spt", batch_size="1,2",
        seq_len="32,64", density="0.25,0.5", active_blocks="1,2", lora_form="auto,merged",
        remat="both",
    )  # fmt: skip
    works = workloads(options)
    assert len(works) == 2 * 2 * 2 * 2 * ((2 + 2) + (2 + 2) + (2 + 4))
    names = [work.name for work in works if work.comparison == works[0].comparison]
    assert names == ["lora", "lora merged", "spt", "spt"]
    model = next(work.step for work in works if work.module == "model")
    assert isinstance(model, ModelStep)
    assert model.config.num_layers == 2
    assert {work.step.dtype for work in works} == {jnp.float32}
    assert {work.step.dtype for work in workloads(options, gpu=True)} == {jnp.bfloat16}
    assert works[0].step.dense_attention == "xla"


def test_attention_alone_may_be_sparse():
    options = Options(module="block", method="lora,spt", spt_ffn="dense", active_blocks="1,2")
    lora, spt = workloads(options)
    assert spt.label == "spt 0.125, dense"
    assert spt.columns()["num_blocks"] is None
    dense, routed = (
        replace(spt.step, ffn=ffn).operations()[1] for ffn in (None, RoutedFFNConfig())
    )
    assert routed < dense < lora.step.operations()[1]
    run, arguments = training_step(replace(spt.step, batch=2, length=16))
    state, frozen, inputs = arguments(jax.random.key(0))
    assert not any(
        isinstance(m, RoutedFFN) for _, m in nnx.iter_modules(spt.step.model(jax.random.key(0)))
    )
    before = trained_norm(state)
    state, _ = jax.jit(run)(state, frozen, inputs)
    assert trained_norm(state) != before


@pytest.mark.parametrize("limit", [0, 1023, 1024, 1100, 5000, 100_000])
def test_the_longest_sequence(limit):
    asked = []

    def fits(length):
        asked.append(length)
        return length <= limit

    found = longest(fits, 1024)
    if limit < 1024:
        assert found == 0
    else:
        assert found <= limit <= found * 17 / 16 + 1
    assert len(asked) < 15


def run(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["experiments.profile", *map(str, arguments)])
        cli.run(profile.main)


def test_the_command(tmp_path, capsys):
    run(
        "--batch-size", 2, "--seq-len", "16,64", "--density", "0.5,1", "--steps", 4,
        "--module", "mha,ffn", "--method", "full,spt", "--out", tmp_path,
    )  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "profile.csv").open()))
    assert len(rows) == 2 * ((1 + 2) + (1 + 1))
    assert {row["steps"] for row in rows} == {"4"}
    assert all(float(row["ms"]) > 0 and int(row["planned_bytes"]) > 0 for row in rows)
    assert all(row["failure"] == "" for row in rows)
    assert {row["device_bytes"] for row in rows} == {""} or jax.default_backend() == "gpu"
    figures = json.loads((tmp_path / "metrics.json").read_text())["figures"]
    spt = figures["opt-2048_ffn_b2_s64_spt_d0.5_a2"]
    assert {"ms", "speedup_over_full", "operations_full", "memory_of_full"} <= spt.keys()
    for name in ("opt-2048.png", "opt-2048-density.png"):
        assert (tmp_path / name).stat().st_size > 1000
    out = capsys.readouterr().out
    assert "x full" in out
    assert "spt 0.5, 2/4" in out


def test_a_length_that_no_compiler_fits_is_too_long(monkeypatch, tmp_path):
    def refuse(work, seed, target=None):
        if work.step.length > 100:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory while compiling")
        return SimpleNamespace(planned_bytes=10 * work.step.length)

    monkeypatch.setattr(profile, "Program", refuse)
    arguments = ("--max-length", "--memory-gb", 1, "--seq-len", 64, "--batch-size", 1)
    run(*arguments, "--method", "lora", "--module", "ffn", "--out", tmp_path)
    (row,) = json.loads((tmp_path / "metrics.json").read_text())["figures"]["max_length"]
    assert 94 <= row["max_length"] <= 100
    assert row["planned_bytes"] == 10 * row["max_length"]


@pytest.mark.usefixtures("compiled_anew")
def test_the_longest_sequence_of_each_method(tmp_path, capsys):
    run(
        "--method", "lora,spt", "--module", "block", "--batch-size", 1, "--seq-len", 64,
        "--max-length", "--memory-gb", 0.0025, "--out", tmp_path,
    )  # fmt: skip
    for row in json.loads((tmp_path / "metrics.json").read_text())["figures"]["max_length"]:
        assert 64 <= row["max_length"] <= 1024
        assert row["planned_bytes"] <= row["memory_bytes"] == 2_500_000
    assert "longest sequence" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--block", "opt-1"], "unknown --block 'opt-1'; choose from bert-large, opt-2048"),
        (["--module", "heads"], "unknown --module 'heads'; choose from mha, ffn, block, model"),
        (["--method", "lora,prefix"], "unknown --method 'prefix'"),
        (["--lora-form", "thin"], "unknown --lora-form 'thin'"),
        (["--seq-len", "12,x"], "--seq-len takes numbers separated by commas, got '12,x'"),
        (["--batch-size", "0"], "--batch-size takes numbers above 0, got 0"),
        (["--density", "1.5"], "attention density must lie in (0, 1], got 1.5"),
        (["--active-blocks", "5"], "active_blocks must lie in 1..num_blocks, got 5 of 4"),
        (["--num-blocks", "7", "--active-blocks", "2"], "64 hidden units do not split into"),
        (["--target", "V100"], "unknown --target V100; choose from H200, H100"),
        (["--memory-gb", "1"], "--memory-gb is what --max-length"),
        (["--max-length"], "does not say how much memory it has"),
    ],
)
def test_a_mistake_is_named(arguments, message, tmp_path, capsys):
    if jax.default_backend() == "gpu" and arguments == ["--max-length"]:
        pytest.skip("a GPU does say it")
    with pytest.raises(SystemExit) as error:
        run("--out", tmp_path, *arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
