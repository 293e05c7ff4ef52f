"""What experiments leave behind: CSV files, plots, and pages in Markdown."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib
from rich.table import Table

from spt_jax.training import environment
from spt_jax.training.metrics import write_text_atomic

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

#: Options that say where things lie, and the word that stands for each; None leaves it out.
_LOCAL: Mapping[str, str | None] = {
    "data_dir": "DIR",
    "text_file": "FILE",
    "eval_file": "FILE",
    "out": None,
    "report": None,
    "report_only": None,
    "overwrite": None,
}


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with all the columns that any of them has; the file is whole at any moment."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text_atomic(path, text.getvalue())


def save_figure(figure: Figure, path: Path) -> None:
    """Write a plot, and close it."""
    figure.savefig(path, dpi=120)
    plt.close(figure)


def command(module: str, options: Any) -> str:
    """The command line that makes a page; options at their defaults are left out.

    Args:
        module: such as "experiments.capture".
        options: its dataclass of options.

    Example:
        >>> from experiments.capture import Options
        >>> command("experiments.capture", Options(seed=1, sweep=False))
        'python -m experiments.capture --no-sweep --seed 1'
    """
    words = ["python", "-m", module]
    for option in fields(options):
        value = getattr(options, option.name)
        if value == option.default:
            continue
        name = option.name.replace("_", "-")
        if option.name in _LOCAL:
            stand_in = _LOCAL[option.name]
            words += [] if stand_in is None else [f"--{name}", stand_in]
        elif isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def markdown(table: Table) -> str:
    """A table, without its title.

    Example:
        >>> table = Table("method", "score")
        >>> table.add_row("lora", "0.5")
        >>> print(markdown(table))
        | method | score |
        | --- | --- |
        | lora | 0.5 |
    """
    header = [str(column.header) for column in table.columns]
    body = zip(*(map(str, column.cells) for column in table.columns), strict=True)
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *body])


def bullets(lines: Iterable[str]) -> str:
    """A list."""
    return "\n".join(f"* {line}" for line in lines)


def page(title: str, *parts: str | Table) -> str:
    """A page: its title and its parts, tables under theirs."""
    texts = [f"# {title}"]
    for part in parts:
        if isinstance(part, Table):
            texts += [f"## {part.title}"] if part.title else []
            texts.append(markdown(part))
        else:
            texts.append(part)
    return "\n\n".join(texts) + "\n"


def machine(record: Mapping[str, Any]) -> str:
    """The device of a record that holds `spt_jax.training.environment`."""
    device = record["device"]
    if device["platform"] != "cpu":
        return f"{device['count']} {device['kind']}"
    return f"{device['cpu_model']}, {device['cpu_cores']} cores, no GPU"


def versions(record: Mapping[str, Any]) -> str:
    """The versions of such a record."""
    named = {"Python": record["python"], **record["versions"]}
    return ", ".join(f"{name} {version}" for name, version in named.items())


def here_and_now(record: Mapping[str, Any] | None = None) -> list[str]:
    """Conditions of what was measured: date, machine, versions.

    Args:
        record: a record that holds `spt_jax.training.environment`; None for this process's.
    """
    record = record or environment()
    return [
        f"Date: {datetime.now(UTC).date().isoformat()}.",
        f"Machine: {machine(record)}.",
        f"Versions: {versions(record)}.",
    ]


def how(module: str, options: Any, conditions: Iterable[str]) -> str:
    """The section that says how a page was made: the command, and a list of conditions."""
    return f"## How it was made\n\n```sh\n{command(module, options)}\n```\n\n{bullets(conditions)}"
