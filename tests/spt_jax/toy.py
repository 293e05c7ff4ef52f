"""A small Transformer made of the layers, for tests that need no checkpoint."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from spt_jax.layers import Attention, Embedding, FeedForward, HeadParam, Linear, split_key

WIDTH, HIDDEN, HEADS, VOCABULARY = 32, 64, 4, 97


class Block(nnx.Module):
    def __init__(self, *, causal: bool, gated: bool, dtype, rngs: nnx.Rngs) -> None:
        options = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.attention = Attention(WIDTH, HEADS, causal=causal, **options)
        self.ffn = FeedForward(WIDTH, HIDDEN, gated=gated, **options)

    def __call__(self, x, key_mask, key):
        keys = split_key(key, 2)
        y, first = self.attention(x, key_mask=key_mask, dropout_key=keys[0])
        x = x + y
        y, second = self.ffn(x, mask=key_mask, dropout_key=keys[1])
        return x + y, first | second


class ToyModel(nnx.Module):
    def __init__(
        self, *, layers: int = 2, causal: bool = False, gated: bool = False, dtype=jnp.float32, rngs
    ) -> None:
        self.embedding = Embedding(VOCABULARY, WIDTH, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            [Block(causal=causal, gated=gated, dtype=dtype, rngs=rngs) for _ in range(layers)]
        )
        self.head = Linear(WIDTH, 2, param_type=HeadParam, rngs=rngs)
        for _, module in nnx.iter_modules(self):
            if isinstance(module, Linear):  # large enough for the parts to matter
                module.kernel[...] = module.kernel[...] * 8

    def forward(
        self, input_ids, attention_mask=None, token_types=None, segments=None, *, dropout_key=None
    ):
        assert token_types is None
        assert segments is None
        key_mask = None if attention_mask is None else attention_mask > 0
        x, aux = self.embedding(input_ids), {}
        for layer, key in zip(self.layers, split_key(dropout_key, len(self.layers)), strict=True):
            x, more = layer(x, key_mask, key)
            aux = {name: aux.get(name, 0) + value for name, value in more.items()} or aux
        return self.head(x[:, 0]), aux

    def __call__(self, input_ids, attention_mask=None, **options):
        return self.forward(input_ids, attention_mask, **options)[0]


def toy_batch(batch: int = 6, length: int = 48, seed: int = 0):
    keys = jax.random.split(jax.random.key(seed))
    lengths = jax.random.randint(keys[0], (batch,), length // 2, length + 1)
    return {
        "input_ids": jax.random.randint(keys[1], (batch, length), 0, VOCABULARY),
        "attention_mask": (jnp.arange(length) < lengths[:, None]).astype(jnp.int32),
    }
