"""Models that were fine-tuned, ready to be used: from a merged directory or an adapter's."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spt_jax.config import Form
from spt_jax.export import load_adapter
from spt_jax.finetune.config import Task
from spt_jax.finetune.trained import TRAINED_FILE, Trained
from spt_jax.forms import set_form
from spt_jax.models import load_pretrained
from spt_jax.models.config import ModelConfig, read_config
from spt_jax.models.decoder import Decoder
from spt_jax.models.encoder import Encoder
from spt_jax.models.encoder_config import EncoderConfig
from spt_jax.models.hub import CONFIG_FILES, find_files, read_json

_ADAPTER_FILES = ("adapter_config.json", "spt_config.json")
_TASKS: dict[str, Task] = {
    "regression": "regression",
    "multi_label_classification": "multi-label",
    "single_label_classification": "classification",
}


@dataclass(frozen=True)
class Loaded:
    """A model with what it needs.

    Attributes:
        model: with its adapter, if it has one.
        config: of the model.
        source: where its tokenizer is.
        trained: what it is for.
    """

    model: Encoder | Decoder
    config: ModelConfig
    source: str
    trained: Trained


def load_trained(
    source: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    form: Form | None = None,
) -> Loaded:
    """Load what `finetune` saved, or any model of `load_pretrained`.

    Args:
        source: directory or Hub id of an adapter, which names its base model, or of a whole model;
            or what else `load_pretrained` takes.
        base_model: in place of the one that an adapter names.
        dtype: compute dtype, and that of weights.
        form: sparse or dense; None for the one that the model was judged in, or dense.

    Raises:
        ValueError: the directory holds no model, or an adapter without a base model.
        ConnectionError: the Hub cannot be reached.
    """
    directory = find_files(source, files=(*CONFIG_FILES, *_ADAPTER_FILES, TRAINED_FILE))
    is_adapter = not (directory / "config.json").is_file() and any(
        (directory / name).is_file() for name in _ADAPTER_FILES
    )
    trained = Trained.load(directory)
    base = str(source)
    if is_adapter:
        base = base_model or _base_of(directory, trained)
    elif base_model is not None:
        raise ValueError(f"{source} holds no adapter, so that it takes no base model")
    files = find_files(base, files=CONFIG_FILES)
    config = read_config(files)
    trained = trained or _described(files, base, config)
    model = load_pretrained(
        base,
        task="causal-lm" if trained.task == "language" else "sequence-classification",
        num_labels=max(1, len(trained.id2label)),
        dtype=dtype,
    )
    if is_adapter or (directory / "spt_config.json").is_file():
        load_adapter(model, source)
    set_form(model, form or trained.form)
    return Loaded(model, config, base, trained)


def _base_of(directory: Path, trained: Trained | None) -> str:
    if trained is not None:
        return trained.base_model
    path = directory / "adapter_config.json"
    if path.is_file() and (base := read_json(path).get("base_model_name_or_path")):
        return str(base)
    raise ValueError(f"{directory} does not name its base model; give it (--base-model)")


def _described(files: Path, base: str, config: ModelConfig) -> Trained:
    """What a model is for by its `config.json`."""
    path = files / "config.json"
    fields = read_json(path) if path.is_file() else {}
    classifies = any(
        str(name).endswith("ForSequenceClassification") for name in fields.get("architectures", ())
    )
    task: Task = "language"
    id2label: dict[str, str] = {}
    if classifies:
        id2label = {str(i): str(label) for i, label in fields.get("id2label", {}).items()}
        task = "regression" if len(id2label) == 1 else "classification"
        task = _TASKS.get(str(fields.get("problem_type")), task)
        id2label = {} if task == "regression" else id2label or {"0": "LABEL_0", "1": "LABEL_1"}
    elif isinstance(config, EncoderConfig):
        raise ValueError(f"{base} has neither a classification head nor is it a language model")
    return Trained(
        task=task,
        base_model=base,
        id2label=id2label,
        max_length=config.max_length,
        text_columns=(),
        layout=None,
        prompt_column="prompt",
        completion_column="completion",
        plain_chat=False,
        form="dense",
    )
