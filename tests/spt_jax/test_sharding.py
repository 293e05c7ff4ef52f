import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from spt_jax.config import MeshConfig
from spt_jax.sharding import make_mesh, parameter_spec, parse_mesh
from tests.processes import free_address

ROOT = Path(__file__).parents[2]
MESHES = [(d, f, 8 // d // f) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) if d * f <= 8]
#: Activations have rows of so many tokens: 16 sequences of 24.
TOKENS = 16 * 24


def _mesh(sizes):
    return None if sizes is None else dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))


def _run(cases, processes=1):
    """Results of cases on eight devices, of one process or shared out."""
    with tempfile.TemporaryDirectory() as folder:
        target, given = Path(folder) / "results.json", Path(folder) / "cases.json"
        given.write_text(json.dumps(cases))
        command = [sys.executable, "-m", "tests.spt_jax.sharded_program", str(target)]
        address = free_address()
        running = [
            subprocess.Popen(
                command + ([address, str(processes), str(number)] if processes > 1 else []),
                stdin=given.open(),
                stdout=subprocess.DEVNULL,
                stderr=(Path(folder) / f"errors-{number}").open("w"),
                cwd=ROOT,
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
            )
            for number in range(processes)
        ]
        codes = [process.wait() for process in running]
        errors = [(Path(folder) / f"errors-{n}").read_text()[-4000:] for n in range(processes)]
        assert not any(codes), "\n\n".join(errors)
        return json.loads(target.read_text())


def _assert_same_run(found, expected, rtol):
    assert len(found["losses"]) == 20
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=rtol)
    for name, value in expected["metrics"].items():
        assert found["metrics"][name] == pytest.approx(value, rel=rtol)
    scale = np.abs(expected["outputs"]).max()
    np.testing.assert_allclose(found["outputs"], expected["outputs"], atol=10 * rtol * scale)


def _compare(family, method, meshes, accumulation=1, processes=1):
    """Every mesh against one device."""
    case = {
        "what": "trained",
        "family": family,
        "method": method,
        "accumulation": accumulation,
    }
    cases = [case | {"mesh": _mesh(sizes)} for sizes in (None, *meshes)]
    if processes == 1:
        expected, *found = _run(cases)
    else:
        (expected,), found = _run(cases[:1]), _run(cases[1:], processes)
    for sizes, result in zip(meshes, found, strict=True):
        assert "error" not in result, (sizes, result)
        _assert_same_run(result, expected, rtol=2e-3 if method == "spt" else 2e-4)


def test_training_in_two_processes_is_training_on_one_device():
    _compare("bert", "spt", [(2, 2, 2)], accumulation=2, processes=2)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.full)])
def test_a_model_loaded_onto_a_mesh_is_trained_and_used_there(processes):
    case = {"what": "loaded", "family": "bert", "method": "spt"}
    (alone,) = _run([case | {"mesh": None}])
    (sharded,) = _run([case | {"mesh": _mesh((1, 4, 2))}], processes)
    assert (alone["devices"], sharded["devices"]) == (1, 8)
    scale = np.abs(alone["outputs"]).max()
    np.testing.assert_allclose(sharded["outputs"], alone["outputs"], atol=2e-2 * scale)


@pytest.mark.full
@pytest.mark.timeout(3000)  # ten meshes, each compiled anew
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", ["full", "lora", "spt"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_training_on_every_mesh_is_training_on_one_device(family, method, accumulation):
    # a microbatch of eight sequences is cut into eight parts at most
    _compare(family, method, MESHES, accumulation)


@pytest.mark.full
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", ["full", "lora", "spt"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_training_in_two_processes_is_that_on_one_device(family, method, accumulation):
    _compare(family, method, [(8, 1, 1), (1, 1, 8), (2, 2, 2)], accumulation, processes=2)


@pytest.mark.full
def test_a_checkpoint_is_resumed_on_another_mesh():
    case = {"what": "trained", "family": "bert", "method": "full"}
    sizes = [(1, 4, 2), (4, 1, 2), (2, 2, 2)]
    alone, *resumed = _run(
        [case | {"mesh": None}]
        + [
            case | {"mesh": _mesh(s), "begun_on": begun}
            for s in sizes
            for begun in (None, _mesh((8, 1, 1)))
        ]
    )
    for run in resumed:
        assert run["resumed_from"] == 10
        _assert_same_run(run, alone, rtol=2e-4)


