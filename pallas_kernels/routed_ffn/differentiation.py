"""Makes a differentiable op of the forward and the backward pass of an implementation."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.routed_ffn.types import Activation, RoutedFFNLoRA, RoutedFFNWeights

Arrays = dict[str, Array]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Wanted:
    """Names of the arrays that are differentiated: part of the residuals' structure."""

    names: frozenset[str]


def named_arrays(
    x: Array, coefficients: Array, weights: RoutedFFNWeights, lora: RoutedFFNLoRA | None
) -> Arrays:
    """The arrays that may have gradients, by name."""
    arrays = {"x": x, "coefficients": coefficients, **vars(weights)}
    if lora is not None:
        arrays |= {f"lora_{name}": array for name, array in vars(lora).items()}
    return {name: array for name, array in arrays.items() if array is not None}


def differentiable(
    forward: Callable[..., tuple[Array, tuple[Any, ...]]], backward: Callable[..., Arrays]
) -> Callable[..., Array]:
    """The op `y = f(x, block_index, coefficients, weights, lora, activation)`.

    Args:
      forward: `forward(activation, arrays, block_index, save=...)` returns y and, with `save`, what
        the backward pass needs beside the arrays.
      backward: `backward(activation, wanted, arrays, *saved, dy)` returns the gradients of the
        arrays named in `wanted`, and computes nothing else.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def op(activation: Activation, p: Arrays, block_index: Array) -> Array:
        return forward(activation, p, block_index, save=False)[0]

    def op_forward(activation: Activation, p: dict[str, Any], block_index: Any) -> Any:
        wanted = _Wanted(frozenset(name for name, primal in p.items() if primal.perturbed))
        p = {name: primal.value for name, primal in p.items()}
        y, saved = forward(activation, p, block_index.value, save=True)
        return y, (wanted, p, saved)

    def op_backward(activation: Activation, residuals: Any, dy: Any) -> tuple[Any, None]:
        wanted, p, saved = residuals
        if isinstance(dy, jax.custom_derivatives.SymbolicZero):
            return None, None
        grads = backward(activation, wanted.names, p, *saved, dy)
        grads = {name: grad.astype(p[name].dtype) for name, grad in grads.items()}
        return {name: grads.get(name) for name in p}, None

    op.defvjp(op_forward, op_backward, symbolic_zeros=True)

    def routed_ffn(
        x: Float[Array, "T D"],
        block_index: Int[Array, "T A"],
        coefficients: Float[Array, "T A"],
        weights: RoutedFFNWeights,
        lora: RoutedFFNLoRA | None = None,
        activation: Activation = "gelu",
    ) -> Float[Array, "T D"]:
        """See `api.routed_ffn`."""
        if not x.shape[0]:
            return x
        return op(activation, named_arrays(x, coefficients, weights, lora), block_index)

    return routed_ffn
