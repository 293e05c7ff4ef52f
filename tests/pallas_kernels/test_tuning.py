"""Tile sizes that measuring found are kept, and taken."""

import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import autotune, tuning


@dataclasses.dataclass(frozen=True)
class Config:
    size: int = 8

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPT_JAX_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tuning.json"


def sleeper(milliseconds_by_size):
    """A function whose time depends on the tile size chosen; None does not compile."""
    sizes = [Config(size) for size in milliseconds_by_size]

    def kernel(x):
        config = tuning.choose("sleep", str(x.shape), Config(8), sizes)
        milliseconds = milliseconds_by_size[config.size]
        if milliseconds is None:
            raise ValueError("too large")

        def sleep(x):
            time.sleep(milliseconds / 1e3)
            return np.asarray(x) + config.size

        return jax.pure_callback(sleep, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    return kernel


def test_the_fastest_is_kept_and_taken(cache):
    x = jnp.zeros(3)
    kernel = sleeper({8: 40, 4: 5, 16: 60, 32: None})
    assert tuning.choose("sleep", "(3,)", Config(8), []) == Config(8)
    lines = []
    chosen = autotune(kernel, x, rounds=3, report=lines.append)
    assert chosen == {("sleep", "(3,)"): Config(4)}
    assert len(lines) == 4
    assert sum("does not compile" in line for line in lines) == 1
    assert float(jax.jit(kernel)(x)[0]) == 4
    assert float(kernel(jnp.zeros(5))[0]) == 8  # other shapes keep the default
    (name,) = json.loads(cache.read_text())
    assert jax.devices()[0].device_kind in name
    assert jax.__version__ in name


def test_other_entries_stay(cache):
    autotune(sleeper({8: 0}), jnp.zeros(3))
    autotune(sleeper({8: 0}), jnp.zeros(4))
    assert len(json.loads(cache.read_text())) == 2


def test_nothing_to_tune():
    with pytest.raises(ValueError, match="launches no kernel"):
        autotune(jnp.sin, jnp.zeros(3))


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not JSON"), ('"size": 0', "not valid"), ('"new": 1', "new")]
)
def test_a_bad_file_is_named(cache, text, message):
    cache.parent.mkdir()
    if ":" in text:
        entry = tuning._entry(("sleep", "(3,)"))
        text = f'{{"{entry}": {{{text}}}}}'
    cache.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        tuning.choose("sleep", "(3,)", Config(8), [])
    assert str(cache) in str(error.value)
