"""Multi-head attention: dense, or over the keys that product quantization selects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int, UInt8

from pallas_kernels import pq_encode, pq_select, scoring_codewords, sparse_attention
from spt_jax.config import SparseAttentionConfig
from spt_jax.layers.linear import Linear, split_key
from spt_jax.layers.quantizer import codebook_loss
from spt_jax.layers.recording import record
from spt_jax.layers.rotary import rotate
from spt_jax.layers.variables import CalibrationStat, CodebookParam

AuxLosses = dict[str, Float[Array, ""]]
RotaryAngles = tuple[Float[Array, "B S h"], Float[Array, "B S h"]]  # cosine, sine


def dense_attention(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    causal: bool = False,
    window: int | None = None,
    key_mask: Bool[Array, "B S"] | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
) -> Float[Array, "B S N H"]:
    """Softmax attention over all valid keys; a query without one gets zeros.

    With `window`, which needs `causal`, a query sees only the last `window` keys up to itself.
    """
    mask = None
    sides = None if window is None else (window - 1, 0)
    if key_mask is not None:
        mask = key_mask[:, None, None, :]
    if segment_ids is not None:
        same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        mask = same if mask is None else mask & same
    out = jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=causal, local_window_size=sides
    )
    if mask is None:
        return out
    if causal:
        reach = jnp.tri(q.shape[1], dtype=bool)
        if window is not None:
            reach &= ~jnp.tri(q.shape[1], k=-window, dtype=bool)
        mask = mask & reach
    return jnp.where(mask.any(-1)[:, 0, :, None, None], out, 0)


class SparseAttention(nnx.Module):
    """Attention of each query over the keys whose codes score best for it.

    Keys are centred by their mean on the calibration batch before they are encoded: softmax does
    not see a shift common to all keys, so no codeword should be spent on it.

    Args:
        query_codebooks: `[K, M, E, C]`; None shares the key codebooks, as `match_count` needs.
        key_codebooks: `[K, M, E, C]`.
        key_center: `[K, H]`, subtracted from keys before encoding.
        config: density, granularity and rule.
        causal: whether a query sees only itself and earlier keys.
    """

    def __init__(
        self,
        query_codebooks: Float[Array, "K M E C"] | None,
        key_codebooks: Float[Array, "K M E C"],
        key_center: Float[Array, "K H"],
        *,
        config: SparseAttentionConfig,
        causal: bool,
    ) -> None:
        self.query_codebooks = nnx.data(
            None if query_codebooks is None else CodebookParam(query_codebooks)
        )
        self.key_codebooks = CodebookParam(key_codebooks)
        self.key_center = CalibrationStat(key_center)
        self.config = config
        self.causal = causal

    def __call__(
        self,
        q: Float[Array, "B S N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        *,
        key_mask: Bool[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
    ) -> tuple[Float[Array, "B S N H"], AuxLosses]:
        """Attention output, and the codebook loss summed over valid tokens."""
        config, length = self.config, q.shape[1]
        num_keys = config.num_keys(length)
        masks: dict[str, Any] = {
            "causal": self.causal,
            "key_mask": key_mask,
            "segment_ids": segment_ids,
        }
        if num_keys >= length:
            return dense_attention(q, k, v, **masks), {}
        key_codebooks = self.key_codebooks[...]
        own = self.query_codebooks
        query_codebooks = key_codebooks if own is None else own[...]
        queries = jax.lax.stop_gradient(q)
        keys = jax.lax.stop_gradient(k) - self.key_center[...].astype(k.dtype)
        frozen = jax.lax.stop_gradient((query_codebooks, key_codebooks))
        query_codes = pq_encode(queries, frozen[0], implementation=config.implementation)
        key_codes = pq_encode(keys, frozen[1], implementation=config.implementation)
        selection = pq_select(
            query_codes,
            key_codes,
            *scoring_codewords(*frozen, config.rule),
            num_keys=num_keys,
            granularity=config.granularity_at(length),
            block_q=config.block_q,
            key_group=config.key_group,
            implementation=config.implementation,
            **masks,
        )
        out = sparse_attention(q, k, v, selection, implementation=config.implementation, **masks)
        aux = {}
        if config.codebook_loss_weight > 0:
            losses = [
                _sampled_codebook_loss(x, codebooks, codes, key_mask, config.codebook_loss_tokens)
                for x, codebooks, codes in (
                    (queries, query_codebooks, query_codes),
                    (keys, key_codebooks, key_codes),
                )
            ]
            aux["codebook_loss"] = config.codebook_loss_weight * (losses[0] + losses[1])
        return out, aux


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
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        if num_heads % self.num_kv_heads:
            raise ValueError(
                f"{num_heads} query heads cannot be shared evenly by {self.num_kv_heads} "
                "key/value heads"
            )
        if head_width is None and width % num_heads:
            raise ValueError(f"width {width} does not split into {num_heads} heads")
        self.head_width = head_width or width // num_heads
        if window is not None and not causal:
            raise ValueError(f"a window of {window} keys needs causal attention")
        self.causal = causal
        self.window = window
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        kv_width = self.num_kv_heads * self.head_width
        output_bias = use_bias if output_bias is None else output_bias
        self.q_proj = Linear(width, num_heads * self.head_width, use_bias=use_bias, **options)
        self.k_proj = Linear(width, kv_width, use_bias=use_bias, **options)
        self.v_proj = Linear(width, kv_width, use_bias=use_bias, **options)
        self.o_proj = Linear(num_heads * self.head_width, width, use_bias=output_bias, **options)

        def head_norm() -> nnx.RMSNorm | None:
            if qk_norm_epsilon is None:
                return None
            return nnx.RMSNorm(self.head_width, epsilon=qk_norm_epsilon, **options)

        self.q_norm: nnx.RMSNorm | None = nnx.data(head_norm())
        self.k_norm: nnx.RMSNorm | None = nnx.data(head_norm())
        self.sparse: SparseAttention | None = nnx.data(None)

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
            NotImplementedError: sparse attention is to reach past the window.
        """
        keys = split_key(dropout_key, 4)
        q, k, v = self._project(x, rotary, keys)
        record(self, q=q, k=k)
        masks: dict[str, Any] = {"key_mask": key_mask, "segment_ids": segment_ids}
        aux: AuxLosses = {}
        if self.sparse is None:
            out = dense_attention(q, k, v, causal=self.causal, window=self.window, **masks)
        elif self.window is not None and x.shape[1] > self.window:
            raise NotImplementedError(
                f"sparse attention does not know the model's window of {self.window} keys: give "
                f"sequences of at most {self.window} tokens, got {x.shape[1]}, or adapt the model "
                "with attention=None"
            )
        else:
            out, aux = self.sparse(q, k, v, **masks)
        return self.o_proj(out.reshape(*x.shape[:2], -1), dropout_key=keys[3]), aux

    def _project(
        self,
        x: Float[Array, "B S D"],
        rotary: RotaryAngles | None,
        keys: Sequence[jax.Array | None],
    ) -> tuple[Float[Array, "B S N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        def heads(projection: Linear, number: int, key: jax.Array | None) -> jax.Array:
            y = projection(x, dropout_key=key)
            return y.reshape(*x.shape[:2], number, self.head_width)

        q = heads(self.q_proj, self.num_heads, keys[0])
        k = heads(self.k_proj, self.num_kv_heads, keys[1])
        v = heads(self.v_proj, self.num_kv_heads, keys[2])
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        return q, k, v
