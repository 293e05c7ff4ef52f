"""Multi-head attention: dense, or over the keys that product quantization selects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Int8, UInt8

from pallas_kernels import (
    Selection,
    TileSelection,
    pq_encode,
    pq_select,
    score_unit,
    scoring_codewords,
    sparse_attention,
    sparse_decode,
)
from pallas_kernels.arguments import at_least_one, checked, match
from pallas_kernels.pq.api import check_codebooks
from spt_jax import sharding
from spt_jax.config import Form, SparseAttentionConfig
from spt_jax.layers.dense import (
    DenseImplementation,
    check_heads,
    check_window,
    dense_attention,
    dense_decode,
)
from spt_jax.layers.linear import Linear, split_key
from spt_jax.layers.quantizer import codebook_loss
from spt_jax.layers.recording import probed, record
from spt_jax.layers.rematerialization import choice, recomputed
from spt_jax.layers.rotary import rotate
from spt_jax.layers.variables import CalibrationStat, CodebookParam

AuxLosses = dict[str, Float[Array, ""]]
"""Auxiliary losses by name, each times its weight and summed over valid tokens."""

RotaryAngles = tuple[Float[Array, "B S h"], Float[Array, "B S h"]]
"""Cosine and sine of each position's angles, h = H / 2."""


class KeyCodes(NamedTuple):
    """What sparse attention keeps of the keys seen so far, and what it scores them by.

    Attributes:
        codes: uint8 `[B, K, M, S]`.
        query_codewords: int8 `[K, M, E, W]`, of `scoring_codewords`.
        key_codewords: int8 `[K, M, E, W]`.
    """

    codes: jax.Array
    query_codewords: jax.Array
    key_codewords: jax.Array


class KeyValueCache(NamedTuple):
    """Keys and values of one attention layer, with room for S tokens.

    Attributes:
        keys: `[B, K, S, H]`, rotated.
        values: `[B, K, S, H]`.
        codes: of the keys; None where all keys are attended to.
    """

    keys: jax.Array
    values: jax.Array
    codes: KeyCodes | None


