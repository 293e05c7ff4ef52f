"""Training steps of PyTorch's side: what needs torch is left out where it is not installed."""

from __future__ import annotations

import csv
import itertools
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import spt_jax
from experiments import peers, profile
from experiments.blocks import BlockStep
from experiments.peers import runner
from experiments.peers.runner import Options, workloads
from experiments.profile import Measurement
from spt_jax import cli
from spt_jax.models.decoder import Decoder
from spt_jax.models.encoder import Encoder
from spt_jax.models.presets import bert_config, llama_config, one_layer, opt_config
from tests.tolerance import assert_close

TINY = {
    "bert-large": bert_config(width=32, heads=2, hidden=64, layers=2, vocabulary=50),
    "opt-2048": opt_config(width=32, heads=2, hidden=64, layers=2, vocabulary=50),
    "llama-4096": llama_config(
        width=32, heads=4, kv_heads=2, hidden=64, layers=2, vocabulary=50
    ),
}  # fmt: skip
MODULES = ("mha", "ffn", "block")


@pytest.fixture(autouse=True)
def tiny_blocks(monkeypatch):
    monkeypatch.setattr(profile, "PRESETS", TINY)


@pytest.fixture
def torch_steps():
    for name in runner.PACKAGES:
        pytest.importorskip(name)
    from experiments.peers import torch_steps

    return torch_steps


def step_of(name, module, method, **options):
    return BlockStep(
        config=one_layer(TINY[name]),
        part=module,
        batch=2,
        length=16,
        method=method,
        **{"dtype": jnp.float32, "dense_attention": "xla"} | options,
    )


def training(torch_steps, step, *, autocast=False):
    device = torch_steps.torch.device("cpu")
    return torch_steps.TrainingStep(step, autocast=autocast, compiled=False, device=device, seed=0)


def run(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["experiments.peers", *map(str, arguments)])
        cli.run(runner.main)


