"""Decoder layers of the product, as full fine-tuning, LoRA and SPT train them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from spt_jax import adapt
from spt_jax.config import RoutedFFNConfig, SparseAttentionConfig, SPTConfig
from spt_jax.layers import (
    ADAPTER,
    AuxLosses,
    Linear,
    RotaryAngles,
    RoutedFFN,
    SparseAttention,
    rotary_angles,
)
from spt_jax.models.common import rematerialized, sum_aux
from spt_jax.models.decoder import DecoderLayer
from spt_jax.models.decoder_config import DecoderConfig, parse_decoder_config

BlockMethod = Literal["full", "lora", "spt"]
DenseAttention = Literal["cudnn", "xla"]

#: How `x (W + A B)` is computed. "merged" and "factored" are those of `spt_jax.layers.lora_dot`.
#: "skinny" is `x W + (x A) B` with every product in the type of x; "skinny_float32" takes the
#: two skinny ones in float32, the type in which PEFT and this library keep the factors.
LoRAForm = Literal["merged", "factored", "skinny", "skinny_float32"]


def opt_config(*, width: int, heads: int, hidden: int, layers: int = 1) -> DecoderConfig:
    """Layers of OPT: LayerNorm, a plain FFN, biases."""
    return parse_decoder_config(
        {
            "model_type": "opt",
            "vocab_size": 1,
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "ffn_dim": hidden,
            "max_position_embeddings": 1,
        }
    )


def llama_config(
    *, width: int, heads: int, kv_heads: int, hidden: int, layers: int = 1
) -> DecoderConfig:
    """Layers of LLaMA: RMSNorm, a gated FFN, rotary embedding, no biases."""
    return parse_decoder_config(
        {
            "model_type": "llama",
            "vocab_size": 1,
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "intermediate_size": hidden,
            "max_position_embeddings": 1,
        }
    )


OPT_2048 = opt_config(width=2048, heads=32, hidden=8192)
LLAMA_4096 = llama_config(width=4096, heads=32, kv_heads=8, hidden=11008)


class FlashAttention(nnx.Module):
    """Dense causal attention by cuDNN's kernel, in the place of a layer's sparse attention."""

    def __init__(self, implementation: DenseAttention) -> None:
        self.implementation: DenseAttention = implementation

    def __call__(
        self,
        q: Float[Array, "B S N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        *,
        capacity: int,
        **masks: None,
    ) -> tuple[Float[Array, "B S N H"], AuxLosses]:
        """Attention output, and no auxiliary losses."""
        del capacity  # all keys are kept, however many
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


Layers = nnx.List[DecoderLayer]


@dataclass(frozen=True, kw_only=True)
class BlockStep:
    """A training step of decoder layers.

    Attributes:
      config: the layers' family, number and sizes.
      batch: sequences.
      length: their tokens.
      method: "full" trains the weights, "lora" and "spt" the adapter; all pass a gradient to x.
      lora_form: how products with LoRA factors are taken; None for the library's choice.
      attention: sparse attention of SPT.
      ffn: routed FFN of SPT.
      remat: whether a layer's activations are computed again in the backward pass.
      dense_attention: implementation of dense attention: "cudnn", or "xla" where there is no GPU.
      dtype: of activations and frozen weights; what an adapter trains is float32.
    """

    config: DecoderConfig
    batch: int
    length: int
    method: BlockMethod
    lora_form: LoRAForm | None = None
    attention: SparseAttentionConfig = field(default_factory=SparseAttentionConfig)
    ffn: RoutedFFNConfig = field(default_factory=RoutedFFNConfig)
    remat: bool = False
    dense_attention: DenseAttention = "cudnn"
    dtype: Any = jnp.bfloat16

    def __str__(self) -> str:
        config = self.config
        layers = f"{config.num_layers} layers " if config.num_layers > 1 else ""
        return (
            f"{layers}B={self.batch} S={self.length} D={config.width} N={config.num_heads} "
            f"K={config.num_kv_heads} F={config.hidden}"
        )

    def model(self, key: jax.Array) -> Layers:
        """Layers with random weights, codebooks and routers: time depends on shapes alone."""
        rngs = nnx.Rngs(params=key)
        options: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.dtype, "rngs": rngs}
        layers = nnx.List(
            [DecoderLayer(self.config, i, **options) for i in range(self.config.num_layers)]
        )
        if self.method != "full":
            adapt(layers, SPTConfig(attention=None, ffn=None), rngs=rngs)
            self._choose_lora_form(layers)
        for layer in layers:
            if self.method == "spt":
                self._sparsify(layer, rngs)
            else:
                layer.attention.sparse = cast(Any, FlashAttention(self.dense_attention))
        return layers

    def _choose_lora_form(self, layers: Layers) -> None:
        form = self.lora_form
        adapted = [
            (owner, name, linear)
            for _, owner in nnx.iter_modules(layers)
            for name, linear in vars(owner).items()
            if isinstance(linear, Linear)
        ]
        for owner, name, linear in adapted:
            if form == "skinny" or form == "skinny_float32":
                wide = form == "skinny_float32"
                setattr(owner, name, SkinnyLinear(linear, jnp.float32 if wide else self.dtype))
            else:
                linear.lora_form = form

    def _sparsify(self, layer: DecoderLayer, rngs: nnx.Rngs) -> None:
        config, heads, width = self.attention, self.config.num_kv_heads, self.config.head_width
        books = (heads, width // config.codeword_width, config.num_codewords, config.codeword_width)
        layer.attention.sparse = SparseAttention(
            jax.random.normal(rngs.params(), books),
            jax.random.normal(rngs.params(), books),
            jnp.zeros((heads, width)),
            config=config,
            causal=True,
        )
        router = (self.config.width, self.ffn.num_blocks)
        ffn = RoutedFFN(
            layer.ffn,
            permutation=jnp.arange(self.config.hidden),
            router_kernel=jax.random.normal(rngs.params(), router) * router[0] ** -0.5,
            router_bias=jnp.zeros(router[1]),
            absent_output=jnp.zeros(router[::-1]),
            config=self.ffn,
        )
        layer.ffn = cast(Any, ffn)

    def _split(self, layers: Layers) -> tuple[Any, nnx.State, nnx.State]:
        trained = nnx.Param if self.method == "full" else ADAPTER
        graphdef, chosen, rest = nnx.split(layers, trained, ...)  # type: ignore[misc]
        return graphdef, chosen, rest

    def arguments(self, key: jax.Array) -> tuple[Any, Any]:
        """What the step differentiates, `(parameters, x)`, and what it does not."""
        model_key, x_key = jax.random.split(key)
        _, trained, frozen = self._split(self.model(model_key))
        size = (self.batch, self.length, self.config.width)
        return (trained, jax.random.normal(x_key, size, self.dtype)), frozen

    def run(self, trained: Any, frozen: Any) -> tuple[Float[Array, "B S D"], AuxLosses]:
        """The last layer's output, and auxiliary losses."""
        graphdef = self._split(nnx.eval_shape(lambda: self.model(jax.random.key(0))))[0]
        parameters, x = trained
        rotary, losses = self._rotary_angles(), []
        for layer in nnx.merge(graphdef, parameters, frozen):
            run = rematerialized(layer) if self.remat else layer
            x, aux = run(x, None, None, rotary, None)
            losses.append(aux)
        return x, sum_aux(*losses)

    def _rotary_angles(self) -> RotaryAngles | None:
        if self.config.rotary is None:
            return None
        positions = jnp.broadcast_to(jnp.arange(self.length), (self.batch, self.length))
        return rotary_angles(positions, self.config.head_width, self.config.rotary)

    def operations(self) -> tuple[float, float]:
        """Floating-point operations of the products: forward, and forward with backward."""
        config, layers = self.config, self.config.num_layers
        heads, width = config.num_heads, config.head_width
        weights = 2 * config.width * (heads + config.num_kv_heads) * width
        ffn = (3.0 if config.gated else 2.0) * config.width * config.hidden
        kept = self.length
        if self.method == "spt":
            ffn *= self.ffn.density
            kept = self.attention.num_keys(self.length)
        dense = 2.0 * layers * self.batch * self.length * (weights + ffn)
        attention = layers * attention_operations(self.batch, self.length, heads, width, kept)
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
