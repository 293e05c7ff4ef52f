"""The model card of a result: the README.md that the Hugging Face Hub shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from spt_jax.finetune.config import ResolvedConfig, Task
from spt_jax.models.hub import hub_id
from spt_jax.training import form_of, write_text_atomic

CARD_FILE = "README.md"
_PIPELINES: Mapping[Task, str] = {
    "classification": "text-classification",
    "multi-label": "text-classification",
    "regression": "text-classification",
    "language": "text-generation",
}
_CLASSES = {True: "AutoModelForCausalLM", False: "AutoModelForSequenceClassification"}


def write_card(
    directory: Path,
    run: ResolvedConfig,
    report: Mapping[str, Any],
    metrics: Mapping[str, float],
) -> None:
    """Write a result's model card.

    Args:
        directory: of the result.
        run: what was asked for.
        report: all that `report.json` holds.
        metrics: of the last or best evaluation; empty without any.
    """
    write_text_atomic(directory / CARD_FILE, card(run, report, metrics))


def card(run: ResolvedConfig, report: Mapping[str, Any], metrics: Mapping[str, float]) -> str:
    """The text of a card: metadata, use, results and training; see `write_card`."""
    whole = report["result"] == "model"
    base = hub_id(run.model)
    metadata = ModelCardData(
        base_model=base,
        library_name="transformers" if whole else "peft",
        pipeline_tag=_PIPELINES[run.task],
        tags=["spt-jax"] if run.spt.lora is None else ["spt-jax", "lora"],
    )
    kind = "model" if whole else "LoRA adapter"
    parts = [
        f"---\n{metadata.to_yaml().strip()}\n---",
        f"# A {kind} for {_goal(report)}",
        f"`{base or Path(run.model).name}`, fine-tuned with spt-jax, after "
        "[SPT](https://arxiv.org/abs/2312.10365): LoRA, and sparse parts where they pay.",
        f"## Use\n\n```py\n{_use(run, report, base, whole=whole)}\n```",
        f"## Results\n\n{_results(report, metrics)}",
        f"## Training\n\n{_training(run, report)}",
    ]
    return "\n\n".join(parts) + "\n"


def _goal(report: Mapping[str, Any]) -> str:
    match report["task"]:
        case "classification":
            return f"the classes {', '.join(report['classes'])}"
        case "multi-label":
            return f"any of the classes {', '.join(report['classes'])}"
        case "regression":
            return "scores"
        case _:
            return "writing"


def _use(run: ResolvedConfig, report: Mapping[str, Any], base: str | None, *, whole: bool) -> str:
    language = run.task == "language"
    example = '"What is a cat?"' if language else '"A text."'
    if len(run.config.data.text_columns) == 2:
        example = '("A text.", "Another one.")'
    loader = _CLASSES[language]
    labels = "" if language else f", num_labels={max(1, len(report['classes']))}"
    lines = [
        "from spt_jax.predict import predict",
        f'predict("DIRECTORY", [{example}])',
        "",
        *([] if whole else ["from peft import PeftModel"]),
        f"from transformers import {loader}",
    ]
    if whole:
        lines.append(f'model = {loader}.from_pretrained("DIRECTORY")')
    else:
        lines.append(f'base = {loader}.from_pretrained("{base or "BASE_MODEL"}"{labels})')
        lines.append('model = PeftModel.from_pretrained(base, "DIRECTORY")')
    return "\n".join(lines)


def _results(report: Mapping[str, Any], metrics: Mapping[str, float]) -> str:
    """A row a metric: as other tools compute the result, and as it was trained."""
    names = [name for name in metrics if form_of(name) is None]
    if not names:
        return "Nothing was held out to evaluate on."
    columns = [
        ("base model", report["before"]),
        ("dense form", {name: metrics.get(f"{name}_dense") for name in names}),
        ("sparse form", {name: metrics.get(f"{name}_sparse") for name in names}),
    ]
    columns = [(head, values) for head, values in columns if any(map(values.get, names))]
    lines = [
        f"On {report['rows']['evaluation']} rows that were held out from training:",
        "",
        _row(["metric", *(head for head, _ in columns)]),
        _row(["---"] * (1 + len(columns))),
        *(_row([name, *(_shown(values.get(name)) for _, values in columns)]) for name in names),
        "",
        "transformers, PEFT and vLLM compute the dense form.",
    ]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _training(run: ResolvedConfig, report: Mapping[str, Any]) -> str:
    figures, rows = report["figures"], report["rows"]
    lines = [
        f"{rows['train']} rows, {figures['steps']} steps of {run.train.batch_size}, learning rate "
        f"{run.train.learning_rate:g}, {run.config.dtype}; {rows['left_out']} rows left out, "
        f"{rows['cut']} cut",
        f"{figures['trainable_parameters']:,} trainable parameters of "
        f"{figures['total_parameters']:,}",
        f"a step took {figures['step_ms']:.0f} ms on {report['device']['kind']}",
    ]
    if report["adaptation"]:
        lines.append(f"sparse parts: {report['adaptation']}")
    return "\n".join(f"* {line}" for line in lines)
