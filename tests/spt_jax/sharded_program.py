"""Trains tiny models on meshes of eight virtual CPU devices; run by `test_sharding.py`.

    python -m tests.spt_jax.sharded_program results.json < cases.json

With a coordinator's address, the number of processes and that of this one as further arguments, the
devices are those of several processes.

A case names a family, a method, a mesh and how to train; a result has the loss of every step and
more, or the error.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import spt_jax
from experiments.collectives import collectives
from spt_jax.layers import Linear
from spt_jax.models import Decoder, Encoder
from spt_jax.models.presets import bert_config, llama_config
from spt_jax.processes import exchange, is_first, start_processes
from spt_jax.sharding import Devices, make_mesh, parameter_sharding
from spt_jax.training import Examples, cross_entropy, next_token, start, supervised, train
from spt_jax.training.memory import compiled_peak_bytes
from spt_jax.training.step import partition

TARGET, *PROCESS = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 8 // int(PROCESS[1]) if PROCESS else 8)
if PROCESS:
    start_processes(PROCESS[0], int(PROCESS[1]), int(PROCESS[2]))

GOLDEN = Path(__file__).parents[1] / "golden"
HEADS, LENGTH, EXAMPLES, STEPS = 8, 24, 64, 20
SIZES = {"width": 32, "heads": HEADS, "hidden": 128, "layers": 1, "vocabulary": 61}
SPT = spt_jax.SPTConfig(
    serve=None,
    lora=spt_jax.LoRAConfig(rank=4, dropout=0.1),
    attention=spt_jax.SparseAttentionConfig(
        density=0.25, min_keys=4, num_codewords=8, granularity="token"
    ),
    ffn=spt_jax.RoutedFFNConfig(num_blocks=4, active_blocks=2, absent_rank=2),
)
CONFIGS = {
    "full": None,
    "lora": spt_jax.SPTConfig(lora=SPT.lora, attention=None, ffn=None),
    "spt": SPT,
}


def examples() -> Examples:
    rng = np.random.default_rng(0)
    lengths = rng.integers(LENGTH // 2, LENGTH + 1, EXAMPLES)
    mask = np.arange(LENGTH) < lengths[:, None]
    ids = rng.integers(1, SIZES["vocabulary"], mask.shape) * mask
    columns = {"input_ids": ids, "attention_mask": mask, "label": ids[:, 0] % 2}
    return Examples({name: x.astype(np.int32) for name, x in columns.items()}, "tiny")


def texts() -> Examples:
    columns = dict(examples().columns)
    ids, mask = columns["input_ids"], columns["attention_mask"]
    following = np.roll(ids, -1, 1), np.roll(mask, -1, 1)
    weight = (following[1] * (np.arange(LENGTH) < LENGTH - 1)).astype(np.float32)
    return Examples(columns | {"label": following[0], "weight": weight}, "tiny")


def build(family: str, method: str) -> nnx.Module:
    """A tiny model with the method's parts."""
    rngs = nnx.Rngs(0)
    if family == "bert":
        model = Encoder(bert_config(**SIZES), num_labels=2, rngs=rngs)
    else:
        kv_heads = HEADS if family == "llama" else HEADS // 2
        model = Decoder(llama_config(**SIZES, kv_heads=kv_heads), rngs=rngs)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Linear):  # large enough for the parts to matter
            module.kernel[...] = module.kernel[...] * 4
    if (config := CONFIGS[method]) is not None:
        batch = {name: examples().columns[name] for name in ("input_ids", "attention_mask")}
        spt_jax.adapt(model, config, calibration_batch=batch)
    return model


def train_config(case: dict) -> spt_jax.TrainConfig:
    mesh = case.get("mesh")
    return spt_jax.TrainConfig(
        trainable="all" if case["method"] == "full" else "adapter",
        steps=STEPS,
        batch_size=16,
        accumulation=case.get("accumulation", 1),
        learning_rate=3e-3,
        checkpoint_every=STEPS // 2,
        eval_every=STEPS,
        mesh=None if mesh is None else spt_jax.MeshConfig(**mesh),
    )


