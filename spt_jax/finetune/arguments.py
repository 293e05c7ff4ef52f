"""A run's options on the command line and in YAML: tyro reads both."""

from __future__ import annotations

import os
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import tyro
import yaml
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from spt_jax import cli
from spt_jax.config import FrozenDict, TargetModules
from spt_jax.finetune.columns import find_columns
from spt_jax.finetune.config import RECIPES, DataConfig, FinetuneConfig, Task
from spt_jax.finetune.rows import read_rows
from spt_jax.names import check_options
from spt_jax.training import write_text_atomic

MODULE = "spt_jax.finetune"
DESCRIPTION = """Fine-tune a model on rows of your own, and save an adapter or a model.

    python -m spt_jax.finetune --train-file reviews.csv --out runs/reviews

Options come from --config FILE.yaml, too, as a run writes it beside its results; those of the
command line go before. A part that may be absent is left out by none, as --spt.attention none."""


_UNNAMED = Path(os.devnull)

#: How tyro is to read the fields that it has no rule of its own for.
_READERS = ConstructorRegistry()


@_READERS.primitive_rule
def _mapping_reader(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Patterns with numbers, one after the other: `q_proj 8 v_proj 4`."""
    if get_origin(info.type) is not Mapping:
        return None
    _, number = get_args(info.type)

    def read(words: list[str]) -> Mapping[str, Any]:
        if len(words) % 2:
            raise ValueError(f"every pattern needs a number after it, got {' '.join(words)}")
        return FrozenDict(zip(words[::2], map(number, words[1::2]), strict=True))

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"[PATTERN {number.__name__.upper()} ...]",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, Mapping),
        str_from_instance=lambda value: [str(x) for pair in value.items() for x in pair],
    )


@_READERS.primitive_rule
def _target_modules_reader(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Names; one word that is no name is all-linear or a regular expression."""
    if info.type != TargetModules:
        return None

    def read(words: list[str]) -> TargetModules:
        if len(words) != 1 or re.fullmatch(r"[\w.]+", words[0]):
            return None if [word.lower() for word in words] == ["none"] else tuple(words)
        return words[0]

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME [NAME ...]|REGEX|all-linear|None",
        instance_from_str=read,
        is_instance=lambda value: value is None or isinstance(value, str | tuple),
        str_from_instance=lambda value: list(value) if isinstance(value, tuple) else [str(value)],
    )


def parse_arguments(arguments: Sequence[str]) -> FinetuneConfig:
    """The run that a command line asks for, `spt` and `train` on top of the task's recipe.

    Args:
        arguments: without the name of the program.

    Raises:
        ValueError: an option is unknown or has a wrong value, or the configuration file is wrong.
    """
    given, files = _without_config(arguments)
    first = parse_for("classification", given, files)
    task = first.task or _task_of(first)
    return parse_for(task, given, files)


def _task_of(config: FinetuneConfig) -> Task:
    rows = read_rows(config.data.train_file, skip_bad=True)
    return find_columns(rows, config.data, None)[0]


def _without_config(arguments: Sequence[str]) -> tuple[list[str], list[Path]]:
    """Arguments without --config, and the files that it names."""
    given, files = [], []
    words = iter(arguments)
    for word in words:
        name, _, value = word.partition("=")
        if name != "--config":
            given.append(word)
        elif found := value or next(words, ""):
            files.append(Path(found))
        else:
            raise ValueError(f"--config needs a file; python -m {MODULE} --help lists the options")
    return given, files


def parse_for(task: Task, given: Sequence[str], files: Sequence[Path] = ()) -> FinetuneConfig:
    """The run that arguments ask for, on top of a task's recipe; no data is read.

    Args:
        task: whose recipe.
        given: arguments, without --config.
        files: configuration files, of which later ones go before.

    Raises:
        ValueError: as `parse_arguments`.
    """
    spt, train = RECIPES[task]
    config = FinetuneConfig(data=DataConfig(train_file=tyro.MISSING), spt=spt, train=train)
    for file in files:
        unnamed = config.data.train_file is tyro.MISSING  # which the command line may name
        if unnamed:
            config = _with(config, "data.train_file", _UNNAMED)
        try:
            config = _on_top(config, list(flatten(read_yaml(file))))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        if config.data.train_file == _UNNAMED:
            config = _with(config, "data.train_file", tyro.MISSING)
    return _on_top(config, given)


