"""The package `experiments` and a user's folder of that name leave each other alone."""

from __future__ import annotations

import ast
import graphlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def installed(tmp_path) -> Path:
    """A directory on the path with the packages, as site-packages has them from a wheel."""
    site = tmp_path / "site"
    site.mkdir()
    for name in ("experiments", "pallas_kernels", "spt_jax"):
        (site / name).symlink_to(ROOT / name)
    return site


def run(*arguments: str, cwd: Path, path: Path) -> list[str]:
    """What Python prints, word by word."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


@pytest.mark.parametrize("package", [True, False])
def test_a_user_s_folder_comes_first(package, installed, tmp_path):
    folder = tmp_path / "project" / "experiments"
    folder.mkdir(parents=True)
    for name in ("own", "glue"):
        (folder / f"{name}.py").write_text("print(__file__)")
    if package:
        (folder / "__init__.py").write_text("")
    for name in ("own", "glue"):
        file = str(folder / f"{name}.py")
        assert run("-c", f"import experiments.{name}", cwd=folder.parent, path=installed) == [file]
        assert run("-m", f"experiments.{name}", cwd=folder.parent, path=installed) == [file]


@pytest.mark.parametrize("package", [True, False])
def test_a_checkout_runs_its_own(package, tmp_path):
    """Whatever else is installed under that name."""
    other = tmp_path / "site" / "experiments"
    other.mkdir(parents=True)
    (other / "reports.py").write_text("raise SystemExit('another')")
    if package:
        (other / "__init__.py").write_text("raise SystemExit('another')")
    program = "from importlib.util import find_spec; print(find_spec('experiments.reports').origin)"
    found = run("-c", program, cwd=ROOT, path=other.parent)
    assert found == [str(ROOT / "experiments" / "reports.py")]


def test_without_a_user_s_folder_the_installed_one_runs(installed, tmp_path):
    program = "from importlib.util import find_spec; print(find_spec('experiments.glue').origin)"
    found = run("-c", program, cwd=tmp_path, path=installed)
    assert found == [str(installed / "experiments" / "glue.py")]


def _imported(path: Path, names: set[str]) -> set[str]:
    """Modules among `names` that a file imports when it is imported itself."""
    found: set[str] = set()
    nodes: list[ast.AST] = list(ast.parse(path.read_text()).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & names or {node.module} & names
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & names
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            nodes += ast.iter_child_nodes(node)
    return found


def test_the_library_has_no_import_cycle():
    modules = {}
    for package in ("spt_jax", "pallas_kernels"):
        for path in ROOT.glob(f"{package}/**/*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    imports = {name: _imported(path, {*modules} - {name}) for name, path in modules.items()}
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(error.args[1])}")


def test_the_library_imports_nothing_of_experiments():
    for path in (*ROOT.glob("spt_jax/**/*.py"), *ROOT.glob("pallas_kernels/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names.append(node.module or "")
            assert not [n for n in names if n.split(".")[0] == "experiments"], path
