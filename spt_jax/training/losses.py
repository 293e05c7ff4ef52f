"""Task losses: weighted sums and the weights they stand on, both float32 scalars."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

Batch = Mapping[str, Any]  # of arrays
Loss = Callable[[Array, Array, Array], tuple[Array, Array]]


def cross_entropy(
    logits: Float[Array, "*B C"], labels: Int[Array, "*B"], weights: Float[Array, "*B"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`sum w (logsumexp(z) - z[label])` in float32, and `sum w`.

    Args:
        logits: scores of the C classes, any float dtype.
        labels: class indices.
        weights: weight of each example (or token); 0 leaves it out.

    Example:
        >>> loss, weight = cross_entropy(jnp.zeros((2, 4)), jnp.array([0, 3]), jnp.ones(2))
        >>> round(float(loss / weight), 4)
        1.3863
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
    return _weighted(losses, weights)


def mean_squared_error(
    outputs: Float[Array, "*B 1"], labels: Float[Array, "*B"], weights: Float[Array, "*B"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`sum w (z - label)**2` in float32, and `sum w`."""
    return _weighted(jnp.square(outputs[..., 0].astype(jnp.float32) - labels), weights)


def _weighted(
    losses: Float[Array, "*B"], weights: Float[Array, "*B"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    # where, not a product alone: an excluded example may be anything, infinities included
    return jnp.sum(jnp.where(weights > 0, losses * weights, 0)), jnp.sum(weights)
