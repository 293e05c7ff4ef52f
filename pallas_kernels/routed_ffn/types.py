"""Parameters of the routed FFN."""

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
