"""The notebooks run from top to bottom, and hold the outputs of such a run."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

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


def _texts(cell: nbformat.NotebookNode) -> list[str]:
    """All that a cell's outputs say in words."""
    texts = []
    for output in cell.outputs:
        texts.append(output.get("text", ""))
        texts += [x for kind, x in output.get("data", {}).items() if not kind.startswith("image/")]
    return texts


def test_there_are_notebooks():
    assert [path.name for path in NOTEBOOKS] == ["finetune_glue.ipynb", "inside_spt.ipynb"]


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

    def test_installs_from_the_repository(self, path):
        install = _code(_read(path))[0].source
        assert f'REPOSITORY = "https://github.com/{REPOSITORY}"' in install
        assert 'find_spec("spt_jax") is None' in install

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