def test_what_is_missing_is_named(monkeypatch, tmp_path, capsys):
    there = {"transformers": object()}
    monkeypatch.setattr(runner, "find_spec", there.get)
    with pytest.raises(SystemExit) as error:
        run("--out", tmp_path / "out")
    assert error.value.code == 2
    assert capsys.readouterr().err == (
        "error: experiments.peers needs torch, peft, not installed in this environment: "
        "pip install torch transformers peft\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--block", "opt-1"], "unknown --block 'opt-1'; choose from bert-large, opt-2048"),
        (["--module", "model"], "unknown --module 'model'; choose from mha, ffn, block"),
        (["--method", "spt"], "unknown --method 'spt'; choose from full, lora"),
        (["--seq-len", "12,x"], "--seq-len takes numbers separated by commas, got '12,x'"),
        (["--steps", "0"], "--steps must be at least 1"),
    ],
)
def test_a_mistake_is_named(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        run("--out", tmp_path, *arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_the_same_steps_as_profile():
    options = Options(block="opt-2048,llama-4096", seq_len="16,32", remat="both")
    profiled = profile.Options(
        block="opt-2048,llama-4096", seq_len="16,32", remat="both", method="full,lora",
        lora_form="skinny_float32,skinny",
    )  # fmt: skip
    found = workloads(options, gpu=True)
    assert [peer.work for peer in found[::2]] == profile.workloads(profiled, gpu=True)
    assert [peer.name for peer in found[:6]] == [
        "torch full", "torch full compiled", "peft lora", "peft lora compiled",
        "peft lora autocast", "peft lora autocast compiled",
    ]  # fmt: skip
    assert found[6].name == "torch full remat"
    assert found[6].method == "torch full"
    assert found[0].work.step.config == one_layer(TINY["opt-2048"])
    on_cpu = workloads(replace(options, autocast="yes", compile="no", remat="no"), gpu=False)
    assert [peer.name for peer in on_cpu[:2]] == ["torch full", "peft lora"]


@pytest.fixture
def pretended(monkeypatch):
    """Measurements that need no torch: full fine-tuning runs out of memory, or of anything else."""
    reasons = {"full": "CUDA out of memory. Tried to allocate 2.00 GiB."}

    def measure(step, *, autocast, compiled, steps, seed):
        if step.method in reasons:
            raise RuntimeError(reasons[step.method])
        return [1.0 + i for i in range(steps)], 5_000_000

    steps = SimpleNamespace(
        measure=measure,
        release=lambda: None,
        gpu_kind=lambda: "NVIDIA H200",
        versions=lambda: {"torch": "2.11.0+cu130", "transformers": "5.17.0", "peft": "0.21.2"},
    )
    monkeypatch.setitem(sys.modules, "experiments.peers.torch_steps", steps)
    monkeypatch.setattr(peers, "torch_steps", steps, raising=False)
    monkeypatch.setattr(runner, "require_packages", lambda: None)
    return reasons


def test_the_files(pretended, tmp_path, capsys):
    run("--module", "ffn", "--compile", "yes", "--steps", 5, "--out", tmp_path)
    full, lora, autocast = csv.DictReader((tmp_path / "peers.csv").open())
    assert list(full) == list(Measurement(profile.workloads(profile.Options())[0]).row())
    assert full["failure"] == "out of memory"
    assert full["ms"] == ""
    assert [row["method"] for row in (full, lora, autocast)] == [
        "torch full compiled", "peft lora compiled", "peft lora autocast compiled"
    ]  # fmt: skip
    assert (lora["lora_form"], autocast["lora_form"]) == ("skinny_float32", "skinny")
    assert (lora["ms"], lora["spread_ms"], lora["steps"]) == ("3.0", "2.0", "5")
    assert (lora["planned_bytes"], lora["device_bytes"]) == ("", "5000000")
    assert lora["dtype"] == "bfloat16"
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert record["experiment"] == "peers"
    assert record["versions"].items() >= {"torch": "2.11.0+cu130", "peft": "0.21.2"}.items()
    assert record["versions"].keys() >= {"jax", "numpy", "transformers"}
    assert record["device"]["kind"] == "NVIDIA H200"
    assert record["figures"]["opt-2048_ffn_b16_s512_peft_lora_compiled"] == {
        "ms": 3.0, "spread_ms": 2.0, "device_bytes": 5_000_000
    }  # fmt: skip
    out = capsys.readouterr().out
    assert "3.00 (2.00)" in out
    assert "out of memory" in out


def test_a_failure_is_told_at_the_end(pretended, tmp_path, capsys):
    pretended["full"] = "No available kernel."
    with pytest.raises(SystemExit) as error:
        run("--module", "mha", "--compile", "no", "--out", tmp_path)
    assert error.value.code == (
        "error: 1 peers failed, the first: opt-2048 mha torch full: RuntimeError: "
        "No available kernel."
    )
    assert (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize("name", TINY)
def test_the_same_function_as_this_librarys_layer(name, torch_steps, tmp_path):
    """With the layer's weights, transformers' layer and its halves give output and gradient."""
    config = one_layer(TINY[name])
    kind = Encoder if name == "bert-large" else Decoder
    model = kind(config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    spt_jax.save_pretrained(model, tmp_path / "model")
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "model" / "model.safetensors")
    weights = {key.partition(".0.")[2]: value for key, value in saved.items() if ".0." in key}
    step = step_of(name, "block", "full")
    block = training(torch_steps, step)
    block.module.load_state_dict(weights)
    layer, rotary = model.layers[0], step._rotary_angles()
    masks = (None, None, None) if name == "bert-large" else (None, None, rotary, None)
    ours = {
        "block": lambda x: layer(x, *masks)[0],
        "mha": lambda x: layer.attend(x, *masks)[0],
        "ffn": lambda x: layer.feed_forward(x, None, None)[0],
    }
    for module, function in ours.items():
        peer = training(torch_steps, replace(step, part=module))
        peer.module = block.module
        if module != "block":
            peer.module = torch_steps.half(block.module, module)
        x = jnp.asarray(peer.x.detach().numpy())
        y, pullback = jax.vjp(function, x)
        assert_close(peer.forward(peer.x).detach().numpy(), y, 64, sums=4)
        (gradient,) = pullback(y * y)
        assert_close(peer.gradient().numpy(), gradient, 64, sums=4)


@pytest.mark.parametrize(("name", "module"), [*itertools.product(TINY, MODULES)])
def test_a_step_trains_what_this_library_trains(name, module, torch_steps):
    for method in ("full", "lora"):
        step = step_of(name, module, method)
        peer = training(torch_steps, step)
        before = {key: value.clone() for key, value in peer.module.state_dict().items()}
        for _ in range(2):  # B is zero at first, so that A has no gradient
            peer()
        after = peer.module.state_dict()
        moved = {key for key in before if not before[key].equal(after[key])}
        trained = {key for key, p in peer.module.named_parameters() if p.requires_grad}
        assert moved == trained
        (expected, _), _ = jax.eval_shape(step.arguments, jax.random.key(0))
        scalars = sum(p.numel() for p in peer.module.parameters() if p.requires_grad)
        assert scalars == sum(leaf.size for leaf in jax.tree.leaves(expected))


@pytest.mark.parametrize("name", TINY)
def test_types_and_rematerialization(name, torch_steps):
    torch = torch_steps.torch
    for method, autocast in (("full", False), ("lora", False), ("lora", True)):
        step = step_of(name, "block", method, dtype=jnp.bfloat16)
        peer = training(torch_steps, step, autocast=autocast)
        again = training(torch_steps, replace(step, remat=True), autocast=autocast)
        again.module.load_state_dict(peer.module.state_dict())
        assert peer.gradient().dtype == torch.bfloat16
        assert peer.gradient().equal(again.gradient())
        frozen = {p.dtype for p in peer.module.parameters() if not p.requires_grad}
        assert frozen == ({torch.bfloat16} if method == "lora" else set())
        assert {p.dtype for p in peer.module.parameters() if p.requires_grad} == {torch.float32}


def test_the_command(torch_steps, tmp_path):
    if torch_steps.torch.cuda.is_available():
        pytest.skip("heads of this width are for a CPU")
    run(
        "--block", "llama-4096", "--module", "block", "--batch-size", 2, "--seq-len", 16,
        "--remat", "yes", "--compile", "no", "--steps", 2, "--out", tmp_path,
    )  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "peers.csv").open()))
    assert [row["method"] for row in rows] == ["torch full", "peft lora"]
    assert all(float(row["ms"]) > 0 for row in rows)
    assert {(row["failure"], row["device_bytes"], row["dtype"]) for row in rows} == {
        ("", "", "float32")
    }
    assert {row["steps"] for row in rows} == {"2"}
    versions = json.loads((tmp_path / "metrics.json").read_text())["versions"]
    assert versions["torch"] == torch_steps.torch.__version__
