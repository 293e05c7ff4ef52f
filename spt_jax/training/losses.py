"""Task losses: weighted sums and the weights they stand on, both float32 scalars."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Num

from spt_jax import sharding

Batch = Mapping[str, Any]  # of arrays
Loss = Callable[[Array, Array, Array], tuple[Array, Array]]

_CHUNK_BYTES = 64 << 20  # of float32 logits
_MIN_CHUNK_TOKENS = 128  # fewer make the products wait for the kernel to be read


def cross_entropy(
    logits: Float[Array, "*B C"], labels: Int[Array, "*B"], weights: Float[Array, "*B"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`sum w (logsumexp(z) - z[label])` in float32, and `sum w`.

    Args:
        logits: scores of the C classes, any float dtype.
        labels: class indices.
        weights: weight of each example (or token); 0 leaves it out.

    Raises:
        ValueError: labels are not integers, or not one for each row of logits.

    Example:
        >>> loss, weight = cross_entropy(jnp.zeros((2, 4)), jnp.array([0, 3]), jnp.ones(2))
        >>> round(float(loss / weight), 4)
        1.3863
    """
    if labels.shape != logits.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels are {labels.dtype} {labels.shape} beside logits {logits.shape}: cross_entropy "
            "takes one class number, an integer, for each row of logits; mean_squared_error takes "
            "scores"
        )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
    return _weighted(losses, weights)