def test_a_checkpoint_is_resumed_on_one_device_and_steps_send_what_they_may():
    """One program, since starting one takes as long as a case."""
    llama = {"family": "llama", "method": "spt"}
    alone, resumed, grouped, data_only, step = _run(
        [
            llama | {"what": "trained", "mesh": None},
            llama | {"what": "trained", "mesh": None, "begun_on": _mesh((1, 4, 2))},
            {"family": "grouped", "method": "spt", "what": "trained", "mesh": _mesh((1, 1, 8))},
            llama | {"what": "compiled", "mesh": _mesh((8, 1, 1))},
            llama | {"what": "compiled", "mesh": _mesh((2, 2, 2))},
        ]
    )
    assert alone["resumed_from"] is None
    assert resumed["resumed_from"] == 10
    _assert_same_run(resumed, alone, rtol=2e-3)
    assert "4 key/value heads, which 8 devices (tensor) cannot share" in grouped["error"]
    _check_collectives(step, tokens=TOKENS // 4, width=32, layers=1, tensor=2)
    _check_collectives(data_only, tokens=TOKENS // 8, width=32, layers=1, tensor=1)
    assert {c["kind"] for c in data_only["collectives"]} == {"all-reduce"}


def _check_collectives(step, *, tokens, width, layers, tensor):
    """Weights are gathered; of activations, only sums over hidden units and heads are taken."""
    shapes = {tuple(sorted(shape)) for shape in step["shapes"]}
    cut = {
        tuple(sorted((*shape[:i], shape[i] // tensor, *shape[i + 1 :])))
        for shape in step["shapes"]
        for i in range(len(shape))
    }
    cut.add(tuple(sorted((tokens, width))))  # the gradient of what the output matrix is applied to
    activations = 0
    for collective in step["collectives"]:
        kind, shape = collective["kind"], tuple(collective["shape"])
        if kind == "all-gather":
            assert tuple(sorted(shape)) in shapes | cut, collective
        else:
            assert kind in ("all-reduce", "reduce-scatter"), collective
            size = int(np.prod(shape))
            assert size <= max(tokens * width, 61 * width), collective
            activations += size if size >= tokens * width else 0
    # forward after attention and FFN; backward before q, k and v, before the FFN and its router
    assert activations <= 8 * layers * tokens * width


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("layers.0.attention.q_proj.kernel", (8, 8), P("fsdp", "tensor")),
        ("layers.0.attention.q_proj.bias", (8,), P("tensor")),
        ("layers.0.attention.q_proj.lora.a", (8, 2), P()),
        ("layers.0.attention.k_proj.lora.b", (2, 8), P(None, "tensor")),
        ("layers.0.attention.o_proj.kernel", (8, 8), P("tensor", "fsdp")),
        ("layers.0.attention.o_proj.bias", (8,), P()),
        ("layers.0.attention.sparse.key_codebooks", (4, 2, 16, 2), P("tensor")),
        ("layers.0.ffn.gate.kernel", (8, 4, 8), P("fsdp", None, "tensor")),
        ("layers.0.ffn.up.bias", (4, 8), P(None, "tensor")),
        ("layers.0.ffn.up.lora.b", (2, 4, 8), P(None, None, "tensor")),
        ("layers.0.ffn.down.kernel", (4, 8, 8), P(None, "tensor", "fsdp")),
        ("layers.0.ffn.down.lora.a", (4, 8, 2), P(None, "tensor", None)),
        ("layers.0.ffn.router_kernel", (8, 4), P()),
        ("layers.0.ffn_norm.scale", (8,), P()),
        ("embeddings.word.embedding", (97, 8), P(None, "fsdp")),
        ("head.kernel", (8, 97), P("fsdp")),
    ],
)
def test_where_parameters_lie(path, shape, spec):
    assert parameter_spec(path, shape) == spec


def test_a_mesh_must_fit_the_devices():
    assert make_mesh(MeshConfig()).shape == {"data": len(jax.devices()), "fsdp": 1, "tensor": 1}
    with pytest.raises(ValueError, match=r"data=1, fsdp=3, tensor=1 does not fit \d devices"):
        make_mesh(MeshConfig(data=1, fsdp=3), jax.devices()[:1])
    with pytest.raises(ValueError, match="only one mesh axis"):
        MeshConfig(data=-1, fsdp=-1)
    with pytest.raises(ValueError, match="mesh axis tensor must be at least 1"):
        MeshConfig(tensor=0)


def test_meshes_are_described_by_text():
    assert parse_mesh("data=2, tensor=4") == MeshConfig(data=2, fsdp=1, tensor=4)
    for text in ("", "data", "data=x", "rows=2", "data=2;fsdp=2"):
        with pytest.raises(ValueError, match="described by axes and sizes"):
            parse_mesh(text)
