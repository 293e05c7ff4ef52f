"""OPT, LLaMA, Mistral, Qwen2 and Qwen3: one decoder, as a language model or under a classifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int

from spt_jax.layers import (
    Attention,
    AuxLosses,
    Embedding,
    FeedForward,
    HeadParam,
    KeyValueCache,
    Linear,
    RotaryAngles,
    dense_dot,
    dropout,
    recomputed,
    rematerialized,
    rotary_angles,
    split_key,
)
from spt_jax.models.common import (
    Mask,
    Tokens,
    check_batch,
    check_inputs,
    layer_norm,
    positions_in_segments,
    sum_aux,
    token_array,
)
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.slots import numbered

DecoderTask = Literal["causal-lm", "backbone"]
Norm = nnx.LayerNorm | nnx.RMSNorm
Cache = list[KeyValueCache]


def _norm(config: DecoderConfig, **options: Any) -> Norm:
    if config.model_type == "opt":
        return layer_norm(config.width, config.norm_epsilon, **options)
    return nnx.RMSNorm(config.width, epsilon=config.norm_epsilon, **options)


class DecoderLayer(nnx.Module):
    """`x = x + attention(norm(x))`, then `x = x + ffn(norm(x))`; norms after the sums in some OPT.

    Args:
        config: sizes and family.
        index: of the layer.
        dtype: compute dtype.
        param_dtype: dtype of the weights.
        rngs: source of the initial values.
    """

    def __init__(
        self, config: DecoderConfig, index: int, *, dtype: Dtype, param_dtype: Dtype, rngs: nnx.Rngs
    ) -> None:
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.attention = Attention(
            config.width,
            config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_width=config.head_width,
            causal=True,
            window=config.windows[index],
            use_bias=config.qkv_bias,
            output_bias=config.output_bias,
            qk_norm_epsilon=config.norm_epsilon if config.qk_norm else None,
            **options,
        )
        self.attention_norm = _norm(config, **options)
        self.ffn = FeedForward(
            config.width,
            config.hidden,
            activation=config.activation,
            gated=config.gated,
            use_bias=config.ffn_bias,
            **options,
        )
        self.ffn_norm = _norm(config, **options)
        self.pre_norm = config.pre_norm
        self.dropout = config.hidden_dropout

    def __call__(
        self,
        x: Float[Array, "B S D"],
        mask: Bool[Array, "B S"] | None,
        segment_ids: Int[Array, "B S"] | None,
        rotary: RotaryAngles | None,
        dropout_key: jax.Array | None,
    ) -> tuple[Float[Array, "B S D"], AuxLosses]:
        """Apply the layer; `mask` is False at padding."""
        keys = split_key(dropout_key, 2)
        x, attention_aux = self.attend(x, mask, segment_ids, rotary, keys[0])
        x, ffn_aux = self.feed_forward(x, mask, keys[1])
        return x, sum_aux(attention_aux, ffn_aux)

    def attend(
        self,
        x: Float[Array, "B S D"],
        mask: Bool[Array, "B S"] | None,
        segment_ids: Int[Array, "B S"] | None,
        rotary: RotaryAngles | None,
        dropout_key: jax.Array | None,
    ) -> tuple[Float[Array, "B S D"], AuxLosses]:
        """The layer's first half."""
        keys = split_key(dropout_key, 2)
        return self._add(
            x,
            self.attention_norm,
            lambda y: self.attention(
                y, key_mask=mask, segment_ids=segment_ids, rotary=rotary, dropout_key=keys[0]
            ),
            keys[1],
        )

    def feed_forward(
        self,
        x: Float[Array, "B S D"],
        mask: Bool[Array, "B S"] | None,
        dropout_key: jax.Array | None,
    ) -> tuple[Float[Array, "B S D"], AuxLosses]:
        """The layer's second half."""
        keys = split_key(dropout_key, 2)
        return self._add(
            x, self.ffn_norm, lambda y: self.ffn(y, mask=mask, dropout_key=keys[0]), keys[1]
        )

    def prefill(
        self,
        x: Float[Array, "B P D"],
        mask: Bool[Array, "B P"],
        rotary: RotaryAngles | None,
        capacity: int,
    ) -> tuple[Float[Array, "B P D"], KeyValueCache]:
        """Apply the layer to prompts and start a cache with room for `capacity` tokens."""
        x, cache = self._add(
            x,
            self.attention_norm,
            lambda y: self.attention.prefill(y, capacity=capacity, key_mask=mask, rotary=rotary),
        )
        return self._add(x, self.ffn_norm, self.ffn)[0], cache

    def decode(
        self,
        x: Float[Array, "B 1 D"],
        cache: KeyValueCache,
        mask: Bool[Array, "B cache"],
        rotary: RotaryAngles | None,
        index: Int[Array, ""],
    ) -> tuple[Float[Array, "B 1 D"], KeyValueCache]:
        """Apply the layer to the next token of each sequence, whose place in the cache is given."""
        x, cache = self._add(
            x,
            self.attention_norm,
            lambda y: self.attention.decode(y, cache, index=index, key_mask=mask, rotary=rotary),
        )
        return self._add(x, self.ffn_norm, lambda y: (self.ffn.decode(y), None))[0], cache

    def _add[Extra](
        self,
        x: Float[Array, "B S D"],
        norm: Norm,
        sublayer: Callable[[jax.Array], tuple[jax.Array, Extra]],
        dropout_key: jax.Array | None = None,
    ) -> tuple[Float[Array, "B S D"], Extra]:
        """Input plus what the sublayer makes of it, with the norm before or after."""
        y, extra = sublayer(recomputed(norm, x) if self.pre_norm else x)
        x = x + dropout(y, self.dropout, dropout_key)
        return x if self.pre_norm else recomputed(norm, x), extra


