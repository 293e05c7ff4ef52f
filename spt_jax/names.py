"""What spt-jax calls the options of transformers' `TrainingArguments` and PEFT's `LoraConfig`.

`NAMES` is the only table of them: errors and the page `docs/from-transformers.md` are made of it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

__all__ = ["NAMES", "Name", "check_options", "explains_names", "markdown"]

#: Where the options of a configuration begin on the command line of `spt_jax.finetune`.
_PREFIXES = MappingProxyType({"LoRAConfig": "spt.lora.", "TrainConfig": "train.",
                              "FinetuneConfig": ""})  # fmt: skip


@dataclass(frozen=True)
class Name:
    """An option of transformers' or PEFT's.

    Attributes:
        theirs: its name there.
        owner: our configuration to which it belongs.
        ours: our name; None where there is no such option.
        note: what differs, or what to do in its place.
    """

    theirs: str
    owner: str
    ours: str | None = None
    note: str = ""

    @property
    def option(self) -> str | None:
        """The option on the command line."""
        if self.ours is None:
            return None
        return f"--{_PREFIXES[self.owner]}{self.ours}".replace("_", "-")

    def remedy(self, instead: str | None) -> str:
        """What a message adds to the name, which `instead` stands for."""
        if instead is None:
            return f": {self.note}"
        return f"; spt-jax calls it {instead}" + (f": {self.note}" if self.note else "")


def _of(owner: str, *rows: tuple[str, str | None, str]) -> dict[str, Name]:
    return {theirs: Name(theirs, owner, ours, note) for theirs, ours, note in rows}


#: By their name.
NAMES: Mapping[str, Name] = MappingProxyType(
    _of(
        "LoRAConfig",
        ("r", "rank", "16 by default, theirs 8"),
        ("lora_r", "rank", "as TRL and others name it"),
        ("lora_alpha", "alpha", "32 by default, theirs 8"),
        ("lora_dropout", "dropout", "one mask a step serves all tokens"),
        ("use_rslora", "use_rslora", ""),
        ("target_modules", "target_modules", "or targets, by type: attention, ffn, embeddings"),
        ("lora_target_modules", "target_modules", "as TRL and others name it"),
        ("modules_to_save", "modules_to_save", "a task's head needs no naming"),
        ("rank_pattern", "rank_pattern", ""),
        ("alpha_pattern", "alpha_pattern", ""),
        ("exclude_modules", None, "leave them out of target_modules"),
        ("layers_to_transform", None, "name layers in target_modules, by a regular expression"),
        ("layers_pattern", None, "name layers in target_modules, by a regular expression"),
        ("bias", None, 'biases alone are not trained, as with "none"; a linear map of '
         "modules_to_save trains with its bias"),
        ("use_dora", None, "there is no DoRA"),
        ("init_lora_weights", None, "A is uniform in 1/sqrt(in), B is 0"),
        ("fan_in_fan_out", None, "the model's family says how weights lie"),
        ("task_type", None, "load_pretrained takes a task, and finetune one of its own"),
        ("inference_mode", None, "leave it out; nothing trains unless train is called"),
    )
    | _of(
        "TrainConfig",
        ("num_train_epochs", "epochs", ""),
        ("max_steps", "steps", "None, not -1, where epochs count"),
        ("per_device_train_batch_size", "batch_size",
         "examples of an optimizer step on all devices together"),
        ("per_device_eval_batch_size", "eval_batch_size", "on all devices together"),
        ("gradient_accumulation_steps", "accumulation",
         "it divides batch_size into microbatches where theirs multiplies it, so give "
         "batch_size = per_device_train_batch_size * gradient_accumulation_steps"),
        ("learning_rate", "learning_rate", "5e-4 by default, theirs 5e-5"),
        ("warmup_ratio", "warmup", "below 1 it is a share of the steps"),
        ("warmup_steps", "warmup", "from 1 on it is a number of steps"),
        ("lr_scheduler_type", "schedule", "linear, cosine or constant, each after the warm-up"),
        ("weight_decay", "weight_decay", "0.01 by default, theirs 0; of matrices alone"),
        ("adam_beta1", "b1", ""),
        ("adam_beta2", "b2", ""),
        ("adam_epsilon", "eps", ""),
        ("max_grad_norm", "clip_norm", "None, not 0, for no clipping"),
        ("optim", None, "it is AdamW"),
        ("gradient_checkpointing", "remat", ""),
        ("group_by_length", "group_by_length", ""),
        ("logging_steps", "log_every", "steps between lines off a terminal"),
        ("eval_steps", "eval_every", ""),
        ("eval_strategy", "eval_every", "steps, or None for the end of each epoch"),
        ("evaluation_strategy", "eval_every", "steps, or None for the end of each epoch"),
        ("save_steps", "checkpoint_every", "beside the checkpoints that follow each evaluation"),
        ("save_strategy", "checkpoint_every",
         "steps, beside the checkpoints that follow each evaluation"),
        ("load_best_model_at_end", "result", 'result="best", where "last" is the default'),
        ("metric_for_best_model", "monitor", "loss and perplexity count as better where lower"),
        ("greater_is_better", None, "losses and perplexity are better where lower, others higher"),
        ("early_stopping_patience", "patience", "evaluations without improvement"),
        ("seed", "seed", "0 by default, theirs 42"),
        ("data_seed", "seed", "one seed for data and dropout"),
        ("fsdp", "mesh", "MeshConfig(fsdp=...), how many devices share each weight"),
        ("report_to", None, "TensorBoard events are always written"),
    )
    | _of(
        "FinetuneConfig",
        ("model_name_or_path", "model", "load_pretrained takes it first"),
        ("output_dir", "out", "train takes it as out_dir"),
        ("overwrite_output_dir", "overwrite", "train takes it too"),
        ("resume_from_checkpoint", "resume", "train takes it too; it is True or False"),
        ("bf16", "dtype", 'dtype="bfloat16", which load_pretrained takes too'),
        ("fp16", "dtype",
         'dtype="bfloat16" is what to train in; load_pretrained takes "float16" too'),
        ("max_seq_length", "max_length", "tokens of a row"),
    )
)  # fmt: skip


def explains_names[Kind: type](kind: Kind) -> Kind:
    """Make a dataclass that is given a name of transformers' or PEFT's say what it calls that.

    Example:
        >>> from spt_jax import LoRAConfig
        >>> LoRAConfig(r=8)
        Traceback (most recent call last):
        ...
        TypeError: LoRAConfig has no r; spt-jax calls it rank: 16 by default, theirs 8
    """
    construct = kind.__init__  # type: ignore[misc]
    own = {field.name for field in fields(kind)}

    @functools.wraps(construct)
    def explaining(self: Any, *arguments: Any, **options: Any) -> None:
        for name in (n for n in options if n in NAMES and n not in own):
            known = NAMES[name]
            instead = known.ours
            if instead is not None and known.owner != kind.__name__:
                instead += f" of {known.owner}"
            raise TypeError(f"{kind.__name__} has no {name}{known.remedy(instead)}")
        construct(self, *arguments, **options)

    kind.__init__ = explaining  # type: ignore[misc]
    return kind


def check_options(arguments: Iterable[str]) -> None:
    """Raise a ValueError for an option of a command line that is transformers' or PEFT's.

    Example:
        >>> check_options(["--spt.lora.r", "8"])
        Traceback (most recent call last):
        ...
        ValueError: no option --spt.lora.r; spt-jax calls it --spt.lora.rank: 16 by default, \
theirs 8
    """
    for word in arguments:
        given = word.partition("=")[0]
        path, _, last = given.removeprefix("--").replace("-", "_").rpartition(".")
        last = last if last in NAMES else last.removeprefix("no_")
        ours = path and f"{path}." not in _PREFIXES.values()  # as --train.mesh.fsdp
        known = NAMES.get(last) if given.startswith("--") and not ours else None
        option = f"--{path}{'.' if path else ''}{last}".replace("_", "-")
        if known is not None and option != known.option:
            raise ValueError(f"no option {given}{known.remedy(known.option)}")


def markdown(owner: str) -> str:
    """The table of a configuration's names, as the documentation has it."""
    rows = ["| theirs | spt-jax | |", "| --- | --- | --- |"]
    for name in NAMES.values():
        if name.owner == owner:
            ours = "none" if name.ours is None else f"`{name.ours}`"
            rows.append(f"| `{name.theirs}` | {ours} | {name.note} |".replace("|  |", "| |"))
    return "\n".join(rows)
