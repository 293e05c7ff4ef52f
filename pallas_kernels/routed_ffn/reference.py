"""Specification of the routed FFN: every block for every token, weighted by a dense mask."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.routed_ffn.types import (
    Activation,
    RoutedFFNLoRA,
    RoutedFFNWeights,
    activation_function,
    split_blocks,
)


def _effective(weight: Array, a: Array | None, b: Array | None) -> Array:
    return weight if a is None or b is None else weight + a @ b


def routed_ffn_reference(
    x: Float[Array, "T D"],
    block_index: Int[Array, "T A"],
    coefficients: Float[Array, "T A"],
    weights: RoutedFFNWeights,
    lora: RoutedFFNLoRA | None = None,
    activation: Activation = "gelu",
) -> Float[Array, "T D"]:
    """Evaluates `y[t] = b_out + sum_a coefficients[t, a] * FFN_{block_index[t, a]}(x[t])`.

    Computes in float32, or float64 if `x` is float64; memory grows as `T * G * Fb`.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    act = activation_function(activation)
    num_blocks = weights.w_in.shape[0]

    def get(node: RoutedFFNWeights | RoutedFFNLoRA | None, name: str) -> Any:
        leaf = getattr(node, name, None)
        return None if leaf is None else leaf.astype(dtype)

    def project(name: str) -> Array:
        a, b = get(lora, f"a_{name}"), get(lora, f"b_{name}")
        h = jnp.einsum("td,gdf->gtf", x.astype(dtype), _effective(get(weights, f"w_{name}"), a, b))
        bias = get(weights, f"b_{name}")
        return h if bias is None else h + bias[:, None]

    hidden = project("in")
    hidden = act(hidden) if weights.w_gate is None else act(project("gate")) * hidden
    w_out = _effective(get(weights, "w_out"), get(lora, "a_out"), get(lora, "b_out"))
    mask = (block_index[:, :, None] == jnp.arange(num_blocks)).astype(dtype)
    share = jnp.einsum("ta,tag->gt", coefficients.astype(dtype), mask)
    y = jnp.einsum("gt,gtf,gfd->td", share, hidden, w_out)
    b_out = get(weights, "b_out")
    return (y if b_out is None else y + b_out).astype(x.dtype)


def routed_ffn_decode_reference(
    x: Float[Array, "T D"],
    block_index: Int[Array, "T A"],
    coefficients: Float[Array, "T A"],
    weights: RoutedFFNWeights,
    lora: RoutedFFNLoRA | None,
    activation: Activation,
    num_blocks: int,
) -> Float[Array, "T D"]:
    """The same of a whole network, cut into blocks first."""
    split = split_blocks(weights, lora, num_blocks)
    return routed_ffn_reference(x, block_index, coefficients, *split, activation)
