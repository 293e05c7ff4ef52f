"""Parameters of the routed FFN."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
from jax.tree_util import register_dataclass
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.arguments import match

Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "identity"]

# Leaves of a PyTree node may be anything while JAX rebuilds it (axes, tangents, placeholders), so
# fields are not annotated with shapes: `match_parameters` checks them.
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


_WEIGHTS = {
    "w_in": "G D Fb",
    "b_in": "G Fb",
    "w_gate": "G D Fb",
    "b_gate": "G Fb",
    "w_out": "G Fb D",
    "b_out": "D",
}
_LORA = {
    "a_in": "D r_in",
    "b_in": "G r_in Fb",
    "a_gate": "D r_gate",
    "b_gate": "G r_gate Fb",
    "a_out": "G Fb r_out",
    "b_out": "r_out D",
}


def match_parameters(
    op: str,
    weights: RoutedFFNWeights,
    lora: RoutedFFNLoRA | None,
    *,
    whole: bool = False,
    dtype: DTypeLike | None = None,
    **sizes: int,
) -> None:
    """Holds parameters against the shapes that the attribute lists give.

    Args:
      op: For messages.
      weights: As `routed_ffn` takes them.
      lora: Likewise.
      whole: Whether they are without the axis of blocks, as `split_blocks` takes them.
      dtype: Their type; None for any floating one.
      sizes: Those of G, D and Fb, or F, that are known.

    Raises:
      ValueError: A shape or a type does not fit, or one of a pair is missing.
    """
    if weights.w_gate is None and weights.b_gate is not None:
        raise ValueError(f"{op}: b_gate is given without w_gate; give both or neither.")
    found = {name: (getattr(weights, name), names) for name, names in _WEIGHTS.items()}
    if lora is not None:
        for name in ("in", "gate", "out"):
            if (getattr(lora, f"a_{name}") is None) != (getattr(lora, f"b_{name}") is None):
                raise ValueError(
                    f"{op}: lora has only one of a_{name} and b_{name}; give both or neither."
                )
        if lora.a_gate is not None and weights.w_gate is None:
            raise ValueError(f"{op}: lora has a_gate, but the weights have no w_gate.")
        found |= {f"lora.{name}": (getattr(lora, name), names) for name, names in _LORA.items()}
    arrays = {}
    for name, (array, names) in found.items():
        if array is not None or name in ("w_in", "w_out"):
            names = names.replace("G ", "").replace("Fb", "F") if whole else names
            arrays[name] = array, Float[Array, names]
    match(op, arrays, **sizes)
    for name, (array, _) in arrays.items():
        if dtype is not None and array.dtype != dtype:
            raise ValueError(
                f"{op}: {name} is {array.dtype} and x is {dtype}; cast one to the other."
            )


def activation_function(name: Activation) -> Callable[[jax.Array], jax.Array]:
    """Returns the elementwise function of that name; `gelu` is the exact one.

    Raises:
      ValueError: There is none of that name.
    """
    if name not in get_args(Activation):
        raise ValueError(
            f"unknown activation {name!r}; choose one of {', '.join(get_args(Activation))}."
        )
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

    Raises:
      ValueError: A shape or a type does not fit, or the hidden units do not split into the blocks.
    """
    match_parameters("split_blocks", weights, lora, whole=True)
    hidden = weights.w_in.shape[1]
    if num_blocks < 1 or hidden % num_blocks:
        raise ValueError(
            f"split_blocks: {hidden} hidden units do not split into {num_blocks} blocks."
        )

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
