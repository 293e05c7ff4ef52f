"""The benchmark runs, on small shapes, and writes what it prints."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from experiments import comparisons, kernels
from experiments.blocks import BlockStep, attention_operations
from experiments.kernels import step_function
from spt_jax import cli
from spt_jax.models.decoder import Decoder
from spt_jax.models.presets import llama_config, opt_config
from tests.jaxprs import needed
from tests.pallas_kernels import mosaic

TINY_STACK = BlockStep(
    config=llama_config(width=32, heads=2, kv_heads=1, hidden=64, layers=1),
    batch=2,
    length=96,
    method="lora",
    dense_attention="xla",
    dtype=jnp.float32,
)


def _only(chosen, kept):
    """Comparisons and methods by name, of all that would be measured."""
    for comparison in chosen:
        names = kept.get(comparison.name, ())
        if names:
            yield dataclasses.replace(
                comparison,
                **{
                    field: {n: m for n, m in getattr(comparison, field).items() if n in names}
                    for field in ("baselines", "candidates")
                },
            )


def test_figures_are_written_and_printed(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(comparisons, "LARGE", comparisons.FFNShape(64, 16, 32))
    monkeypatch.setattr(comparisons, "ATTENTION", comparisons.AttentionShape(256, 2, 16, 1 / 4))
    monkeypatch.setattr(comparisons, "STACK", TINY_STACK)
    kept = {
        "routed_ffn": ("dense", "routed_ffn_half", "routed_ffn_quarter"),
        "sparse_attention": ("dense", "sparse_attention"),
        "llama_stack": ("lora_merged", "llama_stack_spt"),
    }
    found = [*_only(comparisons.cpu_comparisons(), kept)]
    monkeypatch.setattr(comparisons, "cpu_comparisons", lambda: iter(found))
    monkeypatch.setattr(sys, "argv", ["kernels", "--rounds", "2", "--out", str(tmp_path)])
    cli.run(kernels.main)
    figures = json.loads((tmp_path / "metrics.json").read_text())["figures"]
    for name in (
        "routed_ffn_half_speedup",
        "routed_ffn_quarter_speedup",
        "sparse_attention_speedup",
        "sparse_attention_peak_ratio",
        "llama_stack_spt_speedup",
        "llama_stack_spt_peak_ratio",
    ):
        assert figures[name] > 0
    with (tmp_path / "kernels.csv").open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert float(rows["routed_ffn_half"]["speedup"]) == figures["routed_ffn_half_speedup"]
    assert figures["routed_ffn_half"]["step_ms"] > 0
    assert f"{figures['sparse_attention_speedup']:.2f}" in capsys.readouterr().out
    assert (tmp_path / "kernels.png").stat().st_size > 1000


TINY = comparisons.GPUSizes(
    lengths=(128,),
    densities=(1 / 4,),
    token_parts_length=128,
    parts_lengths=(128,),
    heads=2,
    head_width=16,
    tokens=256,
    ffn=comparisons.FFNShape(64, 32, 128, activation="silu", gated=True),
    block=opt_config(width=32, heads=2, hidden=64),
    block_batch=2,
    block_length=96,
    dense_attention="xla",
)


@pytest.mark.slow
def test_what_a_gpu_runs(monkeypatch, capsys, tmp_path):
    kept = {  # one comparison of each kind, and of each the methods that differ in kind
        "routed_ffn_frozen": ("dense", "routed_ffn_frozen_half"),
        "block": ("full", "lora_skinny", "block_spt"),
        "sparse_attention_s128": ("dense", "sparse_attention_s128_token_d4"),
        "parts_s128_tile": (
            "dense",
            "parts_s128_tile_encode",
            "parts_s128_tile_dq",
            "parts_s128_tile_dq_random",
        ),
    }
    found = [*_only(comparisons.gpu_comparisons(TINY), kept)]
    monkeypatch.setattr(comparisons, "cpu_comparisons", lambda: iter(found))
    monkeypatch.setitem(kernels.LIMITS, "cpu", kernels.Limits(1e12, 1e11))
    monkeypatch.setitem(kernels.MIN_MEASUREMENT_MS, "cpu", 1.0)
    monkeypatch.setattr(sys, "argv", ["kernels", "--rounds", "1", "--out", str(tmp_path)])
    cli.run(kernels.main)
    figures = json.loads((tmp_path / "metrics.json").read_text())["figures"]
    for name in ("sparse_attention_s128_token_d4", "routed_ffn_frozen_half", "block_spt"):
        assert figures[f"{name}_speedup"] > 0
        assert figures[name]["step_limit_share"] > 0
    over = [figures[f"block_spt_speedup_over_{name}"] for name in ("full", "lora_skinny")]
    assert figures["block_spt_speedup"] == pytest.approx(min(over))
    # nothing to differentiate: the step is the forward pass
    for name in ("parts_s128_tile_dq", "parts_s128_tile_dq_random"):
        assert figures[name]["step_ms"] > 0
    encode = figures["parts_s128_tile_encode"]
    assert encode["step_ms"] == encode["forward_ms"]
    assert "of limit" in capsys.readouterr().out


def test_methods_of_a_gpu():
    """All of them are consistent: names, shapes, operations; nothing is compiled."""
    names = set()
    for comparison in comparisons.gpu_comparisons():
        methods = comparison.baselines | comparison.candidates
        assert not names & set(comparison.candidates)
        names |= set(comparison.candidates)
        assert set(comparison.density) <= set(comparison.candidates)
        for name, method in methods.items():
            encodes = name.endswith("_encode")  # in plain XLA
            assert bool(method.kernels) == (name in comparison.candidates and not encodes)
    assert {
        "routed_ffn_half",
        "block_spt",
        "sparse_attention_s256_token_d8",
        "sparse_attention_s65536_tile_d16",
        "parts_s8192_tile_select",
        "parts_s32768_tile_dkv_random",
    } <= names
    assert "sparse_attention_s512_token_d8" not in names


def test_triton_runs_beside_the_others():
    plain, both = (list(f()) for f in (comparisons.gpu_comparisons, comparisons.with_triton))
    for one, two in zip(plain, both, strict=True):
        assert two.baselines.keys() == one.baselines.keys()
        added = two.candidates.keys() - one.candidates.keys()
        assert added == {f"{name}_triton" for name in one.candidates}
        assert {name for name in two.density if name in added} == {
            f"{name}_triton" for name in one.density
        }


@pytest.mark.mosaic
@pytest.mark.parametrize(
    ("part", "kernels"),
    {"whole": {"dq", "dkv"}, "dq": {"dq"}, "dkv": {"dkv"}}.items(),
)
def test_a_part_runs_its_kernels_alone(part, kernels):
    """What the other gradient needs is dead code, which XLA drops as this does."""
    sizes = dataclasses.replace(comparisons.REHEARSAL, implementation="mosaic")
    comparison = comparisons.attention_parts(sizes, 128, "tile")
    method = comparison.candidates[f"parts_s128_tile_{part}"]
    expected = {f"sparse_attention_{kernel}" for kernel in ("forward", *kernels)}
    assert part == "whole" or set(method.kernels) == expected
    with mosaic.traced():
        trained, frozen = jax.eval_shape(lambda: method.arguments(jax.random.key(0)))
        y = jax.eval_shape(method.function, trained, frozen)
        step = jax.make_jaxpr(step_function(method))(trained, frozen, y)
    launched = mosaic.names(needed(step))
    assert {name for name in launched if name.startswith("sparse_attention")} == expected
    assert part == "whole" or launched == dict.fromkeys(expected, 1)


def test_triton_needs_a_gpu(tmp_path, monkeypatch, capsys):
    arguments = ["kernels", "--triton", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit):
        cli.run(kernels.main)
    assert "add --device gpu" in capsys.readouterr().err


def _method(name, function, **options):
    return comparisons.Method(
        name=name, function=function, arguments=lambda key: (jnp.ones(8), ()), **options
    )


def _exhausted(x, _):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")


def _broken(x, _):
    raise NotImplementedError("no such kernel")


@pytest.mark.parametrize("optional", [False, True])
def test_failures_are_reported_and_stop_nothing(monkeypatch, capsys, tmp_path, optional):
    comparison = comparisons.Comparison(
        name="test",
        shape="8",
        baselines={
            "dense": _method("dense", _exhausted),
            "other": _method("other", _broken, optional=optional),
        },
        candidates={"ours": _method("ours", lambda x, _: 2 * x)},
    )
    monkeypatch.setattr(comparisons, "cpu_comparisons", lambda: iter([comparison]))
    monkeypatch.setattr(sys, "argv", ["kernels", "--rounds", "1", "--out", str(tmp_path)])
    if optional:
        cli.run(kernels.main)
    else:
        with pytest.raises(SystemExit) as stop:
            cli.run(kernels.main)
        assert "test, other: NotImplementedError: no such kernel" in str(stop.value)
    figures = json.loads((tmp_path / "metrics.json").read_text())["figures"]
    assert figures["test_dense"] == {"failure": "out of memory"}
    assert figures["ours"]["step_ms"] > 0
    assert "ours_speedup" not in figures
    assert "out of memory" in capsys.readouterr().out


def test_the_limit_is_the_longer_of_operations_and_bytes(monkeypatch):
    monkeypatch.setitem(kernels.LIMITS, "test", kernels.Limits(1e12, 1e9))

    def share(operations, moved_bytes, kind="test"):
        program = kernels.Program(
            compiled=lambda: None,
            arguments=(),
            operations=operations,
            moved_bytes=moved_bytes,
            peak_bytes=0,
            launches={},
        )
        return program.limit_share(10.0, kind)

    assert share(2e9, 10) == pytest.approx(0.2)
    assert share(2e9, 5_000_000) == pytest.approx(0.5)
    assert share(None, 5_000_000) is None
    assert share(2e9, 10, "an unknown device") is None


def test_operations_of_causal_attention():
    # four queries that see 1, 2, 3 and 4 keys; then at most 2
    assert attention_operations(1, 4, 1, 1, 4) == 4 * 10
    assert attention_operations(1, 4, 1, 1, 2) == 4 * 7


def test_forms_of_lora_compute_the_same():
    key = jax.random.key(0)

    def outputs(**options):
        step = dataclasses.replace(TINY_STACK, **options)
        (parameters, x), frozen = step.arguments(key)
        parameters = jax.tree.map(lambda p: p + 0.01, parameters)  # B starts at zero
        return jax.jit(step.run)((parameters, x), frozen)[0]

    expected = outputs(lora_form="merged")
    for options in (
        {"lora_form": "factored"},
        {"lora_form": "skinny"},
        {"lora_form": "skinny_float32"},
        {"remat": True},
    ):
        assert jnp.allclose(outputs(**options), expected, atol=1e-4)


def test_a_stack_is_that_of_a_decoder():
    step, key = TINY_STACK, jax.random.key(0)
    config = dataclasses.replace(step.config, vocab_size=50, num_positions=step.length)
    decoder = Decoder(config, task="backbone", rngs=nnx.Rngs(0))
    decoder.norm = None
    decoder.layers = step.model(jax.random.split(key)[0])
    for layer in decoder.layers:
        layer.attention.sparse = None
    ids = jax.random.randint(key, (step.batch, step.length), 0, 50)
    (parameters, _), frozen = step.arguments(key)
    trained = parameters, decoder.embedding(ids)
    got = jax.jit(step.run)(trained, frozen)[0]
    assert jnp.allclose(got, jax.jit(lambda ids: decoder(ids))(ids), atol=1e-5)


def test_a_mistake_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["kernels", "--rounds", "0", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        cli.run(kernels.main)
    assert stop.value.code == 2
    assert "rounds must be at least 1, got 0" in capsys.readouterr().err
