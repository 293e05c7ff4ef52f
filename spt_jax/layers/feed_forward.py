"""Position-wise FFN: dense, or routed over blocks of hidden units."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import (
    Activation,
    RoutedFFNLoRA,
    RoutedFFNWeights,
    activation_function,
    routed_ffn,
    routed_ffn_decode,
)
from pallas_kernels.arguments import checked
from spt_jax import sharding
from spt_jax.config import Form, RoutedFFNConfig
from spt_jax.layers.attention import AuxLosses
from spt_jax.layers.linear import Linear, split_key
from spt_jax.layers.lora import dense_dot, lora_dot
from spt_jax.layers.recording import probed, record
from spt_jax.layers.rematerialization import choice, recomputed
from spt_jax.layers.variables import CalibrationStat, RouterParam
from spt_jax.processes import to_host


class FeedForward(nnx.Module):
    """`down(act(up(x)))`, or gated `down(act(gate(x)) * up(x))`.

    Args:
        width: model width D.
        hidden: hidden units F.
        activation: "relu", "gelu" (exact), "gelu_tanh", "silu" or "identity".
        gated: whether there is a gate.
        use_bias: whether the linear maps have biases.
        dtype: compute dtype.
        param_dtype: dtype of the weights.
        rngs: source of the initial values.

    Raises:
        ValueError: there is no such activation, or a size is below 1.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: Activation = "gelu",
        gated: bool = False,
        use_bias: bool = True,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        activation_function(activation)  # which refuses unknown ones
        options: dict[str, Any] = {
            "use_bias": use_bias,
            "dtype": dtype,
            "param_dtype": param_dtype,
            "rngs": rngs,
        }
        self.up = Linear(width, hidden, cut="outputs", **options)
        self.gate: Linear | None = nnx.data(
            Linear(width, hidden, cut="outputs", **options) if gated else None
        )
        self.down = Linear(hidden, width, cut="inputs", **options)
        self.activation: Activation = activation

    @checked(D="self.up.in_features")
    def hidden(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
        """Hidden units' outputs, before the down projection."""
        return self._activated(*self._sums(x, None))

    @checked(D="self.up.in_features")
    def __call__(
        self,
        x: Float[Array, "B S D"],
        *,
        mask: Bool[Array, "B S"] | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Float[Array, "B S D"], AuxLosses]:
        """Apply the FFN. `mask` marks valid tokens; the dense FFN has no use for it."""
        del mask
        record(self, x=x)
        keys = split_key(dropout_key, 2)

        def output(*sums: jax.Array) -> jax.Array:
            hidden = sharding.constrain(
                self._activated(*sums), sharding.BATCH, None, sharding.TENSOR
            )
            return self.down(hidden, dropout_key=keys[1])

        y = probed(self, recomputed(output, *self._sums(x, keys[0])))
        return sharding.constrain(y, sharding.BATCH), {}

    @checked(D="self.up.in_features")
    def decode(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Apply the FFN to the few tokens of a decoding step."""
        return self.down(self.hidden(x))

    def _sums(
        self, x: Float[Array, "... D"], dropout_key: jax.Array | None
    ) -> tuple[Float[Array, "... F"], ...]:
        """What the activation is applied to, and before it, where there is a gate, its factor."""
        keys = split_key(dropout_key, 2)
        up = self.up(x, dropout_key=keys[0])
        return (up,) if self.gate is None else (up, self.gate(x, dropout_key=keys[1]))

    def _activated(self, *sums: Float[Array, "... F"]) -> Float[Array, "... F"]:
        *factors, last = sums
        hidden = activation_function(self.activation)(last)
        return hidden * factors[0] if factors else hidden


class RoutedFFN(nnx.Module):
    """FFN whose hidden units form G blocks, of which a token computes the A its router ranks first.

    `p = sigmoid(x Wr + br)`, `y = sum over active g of 2 p_g FFN_g(x) + bias` (Gui et al.,
    arXiv 2312.10365, section 4.2): at A = G and p = 1/2 exactly the dense FFN. To that, each block
    that is left out adds `x a_g b_g + c_g`, fitted to what the calibration tokens that left it out
    miss, and constant.

    Args:
        dense: FFN whose weights are taken over; its LoRA factors too.
        permutation: hidden unit `permutation[i]` of `dense` becomes unit i; consecutive runs of
            F / G units form the blocks, which become an axis of the weights: `[D, G, F / G]` and
            `[G, F / G, D]`.
        router_kernel: `[D, G]`.
        router_bias: `[G]`.
        absent_output: `[G, D]`, the constants c of blocks that are left out.
        absent_a: `[D, G, r]`, first factors of their linear maps; None for a rank of 0.
        absent_b: `[G, r, D]`, second factors; None likewise.
        config: number of blocks and of active ones, and the rank.

    Attributes:
        form: whether a token computes its active blocks ("sparse") or, as the dense FFN does, all
            hidden units, whatever the router says ("dense").

    Raises:
        ValueError: the hidden units do not split into blocks, shapes do not fit the FFN and the
            configuration, or the permutation is none.
    """

    @checked(F="dense.up.out_features", D="dense.up.in_features", G="config.num_blocks")
    def __init__(
        self,
        dense: FeedForward,
        *,
        permutation: Int[Array, "F"],
        router_kernel: Float[Array, "D G"],
        router_bias: Float[Array, "G"],
        absent_output: Float[Array, "G D"],
        absent_a: Float[Array, "D G r"] | None = None,
        absent_b: Float[Array, "G r D"] | None = None,
        config: RoutedFFNConfig,
    ) -> None:
        hidden, blocks = dense.up.out_features, config.num_blocks
        if hidden % blocks:
            raise ValueError(f"{hidden} hidden units do not split into num_blocks={blocks} blocks")
        rank = config.effective_absent_rank
        for name, factor in {"absent_a": absent_a, "absent_b": absent_b}.items():
            found = 0 if factor is None else factor.shape[-1 if name == "absent_a" else 1]
            if found != rank:
                raise ValueError(f"{name} has rank {found}, and the configuration asks for {rank}")
        order = jnp.asarray(permutation)
        check_permutation("RoutedFFN: permutation", order)
        self.up, self.gate, self.down = dense.up, nnx.data(dense.gate), dense.down
        self.permutation = CalibrationStat(order)
        units = order.reshape(blocks, -1)
        # Blocks get an axis of their own, so that devices can share the units of each of them.
        for linear in (self.up, self.gate):
            if linear is not None:
                linear.kernel.set_value(linear.kernel[...][:, units])
                if linear.bias is not None:
                    linear.bias.set_value(linear.bias[...][units])
                if linear.lora is not None:
                    linear.lora.b.set_value(linear.lora.b[...][:, units])
        self.down.kernel.set_value(self.down.kernel[...][units])
        if self.down.lora is not None:
            self.down.lora.a.set_value(self.down.lora.a[...][units])
        self.router_kernel = RouterParam(router_kernel)
        self.router_bias = RouterParam(router_bias)
        self.absent_output = CalibrationStat(absent_output)
        self.absent_a = nnx.data(None if absent_a is None else CalibrationStat(absent_a))
        self.absent_b = nnx.data(None if absent_b is None else CalibrationStat(absent_b))
        self.activation: Activation = dense.activation
        self.config = config
        self.form: Form = "sparse"

    @checked(D="self.up.in_features")
    def probabilities(self, x: Float[Array, "T D"]) -> Float[Array, "T G"]:
        """The router's `p`, in float32."""
        kernel = self.router_kernel[...]
        logits = jnp.dot(x.astype(jnp.float32), kernel, precision="highest")
        return jax.nn.sigmoid(logits + self.router_bias[...])

    @checked(D="self.up.in_features")
    def __call__(
        self,
        x: Float[Array, "B S D"],
        *,
        mask: Bool[Array, "B S"] | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Float[Array, "B S D"], AuxLosses]:
        """Apply the active blocks; aux holds the load-balancing loss where it has a weight."""
        record(self, x=x)
        rows = x.reshape(-1, x.shape[-1]).astype(self.up.dtype)
        rows = sharding.constrain(rows, sharding.BATCH)
        if self.form == "dense":
            y = self._dense(rows, dropout_key)
            return sharding.constrain(y.reshape(x.shape), sharding.BATCH), {}
        probabilities, index, coefficients = self.route(rows)
        weights, lora = self._weights(), self._lora(dropout_key)
        weights, lora = jax.tree.map(lambda array: array.astype(rows.dtype), (weights, lora))
        y = self._routed(rows, index, coefficients, *_blocks_first(weights, lora))
        y = y + self._absent(rows, index)
        aux: AuxLosses = {}
        if self.config.load_balance_weight > 0:
            valid = jnp.ones(rows.shape[0], bool) if mask is None else mask.reshape(-1)
            aux["load_balance_loss"] = self.config.load_balance_weight * _load_balance_loss(
                probabilities, index, valid
            )
        return sharding.constrain(y.reshape(x.shape), sharding.BATCH), aux

    @checked(D="self.up.in_features")
    def decode(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Apply the active blocks to the few tokens of a decoding step; reads only their weights.

        There is one kernel for that, whatever `config.implementation`, and it has no gradient.
        """
        rows = x.reshape(-1, x.shape[-1]).astype(self.up.dtype)
        if self.form == "dense":
            return self._dense(rows, None).reshape(x.shape)
        _, index, coefficients = self.route(rows)
        weights, lora = _whole(self._weights(), self._lora(None))
        y = routed_ffn_decode(
            rows,
            index,
            coefficients,
            weights,
            lora=lora,
            num_blocks=self.config.num_blocks,
            activation=self.activation,
        )
        return (y + self._absent(rows, index)).reshape(x.shape)

    def _dense(
        self, rows: Float[Array, "T D"], dropout_key: jax.Array | None
    ) -> Float[Array, "T D"]:
        """All hidden units."""
        weights, lora = _whole(self._weights(), self._lora(dropout_key))
        lora = lora or RoutedFFNLoRA()

        def apply(
            x: jax.Array,
            w: jax.Array,
            bias: jax.Array | None,
            a: jax.Array | None,
            b: jax.Array | None,
        ) -> jax.Array:
            w = w.astype(x.dtype)
            y = dense_dot(x, w) if a is None or b is None else lora_dot(x, w, a, b)
            return y if bias is None else y + bias.astype(x.dtype)

        act = activation_function(self.activation)
        hidden = apply(rows, weights.w_in, weights.b_in, lora.a_in, lora.b_in)
        if weights.w_gate is None:
            hidden = act(hidden)
        else:
            gate = apply(rows, weights.w_gate, weights.b_gate, lora.a_gate, lora.b_gate)
            hidden = act(gate) * hidden
        return apply(hidden, weights.w_out, weights.b_out, lora.a_out, lora.b_out)

    @checked(D="self.up.in_features")
    def route(
        self, rows: Float[Array, "T D"]
    ) -> tuple[Float[Array, "T G"], Int[Array, "T A"], Float[Array, "T A"]]:
        """Probabilities of all blocks; the active ones, and their coefficients."""
        probabilities = self.probabilities(rows)
        tokens = P(sharding.BATCH)

        def choose(p: jax.Array) -> tuple[jax.Array, jax.Array]:
            index = choice(jax.lax.top_k(p, self.config.active_blocks)[1])
            return jnp.take_along_axis(p, index, 1), index

        top, index = sharding.locally(choose, (tokens,), (tokens, tokens))(probabilities)
        return probabilities, index.astype(jnp.int32), (2 * top).astype(rows.dtype)

    @checked(D="self.up.in_features")
    def absent_outputs(self, x: Float[Array, "T D"]) -> Float[Array, "T G D"]:
        """What each block adds to a token's output where it is left out, in float32."""
        constants = self.absent_output[...]
        if self.absent_a is None or self.absent_b is None:
            return jnp.broadcast_to(constants, (x.shape[0], *constants.shape))
        inner = jnp.einsum("td,dgr->tgr", x.astype(jnp.float32), self.absent_a[...])
        return jnp.einsum("tgr,grd->tgd", inner, self.absent_b[...]) + constants

    def _absent(self, rows: Float[Array, "T D"], index: Int[Array, "T A"]) -> Float[Array, "T D"]:
        """Sum of what the blocks that a token leaves out add, in the type of `rows`."""
        absent = 1 - jax.nn.one_hot(index, self.config.num_blocks, dtype=jnp.float32).sum(1)
        # Not as a matrix product, which would store the sum before it is added.
        means = self.absent_output[...]
        shares = [absent[:, g, None] * means[g] for g in range(len(means))]
        total = functools.reduce(jnp.add, shares).astype(rows.dtype)
        if self.absent_a is None or self.absent_b is None:
            return total
        width, (a, b) = rows.shape[1], (self.absent_a[...], self.absent_b[...])
        inner = dense_dot(rows, a.reshape(width, -1).astype(rows.dtype))
        inner = sharding.constrain(inner, sharding.BATCH)
        inner *= jnp.repeat(absent, a.shape[-1], axis=1).astype(rows.dtype)
        return total + dense_dot(inner, b.reshape(-1, width).astype(rows.dtype))

    def _routed(
        self,
        rows: Float[Array, "T D"],
        index: Int[Array, "T A"],
        coefficients: Float[Array, "T A"],
        weights: RoutedFFNWeights,
        lora: RoutedFFNLoRA | None,
    ) -> Float[Array, "T D"]:
        """The active blocks; under a mesh, each device computes its tokens and its hidden units."""
        op = functools.partial(
            routed_ffn, activation=self.activation, implementation=self.config.implementation
        )
        tokens, units = sharding.BATCH, sharding.TENSOR
        b_out = weights.b_out
        of_weights = RoutedFFNWeights(
            w_in=P(None, None, units),
            b_in=P(None, units),
            w_gate=P(None, None, units),
            b_gate=P(None, units),
            w_out=P(None, units),
        )
        of_lora = RoutedFFNLoRA(
            a_in=P(),
            b_in=P(None, None, units),
            a_gate=P(),
            b_gate=P(None, None, units),
            a_out=P(None, units),
            b_out=P(),
        )
        weights = dataclasses.replace(weights, b_out=None)

        def run(*arrays: Any) -> jax.Array:
            *others, lora = arrays
            return sharding.sum_over(op(*others, lora=lora), units)

        y = sharding.locally(
            run,
            (P(tokens), P(tokens), P(tokens), of_weights, None if lora is None else of_lora),
            P(tokens),
        )(rows, index, coefficients, weights, lora)
        return y if b_out is None else y + b_out

    def _weights(self) -> RoutedFFNWeights:
        def parts(linear: Linear | None) -> tuple[jax.Array | None, jax.Array | None]:
            if linear is None:
                return None, None
            return linear.kernel[...], None if linear.bias is None else linear.bias[...]

        w_in, b_in = parts(self.up)
        w_gate, b_gate = parts(self.gate)
        w_out, b_out = parts(self.down)
        return RoutedFFNWeights(
            w_in=w_in, b_in=b_in, w_gate=w_gate, b_gate=b_gate, w_out=w_out, b_out=b_out
        )

    def _lora(self, dropout_key: jax.Array | None) -> RoutedFFNLoRA | None:
        linears = (self.up, self.gate, self.down)
        if all(linear is None or linear.lora is None for linear in linears):
            return None
        pairs = [
            (None, None) if linear is None or linear.lora is None else linear.lora.factors(key)
            for linear, key in zip(linears, split_key(dropout_key, 3), strict=True)
        ]
        (a_in, b_in), (a_gate, b_gate), (a_out, b_out) = pairs
        return RoutedFFNLoRA(
            a_in=a_in, b_in=b_in, a_gate=a_gate, b_gate=b_gate, a_out=a_out, b_out=b_out
        )


def check_permutation(name: str, order: Int[Array | np.ndarray, "F"]) -> None:
    """Raises a ValueError unless concrete integers are 0 to F - 1, each once."""
    if isinstance(order, jax.core.Tracer):
        return
    found = to_host(order) if isinstance(order, jax.Array) else order
    if (missing := np.setdiff1d(np.arange(len(order)), found)).size:
        raise ValueError(
            f"{name} must hold each of 0 to {len(order) - 1} once, and lacks {missing[0]}"
        )


def _blocks_first(
    weights: RoutedFFNWeights, lora: RoutedFFNLoRA | None
) -> tuple[RoutedFFNWeights, RoutedFFNLoRA | None]:
    """As `routed_ffn` takes them; `[D, G, Fb]` becomes `[G, D, Fb]`, which moves no data."""

    def first(array: jax.Array | None) -> jax.Array | None:
        return None if array is None else jnp.moveaxis(array, 1, 0)

    weights = dataclasses.replace(weights, w_in=first(weights.w_in), w_gate=first(weights.w_gate))
    if lora is not None:
        lora = dataclasses.replace(lora, b_in=first(lora.b_in), b_gate=first(lora.b_gate))
    return weights, lora


def _whole(
    weights: RoutedFFNWeights, lora: RoutedFFNLoRA | None
) -> tuple[RoutedFFNWeights, RoutedFFNLoRA | None]:
    """As `routed_ffn_decode` takes them, without an axis of blocks."""

    def columns(array: jax.Array | None) -> jax.Array | None:
        return None if array is None else array.reshape(*array.shape[:-2], -1)

    def rows(array: jax.Array | None) -> jax.Array | None:
        return None if array is None else array.reshape(-1, array.shape[-1])

    weights = dataclasses.replace(
        weights,
        w_in=columns(weights.w_in),
        b_in=columns(weights.b_in),
        w_gate=columns(weights.w_gate),
        b_gate=columns(weights.b_gate),
        w_out=rows(weights.w_out),
    )
    if lora is not None:
        lora = dataclasses.replace(
            lora, b_in=columns(lora.b_in), b_gate=columns(lora.b_gate), a_out=rows(lora.a_out)
        )
    return weights, lora


def _load_balance_loss(
    probabilities: Float[Array, "T G"], index: Int[Array, "T A"], valid: Bool[Array, "T"]
) -> Float[Array, ""]:
    """Switch Transformer's loss (Fedus et al., arXiv 2101.03961, eq. 4) times the valid tokens.

    It is 1 a token when every block is chosen equally often.
    """
    blocks, active = probabilities.shape[1], index.shape[1]
    count = jnp.maximum(valid.sum(), 1)
    chosen = jax.nn.one_hot(index, blocks, dtype=jnp.float32).sum(1) * valid[:, None]
    share = chosen.sum(0) / (count * active)
    normalised = probabilities / probabilities.sum(-1, keepdims=True)
    mean = (normalised * valid[:, None]).sum(0) / count
    return blocks * jnp.dot(share, mean) * count
