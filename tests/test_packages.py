"""What imports what; and `experiments` and a user's folder of that name leave each other alone."""

from __future__ import annotations

import ast
import graphlib
import os
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: The packages, each of which imports those after it alone.
ORDER = ("tools", "experiments", "spt_jax", "pallas_kernels")
MOST_LINES = 600
#: Files of the library that are longer, still to be cut.
LONG = {"spt_jax/budget.py", "spt_jax/calibration.py", "spt_jax/config.py"}


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


def _modules(*packages: str) -> dict[str, Path]:
    modules = {}
    for package in packages:
        for path in ROOT.glob(f"{package}/**/*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def test_no_modules_import_each_other():
    modules = _modules(*ORDER)
    imports = {name: _imported(path, {*modules} - {name}) for name, path in modules.items()}
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("package", ORDER)
def test_imports_run_one_way(package):
    """Those within functions too."""
    later = {*ORDER[: ORDER.index(package)], "tests"}
    for path in _modules(package).values():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path} imports {'.' * node.level}{node.module or ''}"
                names.append(node.module or "")
            assert not [n for n in names if n.split(".")[0] in later], path


def test_the_wheel_has_all_but_the_tools():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["packages"]["find"]["include"]
    found = {package for package in ORDER for pattern in patterns if fnmatch(package, pattern)}
    assert found == {*ORDER} - {"tools"}


def test_no_file_of_the_library_is_long():
    sizes = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in _modules("spt_jax").values()
    }
    assert {name for name, lines in sizes.items() if lines > MOST_LINES} <= LONG
