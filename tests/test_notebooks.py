"""The notebooks run from top to bottom, and hold the outputs of such a run."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

from tools.run_notebooks import NOTEBOOKS, clean, execute

ROOT = Path(__file__).parents[1]
REPOSITORY = "REPOSITORY_OWNER/spt-jax"  # stands for the published repository, until there is one
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
MOST_BYTES = 600_000
# of the machine that the outputs were made on
TRACES = re.compile(
    r"(?<![\w.])/(root|home|tmp|work|usr|opt|var|mnt|content|Users)\b|[A-Z]:\\|https?://|localhost"
    r"|[Ww]arning|Traceback|\b20\d\d-\d\d-\d\d\b|\b\d+\.\d+\.\d+\.\d+\b"
)


def _read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def _code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _python(cell: nbformat.NotebookNode) -> str:
    """A cell's code, magic commands as the calls that they stand for."""
    return TransformerManager().transform_cell(cell.source)


class _Shell:
    """Stands for IPython's: keeps commands in place of running them."""

    def __init__(self, names: dict[str, object]) -> None:
        self.names, self.commands = names, []

    def system(self, command: str) -> None:
        self.commands.append(command.format(**self.names))

    def run_line_magic(self, name: str, line: str) -> None:
        self.commands.append(f"{name} {line.format(**self.names)}")


def _install(path: Path, monkeypatch: pytest.MonkeyPatch, source: str, works: bool) -> list[str]:
    """The commands of the first cell where the package is not there, with another REPOSITORY."""
    names: dict[str, object] = {}
    shell = _Shell(names)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: found(name) if works and shell.commands else None,
    )
    names["get_ipython"] = lambda: shell
    given = f"https://github.com/{REPOSITORY}"
    exec(_python(_code(_read(path))[0]).replace(given, source), names)
    return shell.commands


def _texts(cell: nbformat.NotebookNode) -> list[str]:
    """All that a cell's outputs say in words."""
    texts = []
    for output in cell.outputs:
        texts.append(output.get("text", ""))
        texts += [x for kind, x in output.get("data", {}).items() if not kind.startswith("image/")]
    return texts


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["finetune_chat", "finetune_glue", "inside_spt"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def test_is_valid_and_small(self, path):
        notebook = _read(path)
        nbformat.validate(notebook)
        assert path.stat().st_size < MOST_BYTES
        assert clean(_read(path)) == notebook  # nothing of a run in the metadata

    def test_opens_in_colab(self, path):
        badge = f"({BADGE})](https://colab.research.google.com/github/{REPOSITORY}/blob/main/"
        assert f"{badge}notebooks/{path.name})" in _read(path).cells[0].source
        assert f"{badge}notebooks/{path.name})" in (ROOT / "README.md").read_text(encoding="utf-8")

    def test_imports_what_users_have(self, path):
        trees = [ast.parse(_python(cell)) for cell in _code(_read(path))]
        nodes = [node for tree in trees for node in ast.walk(tree)]
        names = [alias.name for x in nodes if isinstance(x, ast.Import) for alias in x.names]
        names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
        packages = {name.partition(".")[0] for name in names}
        assert packages & {"experiments", "tests", "tools"} == set()
        assert "spt_jax" in packages

    def test_asks_for_the_repository(self, path, monkeypatch):
        with pytest.raises(RuntimeError, match=r"placeholder.*git repository.*wheel"):
            _install(path, monkeypatch, f"https://github.com/{REPOSITORY}", works=True)

    def test_installs_from_the_repository(self, path, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        address = "https://example.org/somebody/spt-jax"
        (tmp_path / "spt-jax").mkdir()  # what an earlier try left
        (tmp_path / "spt-jax" / "constraints.txt").touch()
        (install,) = _install(path, monkeypatch, address, works=True)
        clone = tmp_path / "spt-jax"
        pins = f'-c "{clone / "constraints.txt"}"'
        assert install == f'pip install --quiet {pins} "{clone}[cuda12,datasets]"'
        (clone / "constraints.txt").unlink()
        clone.rmdir()
        clone, install = _install(path, monkeypatch, address, works=True)
        assert clone == f'git clone --quiet --depth 1 "{address}" spt-jax'
        assert install.startswith("pip install")

    def test_installs_a_wheel(self, path, monkeypatch, tmp_path):
        wheel = tmp_path / "spt_jax-0.1.0-py3-none-any.whl"
        (install,) = _install(path, monkeypatch, str(wheel), works=True)
        assert install == f'pip install --quiet  "{wheel}[cuda12,datasets]"'
        (tmp_path / "constraints.txt").touch()
        (install,) = _install(path, monkeypatch, str(wheel), works=True)
        assert f'-c "{tmp_path / "constraints.txt"}"' in install

    def test_says_that_an_installation_failed(self, path, monkeypatch, tmp_path):
        with pytest.raises(RuntimeError, match=r"failed; its messages"):
            _install(path, monkeypatch, str(tmp_path / "spt_jax.whl"), works=False)

    def test_names_the_restart(self, path, monkeypatch, tmp_path):
        monkeypatch.setattr(sys.modules["jax"], "__version__", "0.1")
        with pytest.raises(RuntimeError, match="Restart session"):
            _install(path, monkeypatch, str(tmp_path / "spt_jax.whl"), works=True)

    def test_extras_exist(self, path):
        extras = re.search(r'^EXTRAS = "(.+)"$', _code(_read(path))[0].source, re.MULTILINE)[1]
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert set(extras.split(",")) <= project["optional-dependencies"].keys()

    def test_was_run_from_top_to_bottom(self, path):
        cells = _code(_read(path))
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
        for cell in cells:
            assert all(output.output_type != "error" for output in cell.outputs)
            assert bool("plt.show()" in cell.source) == any(
                "image/png" in output.get("data", {}) for output in cell.outputs
            )
            if re.search(r"^\s*print\(", cell.source, re.MULTILINE):
                assert any(output.output_type == "stream" for output in cell.outputs)

    def test_outputs_tell_nothing_of_the_machine(self, path):
        for cell in _code(_read(path)):
            assert all(output.get("name") != "stderr" for output in cell.outputs)
            for text in _texts(cell):
                assert not TRACES.search(text), text

    @pytest.mark.slow
    @pytest.mark.timeout(1800)
    def test_runs(self, path, monkeypatch):
        monkeypatch.setenv("JAX_PLATFORMS", "cpu")
        kept, again = _code(_read(path)), _code(execute(path))
        for before, after in zip(kept, again, strict=True):
            kinds = [[o.output_type for o in cell.outputs] for cell in (before, after)]
            assert kinds[0] == kinds[1], after.source
            for output in after.outputs:
                assert output.get("name") != "stderr", output.text
