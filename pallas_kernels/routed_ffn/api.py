"""Public functions of the routed FFN: check their arguments and choose an implementation."""

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import triton
from pallas_kernels.arguments import checked
from pallas_kernels.dispatch import Implementation, call, resolve
from pallas_kernels.routed_ffn.decode import routed_ffn_decode_xla
from pallas_kernels.routed_ffn.mosaic import routed_ffn_mosaic, unfit
from pallas_kernels.routed_ffn.reference import (
    routed_ffn_decode_reference,
    routed_ffn_reference,
)
from pallas_kernels.routed_ffn.types import (
    Activation,
    RoutedFFNLoRA,
    RoutedFFNWeights,
    activation_function,
    match_parameters,
    split_blocks,
)
from pallas_kernels.routed_ffn.xla import routed_ffn_xla

_BACKENDS: dict[str, Callable[..., Array]] = {
    "mosaic": routed_ffn_mosaic,
    "triton": triton.imported("pallas_kernels.routed_ffn.triton", "routed_ffn_triton"),
    "xla": routed_ffn_xla,
    "reference": routed_ffn_reference,
}
_DECODE = {"xla": routed_ffn_decode_xla, "reference": routed_ffn_decode_reference}


@checked()
def routed_ffn(
    x: Float[Array, "T D"],
    block_index: Int[Array, "T A"],
    coefficients: Float[Array, "T A"],
    weights: RoutedFFNWeights,
    *,
    lora: RoutedFFNLoRA | None = None,
    activation: Activation = "gelu",
    implementation: Implementation | None = None,
) -> Float[Array, "T D"]:
    """Feed-forward network that computes only `A` of its `G` blocks for each token.

    `y[t] = b_out + sum_a coefficients[t, a] * FFN_{block_index[t, a]}(x[t])`, where
    `FFN_g(x) = act(x w_in[g] + b_in[g]) w_out[g]`, or, with a gate,
    `FFN_g(x) = (act(x w_gate[g] + b_gate[g]) * (x w_in[g] + b_in[g])) w_out[g]`.

    No token is ever dropped, however uneven the choice of blocks. Products accumulate in float32.
    With all but `reference`, forward and backward multiply the active blocks only, and arrays that
    want no gradient cost none; what is kept for the backward pass grows as `T * A * Fb`.
    Differentiable once, in reverse mode.

    Args:
      x: Tokens, `[T, D]`.
      block_index: The blocks of each token, `[T, A]`, distinct for each token and in `[0, G)`.
      coefficients: Weight of each chosen block, `[T, A]`, any floating type.
      weights: Weights, of the type of `x`.
      lora: Low-rank additions to the weights, of the type of `x`.
      activation: "relu", "gelu" (exact), "gelu_tanh", "silu" or "identity".
      implementation: Name of an implementation, or None for the best supported one.

    Returns:
      `[T, D]`, of the type of `x`.

    Raises:
      ValueError: Shapes, types or names do not fit.
      NotImplementedError: The named implementation does not exist for this op, or cannot run here.

    Example:
      >>> import jax.numpy as jnp
      >>> weights = RoutedFFNWeights(w_in=jnp.ones((2, 3, 4)), w_out=jnp.ones((2, 4, 3)))
      >>> index = jnp.array([[0], [1]], jnp.int32)
      >>> routed_ffn(jnp.ones((2, 3)), index, jnp.ones((2, 1)), weights, activation="relu").shape
      (2, 3)

    References:
      Gui et al., "SPT: Fine-Tuning Transformer-based Language Models Efficiently with
      Sparsification", arXiv 2312.10365, section 4.2.
    """
    _check("routed_ffn", x, block_index, weights, lora, activation, dtype=x.dtype)
    why_not = {
        "mosaic": lambda: unfit(x, weights),
        "triton": lambda: triton.unfit_dtype(x, weights.w_in),
    }
    run = resolve("routed_ffn", implementation, _BACKENDS, why_not)
    arrays = {
        "x": x,
        "block_index": block_index,
        "coefficients": coefficients,
        "weights": weights,
        "lora": lora,
    }
    return call("routed_ffn", run, arrays, activation=activation)