@contextmanager
def common_folder() -> Iterator[str]:
    """A temporary folder that all processes see."""
    with tempfile.TemporaryDirectory() as folder:
        yield exchange(folder)[0]
        exchange(None)  # until all are done with it


def trained(case: dict) -> dict:
    """Losses of all steps, evaluation and parameters of a run, or of one that is resumed."""
    model = build(case["family"], case["method"])
    bert = case["family"] == "bert"
    data = examples() if bert else texts()
    with common_folder() as folder:
        arguments = {
            "objective": supervised(cross_entropy) if bert else next_token,
            "eval_data": data,
            "metrics": ["accuracy"] if bert else ["perplexity"],
            "log": lambda message: None,
        }
        if (first := case.get("begun_on", ...)) is not ...:
            begun = train_config(case | {"mesh": first})
            train(build(case["family"], case["method"]), data, begun, folder, **arguments)
            if is_first():
                shutil.rmtree(Path(folder) / "checkpoints" / str(STEPS))
            exchange(None)
        resume = first is not ...
        result = train(model, data, train_config(case), folder, resume=resume, **arguments)
        record = json.loads(
            (Path(folder) / "checkpoints" / str(STEPS) / "record" / "metadata").read_text()
        )
    outputs = model(jnp.asarray(data.columns["input_ids"][:4]))  # on one device again
    return {
        "losses": record["progress"]["losses"],
        "metrics": result.metrics,
        "resumed_from": result.resumed_from,
        "peak_bytes": result.compiled_peak_bytes,
        "outputs": np.asarray(outputs, np.float64).ravel().tolist(),
    }


def loaded(case: dict) -> dict:
    """A checkpoint that is loaded onto the mesh, or onto one device; outputs after training."""
    config = train_config(case)
    sharding = None if config.mesh is None else parameter_sharding(make_mesh(config.mesh))
    model = spt_jax.load_pretrained(
        GOLDEN / "bert", task="sequence-classification", num_labels=3, sharding=sharding
    )
    columns = {name: x[:, :20] for name, x in examples().columns.items() if x.ndim == 2}
    data = Examples(columns | {"label": examples().columns["label"]}, "tiny")
    spt_jax.adapt(model, SPT, calibration_batch=columns)
    objective = supervised(cross_entropy)
    with common_folder() as folder:
        train(model, data, config, folder, objective=objective, log=lambda message: None)
    outputs = model(jnp.asarray(columns["input_ids"][:4]))
    return {
        "devices": len(model.layers[0].ffn.up.kernel[...].sharding.device_set),
        "outputs": np.asarray(outputs, np.float64).ravel().tolist(),
    }


def compiled(case: dict) -> dict:
    """Collectives of a training step, and the shapes of the parameters."""
    model = build(case["family"], case["method"])
    config = train_config(case)
    devices = Devices(config.mesh)
    parts = partition(model, config.trainable)
    objective = supervised(cross_entropy) if case["family"] == "bert" else next_token
    state, step = start(parts, config, total_steps=STEPS, objective=objective)
    data = examples() if case["family"] == "bert" else texts()
    batch = {name: column[:16] for name, column in data.columns.items()}
    batch = {"weight": np.ones(16, np.float32)} | batch
    with devices:
        program = (
            jax.jit(step, donate_argnums=0, out_shardings=devices.outputs(state))
            .lower(devices.put(state), devices.put(parts.frozen), devices.batch(batch, 16))
            .compile()
        )
    return {
        "collectives": [c._asdict() for c in collectives(program.as_text())],
        "shapes": [list(x.shape) for x in jax.tree.leaves(nnx.state(model))],
        "peak_bytes": compiled_peak_bytes(program),
    }


def main() -> None:
    results = []
    for case in json.load(sys.stdin):
        try:
            what = {"trained": trained, "compiled": compiled, "loaded": loaded}[case["what"]]
            results.append(what(case))
        except ValueError as error:
            results.append({"error": str(error)})
        print(case, file=sys.stderr, flush=True)
    if is_first():
        Path(TARGET).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