def _on_top(config: FinetuneConfig, arguments: Sequence[str]) -> FinetuneConfig:
    """The configuration, changed by arguments."""
    check_options(arguments)
    rest = list(arguments)
    for path, kind in optional_parts(FinetuneConfig):
        flag = f"--{path}"
        if flag in rest[:-1] and rest[rest.index(flag) + 1].lower() == "none":
            at = rest.index(flag)
            del rest[at : at + 2]
            config = _with(config, path, None)
        elif any(word.startswith(f"{flag}.") for word in rest) and _at(config, path) is None:
            config = _with(config, path, kind())
    with _READERS:
        return cli.parse(
            FinetuneConfig,
            MODULE,
            DESCRIPTION,
            args=rest,
            default=config,
            config=(tyro.conf.AvoidSubcommands,),
        )


def optional_parts(kind: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Paths of fields that hold a dataclass or None, with the dataclass, outer ones first."""
    hints = get_type_hints(kind)
    for field in fields(kind):
        hint, path = hints[field.name], f"{prefix}{field.name}"
        choices = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        for inner in (choice for choice in choices if is_dataclass(choice)):
            assert isinstance(inner, type)
            if type(None) in choices:
                yield path, inner
            yield from optional_parts(inner, f"{path}.")


def mapping_options(kind: type, prefix: str = "") -> Iterator[str]:
    """Options whose value is a mapping, as a command line names them."""
    hints = get_type_hints(kind)
    for field in fields(kind):
        hint, path = hints[field.name], f"{prefix}{field.name}"
        if get_origin(hint) is Mapping:
            yield path.replace("_", "-")
        for inner in get_args(hint) or (hint,):
            if is_dataclass(inner) and isinstance(inner, type):
                yield from mapping_options(inner, f"{path}.")


def _at(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


def _with(config: Any, path: str, value: Any) -> Any:
    name, _, rest = path.partition(".")
    return replace(config, **{name: _with(getattr(config, name), rest, value) if rest else value})


def read_yaml(file: Path) -> Mapping[str, Any]:
    """The mapping of a YAML file.

    Raises:
        ValueError: it is none, or not well-formed.
    """
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, Mapping):
        raise ValueError(f"a mapping of options is needed, got {type(found).__name__}")
    return found


def flatten(options: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Options of a YAML file as arguments; those below `data` have no prefix.

    Example:
        >>> list(flatten({"data": {"train_file": "a.csv"}, "train": {"steps": 3}, "merge": False}))
        ['--train-file', 'a.csv', '--train.steps', '3', '--no-merge']
    """
    for name, value in options.items():
        path = f"{prefix}{name}".replace("_", "-")
        if isinstance(value, Mapping) and path in mapping_options(FinetuneConfig):
            yield from (f"--{path}", *(str(x) for pair in value.items() for x in pair))
        elif isinstance(value, Mapping):
            yield from flatten(value, "" if path == "data" else f"{path}.")
        elif isinstance(value, bool):
            head, _, last = path.rpartition(".")
            yield f"--{head}{'.' if head else ''}{'' if value else 'no-'}{last}"
        elif isinstance(value, list):
            yield from (f"--{path}", *map(str, value))
        else:
            yield from (f"--{path}", str(value))


def write_config(config: FinetuneConfig, file: Path) -> None:
    """Write a configuration as `read_yaml` reads it."""
    text = yaml.safe_dump(_plain(asdict(config)), sort_keys=False, allow_unicode=True)
    write_text_atomic(file, text)


def _plain(value: Any) -> Any:
    """Values that YAML has."""
    if isinstance(value, Mapping):
        return {name: _plain(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    return str(value) if isinstance(value, Path) else value