def mean_squared_error(
    outputs: Float[Array, "*B 1"], labels: Float[Array, "*B"], weights: Float[Array, "*B"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`sum w (z - label)**2` in float32, and `sum w`.

    Raises:
        ValueError: there is not one output for each label.
    """
    if outputs.shape != (*labels.shape, 1):
        raise ValueError(
            f"outputs are {outputs.shape} beside labels {labels.shape}: mean_squared_error takes "
            "one output a label; load the model with num_labels=1"
        )
    return _weighted(jnp.square(outputs[..., 0].astype(jnp.float32) - labels), weights)


def binary_cross_entropy(
    logits: Float[Array, "*B C"], labels: Num[Array, "*B C"], weights: Float[Array, "*B"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`sum w mean_c (softplus(z_c) - y_c z_c)` in float32, and `sum w`, for several labels a row.

    Args:
        logits: scores of the C classes, any float dtype.
        labels: 1 where a row has the class, else 0.
        weights: weight of each row; 0 leaves it out.

    Raises:
        ValueError: there is not one label for each logit.

    Example:
        >>> loss, weight = binary_cross_entropy(jnp.zeros((2, 3)), jnp.eye(2, 3), jnp.ones(2))
        >>> round(float(loss / weight), 4)
        0.6931
    """
    if labels.shape != logits.shape:
        raise ValueError(
            f"labels are {labels.shape} beside logits {logits.shape}: binary_cross_entropy takes "
            "0 or 1 for each class; load the model with as many num_labels"
        )
    losses = optax.sigmoid_binary_cross_entropy(
        logits.astype(jnp.float32), labels.astype(jnp.float32)
    )
    return _weighted(losses.mean(-1), weights)


def _weighted(
    losses: Float[Array, "*B"], weights: Float[Array, "*B"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    # where, not a product alone: an excluded example may be anything, infinities included
    return jnp.sum(jnp.where(weights > 0, losses * weights, 0)), jnp.sum(weights)


def linear_cross_entropy(
    hidden: Float[Array, "*B D"],
    kernel: Float[Array, "D V"],
    labels: Int[Array, "*B"],
    weights: Float[Array, "*B"],
    *,
    chunk_tokens: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`cross_entropy(hidden @ kernel, labels, weights)` without all logits in memory at once.

    Tokens go through in chunks, those of weight 0 not at all. The gradient is computed along with
    the loss: one product a chunk for the loss, one for the gradient of `hidden` and one for that
    of `kernel`, the latter two only where they are asked for. Products are in the dtype of
    `hidden`, sums in float32. Second derivatives are not supported.

    Args:
        hidden: hidden states, any float dtype; where the weight is 0 they may be anything.
        kernel: output matrix of the V tokens.
        labels: token ids in 0..V-1 where the weight is not 0.
        weights: weight of each token; 0 leaves it out.
        chunk_tokens: tokens a chunk; None takes a power of 2 that makes 32 to 64 MiB of logits,
            at least 128.

    Returns:
        `sum w nll` and `sum w`, float32.

    Example:
        >>> hidden, kernel = jnp.ones((2, 3)), jnp.zeros((3, 4))
        >>> loss, weight = linear_cross_entropy(hidden, kernel, jnp.array([0, 3]), jnp.ones(2))
        >>> round(float(loss / weight), 4)
        1.3863
    """
    if chunk_tokens is None:
        fitting = _CHUNK_BYTES // (4 * kernel.shape[1])
        chunk_tokens = max(_MIN_CHUNK_TOKENS, 1 << max(fitting.bit_length() - 1, 0))
    elif chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    tokens = math.prod(labels.shape)
    axes = sharding.axes_of_rows(tokens)

    def run(hidden: Array, kernel: Array, labels: Array, weights: Array) -> tuple[Array, Array]:
        chunk = max(1, min(chunk_tokens, len(labels)))
        loss, weight = _linear_cross_entropy(chunk, hidden, kernel, labels, weights)
        return sharding.sum_over(loss, axes), sharding.sum_over(weight, axes)

    # Each device takes its own tokens, also along `tensor`, where all have the same.
    rows = P(axes)
    return sharding.locally(run, (rows, P(), rows, rows), (P(), P()))(
        sharding.constrain(hidden.reshape(tokens, hidden.shape[-1]), sharding.BATCH),
        kernel,
        labels.reshape(tokens),
        weights.reshape(tokens).astype(jnp.float32),
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_cross_entropy(
    chunk: int, hidden: Array, kernel: Array, labels: Array, weights: Array
) -> tuple[Array, Array]:
    losses, _, _ = _token_losses(chunk, hidden, kernel, labels, weights)
    return jnp.sum(losses * weights), jnp.sum(weights)


def _forward(
    chunk: int, hidden: Any, kernel: Any, labels: Any, weights: Any
) -> tuple[tuple[Array, Array], Any]:
    losses, d_hidden, d_kernel = _token_losses(
        chunk,
        hidden.value,
        kernel.value,
        labels.value,
        weights.value,
        with_d_hidden=hidden.perturbed,
        with_d_kernel=kernel.perturbed,
    )
    sums = jnp.sum(losses * weights.value), jnp.sum(weights.value)
    return sums, (losses, d_hidden, d_kernel)


def _backward(chunk: int, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    losses, d_hidden, d_kernel = residuals
    d_loss, d_weight = (
        jnp.zeros(c.shape, c.dtype) if isinstance(c, jax.custom_derivatives.SymbolicZero) else c
        for c in cotangents
    )

    def scaled(gradient: Array | None) -> Array | None:
        return None if gradient is None else (d_loss * gradient).astype(gradient.dtype)

    return scaled(d_hidden), scaled(d_kernel), None, d_loss * losses + d_weight


_linear_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _token_losses(
    chunk: int,
    hidden: Float[Array, "T D"],
    kernel: Float[Array, "D V"],
    labels: Int[Array, " T"],
    weights: Float[Array, " T"],
    *,
    with_d_hidden: bool = False,
    with_d_kernel: bool = False,
) -> tuple[Float[Array, " T"], Float[Array, "T D"] | None, Float[Array, "D V"] | None]:
    """Loss of each token, 0 at weight 0, and the gradients of the weighted sum of them."""
    tokens = len(labels)
    counted = weights > 0
    # row numbers of the tokens that count; then one past the end, where reads give 0
    order = jnp.flatnonzero(counted, size=-(-tokens // chunk) * chunk, fill_value=tokens)
    cast_kernel = kernel.astype(hidden.dtype)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def add_chunk(i: Array, carry: Any) -> Any:
        losses, d_hidden, d_kernel = carry
        rows = jax.lax.dynamic_slice_in_dim(order, i * chunk, chunk)
        read = partial(jnp.take, indices=rows, axis=0, mode="fill", fill_value=0)
        x, label, weight = read(hidden), read(labels), read(weights)
        logits = product("td,dv->tv", x, cast_kernel)
        log_sum = jax.nn.logsumexp(logits, axis=-1)
        loss = log_sum - jnp.take_along_axis(logits, label[:, None], axis=-1)[:, 0]
        losses = losses.at[rows].set(loss, mode="drop")
        if with_d_hidden or with_d_kernel:
            hit = label[:, None] == jnp.arange(logits.shape[1])
            d_logits = (jnp.exp(logits - log_sum[:, None]) - hit) * weight[:, None]
            d_logits = d_logits.astype(hidden.dtype)
        if with_d_hidden:
            d_x = product("tv,dv->td", d_logits, cast_kernel).astype(hidden.dtype)
            d_hidden = d_hidden.at[rows].set(d_x, mode="drop")
        if with_d_kernel:
            d_kernel = d_kernel + product("td,tv->dv", x, d_logits)
        return losses, d_hidden, d_kernel

    start = (
        jnp.zeros(tokens, jnp.float32),
        jnp.zeros(hidden.shape, hidden.dtype) if with_d_hidden else None,
        jnp.zeros(kernel.shape, jnp.float32) if with_d_kernel else None,
    )
    num_chunks = (jnp.sum(counted) + chunk - 1) // chunk
    losses, d_hidden, d_kernel = jax.lax.fori_loop(0, num_chunks, add_chunk, start)
    return losses, d_hidden, None if d_kernel is None else d_kernel.astype(kernel.dtype)
