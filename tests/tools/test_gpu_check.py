"""The parts of the GPU check that need no compiler: reading, judging, adding up; and its cases."""

from __future__ import annotations

import json
import sys

import pytest

from experiments.gpu_targets import A10, A100, H200, L4, kernel_launches
from spt_jax import cli
from tools import gpu_cases, gpu_check

PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'sparse_attention_dq_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for sparse_attention_dq_mosaic_gpu_kernel
    0 bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used {registers} registers, used 16 barriers, 1 bytes smem
ptxas info    : Compile time = {ms} ms
"""


def _printed(registers=168, stores=0, loads=0, ms=285.394):
    return PTXAS.format(registers=registers, stores=stores, loads=loads, ms=ms)


def _report(name, launches=(), spilled=0, **fields):
    kernels = tuple(
        gpu_check.Kernel(
            name=kernel, registers=168, spilled_bytes=spilled, shared_bytes=1024, compile_ms=1.0
        )
        for kernel in launches
    )
    return gpu_check.Report(
        name=name, launches=dict.fromkeys(launches, 1), kernels=kernels, **fields
    )


def test_ptxas_is_read():
    other = _printed(64).replace("sparse_attention_dq", "pq_encode")
    kernels = gpu_check.parse_ptxas(
        "noise\n" + _printed() + other, {"sparse_attention_dq": 165888, "pq_encode": 99}
    )
    assert [(k.name, k.registers, k.spilled_bytes, k.shared_bytes) for k in kernels] == [
        ("sparse_attention_dq", 168, 0, 165888),
        ("pq_encode", 64, 0, 99),
    ]
    assert kernels[0].compile_ms == 285.394


def test_the_worst_variant_of_a_kernel_counts():
    text = _printed(100, stores=8, loads=24) + _printed(120, ms=300.5)
    (kernel,) = gpu_check.parse_ptxas(text, {"sparse_attention_dq": 1})
    assert (kernel.registers, kernel.spilled_bytes, kernel.compile_ms) == (120, 24, 300.5)


def test_triton_kernels_go_by_the_names_of_their_launches():
    text = _printed().replace("sparse_attention_dq_mosaic_gpu_kernel", "pq_encode_kernel")
    assert [k.name for k in gpu_check.parse_ptxas(text, {"pq_encode": 1})] == ["pq_encode"]
    line = (
        "  %triton_kernel_call.0 = u8[8]{0} custom-call(%a), custom_call_target="
        '"triton_kernel_call_ffi", operand_layout_constraints={}, metadata={op_name='
        '"jit(_select)/jit(pq_encode)/pq_encode/triton_kernel_call"}'
    )
    assert kernel_launches(line) == {"pq_encode": 1}


def test_triton_kernels_are_assembled(tmp_path):
    pytest.importorskip("triton")
    dump = tmp_path / "1234"
    dump.mkdir()
    (dump / "pq_encode_kernel.compile_info").write_text("pq_encode_kernel: shared_mem_bytes: 4736")
    (dump / "pq_encode_kernel.ptx").write_text(
        ".version 8.4\n.target sm_80\n.address_size 64\n"
        ".visible .entry pq_encode_kernel() { ret; }\n"
    )
    (kernel,) = gpu_check.assemble_triton(tmp_path, "sm_80")
    assert (kernel.name, kernel.spilled_bytes, kernel.shared_bytes) == ("pq_encode", 0, 4736)
    assert kernel.registers > 0
    assert gpu_check.assemble_triton(tmp_path, "sm_80") == []


def test_a_missing_number_is_an_error():
    text = _printed().replace("spill stores", "something else")
    with pytest.raises(ValueError, match="sparse_attention_dq: ptxas printed no"):
        gpu_check.parse_ptxas(text, {"sparse_attention_dq": 1})
    assert gpu_check.parse_ptxas("", {}) == []


def test_shared_memory_is_read(tmp_path):
    text = "Resources(smem_scratch_bytes={}, tmem_scratch_cols=0, barrier_counts=Counter())"
    for number, size in ((3, 512), (12, 2048)):
        (tmp_path / f"pq_encode_{number}.resources.txt").write_text(text.format(size))
    (tmp_path / "pq_encode_3.after_layout_inference.txt").write_text("")
    assert gpu_check.read_shared_bytes(tmp_path) == {"pq_encode": 2048}
    (tmp_path / "pq_encode_4.resources.txt").write_text("Resources()")
    with pytest.raises(ValueError, match=r"pq_encode_4.resources.txt names no shared memory"):
        gpu_check.read_shared_bytes(tmp_path)


def test_launches_are_counted_in_the_program():
    line = (
        "  %mpmd_map.{n} = (bf16[1024,512]{{1,0}}) custom-call(%a), custom_call_target="
        '"mosaic_gpu_v2", metadata={{op_name="jit(run)/transpose(jvp())/{name}/mpmd_map" '
        'scheduling_name="mpmd_map.{n}"}}, backend_config={{module = "\\00a/b"}}\n'
    )
    names = ["sparse_attention_dq", "pq_encode", "sparse_attention_dq"]
    text = "".join(line.format(n=n, name=name) for n, name in enumerate(names))
    text += (
        '  %x = f32[] custom-call(%a), custom_call_target="__cublas", metadata={op_name="a/b"}\n'
    )
    assert kernel_launches(text) == {"sparse_attention_dq": 2, "pq_encode": 1}


def test_what_is_wrong_is_named():
    reports = [
        _report("good", ("a", "b")),
        _report("spilling", ("a",), spilled=16),
        _report("silent"),
        gpu_check.Report(name="broken", error="ValueError: no"),
    ]
    expected = {"good": ("a", "b*"), "spilling": ("a",), "silent": ("a",), "broken": ("a",)}
    found = gpu_check.problems(reports, expected, 0, 1024)
    assert found == [
        "spilling: a spills 16 bytes, more than the 0 allowed",
        "silent: launches no a; its kernels: none",
        "broken: ValueError: no",
    ]
    assert gpu_check.problems(reports[:2], expected, 16, 1024) == []
    assert gpu_check.problems(reports[:1], expected, 0, 1000) == [
        f"good: {name} takes 1024 bytes of shared memory, more than the 1000 that there are"
        for name in "ab"
    ]


def test_growth_is_the_worst_ratio_of_bytes_a_token():
    assert gpu_check.growth({1: 10, 2: 20, 4: 60, 8: 120}) == pytest.approx(1.5)


def test_figures():
    reports = {
        "skinny": _report("skinny", temp_bytes=300),
        "merged": _report("merged", temp_bytes=200),
        "spt": _report("spt", ("a",), spilled=8, temp_bytes=100),
        "short": _report("short", temp_bytes=10),
        "long": _report("long", temp_bytes=22),
        "failed": gpu_check.Report(name="failed", error="no"),
    }
    names = {
        "skinny": "lora_block_temp_bytes",
        "merged": "lora_merged_block_temp_bytes",
        "spt": "spt_block_temp_bytes",
        "failed": "full_block_temp_bytes",
    }
    assert gpu_check.figures_of(reports, names, {1: "short", 2: "long", 4: "failed"}) == {
        "lora_block_temp_bytes": 300,
        "lora_merged_block_temp_bytes": 200,
        "lora_best_block_temp_bytes": 200,
        "spt_block_temp_bytes": 100,
        "spt_block_temp_bytes_by_length": {"1": 10, "2": 22},
        "spt_block_growth": pytest.approx(1.1),
        "max_spilled_bytes": 8,
    }


def test_reports_travel_as_a_line():
    report = _report("spt", ("a", "b"), spilled=8, temp_bytes=100, seconds=1.5)
    line = report.to_json()
    assert "\n" not in line
    assert gpu_check.Report.from_json(line) == report


def test_cases():
    cases = gpu_cases.cases()
    assert all(name == case.name for name, case in cases.items())
    assert len(gpu_cases.cases(all_lengths=True)) > len(cases)
    for case in cases.values():
        plain = "full" in case.name or "lora" in case.name
        plain = plain or case.name.endswith(("_dense", "_encode"))
        assert case.launches or (case.kind in ("block", "benchmark") and plain), case.name
    figures = [case.figure for case in cases.values() if case.figure is not None]
    assert len(set(figures)) == len(figures)
    assert {"spt_block_temp_bytes", "lora_block_temp_bytes", "full_block_temp_bytes"} <= {*figures}
    for length in gpu_cases.GROWTH_LENGTHS:
        assert gpu_cases.GROWTH_CASE.format(length) in cases
    assert (gpu_cases.GROWTH_LENGTHS[0], gpu_cases.GROWTH_LENGTHS[-1]) == (2048, 65536)


def test_triton_has_cases_of_its_own():
    shared, own = gpu_cases.cases(), gpu_cases.cases(implementation="triton")
    assert shared.keys() < own.keys()
    assert "sparse_attention_h64_group1" in own.keys() - shared.keys()
    assert all(shared[name].launches == own[name].launches for name in shared)


def test_descriptions_before_hopper():
    for gpu, architecture in ((A100, "sm_80"), (A10, "sm_86"), (L4, "sm_89"), (H200, "sm_90a")):
        assert gpu.architecture == architecture
        assert ("ACCELERATED" in gpu.proto()) == (gpu is H200)
    assert A10.block_shared_memory_bytes == L4.block_shared_memory_bytes == 101376


def test_the_description_of_the_gpu():
    proto = H200.proto()
    assert "cuda_compute_capability { major: 9 minor: 0" in proto
    assert proto.count("{") == proto.count("}")
    assert "shared_memory_per_block_optin: 232448" in proto


@pytest.fixture
def compiled(monkeypatch):
    """Replaces the compilers by one that gives every program what it asks for."""
    cases = gpu_cases.cases()

    def compile_all(names, processes, advance, gpu, implementation, all_lengths):
        return {
            name: _report(name, cases[name].launches, temp_bytes=1000, peak_bytes=2000)
            for name in names
        }

    monkeypatch.setattr(gpu_check, "compile_all", compile_all)
    return compile_all


def _run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu_check", *map(str, arguments)])
    cli.run(gpu_check.main)


def test_metrics_are_written(monkeypatch, compiled, capsys, tmp_path):
    _run(monkeypatch, "--out", tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for name in ("spt", "lora", "lora_best", "full"):
        assert metrics["figures"][f"{name}_block_temp_bytes"] == 1000
    assert metrics["figures"]["max_spilled_bytes"] == 0
    assert metrics["figures"]["spt_block_growth"] == pytest.approx(0.5)
    assert set(metrics["programs"]) == set(gpu_cases.cases())
    printed = capsys.readouterr().out
    assert "sparse_attention_dkv" in printed
    assert "spt_block_temp_bytes" in printed


def test_a_failure_ends_in_one_line_and_code_1(monkeypatch, compiled, capsys, tmp_path):
    def spills(*arguments):
        reports = compiled(*arguments)
        name = "pq_encode_h64_c4_e16"
        return reports | {name: _report(name, ("pq_encode",), spilled=4)}

    monkeypatch.setattr(gpu_check, "compile_all", spills)
    with pytest.raises(SystemExit) as stop:
        _run(monkeypatch, "--out", tmp_path, "--only", "pq_encode", "--max-spilled-bytes", "0")
    assert "error: 1 check failed, the first: " in str(stop.value.code)
    assert "pq_encode spills 4 bytes, more than the 0 allowed" in str(stop.value.code)
    assert (tmp_path / "metrics.json").exists()


def test_a_pattern_that_matches_nothing_is_refused(monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        _run(monkeypatch, "--out", tmp_path, "--only", "nothing like it")
    assert stop.value.code == 2
    assert "'nothing like it' matches no program" in capsys.readouterr().err
