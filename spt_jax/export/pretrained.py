"""Writes a model as a merged Hugging Face directory."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax import nnx
from flax.typing import Dtype

from spt_jax.export.dense import (
    Units,
    check_model,
    classifier,
    factor_matrices,
    original_units,
    task_of,
)
from spt_jax.export.files import (
    Tensor,
    check_replaceable,
    new_directory,
    write_json,
    write_safetensors,
)
from spt_jax.export.modules import describe, sparse_modules, write_modules, write_report
from spt_jax.models.checkpoint import INDEX_FILE, WEIGHTS_FILE
from spt_jax.models.decoder import Decoder
from spt_jax.models.encoder import Encoder
from spt_jax.models.gguf import find_gguf, read_gguf
from spt_jax.models.gguf_tokenizer import read_tokenizer, tokenizer_config
from spt_jax.models.hub import ADDITIONAL_TEMPLATES, find_files
from spt_jax.models.pretrained import Task, checked_dtype
from spt_jax.models.slots import Slot, module_at, tensor_slots
from spt_jax.processes import to_host

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]

#: Files of a tokenizer, and the defaults of generation that lie beside it.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)

#: Model type -> how transformers begins the names of its classes.
_CLASSES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "distilbert": "DistilBert",
    "opt": "OPT",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
}
_CLASS_ENDINGS: dict[Task, str] = {
    "backbone": "Model",
    "causal-lm": "ForCausalLM",
    "sequence-classification": "ForSequenceClassification",
}

_log = logging.getLogger(__name__)


def save_pretrained(
    model: Encoder | Decoder,
    out_dir: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    dtype: Dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    labels: Sequence[str] | None = None,
    problem_type: ProblemType | None = None,
    overwrite: bool = False,
) -> None:
    """Write `model` as a Hugging Face directory, LoRA merged into the weights.

    A dense model, or one with LoRA alone, is the same function when transformers or
    `load_pretrained` loads it. transformers does not know sparse attention and routed FFNs: it
    computes those layers densely, which a warning says, and the modules are written beside
    (`spt_config.json`, `spt_modules.safetensors`, `adaptation.json`); `load_adapter` adds them to
    the model that `load_pretrained` loads from the directory. Merging is in float32. The directory
    appears whole or not at all; tensors are made and written one by one.

    Args:
        model: a model of `load_pretrained`, adapted or not.
        out_dir: the directory, absent or empty.
        tokenizer: where to copy the tokenizer's files and `generation_config.json` from: a
            directory, GGUF file, model package or Hub id, as for `load_tokenizer`; None for no
            copy.
        dtype: dtype of the weights; None for the model's own.
        max_shard_bytes: where a file would grow beyond this, another is begun.
        labels: names of the outputs of a classification head, for `id2label`; None for numbers.
        problem_type: what transformers is to take the head's labels for; None leaves it open.
        overwrite: replace the whole of an earlier export in `out_dir`.

    Raises:
        ValueError: the model is of no known family, labels are not one for each output of a
            classification head, `out_dir` holds files that must not be replaced, `tokenizer` has
            no tokenizer, or an argument is wrong.
        OSError: the directory cannot be written; what was there is as before.

    Example:
        >>> spt_jax.save_pretrained(model, "merged", tokenizer="minilm")  # doctest: +SKIP
    """
    check_model("save_pretrained", model)
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    stored = None if dtype is None else checked_dtype("dtype", dtype)
    out = Path(out_dir)
    check_replaceable(out, overwrite=overwrite)
    head = classifier(model)
    if labels is not None and (head is None or len(labels) != head.out_features):
        outputs = "no classification head" if head is None else f"{head.out_features} outputs"
        raise ValueError(f"{len(labels)} labels were given, but the model has {outputs}")
    files = {} if tokenizer is None else _tokenizer_files(tokenizer)
    tensors = _tensors(model, stored)
    with new_directory(out, overwrite=overwrite) as directory:
        write_json(directory / "config.json", _config(model, tensors, labels, problem_type))
        _write_weights(directory, tensors, max_shard_bytes)
        for name, content in files.items():
            (directory / name).write_bytes(content)
        if sparse_modules(model):
            write_modules(model, directory, with_head=False)
            write_report(model, directory)
    if sparse_modules(model):
        _log.warning(
            "%s: %s are not part of a Hugging Face model: transformers computes these layers "
            "densely. They are written beside, and spt_jax.load_adapter adds them to the model",
            out,
            describe(model),
        )


def _tokenizer_files(source: str | os.PathLike[str]) -> dict[str, bytes]:
    """Contents of the files by their names; what a GGUF file says in its metadata as such files."""
    directory = find_files(source, files=TOKENIZER_FILES)
    if (file := find_gguf(directory, instead_of="tokenizer.json")) is not None:
        gguf = read_gguf(file)
        config = json.dumps(tokenizer_config(gguf), indent=2, ensure_ascii=False)
        texts = {"tokenizer.json": read_tokenizer(gguf).to_str(), "tokenizer_config.json": config}
        return {name: text.encode() for name, text in texts.items()}
    found = [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
    if not any(path.stem in ("tokenizer", "vocab") for path in found):
        raise ValueError(f"{directory} has no tokenizer: none of {', '.join(TOKENIZER_FILES[:-1])}")
    if templates := sorted(p.name for p in (directory / ADDITIONAL_TEMPLATES).glob("*.jinja")):
        _log.warning(
            "%s: the chat templates %s are not copied; copy the folder %s yourself",
            directory,
            ", ".join(templates),
            ADDITIONAL_TEMPLATES,
        )
    return {path.name: path.read_bytes() for path in found}


def _unties(model: Encoder | Decoder) -> bool:
    """Whether LoRA on a tied embedding changes the input alone, so that an output is needed."""
    return (
        isinstance(model, Decoder)
        and task_of(model) == "causal-lm"
        and model.config.tie_embeddings
        and model.embedding.lora is not None
    )


def _config(
    model: Encoder | Decoder,
    tensors: Sequence[Tensor],
    names: Sequence[str] | None,
    problem_type: ProblemType | None,
) -> dict[str, Any]:
    dtype = tensors[0].dtype.name
    fields: dict[str, Any] = {"dtype": dtype, "torch_dtype": dtype}  # transformers 5, and 4
    if (head := classifier(model)) is not None:
        labels = names or [f"LABEL_{i}" for i in range(head.out_features)]
        fields["id2label"] = {str(i): label for i, label in enumerate(labels)}
        fields["label2id"] = {label: i for i, label in enumerate(labels)}
    if problem_type is not None:
        fields["problem_type"] = problem_type
    if _unties(model):
        fields["tie_word_embeddings"] = False
    described = model.config.to_hugging_face()
    architecture = _CLASSES[model.config.model_type] + _CLASS_ENDINGS[task_of(model)]
    return {"architectures": [architecture]} | described | fields


def _tensors(model: Encoder | Decoder, dtype: np.dtype | None) -> list[Tensor]:
    """The dense tensors of the model, under transformers' names."""
    units, paths = original_units(model), model.module_paths()
    tensors = []
    for name, slot in tensor_slots(model).items():
        module = module_at(model, paths[name.rpartition(".")[0]])
        own = np.dtype(slot.variable.get_value().dtype)
        order = units.get(id(module), Units())
        make = partial(_dense, module, slot, order, dtype or own)
        tensors.append(Tensor(name, slot.shape, dtype or own, make))
    if _unties(model):
        assert isinstance(model, Decoder)
        table = model.embedding.embedding
        own = np.dtype(table.get_value().dtype)
        output = Tensor("lm_head.weight", table.shape, dtype or own, lambda: to_host(table[...]))
        tensors.append(output)
    return tensors


def _dense(module: nnx.Module, slot: Slot, units: Units, dtype: np.dtype) -> np.ndarray:
    array = to_host(slot.variable[...]).reshape(slot.own_shape)
    if array.ndim == 1:
        return array[units.columns]
    if (lora := getattr(module, "lora", None)) is not None:
        a, b = factor_matrices(*lora.factors())
        merged = a @ b
        merged += array.astype(np.float32, copy=False)
        array = merged.astype(dtype, copy=False)
    array = units.of(array)
    return array.T if slot.transpose else array


def _write_weights(directory: Path, tensors: Sequence[Tensor], max_shard_bytes: int) -> None:
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.size_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.size_bytes
    if len(shards) == 1:
        write_safetensors(directory / WEIGHTS_FILE, tensors)
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(directory / name, shard)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.size_bytes for tensor in tensors)
    write_json(
        directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map}
    )
