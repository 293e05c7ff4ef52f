"""What to fine-tune, on which data, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import tyro

from spt_jax.config import SPTConfig, TrainConfig
from spt_jax.names import explains_names

Task = Literal["classification", "regression", "multi-label", "language"]
Tracker = Literal["trackio", "wandb"]
Layout = Literal["text", "messages", "sharegpt", "alpaca", "prompt-completion"]

#: Models where none is named, by whether the task is language.
_MODELS = {True: "smollm2", False: "minilm"}
#: Tokens of a row at most, likewise.
_MAX_LENGTHS = {True: 1024, False: 128}


def _as_paths(config: Any, *names: str) -> None:
    """Turn texts into paths."""
    for name in names:
        if isinstance(value := getattr(config, name), str):
            object.__setattr__(config, name, Path(value))


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Files of rows, and what their columns are."""

    train_file: Path
    """Rows to train on: .csv, .tsv, .jsonl, .json (an array), .parquet, a directory that Hugging
    Face's datasets saved, or text (any other ending)."""
    eval_file: Path | None = None
    """Rows to evaluate on, in any of these formats; by default the split validation or test of a
    directory, or --eval-share of the others."""
    eval_share: float = 0.1
    """Share of the rows that is held out for evaluation where there is no --eval-file; 0 for
    none."""
    text_columns: tuple[str, ...] = ()
    """The column with the text, or the two with a pair of texts; guessed where that is plain."""
    label_columns: tuple[str, ...] = ()
    """The column with the label, a list or names with commas between them for multi-label; or a
    column of 0 and 1 for each class. Guessed where that is plain."""
    layout: Layout | None = None
    """What a row for a language model is: a text, a conversation as messages of role and content,
    as ShareGPT (conversations of from and value) or Alpaca (instruction, input, output) has it, or
    a prompt with its completion; by default what the columns say."""
    prompt_column: str = "prompt"
    """The column with the prompt, of the layout prompt-completion."""
    completion_column: str = "completion"
    """The column with its completion."""
    skip_bad_rows: bool = False
    """Leave rows out that cannot be used, and count them, where the first one is an error
    otherwise."""

    def __post_init__(self) -> None:
        _as_paths(self, "train_file", "eval_file")
        if not 0 <= self.eval_share < 1:
            raise ValueError(f"eval_share must lie in [0, 1), got {self.eval_share}")
        if len(self.text_columns) > 2:
            raise ValueError(
                f"text_columns are one or two, got {len(self.text_columns)}: "
                f"{', '.join(self.text_columns)}"
            )


@explains_names
@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """One run of `finetune`; what is None is taken from the task's recipe."""

    model: str | None = None
    """Hugging Face directory or hub id, or a GGUF file; by default minilm for labels and scores,
    smollm2 for texts and conversations, which the set-up installs."""
    task: Task | None = None
    """What is learnt: a class, a score, several classes at once, or to write; by default what the
    columns say."""
    data: Annotated[DataConfig, tyro.conf.arg(name="")]
    spt: SPTConfig | None = None
    train: TrainConfig | None = None
    out: Path = Path("runs/finetune")
    """Folder for the result, report.json, config.yaml, checkpoints and TensorBoard events."""
    max_length: int | None = None
    """Tokens of a row, what is longer is cut; by default 128, or 1024 for texts and
    conversations, or as many as the model has positions for."""
    plain_chat: bool = False
    """Write conversations as lines `Role: content`, whatever template the model has."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype, and that of frozen weights."""
    merge: bool = False
    """Save the whole model as a Hugging Face directory, OUT/model, not an adapter, OUT/adapter."""
    tracker: Tracker | None = None
    """Show the run's figures there too, beside TensorBoard; the package must be installed."""
    project: str = "spt-jax"
    """The tracker's project; the run is called as --out."""
    push_to_hub: str | None = None
    """Put the result into this repository of the Hugging Face Hub, owner/name, which is made if it
    is not there."""
    hub_private: bool = True
    """Whether a repository that is made is private."""
    resume: bool = False
    """Go on with the run in --out."""
    overwrite: bool = False
    """Delete the run in --out."""

    def __post_init__(self) -> None:
        _as_paths(self, "out")
        if self.resume and self.overwrite:
            raise ValueError("give resume or overwrite, not both")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {self.max_length}")

    def resolved(self, task: Task, data: DataConfig) -> ResolvedConfig:
        """The run with everything decided.

        Args:
            task: what the rows are for.
            data: with the columns that were found.
        """
        spt, train = RECIPES[task]
        language = task == "language"
        return ResolvedConfig(
            config=replace(
                self,
                model=self.model or _MODELS[language],
                task=task,
                data=data,
                spt=self.spt or spt,
                train=self.train or train,
            ),
            default_max_length=_MAX_LENGTHS[language],
        )


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig:
    """A run of which nothing but the length is left to the model.

    Attributes:
        config: without a None for model, task, spt and train.
        default_max_length: tokens of a row where `config.max_length` is None.
    """

    config: FinetuneConfig
    default_max_length: int

    @property
    def model(self) -> str:
        """Directory, file or id of the base model."""
        assert self.config.model is not None
        return self.config.model

    @property
    def task(self) -> Task:
        """What is learnt."""
        assert self.config.task is not None
        return self.config.task

    @property
    def spt(self) -> SPTConfig:
        """What is added to the model."""
        assert self.config.spt is not None
        return self.config.spt

    @property
    def train(self) -> TrainConfig:
        """How it is trained."""
        assert self.config.train is not None
        return self.config.train

    def row_length(self, positions: int) -> int:
        """Tokens of a row at most.

        Args:
            positions: of the model.

        Raises:
            ValueError: the length asked for is above them.
        """
        asked = self.config.max_length
        if asked is not None and asked > positions:
            raise ValueError(
                f"max_length {asked} is above the {positions} positions of the model; choose at "
                f"most {positions}"
            )
        return asked or min(self.default_max_length, positions)


_LABELS = SPTConfig(), TrainConfig(learning_rate=1e-3)
#: What is added, and how it is trained, where that is not said. A decoder's loss suffers more from
#: a routed FFN than it gains in time.
RECIPES: Mapping[Task, tuple[SPTConfig, TrainConfig]] = MappingProxyType(
    {
        "classification": _LABELS,
        "regression": _LABELS,
        "multi-label": _LABELS,
        "language": (SPTConfig(ffn=None), TrainConfig(learning_rate=1e-3, batch_size=4)),
    }
)
