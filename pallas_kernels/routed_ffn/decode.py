"""Routed FFN of a few tokens in plain XLA: reads the weights of active blocks, in place, alone."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.routed_ffn.types import (
    Activation,
    RoutedFFNLoRA,
    RoutedFFNWeights,
    activation_function,
)

TILE_BYTES = 2**19  # of one weight's slice on a CPU: it is a copy, which is to stay in cache


def _tile_units(units: int, row_bytes: int) -> int:
    """Hidden units of a step: a divisor of a block's, or all of them where steps are launched."""
    if jax.default_backend() != "cpu":
        return units
    most = max(1, TILE_BYTES // row_bytes)
    return max(n for n in range(1, min(units, most) + 1) if units % n == 0)


def routed_ffn_decode_xla(
    x: Float[Array, "T D"],
    block_index: Int[Array, "T A"],
    coefficients: Float[Array, "T A"],
    weights: RoutedFFNWeights,
    lora: RoutedFFNLoRA | None,
    activation: Activation,
    num_blocks: int,
) -> Float[Array, "T D"]:
    """Loops over the hidden units of the blocks that any token chose, for all tokens at once.

    The weights are bound by memory, so a token that did not choose a block costs nothing in it.
    """
    hidden = weights.w_in.shape[1]
    units = hidden // num_blocks
    tile = _tile_units(units, x.shape[1] * weights.w_in.dtype.itemsize)
    tiles = units // tile
    act = activation_function(activation)
    lora = lora or RoutedFFNLoRA()

    members = block_index[:, :, None] == jnp.arange(num_blocks)
    chosen = members.any(1)
    share = jnp.where(members, coefficients[:, :, None].astype(jnp.float32), 0).sum(1)
    used = chosen.any(0)
    order = jnp.argsort(~used, stable=True)

    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.dot(a, b.astype(x.dtype), preferred_element_type=jnp.float32)

    def narrow(name: str) -> jax.Array | None:
        a = getattr(lora, f"a_{name}")
        return None if a is None else dot(x, a).astype(x.dtype)

    narrows = {name: narrow(name) for name in ("in", "gate")}
    rank = None if lora.b_out is None else lora.b_out.shape[0]

    def body(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        block = order[i // tiles]
        first = block * units + i % tiles * tile

        def cut(array: jax.Array, axis: int) -> jax.Array:
            return lax.dynamic_slice_in_dim(array, first, tile, axis)

        def project(name: str) -> jax.Array:
            h = dot(x, cut(getattr(weights, f"w_{name}"), 1))
            if (low := narrows[name]) is not None:
                h += dot(low, cut(getattr(lora, f"b_{name}"), 1))
            bias = getattr(weights, f"b_{name}")
            return h if bias is None else h + cut(bias, 0)

        inner = project("in")
        inner = act(inner) if weights.w_gate is None else act(project("gate")) * inner
        inner = jnp.where(chosen[:, block, None], share[:, block, None] * inner, 0)
        inner = inner.astype(x.dtype)
        products = [dot(inner, cut(weights.w_out, 0))]
        if lora.a_out is not None:
            products.append(dot(inner, cut(lora.a_out, 0)))
        return tuple(total + product for total, product in zip(sums, products, strict=True))

    widths = [x.shape[1]] + ([] if rank is None else [rank])
    start = tuple(jnp.zeros((x.shape[0], width), jnp.float32) for width in widths)
    y, *low = lax.fori_loop(0, used.sum(dtype=jnp.int32) * tiles, body, start)
    if low:
        y += dot(low[0].astype(x.dtype), lora.b_out)
    return (y if weights.b_out is None else y + weights.b_out).astype(x.dtype)
