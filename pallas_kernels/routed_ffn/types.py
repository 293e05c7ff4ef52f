"""Parameters of the routed FFN."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
from jax.tree_util import register_dataclass

Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "identity"]

# Leaves of a PyTree node may be anything while JAX rebuilds it (axes, tangents, placeholders), so
# fields are not annotated with shapes here: `api.routed_ffn` checks them.
Leaf = Any


@register_dataclass
@dataclass(frozen=True, kw_only=True)
class RoutedFFNWeights:
    """Weights of a feed-forward network whose hidden units are split into G blocks.

    Attributes:
      w_in: Up projection, `[G, D, Fb]`.
      b_in: Its bias, `[G, Fb]`, or None.
      w_gate: Gate projection of a gated network, `[G, D, Fb]`, or None.
      b_gate: Its bias, `[G, Fb]`, or None.
      w_out: Down projection, `[G, Fb, D]`.
      b_out: Its bias, added once a token, `[D]`, or None.
    """

    w_in: Leaf
    w_out: Leaf
    b_in: Leaf = None
    w_gate: Leaf = None
    b_gate: Leaf = None
    b_out: Leaf = None


@register_dataclass
@dataclass(frozen=True, kw_only=True)
class RoutedFFNLoRA:
    """Low-rank additions to the projections; the scaling is part of the second factors.

    The effective weights of block `g` are `w_in[g] + a_in @ b_in[g]`,
    `w_gate[g] + a_gate @ b_gate[g]` and `w_out[g] + a_out[g] @ b_out`. Both factors of a pair are
    given, or neither.

    Attributes:
      a_in: `[D, r]`, shared by all blocks.
      b_in: `[G, r, Fb]`.
      a_gate: `[D, r]`, shared by all blocks.
      b_gate: `[G, r, Fb]`.
      a_out: `[G, Fb, r]`.
      b_out: `[r, D]`, shared by all blocks.
    """

    a_in: Leaf = None
    b_in: Leaf = None
    a_gate: Leaf = None
    b_gate: Leaf = None
    a_out: Leaf = None
    b_out: Leaf = None


def activation_function(name: Activation) -> Callable[[jax.Array], jax.Array]:
    """Returns the elementwise function of that name; `gelu` is the exact one."""
    return {
        "relu": jax.nn.relu,
        # Half the time of jax.nn.gelu, whose erfc is accurate where the result is nil.
        "gelu": lambda x: 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5))),
        "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
        "silu": jax.nn.silu,
        "identity": lambda x: x,
    }[name]


def split_blocks(
    weights: RoutedFFNWeights, lora: RoutedFFNLoRA | None, num_blocks: int
) -> tuple[RoutedFFNWeights, RoutedFFNLoRA | None]:
    """Cuts a whole network into blocks of consecutive hidden units.

    Args:
      weights: Without the axis of blocks: `w_in` and `w_gate` `[D, F]`, their biases `[F]`, `w_out`
        `[F, D]`.
      lora: Likewise: `b_in` and `b_gate` `[r, F]`, `a_out` `[F, r]`.
      num_blocks: Blocks G, a divisor of F.

    Returns:
      The same with blocks first, as `routed_ffn` takes them.
    """

    def columns(array: Leaf) -> Leaf:
        if array is None:
            return None
        return array.reshape(array.shape[0], num_blocks, -1).transpose(1, 0, 2)

    def rows(array: Leaf) -> Leaf:
        return None if array is None else array.reshape(num_blocks, -1, *array.shape[1:])

    split = dataclasses.replace(
        weights,
        w_in=columns(weights.w_in),
        b_in=rows(weights.b_in),
        w_gate=columns(weights.w_gate),
        b_gate=rows(weights.b_gate),
        w_out=rows(weights.w_out),
    )
    if lora is None:
        return split, None
    return split, dataclasses.replace(
        lora, b_in=columns(lora.b_in), b_gate=columns(lora.b_gate), a_out=rows(lora.a_out)
    )
