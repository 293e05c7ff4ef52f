"""LoRA factors, and the product of a batch with a weight that carries them."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.arguments import checked
from spt_jax.config import LoRAConfig
from spt_jax.layers.variables import LoRAParam

LoRAForm = Literal["merged", "factored"]


class LoRA(nnx.Module):
    """Two factors A `[in, r]` and B `[r, out]`, kept in float32.

    B starts at zero, so fresh factors change nothing. A starts uniform in +-1/sqrt(in).

    Args:
        in_features: rows of the weight that the factors adapt.
        out_features: its columns.
        config: rank, scaling and dropout.
        rngs: source of the initial values.
    """

    def __init__(
        self, in_features: int, out_features: int, *, config: LoRAConfig, rngs: nnx.Rngs
    ) -> None:
        bound = in_features**-0.5
        shape = (in_features, config.rank)
        self.a = LoRAParam(
            jax.random.uniform(rngs.params(), shape, jnp.float32, minval=-bound, maxval=bound)
        )
        self.b = LoRAParam(jnp.zeros((config.rank, out_features), jnp.float32))
        self.config = config

    def factors(
        self, dropout_key: jax.Array | None = None
    ) -> tuple[Float[Array, "*in r"], Float[Array, "r *out"]]:
        """A with this step's dropout, and B with the scaling folded in."""
        a, rate = self.a[...], self.config.dropout
        if dropout_key is not None and rate > 0:
            kept = jax.random.bernoulli(dropout_key, 1 - rate, (*a.shape[:-1], 1))
            a = jnp.where(kept, a / (1 - rate), 0)
        return a, self.b[...] * self.config.scaling


def cheaper_form(tokens: int, in_features: int, out_features: int) -> LoRAForm:
    """The form with fewer multiply-adds; both cost `tokens * in * out` for the weight itself.

    Forming W + A B takes `in * out * r`; two skinny products take `tokens * (in + out) * r`.
    """
    merged = in_features * out_features
    return "merged" if merged < tokens * (in_features + out_features) else "factored"


@checked()
def lora_dot(
    x: Float[Array, "... in"],
    w: Float[Array, "in out"],
    a: Float[Array, "in r"],
    b: Float[Array, "r out"],
    *,
    form: LoRAForm | None = None,
) -> Float[Array, "... out"]:
    """`x (w + a b)`, accumulated in float32 and returned in x's dtype.

    Neither form computes or stores a gradient of w's size for a and b: both take
    `da = x' (dy b')` and `db = (x a)' dy`.

    Args:
        x: inputs; all but the last axis are tokens.
        w: weight, in x's dtype.
        a: first factor, any float dtype.
        b: second factor, scaling included.
        form: "merged" (the sum formed once for all tokens), "factored" (two skinny products
            beside the dense one), or None for whichever needs fewer operations here; with weights
            of 16 bits always factored, since a sum rounded to them would lose small updates.

    Returns:
        The product, `[..., out]`.

    Raises:
        ValueError: shapes or types do not fit together.
    """
    rows = x.reshape(-1, x.shape[-1])
    if form is None:
        half = jnp.finfo(w.dtype).bits < 32
        form = "factored" if half else cheaper_form(rows.shape[0], *w.shape)
    return _product(form, rows, w, a, b).reshape(*x.shape[:-1], w.shape[-1])


_dot = partial(jnp.dot, preferred_element_type=jnp.float32)


@checked()
def dense_dot(x: Float[Array, "... in"], w: Float[Array, "in out"]) -> Float[Array, "... out"]:
    """`x w` of two arrays of one type, accumulated in float32 and returned in that type.

    Backward as forward, products take 16-bit operands where x and w have 16 bits: a float32 result,
    rounded afterwards, would have float32 cotangents, and GPUs would multiply in TF32.
    """
    return jnp.dot(x, w)


def _merge(w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return (w.astype(jnp.float32) + _dot(a, b)).astype(w.dtype)


def _products(
    form: LoRAForm, x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """`x (w + a b)`, and `x a` where it came about."""
    if form == "merged":
        return dense_dot(x, _merge(w, a, b)), None
    narrow = dense_dot(x, a.astype(x.dtype))
    # Rounded before they are added: a sum of float32 would be twice as large.
    return dense_dot(x, w) + dense_dot(narrow, b.astype(x.dtype)), narrow


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(form: LoRAForm, x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return _products(form, x, w, a, b)[0]


def _product_forward(
    form: LoRAForm, x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array
) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
    y, narrow = _products(form, x, w, a, b)
    return y, (x, w, a, b, narrow)


def _product_backward(form: LoRAForm, residuals: Any, dy: jax.Array) -> tuple[jax.Array, ...]:
    x, w, a, b, narrow = residuals
    if form == "merged":
        # Else XLA would keep the forward pass's sum, or form this one long before it is needed.
        w, a, b, dy = jax.lax.optimization_barrier((w, a, b, dy))
    dnarrow = dense_dot(dy, b.astype(dy.dtype).T)
    if form == "merged":
        narrow = dense_dot(x, a.astype(x.dtype))
        dx = dense_dot(dy, _merge(w, a, b).T)
    else:
        dx = dense_dot(dy, w.T) + dense_dot(dnarrow, a.astype(dy.dtype).T)
    da = _dot(x.T, dnarrow).astype(a.dtype)
    db = _dot(narrow.T, dy).astype(b.dtype)
    dw = dense_dot(x.T, dy)  # dropped by the compiler where w is frozen
    return dx, dw, da, db


_product.defvjp(_product_forward, _product_backward)
