"""Tables of what the reliability tests did, and the page that `--report` keeps of them.

Rows travel as properties of test reports, so that they arrive from every process of a test run.
"""

from __future__ import annotations

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
    text: str = ""


TABLES = {
    "faults": Table("Faults", ("fault", "times", "ended", "resumed", "message")),
    "properties": Table(
        "Properties",
        ("op", "examples", "compared", "programs", "types", "failures"),
    ),
}


def summarize(terminal: pytest.TerminalReporter) -> None:
    pass
