"""Linear map and embedding table, each with optional LoRA factors."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float, Integer

from pallas_kernels.arguments import at_least_one, checked
from spt_jax import sharding
from spt_jax.layers.lora import LoRA, LoRAForm, dense_dot, lora_dot


class Linear(nnx.Module):
    """`y = x (W + A B) + bias`, with float32 accumulation.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        use_bias: whether there is a bias.
        dtype: compute and output dtype.
        param_dtype: dtype of kernel and bias.
        param_type: variable type of kernel and bias; `HeadParam` for task heads.
        cut: whether the devices along a mesh's axis `tensor` share the outputs, or the inputs.
        rngs: source of the initial values.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        param_type: type[nnx.Param] = nnx.Param,
        cut: Literal["outputs", "inputs"] | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        at_least_one("Linear", in_features=in_features, out_features=out_features)
        kernel = nnx.initializers.normal(0.02)(
            rngs.params(), (in_features, out_features), param_dtype
        )
        self.kernel = param_type(kernel)
        self.cut = cut
        self.in_features = in_features
        self.out_features = out_features
        self.bias = nnx.data(
            param_type(jnp.zeros((out_features,), param_dtype)) if use_bias else None
        )
        self.lora: LoRA | None = nnx.data(None)
        self.lora_form: LoRAForm | None = None
        self.dtype = dtype

    @checked(**{"in": "self.in_features"})
    def __call__(
        self, x: Float[Array, "... in"], *, dropout_key: jax.Array | None = None
    ) -> Float[Array, "... out"]:
        """Apply the map. `dropout_key` draws this step's LoRA dropout; None leaves it out."""
        x = x.astype(self.dtype)
        kernel = sharding.gathered(self.kernel[...].astype(self.dtype), self.cut)
        if self.lora is None:
            y = dense_dot(x, kernel)
        else:
            y = lora_dot(x, kernel, *self.lora.factors(dropout_key), form=self.lora_form)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class Embedding(nnx.Module):
    """Rows of a table `[num_embeddings, width]`, plus those of A B where LoRA is on.

    Args:
        num_embeddings: rows.
        width: width of a row.
        dtype: output dtype.
        param_dtype: dtype of the table.
        rngs: source of the initial values.
    """

    def __init__(
        self,
        num_embeddings: int,
        width: int,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        at_least_one("Embedding", num_embeddings=num_embeddings, width=width)
        table = nnx.initializers.normal(0.02)(rngs.params(), (num_embeddings, width), param_dtype)
        self.embedding = nnx.Param(table)
        self.lora: LoRA | None = nnx.data(None)
        self.dtype = dtype

    @property
    def num_embeddings(self) -> int:
        """Rows of the table."""
        return self.embedding.shape[0]

    @property
    def width(self) -> int:
        """Width of a row."""
        return self.embedding.shape[1]

    @checked()
    def __call__(
        self, ids: Integer[Array, "..."], *, dropout_key: jax.Array | None = None
    ) -> Float[Array, "... D"]:
        """Look up `ids`; they must lie in 0..num_embeddings - 1, though others read a row too."""
        rows = sharding.gathered(self.embedding[...])[ids].astype(self.dtype)
        if self.lora is not None:
            a, b = self.lora.factors(dropout_key)
            rows += jnp.dot(a[ids], b).astype(self.dtype)
        return sharding.constrain(rows, sharding.BATCH) if rows.ndim == 3 else rows


def dropout(x: Float[Array, "..."], rate: float, key: jax.Array | None) -> Float[Array, "..."]:
    """Zero elements with probability `rate` and rescale the rest; without a key, the identity."""
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def split_key(key: jax.Array | None, number: int) -> list[jax.Array | None]:
    """`jax.random.split`, passing None through."""
    return [None] * number if key is None else list(jax.random.split(key, number))
