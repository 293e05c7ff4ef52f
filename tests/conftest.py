"""Options and checks common to all tests."""

from __future__ import annotations

from pathlib import Path

import jaxtyping
import pytest

import tests.typechecker  # noqa: F401  the hook below looks it up by name

# Shapes and dtypes in the signatures are checked at every call made by a test. Configurations check
# themselves, and their tests need them to.
_hook = jaxtyping.install_import_hook(
    [
        "experiments",
        "pallas_kernels",
        "spt_jax.adapt",
        "spt_jax.calibration",
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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what cannot run here, and say why once, in the header of the summary."""
    import jax

    reasons = {}
    if jax.default_backend() != "gpu":
        reasons["gpu"] = "no GPU (jax.default_backend() is not gpu)"
    if config.getoption("--data-dir") is None:
        reasons["data"] = "no --data-dir"
    if not config.getoption("--slow"):
        reasons["slow"] = "no --slow"
    dropped = {
        item: marker
        for item in items
        for marker in reasons
        if item.get_closest_marker(marker) is not None
    }
    if dropped:
        config.hook.pytest_deselected(items=list(dropped))
        items[:] = [item for item in items if item not in dropped]
    config.stash[_DESELECTED] = [
        f"{sum(m == marker for m in dropped.values())} tests deselected: {reason}"
        for marker, reason in reasons.items()
        if marker in dropped.values()
    ]


_DESELECTED = pytest.StashKey[list[str]]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in terminalreporter.config.stash.get(_DESELECTED, []):
        terminalreporter.write_line(line)


@pytest.fixture
def data_dir(request: pytest.FixtureRequest) -> Path:
    """The directory given by --data-dir."""
    return request.config.getoption("--data-dir")
