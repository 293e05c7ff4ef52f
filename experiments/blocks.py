"""One decoder block, made of the product's layers, as full fine-tuning, LoRA and SPT train it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels import Activation
from spt_jax.config import LoRAConfig, RoutedFFNConfig, SparseAttentionConfig
from spt_jax.layers import (
    ADAPTER,
    Attention,
    AuxLosses,
    FeedForward,
    Linear,
    LoRA,
    RoutedFFN,
    SparseAttention,
)

BlockMethod = Literal["full", "lora", "spt"]
DenseAttention = Literal["cudnn", "xla"]

#: How `x (W + A B)` is computed. "merged" and "factored" are those of `spt_jax.layers.lora_dot`.
#: "skinny" is `x W + (x A) B` with every product in the type of x; "skinny_float32" takes the
#: two skinny ones in float32, the type in which PEFT and this library keep the factors.
LoRAForm = Literal["merged", "factored", "skinny", "skinny_float32"]


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """Sizes and style of a pre-norm decoder block.

    Attributes:
      width: model width D.
      heads: query heads N.
      kv_heads: key/value heads K.
      hidden: hidden units F.
      activation: the FFN's activation.
      llama: RMSNorm, a gated FFN and no biases; else LayerNorm, a plain FFN and biases.
    """

    width: int
    heads: int
    kv_heads: int
    hidden: int
    activation: Activation
    llama: bool = False

    def __str__(self) -> str:
        return f"D={self.width} N={self.heads} K={self.kv_heads} F={self.hidden}"


OPT_2048 = BlockShape(width=2048, heads=32, kv_heads=32, hidden=8192, activation="relu")
LLAMA_4096 = BlockShape(
    width=4096, heads=32, kv_heads=8, hidden=11008, activation="silu", llama=True
)


class FlashAttention(nnx.Module):
    """Dense causal attention by cuDNN's kernel, in the place of a layer's sparse attention."""

    def __init__(self, implementation: DenseAttention) -> None:
        self.implementation: DenseAttention = implementation

    def __call__(
        self,
        q: Float[Array, "B S N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        **masks: None,
    ) -> tuple[Float[Array, "B S N H"], AuxLosses]:
        """Attention output, and no auxiliary losses."""
        if any(mask is not None for mask in masks.values()):
            raise NotImplementedError("this baseline knows no masks but the causal one")
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation=self.implementation
        ), {}


class SkinnyLinear(Linear):
    """Linear map whose LoRA factors are applied as two skinny products beside the dense one.

    Args:
        linear: map whose variables are taken over.
        dtype: type of the skinny products.
    """

    def __init__(self, linear: Linear, dtype: Any) -> None:
        self.kernel, self.bias, self.dtype = linear.kernel, nnx.data(linear.bias), linear.dtype
        self.lora = nnx.data(linear.lora)
        self.skinny_dtype = dtype

    def __call__(
        self, x: Float[Array, "... in"], *, dropout_key: jax.Array | None = None
    ) -> Float[Array, "... out"]:
        """Apply the map."""
        assert self.lora is not None
        a, b = (f.astype(self.skinny_dtype) for f in self.lora.factors(dropout_key))
        y = x @ self.kernel[...] + x.astype(self.skinny_dtype) @ a @ b
        return (y if self.bias is None else y + self.bias[...]).astype(self.dtype)


class DecoderBlock(nnx.Module):
    """`x + attention(norm(x))`, then `x + ffn(norm(x))`.

    Args:
      shape: sizes and style.
      dtype: compute dtype and that of the weights.
      rngs: source of the initial values.
    """

    def __init__(self, shape: BlockShape, *, dtype: Any, rngs: nnx.Rngs) -> None:
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        norm: Any = nnx.RMSNorm if shape.llama else nnx.LayerNorm
        self.attention_norm = norm(shape.width, **options)
        self.attention = Attention(
            shape.width,
            shape.heads,
            num_kv_heads=shape.kv_heads,
            causal=True,
            use_bias=not shape.llama,
            **options,
        )
        self.ffn_norm = norm(shape.width, **options)
        self.ffn: FeedForward | RoutedFFN = FeedForward(
            shape.width,
            shape.hidden,
            activation=shape.activation,
            gated=shape.llama,
            use_bias=not shape.llama,
            **options,
        )

    def __call__(self, x: Float[Array, "B S D"]) -> tuple[Float[Array, "B S D"], AuxLosses]:
        """Output and auxiliary losses."""
        y, attention_aux = self.attention(self.attention_norm(x))
        x = x + y
        y, ffn_aux = self.ffn(self.ffn_norm(x))
        return x + y, attention_aux | ffn_aux


@dataclass(frozen=True, kw_only=True)
class BlockStep:
    """A training step of one block.

    Attributes:
      shape: the block.
      batch: sequences.
      length: their tokens.
      method: "full" trains the weights, "lora" and "spt" the adapter; all pass a gradient to x.
      lora_form: how products with LoRA factors are taken; None for the library's choice.
      attention: sparse attention of SPT.
      ffn: routed FFN of SPT.
      dense_attention: implementation of dense attention: "cudnn", or "xla" where there is no GPU.
      dtype: of activations and frozen weights; what an adapter trains is float32.
    """

    shape: BlockShape
    batch: int
    length: int
    method: BlockMethod
    lora_form: LoRAForm | None = None
    attention: SparseAttentionConfig = field(default_factory=SparseAttentionConfig)
    ffn: RoutedFFNConfig = field(default_factory=RoutedFFNConfig)
    dense_attention: DenseAttention = "cudnn"
    dtype: Any = jnp.bfloat16

    def model(self, key: jax.Array) -> DecoderBlock:
        """The block with random weights, codebooks and routers: time depends on shapes alone."""
        rngs = nnx.Rngs(params=key)
        block = DecoderBlock(self.shape, dtype=self.dtype, rngs=rngs)
        if self.method != "full":
            self._add_lora(block, rngs)
        if self.method == "spt":
            self._sparsify(block, rngs)
        else:
            block.attention.sparse = cast(Any, FlashAttention(self.dense_attention))
        return block

    def _add_lora(self, block: DecoderBlock, rngs: nnx.Rngs) -> None:
        owners: dict[nnx.Module, tuple[str, ...]] = {
            block.attention: ("q_proj", "k_proj", "v_proj", "o_proj"),
            block.ffn: ("up", "gate", "down") if self.shape.llama else ("up", "down"),
        }
        for owner, names in owners.items():
            for name in names:
                linear = getattr(owner, name)
                linear.lora = LoRA(*linear.kernel.shape, config=LoRAConfig(), rngs=rngs)
                if self.lora_form in ("skinny", "skinny_float32"):
                    wide = self.lora_form == "skinny_float32"
                    linear = SkinnyLinear(linear, jnp.float32 if wide else self.dtype)
                    setattr(owner, name, linear)
                else:
                    linear.lora_form = self.lora_form

    def _sparsify(self, block: DecoderBlock, rngs: nnx.Rngs) -> None:
        attention, config = block.attention, self.attention
        heads, width = attention.num_kv_heads, attention.head_width
        books = (heads, width // config.codeword_width, config.num_codewords, config.codeword_width)
        attention.sparse = SparseAttention(
            jax.random.normal(rngs.params(), books),
            jax.random.normal(rngs.params(), books),
            jnp.zeros((heads, width)),
            config=config,
            causal=True,
        )
        router = (self.shape.width, self.ffn.num_blocks)
        block.ffn = RoutedFFN(
            cast(FeedForward, block.ffn),
            permutation=jnp.arange(self.shape.hidden),
            router_kernel=jax.random.normal(rngs.params(), router) * router[0] ** -0.5,
            router_bias=jnp.zeros(router[1]),
            absent_output=jnp.zeros(router[::-1]),
            config=self.ffn,
        )

    def _split(self, block: DecoderBlock) -> tuple[Any, nnx.State, nnx.State]:
        trained = nnx.Param if self.method == "full" else ADAPTER
        graphdef, chosen, rest = nnx.split(block, trained, ...)  # type: ignore[misc]
        return graphdef, chosen, rest

    def arguments(self, key: jax.Array) -> tuple[Any, Any]:
        """What the step differentiates, `(parameters, x)`, and what it does not."""
        model_key, x_key = jax.random.split(key)
        _, trained, frozen = self._split(self.model(model_key))
        size = (self.batch, self.length, self.shape.width)
        return (trained, jax.random.normal(x_key, size, self.dtype)), frozen

    def run(self, trained: Any, frozen: Any) -> tuple[Float[Array, "B S D"], AuxLosses]:
        """The block's output and auxiliary losses."""
        graphdef = self._split(nnx.eval_shape(lambda: self.model(jax.random.key(0))))[0]
        parameters, x = trained
        return nnx.merge(graphdef, parameters, frozen)(x)

    def operations(self) -> tuple[float, float]:
        """Floating-point operations of the products: forward, and forward with backward."""
        shape, tokens = self.shape, self.batch * self.length
        head_width = shape.width // shape.heads
        weights = 2 * shape.width * (shape.heads + shape.kv_heads) * head_width
        ffn = (3.0 if shape.llama else 2.0) * shape.width * shape.hidden
        kept = self.length
        if self.method == "spt":
            ffn *= self.ffn.density
            kept = self.attention.num_keys(self.length)
        dense = 2.0 * tokens * (weights + ffn)
        attention = attention_operations(self.batch, self.length, shape.heads, head_width, kept)
        backward = 2 * dense if self.method == "full" else dense
        return dense + attention, dense + backward + 3.5 * attention


def attention_operations(batch: int, length: int, heads: int, width: int, kept: int) -> float:
    """Floating-point operations of causal attention, forward; backward takes 2.5 times as many.

    Args:
      batch: sequences.
      length: their tokens.
      heads: query heads.
      width: of a head.
      kept: keys that a query attends to, or all before it where there are fewer.
    """
    pairs = kept * (kept + 1) // 2 + (length - kept) * kept
    return 4.0 * batch * heads * width * pairs
