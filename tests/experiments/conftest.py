"""Fixtures of the experiments' tests."""

from __future__ import annotations

import pytest
from flax import nnx

from experiments import small_llama
from experiments.corpora import cpython_documentation
from spt_jax.models.config import parse_config
from spt_jax.models.decoder import Decoder
from tests.spt_jax.models.builders import save_model


@pytest.fixture
def small_decoder(tmp_path):
    """A LLaMA of one layer, with a tokenizer."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    raw = small_llama.CONFIG | sizes
    directory = save_model(tmp_path / "model", raw, Decoder(parse_config(raw), rngs=nnx.Rngs(0)))
    tokenizer = small_llama.train_tokenizer(cpython_documentation()[:8])
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory
