"""Layers of the product, whole or in part, as full fine-tuning, LoRA and SPT train them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from spt_jax import adapt
from spt_jax.config import RoutedFFNConfig, SparseAttentionConfig, SPTConfig, TrainConfig
from spt_jax.layers import (
    ADAPTER,
    AuxLosses,
    DenseImplementation,
    FeedForward,
    Linear,
    RotaryAngles,
    RoutedFFN,
    SparseAttention,
    rematerialized,
    rotary_angles,
)
from spt_jax.models.common import sum_aux
from spt_jax.models.config import ModelConfig
from spt_jax.models.decoder import Decoder, DecoderLayer
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.encoder import Encoder, EncoderLayer
from spt_jax.training import Outcome, cross_entropy, next_token, partition, start, supervised

BlockMethod = Literal["full", "lora", "spt"]
#: What of a layer: all of it, or its first or second half, with norm and residual connection.
Part = Literal["block", "mha", "ffn"]

#: How `x (W + A B)` is computed. "merged" and "factored" are those of `spt_jax.layers.lora_dot`.
#: "skinny" is `x W + (x A) B` with every product in the type of x; "skinny_float32" takes the
#: two skinny ones in float32, the type in which PEFT and this library keep the factors.
LoRAForm = Literal["merged", "factored", "skinny", "skinny_float32"]


class SkinnyLinear(Linear):
    """Linear map whose LoRA factors are applied as two skinny products beside the dense one.

    Args:
        linear: map whose variables are taken over.
        dtype: type of the skinny products.
    """

    def __init__(self, linear: Linear, dtype: Any) -> None:
        self.in_features, self.out_features = linear.in_features, linear.out_features
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


Layer = DecoderLayer | EncoderLayer
Layers = nnx.List[Layer]


def num_kv_heads(config: ModelConfig) -> int:
    """Key/value heads K."""
    return config.num_kv_heads if isinstance(config, DecoderConfig) else config.num_heads


def head_width(config: ModelConfig) -> int:
    """H."""
    if isinstance(config, DecoderConfig):
        return config.head_width
    return config.width // config.num_heads


@dataclass(frozen=True, kw_only=True)
class BlockStep:
    """A training step of layers.

    Attributes:
      config: the layers' family, number and sizes.
      part: what of each layer is there.
      batch: sequences.
      length: their tokens.
      method: "full" trains the weights, "lora" and "spt" the adapter; all pass a gradient to x.
      lora_form: how products with LoRA factors are taken; None for the library's choice.
      attention: sparse attention of SPT.
      ffn: routed FFN of SPT; None leaves it dense.
      remat: whether a layer's activations are computed again in the backward pass.
      dense_attention: implementation of attention to all keys.
      dtype: of activations and frozen weights; what an adapter trains is float32.
      param_dtype: of weights that "full" trains; None for `dtype`.
    """

    config: ModelConfig
    batch: int
    length: int
    method: BlockMethod
    lora_form: LoRAForm | None = None
    attention: SparseAttentionConfig = field(default_factory=SparseAttentionConfig)
    ffn: RoutedFFNConfig | None = field(default_factory=RoutedFFNConfig)
    remat: bool = False
    dense_attention: DenseImplementation = "cudnn"
    dtype: Any = jnp.bfloat16
    param_dtype: Any = None
    part: Part = "block"

    def __str__(self) -> str:
        config = self.config
        layers = f"{config.num_layers} layers " if config.num_layers > 1 else ""
        return (
            f"{layers}B={self.batch} S={self.length} D={config.width} N={config.num_heads} "
            f"K={num_kv_heads(config)} F={config.hidden}"
        )

    def model(self, key: jax.Array) -> nnx.Module:
        """Layers with random weights, codebooks and routers: time depends on shapes alone."""
        options = self._options(key)
        layers = nnx.List([self._layer(i, options) for i in range(self.config.num_layers)])
        self._adapt(layers, layers, options["rngs"])
        return layers

    def _options(self, key: jax.Array) -> dict[str, Any]:
        """Arguments of a layer's constructor."""
        param_dtype = self.dtype
        if self.method == "full" and self.param_dtype is not None:
            param_dtype = self.param_dtype
        rngs = nnx.Rngs(params=key)
        return {"dtype": self.dtype, "param_dtype": param_dtype, "rngs": rngs}

    def _adapt(self, model: nnx.Module, layers: Layers, rngs: nnx.Rngs) -> None:
        """What the method adds to a model with these layers."""
        if self.method != "full":
            adapt(model, SPTConfig(attention=None, ffn=None), rngs=rngs)
            self._choose_lora_form(model)
        for layer in layers:
            if self.part != "ffn":
                layer.attention.sparse = self._attention(rngs)
                layer.attention.dense_implementation = self.dense_attention
            if self.part != "mha" and self.method == "spt" and self.ffn is not None:
                layer.ffn = cast(Any, self._routed(layer.ffn, self.ffn, rngs))

    def _layer(self, index: int, options: dict[str, Any]) -> Layer:
        config = self.config
        if isinstance(config, DecoderConfig):
            layer: Layer = DecoderLayer(config, index, **options)
        else:
            layer = EncoderLayer(config, **options)
        if self.part == "mha":
            del layer.ffn, layer.ffn_norm
        elif self.part == "ffn":
            del layer.attention, layer.attention_norm
        return layer

    def _choose_lora_form(self, model: nnx.Module) -> None:
        form = self.lora_form
        adapted = [
            (owner, name, linear)
            for _, owner in nnx.iter_modules(model)
            for name, linear in vars(owner).items()
            if isinstance(linear, Linear) and linear.lora is not None
        ]
        for owner, name, linear in adapted:
            if form == "skinny" or form == "skinny_float32":
                wide = form == "skinny_float32"
                setattr(owner, name, SkinnyLinear(linear, jnp.float32 if wide else self.dtype))
            else:
                linear.lora_form = form

    @property
    def causal(self) -> bool:
        """Whether a query sees only itself and earlier keys."""
        return isinstance(self.config, DecoderConfig)

    def _attention(self, rngs: nnx.Rngs) -> SparseAttention | None:
        if self.method != "spt" or self.attention.granularity_at(self.length) == "dense":
            return None
        config, heads, width = self.attention, num_kv_heads(self.config), head_width(self.config)
        books = (heads, width // config.codeword_width, config.num_codewords, config.codeword_width)
        shared = config.rule == "match_count"
        return SparseAttention(
            None if shared else jax.random.normal(rngs.params(), books),
            jax.random.normal(rngs.params(), books),
            jnp.zeros((heads, width)),
            config=config,
            causal=self.causal,
        )

    def _routed(self, ffn: FeedForward, config: RoutedFFNConfig, rngs: nnx.Rngs) -> RoutedFFN:
        width, blocks = self.config.width, config.num_blocks
        rank = config.effective_absent_rank
        return RoutedFFN(
            ffn,
            permutation=jnp.arange(self.config.hidden),
            router_kernel=jax.random.normal(rngs.params(), (width, blocks)) * width**-0.5,
            router_bias=jnp.zeros(blocks),
            absent_output=jnp.zeros((blocks, width)),
            absent_a=jnp.zeros((width, blocks, rank)) if rank else None,
            absent_b=jnp.zeros((blocks, rank, width)) if rank else None,
            config=config,
        )

    def _split(self, model: nnx.Module) -> tuple[Any, nnx.State, nnx.State]:
        trained = nnx.Param if self.method == "full" else ADAPTER
        graphdef, chosen, rest = nnx.split(model, trained, ...)  # type: ignore[misc]
        return graphdef, chosen, rest

    def arguments(self, key: jax.Array) -> tuple[Any, Any]:
        """What the step differentiates, `(parameters, x)`, and what it does not."""
        model_key, x_key = jax.random.split(key)
        _, trained, frozen = self._split(self.model(model_key))
        size = (self.batch, self.length, self.config.width)
        return (trained, jax.random.normal(x_key, size, self.dtype)), frozen

    def run(self, trained: Any, frozen: Any) -> tuple[Float[Array, "B S D"], AuxLosses]:
        """The last layer's output, and auxiliary losses."""
        parameters, x = trained
        rotary, losses = self._rotary_angles(), []
        for layer in self._merge(parameters, frozen):
            run = partial(self._apply, layer)
            x, aux = (rematerialized(run) if self.remat else run)(x, rotary)
            losses.append(aux)
        return x, sum_aux(*losses)

    def _merge(self, trained: Any, frozen: Any) -> Any:
        graphdef = self._split(nnx.eval_shape(lambda: self.model(jax.random.key(0))))[0]
        return nnx.merge(graphdef, trained, frozen)

    def _apply(
        self, layer: Layer, x: Float[Array, "B S D"], rotary: RotaryAngles | None
    ) -> tuple[Float[Array, "B S D"], AuxLosses]:
        if self.part == "ffn":
            return layer.feed_forward(x, None, None)
        if isinstance(layer, DecoderLayer):
            whole = layer if self.part == "block" else layer.attend
            return whole(x, None, None, rotary, None)
        return (layer if self.part == "block" else layer.attend)(x, None, None, None)

    def _rotary_angles(self) -> RotaryAngles | None:
        if not isinstance(self.config, DecoderConfig) or self.config.rotary is None:
            return None
        positions = jnp.broadcast_to(jnp.arange(self.length), (self.batch, self.length))
        return rotary_angles(positions, self.config.head_width, self.config.rotary)

    def operations(self) -> tuple[float, float]:
        """Floating-point operations of the products: forward, and forward with backward."""
        config, layers = self.config, self.config.num_layers
        heads, width, kept = config.num_heads, head_width(config), self.length
        gated = isinstance(config, DecoderConfig) and config.gated
        projections = 2 * config.width * (heads + num_kv_heads(config)) * width
        ffn = (3.0 if gated else 2.0) * config.width * config.hidden
        if self.method == "spt":
            ffn *= 1 if self.ffn is None else self.ffn.density
            kept = self.attention.num_keys(self.length)
        weights = projections * (self.part != "ffn") + ffn * (self.part != "mha")
        dense = 2.0 * layers * self.batch * self.length * weights
        attention = layers * attention_operations(
            self.batch, self.length, heads, width, kept, causal=self.causal
        )
        attention *= self.part != "ffn"
        backward = 2 * dense if self.method == "full" else dense
        return dense + attention, dense + backward + 3.5 * attention


class ModelStep(BlockStep):
    """The training step of a whole model: a decoder's next token, or an encoder's classes."""

    def model(self, key: jax.Array) -> nnx.Module:
        """The model with random weights, codebooks and routers."""
        options, config = self._options(key), self.config
        model: Decoder | Encoder
        if isinstance(config, DecoderConfig):
            model = Decoder(config, **options)
        else:
            model = Encoder(config, num_labels=2, **options)
        self._adapt(model, cast(Layers, model.layers), options["rngs"])
        model.remat = self.remat
        return model

    def training_step(self) -> tuple[Callable[..., Any], Callable[[jax.Array], Any]]:
        """`spt_jax.training.train_step`, and what makes its arguments from a random key."""
        config = TrainConfig(
            trainable="all" if self.method == "full" else "adapter",
            learning_rate=1e-4,
            schedule="constant",
            warmup=0,
            dropout=False,
        )
        run: Any = None

        def arguments(key: jax.Array) -> Any:
            nonlocal run
            model_key, ids_key = jax.random.split(key)
            parts = partition(self.model(model_key), config.trainable)
            state, run = start(parts, config, total_steps=1, objective=self.objective)
            return state, parts.frozen, self._batch(ids_key)

        jax.eval_shape(arguments, jax.random.key(0))
        return run, arguments

    def _batch(self, key: jax.Array) -> dict[str, jax.Array]:
        size = (self.batch, self.length)
        ids = jax.random.randint(key, size, 0, self.config.vocab_size)
        label = jnp.roll(ids, -1, 1) if self.causal else jnp.zeros(self.batch, jnp.int32)
        return {
            "input_ids": ids,
            "attention_mask": jnp.ones(size, jnp.int32),
            "label": label,
            "weight": jnp.ones(label.shape, jnp.float32),
        }

    def objective(self, model: Any, batch: Any, dropout_key: jax.Array | None) -> Outcome:
        """The task's loss; no token is padding, so that dense attention may be cuDNN's."""
        loss = next_token if self.causal else supervised(cross_entropy)
        return loss(model, {**batch, "attention_mask": None}, dropout_key)

    def operations(self) -> tuple[float, float]:
        """Those of the layers and of a decoder's output matrix."""
        forward, step = super().operations()
        if not isinstance(self.config, DecoderConfig):
            return forward, step
        head = 2.0 * self.batch * self.length * self.config.width * self.config.vocab_size
        return forward + head, step + (3 if self.method == "full" else 2) * head


def attention_operations(
    batch: int, length: int, heads: int, width: int, kept: int, *, causal: bool = True
) -> float:
    """Floating-point operations of attention, forward; backward takes 2.5 times as many.

    Args:
      batch: sequences.
      length: their tokens.
      heads: query heads.
      width: of a head.
      kept: keys that a query attends to, or all before it where there are fewer.
      causal: whether a query sees only itself and earlier keys.
    """
    pairs = kept * (kept + 1) // 2 + (length - kept) * kept if causal else length * kept
    return 4.0 * batch * heads * width * pairs