@checked()
def routed_ffn_decode(
    x: Float[Array, "T D"],
    block_index: Int[Array, "T A"],
    coefficients: Float[Array, "T A"],
    weights: RoutedFFNWeights,
    *,
    num_blocks: int,
    lora: RoutedFFNLoRA | None = None,
    activation: Activation = "gelu",
    implementation: Implementation | None = None,
) -> Float[Array, "T D"]:
    """`routed_ffn` for the few tokens of a decoding step, on weights that are not cut into blocks.

    Block g is the g-th run of F / G hidden units. Of weights and second LoRA factors only the
    blocks that some token chose are read, straight from where they lie; each of them is computed
    for all tokens. LoRA stays factored. Products accumulate in float32. Not differentiated.

    Args:
      x: Tokens, `[T, D]`.
      block_index: The blocks of each token, `[T, A]`, distinct for each token and in `[0, G)`.
      coefficients: Weight of each chosen block, `[T, A]`, any floating type.
      weights: Any floating type: `w_in` and `w_gate` `[D, F]`, `b_in` and `b_gate` `[F]`, `w_out`
        `[F, D]`, `b_out` `[D]`.
      num_blocks: Blocks G, a divisor of F.
      lora: Any floating type: `b_in` and `b_gate` `[r, F]`, `a_out` `[F, r]`, the others as for
        `routed_ffn`.
      activation: "relu", "gelu" (exact), "gelu_tanh", "silu" or "identity".
      implementation: Name of an implementation, or None for the best supported one.

    Returns:
      `[T, D]`, of the type of `x`.

    Raises:
      ValueError: Shapes, types or names do not fit.
      NotImplementedError: The named implementation does not exist for this op.
    """
    blocks, factors = jax.eval_shape(
        functools.partial(split_blocks, num_blocks=num_blocks), weights, lora
    )
    _check("routed_ffn_decode", x, block_index, blocks, factors, activation, dtype=None)
    if implementation in ("mosaic", "triton"):
        raise NotImplementedError(
            "routed_ffn_decode: a few tokens are bound by memory, which leaves a kernel of "
            f"implementation {implementation!r} nothing to gain. Take 'xla', or None."
        )
    run = resolve("routed_ffn_decode", implementation, _DECODE)
    return run(x, block_index, coefficients, weights, lora, activation, num_blocks)


def _check(
    op: str,
    x: Array,
    block_index: Array,
    weights: RoutedFFNWeights,
    lora: RoutedFFNLoRA | None,
    activation: Activation,
    *,
    dtype: DTypeLike | None,
) -> None:
    activation_function(activation)
    match_parameters(op, weights, lora, dtype=dtype, D=x.shape[1])
    blocks, active = weights.w_in.shape[0], block_index.shape[1]
    if not 1 <= active <= blocks:
        raise ValueError(
            f"{op}: block_index chooses {active} blocks a token; w_in has {blocks} blocks, "
            f"so choose 1 to {blocks}."
        )
    if not isinstance(block_index, jax.core.Tracer):
        _check_index(op, np.asarray(block_index), blocks)


def _check_index(op: str, block_index: np.ndarray, blocks: int) -> None:
    if block_index.size and not 0 <= block_index.min() <= block_index.max() < blocks:
        raise ValueError(
            f"{op}: block_index runs from {block_index.min()} to {block_index.max()}; "
            f"expected 0 to {blocks - 1}."
        )
    ordered = np.sort(block_index, axis=1)
    repeated = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
    if repeated.any():
        token = int(repeated.argmax())
        raise ValueError(
            f"{op}: token {token} chooses blocks {block_index[token].tolist()}; the blocks "
            "of a token must be distinct."
        )