class SparseAttention(nnx.Module):
    """Attention of each query over the keys whose codes score best for it.

    Keys are centred by their mean on the calibration batch before they are encoded: softmax does
    not see a shift common to all keys, so no codeword should be spent on it.

    Args:
        query_codebooks: `[K, M, E, C]`; None with `match_count`, which shares the key codebooks.
            Codebooks train where they have a loss, and are constants otherwise.
        key_codebooks: `[K, M, E, C]`.
        key_center: `[K, H]`, subtracted from keys before encoding.
        config: density, granularity and rule.
        causal: whether a query sees only itself and earlier keys.

    Attributes:
        strict: whether no token may have an influence on what an earlier one attends to; at first
            `config.strict`. It matters for causal attention by tile.
        form: whether only selected keys are attended to ("sparse") or all of them ("dense").

    Raises:
        ValueError: codebooks and center do not fit each other, or the configuration.
    """

    @checked(E="config.num_codewords", C="config.codeword_width")
    def __init__(
        self,
        query_codebooks: Float[Array, "K M E C"] | None,
        key_codebooks: Float[Array, "K M E C"],
        key_center: Float[Array, "K H"],
        *,
        config: SparseAttentionConfig,
        causal: bool,
    ) -> None:
        check_codebooks("SparseAttention", key_codebooks, *key_center.shape)
        if (query_codebooks is None) != (config.rule == "match_count"):
            raise ValueError(
                "SparseAttention: query_codebooks must be None with the rule match_count, and "
                f"given with inner_product; the rule is {config.rule}"
            )
        kind = CodebookParam if config.codebook_loss_weight > 0 else CalibrationStat
        self.query_codebooks = nnx.data(None if query_codebooks is None else kind(query_codebooks))
        self.key_codebooks = kind(key_codebooks)
        self.key_center = CalibrationStat(key_center)
        self.config = config
        self.causal = causal
        self.strict = config.strict
        self.form: Form = "sparse"

    def granularity_at(self, length: int) -> Literal["token", "tile", "dense"]:
        """The rule for a sequence of `length` positions."""
        if self.form == "dense":
            return "dense"
        return self.config.granularity_at(length, strict=self.strict and self.causal)

    @checked()
    def __call__(
        self,
        q: Float[Array, "B S N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        *,
        key_mask: Bool[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
        capacity: int | None = None,
    ) -> tuple[Float[Array, "B S N H"], AuxLosses]:
        """Attention output and, where it has a weight, the codebook loss summed over valid tokens.

        Density and granularity are those of a sequence of `capacity` positions, by default S. Under
        a mesh, each device attends from its sequences and heads, and samples its own tokens for
        the codebook loss.

        Raises:
            ValueError: shapes or types do not fit together.
        """
        capacity, arrays = capacity or q.shape[1], (q, k, v, key_mask, segment_ids)
        if sharding.current() is None:
            return self._attend(*arrays, capacity=capacity)
        graphdef, state = nnx.split(self)

        def run(state: nnx.State, *arrays: Any) -> tuple[jax.Array, AuxLosses]:
            out, aux = nnx.merge(graphdef, state)._attend(*arrays, capacity=capacity)
            return out, {name: sharding.sum_over(loss, sharding.AXES) for name, loss in aux.items()}

        batch, heads = P(sharding.BATCH), P(sharding.BATCH, None, sharding.TENSOR)
        of_state = jax.tree.map(lambda _: P(sharding.TENSOR), state)
        specs = of_state, heads, heads, heads, batch, batch
        return sharding.locally(run, specs, (heads, P()))(state, *arrays)

    def _attend(
        self,
        q: Float[Array, "B S N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        key_mask: Bool[Array, "B S"] | None,
        segment_ids: Int[Array, "B S"] | None,
        *,
        capacity: int,
    ) -> tuple[Float[Array, "B S N H"], AuxLosses]:
        config, length = self.config, q.shape[1]
        num_keys, granularity = config.num_keys(capacity), self.granularity_at(capacity)
        masks: dict[str, Any] = {
            "causal": self.causal,
            "key_mask": key_mask,
            "segment_ids": segment_ids,
        }
        if granularity == "dense" or num_keys >= length:
            return dense_attention(q, k, v, **masks), {}
        codes = self.codes(q, k)
        selection = self._select(codes, num_keys=num_keys, granularity=granularity, **masks)
        if isinstance(selection, TileSelection):  # one by token is as large as queries and keys
            selection = choice(selection)
        out = sparse_attention(q, k, v, selection, implementation=config.implementation, **masks)
        aux = {}
        if config.codebook_loss_weight > 0:
            sides = jax.lax.stop_gradient((q, k - self.key_center[...].astype(k.dtype)))
            losses = [
                _sampled_codebook_loss(*side, key_mask, config.codebook_loss_tokens)
                for side in zip(sides, self._codebooks(), codes, strict=True)
            ]
            aux["codebook_loss"] = config.codebook_loss_weight * (losses[0] + losses[1])
        return out, aux

    def select(
        self,
        q: Float[Array, "B S N H"],
        k: Float[Array, "B S K H"],
        *,
        num_keys: int,
        granularity: Literal["token", "tile"],
        key_mask: Bool[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
    ) -> Selection:
        """The keys that each query keeps."""
        return self._select(
            self.codes(q, k),
            num_keys=num_keys,
            granularity=granularity,
            causal=self.causal,
            key_mask=key_mask,
            segment_ids=segment_ids,
        )

    def codes(
        self, q: Float[Array, "B S N H"], k: Float[Array, "B S K H"]
    ) -> tuple[UInt8[Array, "B S N M"], UInt8[Array, "B S K M"]]:
        """Codes of queries and keys."""
        of_queries, of_keys = self._encoders()
        implementation = self.config.implementation
        return (
            pq_encode(q, of_queries, implementation=implementation),
            pq_encode(k, of_keys, implementation=implementation),
        )

    def key_codes(self, k: Float[Array, "B S K H"]) -> UInt8[Array, "B K M S"]:
        """Codes of keys, in the layout of a cache."""
        codes = pq_encode(k, self._encoders()[1], implementation=self.config.implementation)
        return codes.transpose(0, 2, 3, 1)

    def scoring(self) -> tuple[Int8[Array, "K M E W"], Int8[Array, "K M E W"]]:
        """Query and key codewords by which codes are scored."""
        return scoring_codewords(*self._codebooks(), self.config.rule)

    def decode(
        self,
        q: Float[Array, "B N H"],
        cache: KeyValueCache,
        key_mask: Bool[Array, "B cache"],
    ) -> Float[Array, "B N H"]:
        """Attention of one query a sequence over a cache with codes."""
        assert cache.codes is not None
        query_codes = pq_encode(
            q[:, None], self._encoders()[0], implementation=self.config.implementation
        )
        return sparse_decode(
            q,
            cache.keys,
            cache.values,
            query_codes[:, 0],
            *cache.codes,
            num_keys=self.config.num_keys(key_mask.shape[1]),
            key_mask=key_mask,
        )

    def _select(
        self, codes: tuple[UInt8[Array, "B S N M"], UInt8[Array, "B S K M"]], **options: Any
    ) -> Selection:
        config, codebooks = self.config, self._codebooks()
        heads = config.heads_of_list(codes[0].shape[2], codes[1].shape[2])
        return pq_select(
            *codes,
            *scoring_codewords(*codebooks, config.rule),
            score_unit=score_unit(*codebooks, config.rule),
            block_q=config.block_q // heads,
            key_group=config.key_group,
            share_heads=heads > 1,
            implementation=config.implementation,
            **options,
        )

    def _codebooks(self) -> tuple[Float[Array, "K M E C"], Float[Array, "K M E C"]]:
        keys, queries = self.key_codebooks[...], self.query_codebooks
        return keys if queries is None else queries[...], keys

    def _encoders(self) -> tuple[Float[Array, "K M E C"], Float[Array, "K M E C"]]:
        """What queries and keys are compared with; it costs less to move the codewords than k."""
        of_queries, of_keys = self._codebooks()
        kv_heads, spaces, _, width = of_keys.shape
        return of_queries, of_keys + self.key_center[...].reshape(kv_heads, spaces, 1, width)


def _sampled_codebook_loss(
    x: Float[Array, "B S N H"],
    codebooks: Float[Array, "K M E C"],
    codes: UInt8[Array, "B S N M"],
    mask: Bool[Array, "B S"] | None,
    num_tokens: int,
) -> Float[Array, ""]:
    """Codebook loss of evenly spread tokens, scaled up to the sum over all valid ones."""
    batch, length = x.shape[:2]
    total = batch * length
    stride = max(1, total // num_tokens)
    strata = jnp.arange(total // stride)
    sample = strata * stride + strata % stride  # every offset in a stride has its turn
    valid = jnp.ones(total, bool) if mask is None else mask.reshape(total)
    flat = [a.reshape(1, total, *a.shape[2:])[:, sample] for a in (x, codes)]
    # Made again in the backward pass: distances to all codewords are larger than the sample.
    loss = jax.checkpoint(codebook_loss)(flat[0], codebooks, flat[1], valid[None, sample])
    return loss * valid.sum() / jnp.maximum(valid[sample].sum(), 1)


class Attention(nnx.Module):
    """Multi-head attention with query, key, value and output projections.

    Args:
        width: model width D.
        num_heads: query heads N.
        num_kv_heads: key/value heads K, a divisor of N; None for N.
        head_width: H; None for D / N.
        causal: whether a query sees only itself and earlier keys.
        window: keys that a query of causal attention sees, itself included; None for all.
        use_bias: whether the query, key and value projections have biases.
        output_bias: whether the output projection has one; None for `use_bias`.
        qk_norm_epsilon: epsilon of an RMSNorm of each query's and key's head; None for no norm.
        dtype: compute dtype.
        param_dtype: dtype of the projections.
        rngs: source of the initial values.

    Attributes:
        sparse: selects keys; None for attention to all.
        dense_implementation: of attention to all keys, as `dense_attention` takes it.

    Raises:
        ValueError: heads do not divide the width or cannot be shared, a size is below 1, or there
            is a window without causal attention.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_width: int | None = None,
        causal: bool = False,
        window: int | None = None,
        use_bias: bool = True,
        output_bias: bool | None = None,
        qk_norm_epsilon: float | None = None,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        at_least_one("Attention", width=width, num_heads=num_heads)
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_heads(num_heads, self.num_kv_heads)
        if head_width is None and width % num_heads:
            raise ValueError(f"width {width} does not split into {num_heads} heads")
        self.head_width = width // num_heads if head_width is None else head_width
        at_least_one("Attention", head_width=self.head_width)
        check_window(window, causal=causal)
        self.causal = causal
        self.window = window
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        kv_width = self.num_kv_heads * self.head_width
        output_bias = use_bias if output_bias is None else output_bias
        q_width = num_heads * self.head_width
        self.q_proj = Linear(width, q_width, use_bias=use_bias, cut="outputs", **options)
        self.k_proj = Linear(width, kv_width, use_bias=use_bias, cut="outputs", **options)
        self.v_proj = Linear(width, kv_width, use_bias=use_bias, cut="outputs", **options)
        self.o_proj = Linear(q_width, width, use_bias=output_bias, cut="inputs", **options)

        def head_norm() -> nnx.RMSNorm | None:
            if qk_norm_epsilon is None:
                return None
            return nnx.RMSNorm(self.head_width, epsilon=qk_norm_epsilon, **options)

        self.q_norm: nnx.RMSNorm | None = nnx.data(head_norm())
        self.k_norm: nnx.RMSNorm | None = nnx.data(head_norm())
        self.sparse: SparseAttention | None = nnx.data(None)
        self.dense_implementation: DenseImplementation | None = None

    @checked(D="self.q_proj.in_features")
    def __call__(
        self,
        x: Float[Array, "B S D"],
        *,
        key_mask: Bool[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
        rotary: RotaryAngles | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Float[Array, "B S D"], AuxLosses]:
        """Attend within each sequence.

        Args:
            x: inputs.
            key_mask: False where a key is padding.
            segment_ids: tokens see only tokens with their own id.
            rotary: angles by which queries and keys are rotated, from `rotary_angles`.
            dropout_key: draws this step's LoRA dropout; None leaves it out.

        Returns:
            The output, and auxiliary losses summed over valid tokens.

        Raises:
            ValueError: shapes or types do not fit together.
            NotImplementedError: sparse attention is to reach past the window.
        """
        keys = split_key(dropout_key, 4)
        q, k, v = self._project(x, rotary, keys)
        record(self, q=q, k=k, v=v)
        masks: dict[str, Any] = {"key_mask": key_mask, "segment_ids": segment_ids}
        out, aux = self._attend(q, k, v, x.shape[1], **masks)
        out = probed(self, out)
        out = sharding.constrain(out, sharding.BATCH, None, sharding.TENSOR)
        y = self.o_proj(out.reshape(*x.shape[:2], -1), dropout_key=keys[3])
        return sharding.constrain(y, sharding.BATCH), aux

    @checked(D="self.q_proj.in_features")
    def prefill(
        self,
        x: Float[Array, "B P D"],
        *,
        capacity: int,
        key_mask: Bool[Array, "B P"],
        rotary: RotaryAngles | None = None,
    ) -> tuple[Float[Array, "B P D"], KeyValueCache]:
        """Attend within prompts, and keep what later tokens need of them.

        Args:
            x: inputs.
            capacity: tokens S that the cache has room for, at least P. Sparse attention selects as
                in a sequence of that many.
            key_mask: False where a key is padding.
            rotary: as for `__call__`.

        Returns:
            The output, and the cache with the prompts at its start.

        Raises:
            ValueError: shapes or types do not fit together, or the prompts exceed the capacity.
            NotImplementedError: sparse attention is to reach past the window.
        """
        if capacity < x.shape[1]:
            raise ValueError(
                f"Attention.prefill: prompts of {x.shape[1]} tokens do not fit capacity={capacity}"
            )
        q, k, v = self._project(x, rotary, [None] * 4)
        out, _ = self._attend(q, k, v, capacity, key_mask=key_mask)
        room = capacity - x.shape[1]

        def cached(a: jax.Array) -> jax.Array:
            return jnp.pad(a.swapaxes(1, 2), ((0, 0), (0, 0), (0, room), (0, 0)))

        codes = None
        if self.sparse is not None and self.sparse.granularity_at(capacity) != "dense":
            of_prompt = self.sparse.key_codes(k)
            codes = KeyCodes(
                jnp.pad(of_prompt, ((0, 0), (0, 0), (0, 0), (0, room))), *self.sparse.scoring()
            )
        out = self.o_proj(out.reshape(*x.shape[:2], -1))
        return out, KeyValueCache(cached(k), cached(v), codes)

    @checked(D="self.q_proj.in_features")
    def decode(
        self,
        x: Float[Array, "B 1 D"],
        cache: KeyValueCache,
        *,
        index: Int[Array, ""],
        key_mask: Bool[Array, "B cache"],
        rotary: RotaryAngles | None = None,
    ) -> tuple[Float[Array, "B 1 D"], KeyValueCache]:
        """Attend from the next token of each sequence to those in the cache and to itself.

        Args:
            x: inputs.
            cache: what `prefill` and earlier calls returned.
            index: place of the token in the cache.
            key_mask: False where the cache holds padding, or nothing yet; True at `index`.
            rotary: as for `__call__`.

        Returns:
            The output, and the cache with the token in it.

        Raises:
            ValueError: shapes or types do not fit together.
        """
        kind, sizes = Float[Array, "B K S H"], {"K": self.num_kv_heads, "H": self.head_width}
        buffers = {"cache.keys": (cache.keys, kind), "cache.values": (cache.values, kind)}
        match("Attention.decode", buffers, B=len(x), S=key_mask.shape[1], **sizes)
        q, k, v = self._project(x, rotary, [None] * 4)

        def put(buffer: jax.Array, token: jax.Array, axis: int) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(buffer, token, index, axis)

        codes = cache.codes
        if codes is not None:
            assert self.sparse is not None
            codes = codes._replace(codes=put(codes.codes, self.sparse.key_codes(k), 3))
        cache = KeyValueCache(
            put(cache.keys, k.swapaxes(1, 2), 2), put(cache.values, v.swapaxes(1, 2), 2), codes
        )
        if codes is not None:
            assert self.sparse is not None
            out = self.sparse.decode(q[:, 0], cache, key_mask)
        else:
            if self.window is not None:
                key_mask &= jnp.arange(key_mask.shape[1]) > index - self.window
            out = dense_decode(q[:, 0], cache.keys, cache.values, key_mask)
        return self.o_proj(out.reshape(x.shape[0], 1, -1)), cache

    def _attend(
        self,
        q: Float[Array, "B S N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        capacity: int,
        **masks: Any,
    ) -> tuple[Float[Array, "B S N H"], AuxLosses]:
        if self.sparse is None or self.sparse.granularity_at(capacity) == "dense":
            out = dense_attention(
                q, k, v, causal=self.causal, window=self.window,
                implementation=self.dense_implementation, **masks,
            )  # fmt: skip
            return out, {}
        if self.window is not None and capacity > self.window:
            raise NotImplementedError(
                f"sparse attention does not know the model's window of {self.window} keys: give "
                f"sequences of at most {self.window} tokens, got {capacity}, or adapt the model "
                "with attention=None"
            )
        return self.sparse(q, k, v, capacity=capacity, **masks)

    def _project(
        self,
        x: Float[Array, "B S D"],
        rotary: RotaryAngles | None,
        keys: Sequence[jax.Array | None],
    ) -> tuple[Float[Array, "B S N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        def heads(projection: Linear, number: int, key: jax.Array | None) -> jax.Array:
            y = projection(x, dropout_key=key)
            y = y.reshape(*x.shape[:2], number, self.head_width)
            return sharding.constrain(y, sharding.BATCH, None, sharding.TENSOR)

        q = heads(self.q_proj, self.num_heads, keys[0])
        k = heads(self.k_proj, self.num_kv_heads, keys[1])
        v = heads(self.v_proj, self.num_kv_heads, keys[2])
        if self.q_norm is not None and self.k_norm is not None:
            q, k = recomputed(self.q_norm, q), recomputed(self.k_norm, k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        return q, k, v
