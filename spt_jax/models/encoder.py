"""BERT, RoBERTa and DistilBERT: one encoder, with and without a classification head."""

from __future__ import annotations

from typing import Any

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
    Linear,
    dropout,
    recomputed,
    rematerialized,
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
from spt_jax.models.encoder_config import EncoderConfig, EncoderType
from spt_jax.models.slots import numbered


class Embeddings(nnx.Module):
    """Sum of word, position and token type embeddings, normalised.

    Args:
        config: sizes and family.
        dtype: compute dtype.
        param_dtype: dtype of the tables.
        rngs: source of the initial values.
    """

    def __init__(
        self, config: EncoderConfig, *, dtype: Dtype, param_dtype: Dtype, rngs: nnx.Rngs
    ) -> None:
        def table(rows: int) -> Embedding:
            return Embedding(rows, config.width, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        self.word = table(config.vocab_size)
        self.position = table(config.num_positions)
        self.token_type: Embedding | None = nnx.data(
            table(config.num_token_types) if config.num_token_types else None
        )
        self.norm = layer_norm(
            config.width, config.layer_norm_epsilon, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.config = config

    def __call__(
        self,
        input_ids: Int[Array, "B S"],
        token_type_ids: Int[Array, "B S"] | None,
        segment_ids: Int[Array, "B S"] | None,
        *,
        dropout_key: jax.Array | None,
    ) -> Float[Array, "B S D"]:
        """Embed tokens; positions start anew in every segment."""
        keys = split_key(dropout_key, 4)
        if self.config.model_type == "roberta":
            # padding tokens sit at row pad_token_id and do not count
            tokens = input_ids != self.config.pad_token_id
            counted = positions_in_segments(tokens, segment_ids) + self.config.position_offset
            positions = jnp.where(tokens, counted, self.config.pad_token_id)
        else:
            shape = (1, input_ids.shape[1]) if segment_ids is None else input_ids.shape
            positions = positions_in_segments(jnp.ones(shape, bool), segment_ids)
        x = self.word(input_ids, dropout_key=keys[0])
        if self.token_type is not None:
            types = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            x = x + self.token_type(types, dropout_key=keys[1])
        x = x + self.position(positions, dropout_key=keys[2])
        return dropout(self.norm(x), self.config.hidden_dropout, keys[3])


class EncoderLayer(nnx.Module):
    """`x = norm(x + attention(x))`, then `x = norm(x + ffn(x))`.

    Args:
        config: sizes and family.
        dtype: compute dtype.
        param_dtype: dtype of the weights.
        rngs: source of the initial values.
    """

    def __init__(
        self, config: EncoderConfig, *, dtype: Dtype, param_dtype: Dtype, rngs: nnx.Rngs
    ) -> None:
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.attention = Attention(config.width, config.num_heads, **options)
        self.attention_norm = layer_norm(config.width, config.layer_norm_epsilon, **options)
        self.ffn = FeedForward(config.width, config.hidden, activation=config.activation, **options)
        self.ffn_norm = layer_norm(config.width, config.layer_norm_epsilon, **options)
        self.attention_dropout = config.attention_output_dropout
        self.ffn_dropout = config.hidden_dropout

    def __call__(
        self,
        x: Float[Array, "B S D"],
        mask: Bool[Array, "B S"] | None,
        segment_ids: Int[Array, "B S"] | None,
        dropout_key: jax.Array | None,
    ) -> tuple[Float[Array, "B S D"], AuxLosses]:
        """Apply the layer; `mask` is False at padding."""
        keys = split_key(dropout_key, 2)
        x, attention_aux = self.attend(x, mask, segment_ids, keys[0])
        x, ffn_aux = self.feed_forward(x, mask, keys[1])
        return x, sum_aux(attention_aux, ffn_aux)

    def attend(
        self,
        x: Float[Array, "B S D"],
        mask: Bool[Array, "B S"] | None,
        segment_ids: Int[Array, "B S"] | None,
        dropout_key: jax.Array | None,
    ) -> tuple[Float[Array, "B S D"], AuxLosses]:
        """The layer's first half."""
        keys = split_key(dropout_key, 2)
        y, aux = self.attention(x, key_mask=mask, segment_ids=segment_ids, dropout_key=keys[0])
        x = x + dropout(y, self.attention_dropout, keys[1])
        return recomputed(self.attention_norm, x), aux

    def feed_forward(
        self,
        x: Float[Array, "B S D"],
        mask: Bool[Array, "B S"] | None,
        dropout_key: jax.Array | None,
    ) -> tuple[Float[Array, "B S D"], AuxLosses]:
        """The layer's second half."""
        keys = split_key(dropout_key, 2)
        y, aux = self.ffn(x, mask=mask, dropout_key=keys[0])
        return recomputed(self.ffn_norm, x + dropout(y, self.ffn_dropout, keys[1])), aux


class ClassificationHead(nnx.Module):
    """`out(dropout(act(dense(x))))` on a sequence's first token.

    BERT's pooler and classifier (tanh), RoBERTa's head (tanh, and a dropout in front), DistilBERT's
    pre-classifier and classifier (ReLU).

    Args:
        config: width, family and dropout rate.
        num_labels: outputs.
        dtype: compute dtype.
        param_dtype: dtype of the weights.
        rngs: source of the initial values.
    """

    def __init__(
        self,
        config: EncoderConfig,
        num_labels: int,
        *,
        dtype: Dtype,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ) -> None:
        options: dict[str, Any] = {
            "dtype": dtype,
            "param_dtype": param_dtype,
            "param_type": HeadParam,
            "rngs": rngs,
        }
        self.dense = Linear(config.width, config.width, **options)
        self.out = Linear(config.width, num_labels, **options)
        self.config = config

    def __call__(
        self, x: Float[Array, "B D"], *, dropout_key: jax.Array | None
    ) -> Float[Array, "B labels"]:
        """Logits of each sequence."""
        rate, family = self.config.classifier_dropout, self.config.model_type
        keys = split_key(dropout_key, 2)
        if family == "roberta":
            x = dropout(x, rate, keys[0])
        x = (jax.nn.relu if family == "distilbert" else jnp.tanh)(self.dense(x))
        return self.out(dropout(x, rate, keys[1]))


class Encoder(nnx.Module):
    """Transformer encoder of the BERT, RoBERTa or DistilBERT family.

    Outputs are hidden states `[B, S, D]`, or logits `[B, num_labels]` with a head.

    Args:
        config: sizes and family.
        num_labels: outputs of the classification head; None for no head.
        dtype: compute dtype; LayerNorm's statistics and all accumulations are float32.
        param_dtype: dtype of the weights.
        rngs: source of the initial values.

    Attributes:
        remat: recompute each layer's activations in the backward pass instead of storing them.
    """

    def __init__(
        self,
        config: EncoderConfig,
        *,
        num_labels: int | None = None,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.embeddings = Embeddings(config, **options)
        self.layers = nnx.List([EncoderLayer(config, **options) for _ in range(config.num_layers)])
        self.head: ClassificationHead | None = nnx.data(None)
        self.config = config
        self.dtype, self.param_dtype = dtype, param_dtype
        self.remat = False
        if num_labels is not None:
            self.add_classifier(num_labels, rngs=rngs)

    def __call__(
        self,
        input_ids: Tokens,
        attention_mask: Mask | None = None,
        token_type_ids: Tokens | None = None,
        segment_ids: Tokens | None = None,
        *,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "B S D"] | Float[Array, "B labels"]:
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
    ) -> tuple[Float[Array, "B S D"] | Float[Array, "B labels"], AuxLosses]:
        """Encode sequences.

        Args:
            input_ids: token ids, below the vocabulary's size. Under jit neither they nor types are
                checked: as JAX indexes, one too large reads the table's last row, and a negative
                one counts from its end.
            attention_mask: 0 or False at padding; None for no padding.
            token_type_ids: sentence of each token, None for zeros; refused by a model without token
                types.
            segment_ids: for several sequences packed into a row, each a run of one id: tokens see
                only their own segment and positions start anew in it. A head still reads the
                row's first token, and thus its first segment.
            dropout_key: draws this step's dropout; None turns dropout off.

        Returns:
            Hidden states or logits, and auxiliary losses summed over layers and valid tokens.

        Raises:
            ValueError: a shape is wrong, the sequence is longer than the model's positions, the
                model has no token types, or a token id or type is outside its tables.
        """
        keys = split_key(dropout_key, 2)
        x, aux = self.hidden_states(
            input_ids, attention_mask, token_type_ids, segment_ids, dropout_key=keys[0]
        )
        return (x if self.head is None else self.head(x[:, 0], dropout_key=keys[1])), aux

    def hidden_states(
        self,
        input_ids: Tokens,
        attention_mask: Mask | None = None,
        token_type_ids: Tokens | None = None,
        segment_ids: Tokens | None = None,
        *,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Float[Array, "B S D"], AuxLosses]:
        """The last layer's output; arguments and errors as for `forward`."""
        ids = token_array(input_ids, "input_ids")
        optional = (attention_mask, token_type_ids, segment_ids)
        mask, types, segments = (None if a is None else jnp.asarray(a) for a in optional)
        check_inputs(
            ids,
            self.config.max_length,
            attention_mask=mask,
            token_type_ids=types,
            segment_ids=segments,
        )
        if types is not None and self.embeddings.token_type is None:
            raise ValueError(
                f"a {self.config.model_type} model has no token types; leave token_type_ids out"
            )
        check_batch(self, {"input_ids": ids, "token_type_ids": types}, "input")
        if mask is not None:
            mask = mask != 0
        keys = split_key(dropout_key, len(self.layers) + 1)
        x = self.embeddings(ids, types, segments, dropout_key=keys[-1])
        losses = []
        for layer, key in zip(self.layers, keys[:-1], strict=True):
            run = rematerialized(layer) if self.remat else layer
            x, aux = run(x, mask, segments, key)
            losses.append(aux)
        return x, sum_aux(*losses)

    def add_classifier(self, num_labels: int, *, rngs: nnx.Rngs) -> None:
        """Put a fresh classification head on the model."""
        self.head = ClassificationHead(
            self.config, num_labels, dtype=self.dtype, param_dtype=self.param_dtype, rngs=rngs
        )

    @property
    def base_prefix(self) -> str:
        """Prefix of the backbone's modules in a Hugging Face checkpoint with a head."""
        return f"{self.config.model_type}."

    def module_paths(self) -> dict[str, str]:
        """Hugging Face's name of every module that holds weights -> its path in the model."""
        family = self.config.model_type
        prefix = "" if self.head is None else self.base_prefix
        paths = numbered(BACKBONE_MODULES[family], prefix, len(self.layers))
        return paths if self.head is None else paths | HEAD_MODULES[family]


_BERT_MODULES = {
    "embeddings.word_embeddings": "embeddings.word",
    "embeddings.position_embeddings": "embeddings.position",
    "embeddings.token_type_embeddings": "embeddings.token_type",
    "embeddings.LayerNorm": "embeddings.norm",
    "encoder.layer.{i}.attention.self.query": "layers.{i}.attention.q_proj",
    "encoder.layer.{i}.attention.self.key": "layers.{i}.attention.k_proj",
    "encoder.layer.{i}.attention.self.value": "layers.{i}.attention.v_proj",
    "encoder.layer.{i}.attention.output.dense": "layers.{i}.attention.o_proj",
    "encoder.layer.{i}.attention.output.LayerNorm": "layers.{i}.attention_norm",
    "encoder.layer.{i}.intermediate.dense": "layers.{i}.ffn.up",
    "encoder.layer.{i}.output.dense": "layers.{i}.ffn.down",
    "encoder.layer.{i}.output.LayerNorm": "layers.{i}.ffn_norm",
}
_DISTILBERT_MODULES = {
    "embeddings.word_embeddings": "embeddings.word",
    "embeddings.position_embeddings": "embeddings.position",
    "embeddings.LayerNorm": "embeddings.norm",
    "transformer.layer.{i}.attention.q_lin": "layers.{i}.attention.q_proj",
    "transformer.layer.{i}.attention.k_lin": "layers.{i}.attention.k_proj",
    "transformer.layer.{i}.attention.v_lin": "layers.{i}.attention.v_proj",
    "transformer.layer.{i}.attention.out_lin": "layers.{i}.attention.o_proj",
    "transformer.layer.{i}.sa_layer_norm": "layers.{i}.attention_norm",
    "transformer.layer.{i}.ffn.lin1": "layers.{i}.ffn.up",
    "transformer.layer.{i}.ffn.lin2": "layers.{i}.ffn.down",
    "transformer.layer.{i}.output_layer_norm": "layers.{i}.ffn_norm",
}

#: For each family, Hugging Face's name of a backbone module -> path in `Encoder`.
BACKBONE_MODULES: dict[EncoderType, dict[str, str]] = {
    "bert": _BERT_MODULES,
    "roberta": _BERT_MODULES,
    "distilbert": _DISTILBERT_MODULES,
}
#: The same for sequence classification's head. BERT's pooler is saved inside its backbone.
HEAD_MODULES: dict[EncoderType, dict[str, str]] = {
    "bert": {"bert.pooler.dense": "head.dense", "classifier": "head.out"},
    "roberta": {"classifier.dense": "head.dense", "classifier.out_proj": "head.out"},
    "distilbert": {"pre_classifier": "head.dense", "classifier": "head.out"},
}
