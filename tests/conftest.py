"""Options and checks common to all tests."""

from __future__ import annotations

from pathlib import Path

import jaxtyping
import pytest

import tests.typechecker  # noqa: F401  the hook below looks it up by name
from tests.reliability import report

# Shapes and dtypes in the signatures are checked at every call made by a test. Configurations check
# themselves, and their tests need them to.
_hook = jaxtyping.install_import_hook(
    [
        "experiments",
        "pallas_kernels",
        "spt_jax.adapt",
        "spt_jax.calibration",
        "spt_jax.chat",
        "spt_jax.export",
        "spt_jax.generation",
        "spt_jax.inspection",
        "spt_jax.layers",
        "spt_jax.models",
        "spt_jax.training",
    ],
    "tests.typechecker.check",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--data-dir", type=Path, help="TFDS data directory holding GLUE; runs the data tests"
    )
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes")
    parser.addoption("--full", action="store_true", help="run tests/reliability in full")
    parser.addoption("--fault-seed", type=int, default=0, help="seed of the moments of faults")
    parser.addoption("--report", type=Path, help="page that gets the tables of tests/reliability")


def _unmet(config: pytest.Config) -> dict[str, str]:
    """Markers whose tests cannot run here, and why."""
    import jax

    reasons = {}
    if jax.default_backend() != "gpu":
        reasons["gpu"] = f"no GPU (JAX's default backend is {jax.default_backend()})"
    if config.getoption("--data-dir") is None:
        reasons["data"] = "no --data-dir"
    if not config.getoption("--slow"):
        reasons["slow"] = "no --slow"
    if not config.getoption("--full"):
        reasons["full"] = "no --full"
    return reasons


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    unmet = _unmet(config)
    dropped = [item for item in items if any(map(item.get_closest_marker, unmet))]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in dropped]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for marker, reason in _unmet(terminalreporter.config).items():
        terminalreporter.write_line(f"tests marked {marker} were deselected: {reason}")
    report.summarize(terminalreporter)


@pytest.fixture
def data_dir(request: pytest.FixtureRequest) -> Path:
    """The directory given by --data-dir."""
    return request.config.getoption("--data-dir")
