"""What a fine-tuned model is for: the file beside its weights by which it is used again."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from spt_jax.config import Form
from spt_jax.finetune.config import DataConfig, Layout, Task
from spt_jax.models.hub import read_json
from spt_jax.training import write_json_atomic

TRAINED_FILE = "finetune.json"


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What predictions need beside the weights.

    Attributes:
        task: what was learnt.
        base_model: directory, file or id of the model that was fine-tuned.
        id2label: names of the classes by their numbers, as in a Hugging Face `config.json`; empty
            where there are none.
        max_length: tokens of a row at most.
        text_columns: columns of the training file with texts.
        layout: of rows of a language model.
        prompt_column: column with prompts.
        completion_column: column with their completions.
        plain_chat: whether conversations are written plainly, not by the model's template.
        form: in which the model was judged.
    """

    task: Task
    base_model: str
    id2label: dict[str, str]
    max_length: int
    text_columns: tuple[str, ...]
    layout: Layout | None
    prompt_column: str
    completion_column: str
    plain_chat: bool
    form: Form

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in order."""
        return tuple(self.id2label[str(i)] for i in range(len(self.id2label)))

    def data(self, file: Path) -> DataConfig:
        """How rows of a file to predict are read."""
        return DataConfig(
            train_file=file,
            text_columns=self.text_columns,
            layout=self.layout,
            prompt_column=self.prompt_column,
            completion_column=self.completion_column,
        )

    def save(self, directory: Path) -> None:
        """Write `finetune.json`."""
        write_json_atomic(directory / TRAINED_FILE, asdict(self))

    @classmethod
    def load(cls, directory: Path) -> Trained | None:
        """Read `finetune.json`; None where there is none.

        Raises:
            ValueError: the file is damaged.
        """
        path = directory / TRAINED_FILE
        if not path.is_file():
            return None
        values: dict[str, Any] = read_json(path)
        names = {field.name for field in fields(cls)}
        if names != values.keys() or values["task"] not in get_args(Task):
            wrong = ", ".join(sorted(names ^ values.keys())) or f"task {values['task']!r}"
            raise ValueError(f"{path} is damaged, or of another version ({wrong}); train again")
        return cls(**values | {"text_columns": tuple(values["text_columns"])})
