"""Tables of what the reliability tests did, and the page that `--report` keeps of them.

Rows travel as properties of test reports, so that they arrive from every process of a test run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

KEY = "reliability"


@dataclass(frozen=True)
class Table:
    """One table of the page.

    Attributes:
        title: its heading.
        columns: names of its columns.
        text: what stands before it.
    """

    title: str
    columns: tuple[str, ...]
    text: str


TABLES = {
    "faults": Table(
        "Faults",
        ("fault", "times", "ended", "resumed", "message"),
        "Each strikes `experiments.glue`, which fine-tunes a tiny encoder with SPT for 48 steps "
        "and writes a checkpoint every 6. Every run was then resumed, and ended in the figures "
        "and, bit for bit, the parameters and optimizer state of a run that nothing struck: "
        "nothing up to the last whole checkpoint was lost. OUT is the folder of the results, DATA "
        "that of the data.",
    ),
    "bad_input": Table(
        "Bad input",
        ("area", "kind", "message", "s", "MB"),
        "Tried one after the other in one process. Each ends in exit code 2 and one line, within "
        "10 seconds and 2 GB: `s` is the time, `MB` the most memory that the process held "
        "meanwhile, JAX's own included.",
    ),
    "commands": Table(
        "Bad input at the command line",
        ("command", "message", "s", "MB"),
        "Each in a process of its own, from its start to exit code 2.",
    ),
    "properties": Table(
        "Properties of the ops",
        ("op", "examples", "compared", "programs", "types", "failures"),
        "Random shapes, types and options are drawn once and compiled (`programs`); hypothesis "
        "then draws masks, segments and values for them (`examples`, all different). In every "
        "example output and gradients are finite, and zero on masked rows; where values are "
        "neither tiny nor large (`compared`) they equal the float32 reference within the "
        "tolerance of their type. Selections equal it bit for bit, and codes where distances are "
        "exact; elsewhere a code's distance is the least within rounding.",
    ),
    "memory": Table(
        "Memory of a long run",
        ("steps", "checkpoints", "resident", "growth", "arrays", "objects"),
        "Growth from the second quarter of the run to the last: of resident memory, of JAX's "
        "arrays, and of Python's objects. Orbax and TensorStore keep some of each checkpoint.",
    ),
}


def summarize(terminal: pytest.TerminalReporter) -> None:
    """Print the tables with `--full`, and write the page if all tests passed."""
    config = terminal.config
    if not config.getoption("--full"):
        return
    rows: dict[str, list[dict[str, str]]] = {name: [] for name in TABLES}
    for name, row in _rows(terminal):
        rows[name].append(row)
    parts = [f"## {TABLES[name].title}\n\n{_text(name, rows[name])}" for name in rows if rows[name]]
    for part in parts:
        terminal.write_line("")
        terminal.write_line(part)
    if (path := config.getoption("--report")) is None:
        return
    missing = [name for name in TABLES if not rows[name]]
    if terminal.stats.get("failed") or terminal.stats.get("error") or missing:
        terminal.write_line(f"{path} is not written: tests failed or are missing")
        return
    from experiments.reports import bullets, here_and_now

    passed, skipped = (len(terminal.stats.get(name, [])) for name in ("passed", "skipped"))
    conditions = bullets(
        [
            f"{passed} tests passed, {skipped} were skipped, none failed.",
            f"Seed of the moments of faults: {config.getoption('--fault-seed')}.",
            *here_and_now(),
        ]
    )
    how = f"## How it was made\n\n```sh\nmake test-faults\n```\n\n{conditions}"
    path.write_text("\n\n".join(["# Reliability", *parts, how]) + "\n", encoding="utf-8")
    terminal.write_line(f"{path} is written")


def _rows(terminal: pytest.TerminalReporter) -> Iterator[tuple[str, dict[str, str]]]:
    for report in terminal.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == KEY and report.when == "call":
                yield value


def _text(name: str, rows: list[dict[str, str]]) -> str:
    table = TABLES[name]
    lines = [table.columns, ["---"] * len(table.columns), *(row.values() for row in rows)]
    cells = (" | ".join(_cell(cell) for cell in line) for line in lines)
    body = "\n".join(f"| {x} |" for x in cells)
    return "\n\n".join(filter(None, [table.text, _count(name, rows), body]))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _count(name: str, rows: list[dict[str, str]]) -> str:
    if name == "faults":
        return f"{sum(int(row['times']) for row in rows)} faults, {len(rows)} kinds."
    if name == "bad_input":
        by_area = Counter(row["area"] for row in rows)
        areas = ", ".join(f"{count} of {area}s" for area, count in by_area.items())
        return f"{len(rows)} kinds: {areas}.".replace("of datas", "of data")
    if name == "properties":
        total, compared = (sum(int(row[n]) for row in rows) for n in ("examples", "compared"))
        return f"{total:,} examples, {compared:,} of them compared with the reference."
    return f"{len(rows)} of them." if name == "commands" else ""