class Decoder(nnx.Module):
    """Causal Transformer of the OPT, LLaMA, Mistral, Qwen2 or Qwen3 family.

    Outputs are logits `[B, S, V]` of the next token, hidden states `[B, S, E]` (E is the width D,
    or `embedding_width` where OPT maps out of the layers), or, with a classifier, logits
    `[B, num_labels]` from each sequence's last token.

    Args:
        config: sizes and family.
        task: "causal-lm" for logits of the next token, "backbone" for hidden states.
        dtype: compute dtype; statistics of norms and all accumulations are float32.
        param_dtype: dtype of the weights.
        rngs: source of the initial values.

    Attributes:
        remat: recompute each layer's activations in the backward pass instead of storing them.
    """

    base_prefix = "model."

    def __init__(
        self,
        config: DecoderConfig,
        *,
        task: DecoderTask = "causal-lm",
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        width, inner = config.embedding_width, config.width

        def projection(rows: int, columns: int) -> Linear | None:
            return None if width == inner else Linear(rows, columns, use_bias=False, **options)

        self.embedding = Embedding(config.vocab_size, width, **options)
        self.position: Embedding | None = nnx.data(
            None
            if config.rotary is not None
            else Embedding(config.num_positions + config.position_offset, inner, **options)
        )
        self.project_in: Linear | None = nnx.data(projection(width, inner))
        self.layers = nnx.List(
            [DecoderLayer(config, i, **options) for i in range(config.num_layers)]
        )
        self.norm: Norm | None = nnx.data(_norm(config, **options) if config.final_norm else None)
        self.project_out: Linear | None = nnx.data(projection(inner, width))
        untied = task == "causal-lm" and not config.tie_embeddings
        self.head: Linear | None = nnx.data(
            Linear(width, config.vocab_size, use_bias=False, **options) if untied else None
        )
        self.score: Linear | None = nnx.data(None)
        self.config = config
        self.task: DecoderTask = task
        self.dtype, self.param_dtype = dtype, param_dtype
        self.remat = False

    def add_classifier(self, num_labels: int, *, rngs: nnx.Rngs) -> None:
        """Put a fresh classification head on the model."""
        self.score = Linear(
            self.config.embedding_width,
            num_labels,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            param_type=HeadParam,
            rngs=rngs,
        )

    def __call__(
        self,
        input_ids: Tokens,
        attention_mask: Mask | None = None,
        token_type_ids: Tokens | None = None,
        segment_ids: Tokens | None = None,
        *,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "B S E"] | Float[Array, "B S V"] | Float[Array, "B labels"]:
        """Outputs of `forward`, without the auxiliary losses."""
        outputs, _ = self.forward(
            input_ids, attention_mask, token_type_ids, segment_ids, dropout_key=dropout_key
        )
        return outputs

    def forward(
        self,
        input_ids: Tokens,
        attention_mask: Mask | None = None,
        token_type_ids: Tokens | None = None,
        segment_ids: Tokens | None = None,
        *,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Float[Array, "B S E"] | Float[Array, "B S V"] | Float[Array, "B labels"], AuxLosses]:
        """Decode sequences.

        Args:
            input_ids: token ids, below the vocabulary's size. Under jit they are not checked: as
                JAX indexes, one too large reads the table's last row, and a negative one counts
                from its end.
            attention_mask: 0 or False at padding, left or right; None for no padding.
            token_type_ids: None; decoders have no token types.
            segment_ids: for several sequences packed into a row, each a run of one id: tokens see
                only their own segment and positions start anew in it.
            dropout_key: draws this step's dropout; None turns dropout off.

        Returns:
            Outputs by task, and auxiliary losses summed over layers and valid tokens.

        Raises:
            ValueError: a shape is wrong, the sequence is longer than the model's positions, a token
                id is outside the vocabulary, or token types are given.
        """
        x, aux = self.hidden_states(
            input_ids, attention_mask, token_type_ids, segment_ids, dropout_key=dropout_key
        )
        if self.score is not None:
            if attention_mask is None:
                last = jnp.full(x.shape[0], x.shape[1] - 1)
            else:
                valid = jnp.asarray(attention_mask) != 0
                last = jnp.max(jnp.where(valid, jnp.arange(x.shape[1]), 0), axis=1)
            return self.score(x[jnp.arange(x.shape[0]), last]), aux
        return (x if self.task == "backbone" else self.logits(x)), aux

    def hidden_states(
        self,
        input_ids: Tokens,
        attention_mask: Mask | None = None,
        token_type_ids: Tokens | None = None,
        segment_ids: Tokens | None = None,
        *,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Float[Array, "B S E"], AuxLosses]:
        """What the output matrix is applied to; arguments and errors as for `forward`."""
        ids = token_array(input_ids, "input_ids")
        if token_type_ids is not None:
            raise ValueError(
                f"a {self.config.model_type} model has no token types; leave token_type_ids out"
            )
        optional = (attention_mask, segment_ids)
        mask, segments = (None if a is None else jnp.asarray(a) for a in optional)
        check_inputs(ids, self.config.max_length, attention_mask=mask, segment_ids=segments)
        check_batch(self, {"input_ids": ids}, "input")
        if mask is not None:
            mask = mask != 0
        tokens = jnp.ones(ids.shape, bool) if mask is None else mask
        positions = positions_in_segments(tokens, segments)
        keys = split_key(dropout_key, len(self.layers) + 1)
        x, rotary = self.embed(ids, positions, dropout_key=keys[-1])
        losses = []
        for layer, key in zip(self.layers, keys[:-1], strict=True):
            run = rematerialized(layer) if self.remat else layer
            x, aux = run(x, mask, segments, rotary, key)
            losses.append(aux)
        return self.finish(x), sum_aux(*losses)

    def prefill(
        self, input_ids: Int[Array, "B P"], mask: Bool[Array, "B P"], *, capacity: int
    ) -> tuple[Float[Array, "B E"], Cache]:
        """Read prompts that end in the last column, for `decode` to go on from there.

        Args:
            input_ids: token ids.
            mask: False at padding, which is at the left.
            capacity: tokens S, prompt included, that the cache has room for. Sparse attention
                selects as in a sequence of that many.

        Returns:
            What `logits` takes at the last token of each prompt, and the cache.

        Raises:
            NotImplementedError: sparse attention is to reach past a layer's window.
        """
        x, rotary = self.embed(input_ids, positions_in_segments(mask, None))
        cache = []
        for layer in self.layers:
            x, kept = layer.prefill(x, mask, rotary, capacity)
            cache.append(kept)
        return self.finish(x[:, -1:])[:, 0], cache

    def decode(
        self,
        token: Int[Array, "B"],
        cache: Cache,
        mask: Bool[Array, "B cache"],
        index: Int[Array, ""],
    ) -> tuple[Float[Array, "B E"], Cache]:
        """Read the next token of each sequence.

        Args:
            token: token ids.
            cache: what `prefill` and earlier calls returned.
            mask: which places of the cache hold a token, this one's included.
            index: place of this token in the cache.

        Returns:
            What `logits` takes at that token, and the cache with the token in it.
        """
        position = mask.sum(1, keepdims=True, dtype=jnp.int32) - 1
        x, rotary = self.embed(token[:, None], position)
        kept = []
        for layer, old in zip(self.layers, cache, strict=True):
            x, new = layer.decode(x, old, mask, rotary, index)
            kept.append(new)
        return self.finish(x)[:, 0], kept

    def embed(
        self,
        input_ids: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        *,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Float[Array, "B S D"], RotaryAngles | None]:
        """The first layer's input, and the angles of all layers."""
        keys = split_key(dropout_key, 2)
        x = self.embedding(input_ids, dropout_key=keys[0])
        if self.project_in is not None:
            x = self.project_in(x)
        if self.position is not None:
            rows = positions + self.config.position_offset
            return x + self.position(rows, dropout_key=keys[1]), None
        assert self.config.rotary is not None
        return x, rotary_angles(positions, self.config.head_width, self.config.rotary)

    def finish(self, x: Float[Array, "B S D"]) -> Float[Array, "B S E"]:
        """The last layer's output, normalised and mapped to the embedding's width."""
        if self.norm is not None:
            x = self.norm(x)
        return x if self.project_out is None else self.project_out(x)

    def output_kernel(self) -> Float[Array, "E V"]:
        """The output matrix: the head's with LoRA, or the word embedding without it."""
        if self.head is None:
            return self.embedding.embedding[...].T
        kernel = self.head.kernel[...]
        if self.head.lora is None:
            return kernel
        a, b = self.head.lora.factors()
        return (kernel + jnp.dot(a, b)).astype(kernel.dtype)

    def logits(self, x: Float[Array, "*B E"]) -> Float[Array, "*B V"]:
        """Logits of the next token, in the compute dtype."""
        if self.head is not None:
            return self.head(x)
        kernel = self.output_kernel().astype(self.dtype)
        return dense_dot(x, kernel)

    def module_paths(self) -> dict[str, str]:
        """Hugging Face's name of every module that holds weights -> its path in the model."""
        config = self.config
        names = dict(_OPT_MODULES if config.model_type == "opt" else _LLAMA_MODULES)
        if config.qk_norm:
            names |= _QK_NORM_MODULES
        absent = {
            path
            for path in ("project_in", "project_out", "norm")
            if getattr(self, path, None) is None
        }
        names = {name: path for name, path in names.items() if path not in absent}
        heads = {"lm_head": self.head, "score": self.score}
        paths = {"lm_head": "head", "score": "score"}
        bare = self.task == "backbone" and self.score is None
        backbone = numbered(names, "" if bare else self.base_prefix, config.num_layers)
        return backbone | {name: paths[name] for name, head in heads.items() if head is not None}


_OPT_MODULES = {
    "decoder.embed_tokens": "embedding",
    "decoder.embed_positions": "position",
    "decoder.project_in": "project_in",
    "decoder.layers.{i}.self_attn.q_proj": "layers.{i}.attention.q_proj",
    "decoder.layers.{i}.self_attn.k_proj": "layers.{i}.attention.k_proj",
    "decoder.layers.{i}.self_attn.v_proj": "layers.{i}.attention.v_proj",
    "decoder.layers.{i}.self_attn.out_proj": "layers.{i}.attention.o_proj",
    "decoder.layers.{i}.self_attn_layer_norm": "layers.{i}.attention_norm",
    "decoder.layers.{i}.fc1": "layers.{i}.ffn.up",
    "decoder.layers.{i}.fc2": "layers.{i}.ffn.down",
    "decoder.layers.{i}.final_layer_norm": "layers.{i}.ffn_norm",
    "decoder.final_layer_norm": "norm",
    "decoder.project_out": "project_out",
}
_LLAMA_MODULES = {
    "embed_tokens": "embedding",
    "layers.{i}.self_attn.q_proj": "layers.{i}.attention.q_proj",
    "layers.{i}.self_attn.k_proj": "layers.{i}.attention.k_proj",
    "layers.{i}.self_attn.v_proj": "layers.{i}.attention.v_proj",
    "layers.{i}.self_attn.o_proj": "layers.{i}.attention.o_proj",
    "layers.{i}.input_layernorm": "layers.{i}.attention_norm",
    "layers.{i}.mlp.gate_proj": "layers.{i}.ffn.gate",
    "layers.{i}.mlp.up_proj": "layers.{i}.ffn.up",
    "layers.{i}.mlp.down_proj": "layers.{i}.ffn.down",
    "layers.{i}.post_attention_layernorm": "layers.{i}.ffn_norm",
    "norm": "norm",
}
_QK_NORM_MODULES = {
    "layers.{i}.self_attn.q_norm": "layers.{i}.attention.q_norm",
    "layers.{i}.self_attn.k_norm": "layers.{i}.attention.k_norm",
}
