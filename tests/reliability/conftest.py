from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.reliability import report


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether all of it runs, as by `make test-faults`, or a shortened form."""
    return request.config.getoption("--full")


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Adds a row to a table of the page: `record("faults", fault=..., ...)`."""

    def add(table: str, **cells: object) -> None:
        row = {name: str(cell) for name, cell in cells.items()}
        assert tuple(row) == report.TABLES[table].columns
        request.node.user_properties.append((report.KEY, [table, row]))

    return add
