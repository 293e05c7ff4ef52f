"""Fine-tuning from files to a saved adapter or model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from flax import nnx

from spt_jax.adaptation import AdaptationReport
from spt_jax.config import SPTConfig
from spt_jax.export import save_adapter, save_pretrained
from spt_jax.export.pretrained import ProblemType
from spt_jax.finetune.arguments import write_config
from spt_jax.finetune.card import write_card
from spt_jax.finetune.config import FinetuneConfig, ResolvedConfig, Task
from spt_jax.finetune.hub import check_access, push
from spt_jax.finetune.job import Job
from spt_jax.finetune.prepare import Content, Data, encode, read_content
from spt_jax.finetune.tracking import Record, check_tracker, tracked
from spt_jax.finetune.trained import Trained
from spt_jax.models import Decoder
from spt_jax.models.config import read_config
from spt_jax.models.encoder import Encoder
from spt_jax.models.hub import CONFIG_FILES, find_files, hub_id
from spt_jax.processes import is_first
from spt_jax.training import (
    TrainResult,
    environment,
    evaluate,
    finite,
    next_token,
    write_json_atomic,
)

CONFIG_FILE = "config.yaml"
REPORT_FILE = "report.json"
_METRICS: Mapping[Task, tuple[str, ...]] = MappingProxyType(
    {
        "classification": ("accuracy", "matthews"),
        "multi-label": ("f1_micro", "exact_match"),
        "regression": ("pearson", "spearman"),
        "language": ("perplexity",),
    }
)
_PROBLEMS: Mapping[Task, ProblemType | None] = MappingProxyType(
    {
        "classification": "single_label_classification",
        "multi-label": "multi_label_classification",
        "regression": "regression",
        "language": None,
    }
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinetuneResult:
    """What came of a run.

    Attributes:
        directory: of the adapter, or of the merged model.
        model: the trained model, as it was when training ended.
        figures: what training reached and cost, see `TrainResult.figures`.
        report: all that `report.json` holds.
    """

    directory: Path
    model: Encoder | Decoder
    figures: Mapping[str, Any]
    report: Mapping[str, Any]


def finetune(config: FinetuneConfig) -> FinetuneResult:
    """Fine-tune a model on rows of a file, and save what came of it.

    All rows are read and checked before a model is loaded. Under `config.out` appear
    `config.yaml` (the run with everything decided, which `python -m spt_jax.finetune --config`
    takes again), checkpoints and TensorBoard events, `adapter/` (PEFT's files) or with `merge`
    `model/` (a Hugging Face directory), each with a model card and `finetune.json`, by which
    `spt_jax.predict` and `spt_jax.chat` know what it is for, and, last, `report.json`.

    Args:
        config: the run.

    Returns:
        Where the result lies, the model, and the figures.

    Raises:
        BadRow: a row cannot be used; the message gives file, place and reason.
        ValueError: an option, a file or the model is wrong, or they do not go together.
        ConnectionError: the Hub cannot be reached; nothing was computed, or the result is on disk.
        ModuleNotFoundError: the tracker is not installed.
        CheckpointError: `config.out` holds another run.
        Interrupted: SIGTERM or SIGINT came; a checkpoint is saved.
        NonFiniteLoss: the loss or its gradient is not finite.

    Example:
        >>> from spt_jax.finetune import DataConfig, FinetuneConfig, finetune
        >>> data = DataConfig(train_file="reviews.csv")  # doctest: +SKIP
        >>> finetune(FinetuneConfig(data=data, out="runs/reviews")).directory  # doctest: +SKIP
        PosixPath('runs/reviews/adapter')
    """
    content = read_content(config)
    run = content.resolved
    _check_out(run)
    if run.config.tracker is not None:
        check_tracker(run.config.tracker)
    if run.config.push_to_hub is not None:
        check_access(run.config.push_to_hub)
    model_config = read_config(find_files(run.model, files=CONFIG_FILES))
    data = encode(content, run.model, model_config)
    out = Path(run.config.out)
    out.mkdir(parents=True, exist_ok=True)
    if is_first():
        write_config(run.config, out / CONFIG_FILE)

    job = Job(
        source=run.model,
        task=run.task,
        num_labels=max(1, len(content.classes)),
        spt=run.spt,
        train=run.train,
        dtype=run.config.dtype,
        out=out,
        resume=run.config.resume,
        overwrite=run.config.overwrite,
    )
    rngs = nnx.Rngs(run.train.seed)
    model = job.load(rngs)
    before = _before(model, run, data)
    tokens = run.train.total_steps(len(data.train)) * run.train.batch_size * data.train.length
    job.adapt(model, data.train, rngs=rngs, training_tokens=tokens)
    metrics = _METRICS[run.task] if data.evaluation else ()
    with _recorder(run) as record:
        result = job.fit(model, data.train, data.evaluation, metrics, record)
    directory = _save(model, run, content, data, out)
    report = _report(model, run, content, data, before, result, directory)
    if is_first():
        write_card(directory, run, report, result.metrics)
        write_json_atomic(out / REPORT_FILE, report)
        if run.config.push_to_hub is not None:
            push(directory, run.config.push_to_hub, private=run.config.hub_private)
    return FinetuneResult(directory, model, result.figures(), report)


def _check_out(run: ResolvedConfig) -> None:
    """Raise a ValueError where there is a run already, before anything is computed."""
    config = run.config
    if not (config.resume or config.overwrite) and (Path(config.out) / "checkpoints").exists():
        raise ValueError(
            f"{config.out} holds a run already: give --resume to go on with it, --overwrite to "
            "delete it, or another --out"
        )
    if not _adapts(run.spt) and run.train.trainable == "adapter":
        raise ValueError(
            "spt has neither lora, attention nor ffn, so there is no adapter to train; give one "
            'of them, or train with trainable="all" (--train.trainable all)'
        )


def _adapts(spt: SPTConfig) -> bool:
    return any(part is not None for part in (spt.lora, spt.attention, spt.ffn))


def _before(model: Encoder | Decoder, run: ResolvedConfig, data: Data) -> dict[str, float]:
    """Metrics of a language model as it comes; of others the head is random."""
    if run.task != "language" or data.evaluation is None:
        return {}
    values = evaluate(
        model,
        data.evaluation,
        objective=next_token,
        metrics=_METRICS["language"],
        batch_size=run.train.eval_batch_size or run.train.batch_size,
    )
    _log.info("before fine-tuning: perplexity %.2f", values["perplexity"])
    return values


@contextmanager
def _recorder(run: ResolvedConfig) -> Iterator[Record | None]:
    """What figures are recorded by beside TensorBoard."""
    config = run.config
    if config.tracker is None or not is_first():
        yield None
        return
    with tracked(config.tracker, config.project, config.out.name, asdict(config)) as record:
        yield record


def _save(
    model: Encoder | Decoder, run: ResolvedConfig, content: Content, data: Data, out: Path
) -> Path:
    """Write the adapter, or the whole model where all of it was trained or it is to be merged."""
    columns = run.config.data
    local = Path(run.model).expanduser()
    base = str(local.resolve()) if local.exists() else run.model
    whole = run.config.merge or run.train.trainable == "all" or run.spt.lora is None
    directory = out / ("model" if whole else "adapter")
    if whole:
        save_pretrained(
            model,
            directory,
            tokenizer=run.model,
            labels=content.classes or None,
            problem_type=_PROBLEMS[run.task],
            overwrite=True,
        )
    else:
        base_model = hub_id(run.model) or base  # PEFT knows no packages
        save_adapter(model, directory, base_model=base_model, overwrite=True)
    if is_first():
        Trained(
            task=run.task,
            base_model=base,
            id2label={str(i): name for i, name in enumerate(content.classes)},
            max_length=data.length,
            text_columns=columns.text_columns,
            layout=columns.layout,
            prompt_column=columns.prompt_column,
            completion_column=columns.completion_column,
            plain_chat=run.config.plain_chat,
            form=run.train.evaluate_as,
        ).save(directory)
    return directory


def _report(
    model: Encoder | Decoder,
    run: ResolvedConfig,
    content: Content,
    data: Data,
    before: Mapping[str, float],
    result: TrainResult,
    directory: Path,
) -> dict[str, Any]:
    adaptation: AdaptationReport | None = getattr(model, "adaptation", None)
    return {
        "task": run.task,
        "model": run.model,
        "result": directory.name,
        "classes": list(content.classes),
        "rows": {
            "train": len(content.train),
            "evaluation": len(content.evaluation),
            "left_out": content.left_out,
            "cut": data.cut,
        },
        "adaptation": None if adaptation is None else adaptation.summary(),
        "before": finite(before),
        "figures": finite(result.figures()),
        **environment(),
    }
