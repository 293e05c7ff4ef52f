"""Options and checks common to all tests."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
from xdist.scheduler import LoadFileScheduling

import tests.typechecker  # noqa: F401  the hook below looks it up by name
from tests.processes import UNOPTIMIZED

#: Files that take longest, which come first, so that all workers end together,
LONG = (
    "tests/reliability/test_faults.py",
    "tests/spt_jax/test_sharding.py",
    "tests/experiments/test_glue.py",
    "tests/experiments/test_gpu_run.py",
    "tests/test_commands.py",
    "tests/test_notebooks.py",
)
#: and files whose tests take long and share nothing, which come last and go to workers one by one.
FINE = ("tests/pallas_kernels/test_sparse_attention_mosaic.py",)

CACHE = "JAX_COMPILATION_CACHE_DIR"
#: A directory of this process', for what it and those that it starts compile; theirs is given.
_own_cache = None if CACHE in os.environ else tempfile.mkdtemp(prefix="compiled-")
if _own_cache is not None:  # before anything imports JAX, which reads these
    os.environ |= {
        CACHE: _own_cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "SPT_JAX_CACHE_DIR": os.path.join(_own_cache, "spt_jax"),
    }

from tests.reliability import report  # noqa: E402

# Shapes and dtypes in the signatures are checked at every call made by a test. Configurations check
# themselves, and their tests need them to.
_hook = jaxtyping.install_import_hook(
    [
        "experiments",
        "pallas_kernels",
        "spt_jax.adapt",
        "spt_jax.budget",
        "spt_jax.calibration",
        "spt_jax.chat",
        "spt_jax.export",
        "spt_jax.finetune.job",
        "spt_jax.finetune.labels",
        "spt_jax.finetune.prepare",
        "spt_jax.fitting",
        "spt_jax.generation",
        "spt_jax.inspection",
        "spt_jax.layers",
        "spt_jax.models",
        "spt_jax.predict",
        "spt_jax.training",
        "tools.gpu_cases",
        "tools.gpu_check",
    ],
    "tests.typechecker.check",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--data-dir", type=Path, help="TFDS data directory holding GLUE; runs the data tests"
    )
    parser.addoption("--slow", action="store_true", help="run the tests that take long, too")
    parser.addoption(
        "--whole",
        action="append",
        default=[],
        metavar="OPERATION",
        help="run the slow tests of an operation under pallas_kernels",
    )
    parser.addoption("--full", action="store_true", help="run tests/reliability in full")
    parser.addoption("--fault-seed", type=int, default=0, help="seed of the moments of faults")
    parser.addoption("--report", type=Path, help="page that gets the tables of tests/reliability")
    parser.addoption(
        "--optimize",
        action="store_true",
        help="compile as for users: with LLVM's optimizations, at twice the time of compilation",
    )


def pytest_configure(config: pytest.Config) -> None:
    # XLA's threads: Pallas' interpreter blocks one for every warpgroup that waits at a barrier,
    # and on fewer cores than warpgroups none would be left for those that are waited for.
    os.environ.setdefault("NPROC", "8")
    flags = os.environ.get("XLA_FLAGS", "")
    if not config.getoption("--optimize") and UNOPTIMIZED.partition("=")[0] not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {UNOPTIMIZED}".lstrip()


def pytest_unconfigure() -> None:
    if _own_cache is not None:
        shutil.rmtree(_own_cache, ignore_errors=True)


class _Scheduling(LoadFileScheduling):
    """Files go to workers whole, in order, but for the tests of `FINE`, which go one by one."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return nodeid if file in FINE else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    if config.getoption("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False
    return _Scheduling(config, log)


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
    whole = tuple(f"tests/pallas_kernels/test_{name}" for name in config.getoption("--whole"))

    def runs(item: pytest.Item) -> bool:
        missing = {marker for marker in unmet if item.get_closest_marker(marker)}
        return not missing or (missing == {"slow"} and item.nodeid.startswith(whole))

    dropped = [item for item in items if not runs(item)]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in dropped]
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> int:
    """Place of a test's file: among the first, in the middle, or among the last."""
    file = item.nodeid.partition("::")[0]
    return LONG.index(file) if file in LONG else len(LONG) + (file in FINE)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for marker, reason in _unmet(terminalreporter.config).items():
        terminalreporter.write_line(f"tests marked {marker} were deselected: {reason}")
    report.summarize(terminalreporter)


@pytest.fixture
def compiled_anew() -> Iterator[None]:
    """No program comes from the cache, which does not keep what the compiler says of its memory."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    def switch(enabled: bool) -> None:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()

    before = jax.config.jax_enable_compilation_cache
    switch(False)
    yield
    switch(before)


@pytest.fixture(autouse=True)
def quiet() -> None:
    """The library logs as it does for users of it, whatever commands ran before in this process."""
    logging.getLogger("spt_jax").setLevel(logging.NOTSET)


@pytest.fixture
def unhooked() -> Iterator[None]:
    """Switches the import hook's own checks off, so that those of the library speak."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def data_dir(request: pytest.FixtureRequest) -> Path:
    """The directory given by --data-dir."""
    return request.config.getoption("--data-dir")
