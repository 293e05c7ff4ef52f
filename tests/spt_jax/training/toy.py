"""A model with one parameter of each kind, and a task that it can learn."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spt_jax.layers.variables import CodebookParam, HeadParam, LoRAParam, RouterParam
from spt_jax.training import Examples

VOCABULARY, WIDTH, LENGTH = 20, 32, 16


class Toy(nnx.Module):
    def __init__(self, *, classes: int = 2, dtype=jnp.float32, seed: int = 0) -> None:
        key = iter(jax.random.split(jax.random.key(seed), 4))
        self.embedding = nnx.Param(jax.random.normal(next(key), (VOCABULARY, WIDTH), dtype))
        self.a = LoRAParam(jax.random.normal(next(key), (WIDTH, 4)) / WIDTH**0.5)
        self.b = LoRAParam(jnp.zeros((4, WIDTH)))
        self.router = RouterParam(jax.random.normal(next(key), (WIDTH, 2)) / WIDTH**0.5)
        self.codebook = CodebookParam(jax.random.normal(next(key), (3, WIDTH)))
        self.head = HeadParam(jnp.zeros((WIDTH, classes)))
        self.bias = HeadParam(jnp.zeros(classes))
        self.remat = False
        self.dtype = dtype

    def forward(self, ids, mask=None, token_type_ids=None, segment_ids=None, *, dropout_key=None):
        weights = [w[...].astype(self.dtype) for w in (self.embedding, self.a, self.b, self.head)]
        embedding, a, b, head = weights
        x = embedding[ids]

        def layer(x):
            gates = jax.nn.sigmoid(x @ self.router[...].astype(self.dtype))
            return jnp.tanh(x + x @ a @ b) * gates.sum(-1, keepdims=True)

        x = nnx.remat(layer)(x) if self.remat else layer(x)
        if dropout_key is not None:
            x = jnp.where(jax.random.bernoulli(dropout_key, 0.9, x.shape), x / 0.9, 0)
        mask = mask[..., None].astype(self.dtype)
        distance = jnp.square(jax.lax.stop_gradient(x)[:, :, None] - self.codebook[...]).mean(-1)
        aux = {"codebook": 0.01 * jnp.sum(distance.min(-1) * mask[..., 0])}
        pooled = (x * mask).sum(1) / mask.sum(1)
        return pooled @ head + self.bias[...].astype(self.dtype), aux


def examples(n: int, seed: int = 0, *, scores: bool = False) -> Examples:
    """Whether, or how much, small ids prevail."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, VOCABULARY, (n, LENGTH)).astype(np.int32)
    mask = (np.arange(LENGTH) < rng.integers(3, LENGTH + 1, (n, 1))).astype(np.int32)
    share = ((ids < VOCABULARY // 2) * mask).sum(1) / mask.sum(1)
    label = share.astype(np.float32) if scores else (share > 0.5).astype(np.int32)
    columns = {"input_ids": ids, "attention_mask": mask, "label": label}
    return Examples(columns, f"toy {seed}")
