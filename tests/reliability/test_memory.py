"""A long run holds no more memory at its end than near its start."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import spt_jax
from spt_jax.config import SPTConfig, TrainConfig
from spt_jax.training import Examples, cross_entropy, supervised, train
from tests.spt_jax.models.builders import GOLDEN

pytestmark = pytest.mark.timeout(1800)

EVERY = 25  # steps between samples
SAVED = 100  # steps between checkpoints, of each of which the library that writes it keeps some
GROWTH_BYTES = 4 << 20  # of a process of hundreds of megabytes, by its allocator's whims


def resident_bytes() -> int:
    """Of this process, without the files that it maps."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.partition("RssAnon:")[2].split()[0])


def sample() -> tuple[int, int, int]:
    """Resident bytes, JAX's arrays, and objects of the garbage collector."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # else what compilation left behind comes and goes
    return resident_bytes(), len(jax.live_arrays()), len(gc.get_objects())


def grown(samples: list[tuple[int, int, int]]) -> tuple[int, int, int]:
    """Growth from the second quarter of the run to the last."""
    array = np.array(samples)
    quarter = len(array) // 4
    second, last = array[quarter : 2 * quarter], array[-quarter:]
    # the least of each quarter: what comes and goes, such as a checkpoint under way, is no growth
    return tuple((last.min(0) - second.min(0)).tolist())


def examples(count: int) -> Examples:
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 97, (count, 16)).astype(np.int32)
    mask = (np.arange(16) < rng.integers(4, 17, (count, 1))).astype(np.int32)
    columns = {"input_ids": ids, "attention_mask": mask, "label": ids[:, 0] % 3}
    return Examples(columns, "random")


@pytest.fixture
def one_heap() -> None:
    """No heaps of their own for threads to come, whose filling up would look like growth."""
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        m_arena_max = -8
        libc.mallopt(m_arena_max, 1)


def run(steps: int, out: Path, log) -> None:
    model = spt_jax.load_pretrained(
        GOLDEN / "bert", task="sequence-classification", num_labels=3, rngs=nnx.Rngs(0)
    )
    data = examples(200)
    config = SPTConfig(serve=None, lora=spt_jax.LoRAConfig(rank=4))
    spt_jax.adapt(model, config, calibration_batch=data.take(slice(32)).columns, rngs=nnx.Rngs(0))
    training = TrainConfig(
        steps=steps,
        batch_size=8,
        eval_every=SAVED,
        checkpoint_every=SAVED,
        log_every=EVERY,
    )
    train(
        model,
        data,
        training,
        out,
        objective=supervised(cross_entropy),
        eval_data=data.take(slice(16)),
        metrics=("accuracy",),
        log=log,
    )


@pytest.mark.parametrize("keeping", [False, True], ids=["memory", "a_leak_is_noticed"])
def test_memory_does_not_grow(keeping, full, tmp_path, record, one_heap):
    steps = 1000 if full and not keeping else 400
    samples: list[tuple[int, int, int]] = []
    kept = []

    def log(message: str) -> None:
        if message.startswith("step "):
            samples.append(sample())
            if keeping:
                kept.append((jax.numpy.ones(1000), np.ones(1 << 19), [[] for _ in range(1000)]))

    run(steps, tmp_path, log)
    assert len(samples) == steps // EVERY
    growth, arrays, objects = grown(samples)
    if keeping:
        assert growth > GROWTH_BYTES
        assert arrays >= 4
        assert objects > 1000
        return
    assert growth < GROWTH_BYTES, samples
    assert arrays <= 0, samples
    assert objects < steps // 4, samples  # not one a step
    record(
        "memory",
        steps=steps,
        checkpoints=steps // SAVED,
        resident=f"{samples[-1][0] / 1e6:.0f} MB",
        growth=f"{growth / 1e6:+.1f} MB",
        arrays=f"{arrays:+d}",
        objects=f"{objects:+d}",
    )
