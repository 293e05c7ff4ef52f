"""Execute the notebooks in their small offline mode and keep the outputs: `make notebooks`.

What depends on the machine or the hour, but for what a cell prints, is left out of the files.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient

import spt_jax

NOTEBOOKS = tuple(sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb")))
TIMEOUT_S = 1200  # of the start and of each cell, on a slow and busy machine


def execute(path: Path) -> nbformat.NotebookNode:
    """A notebook with the outputs of a run in its offline mode, in an empty folder.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    packages = str(Path(spt_jax.__file__).parents[1])  # of this process, wherever it found them
    environment = {
        **os.environ,
        "SPT_JAX_NOTEBOOK": "offline",
        "TF_CPP_MIN_LOG_LEVEL": "3",  # else XLA tells that a busy machine is slow
        "PYTHONPATH": os.pathsep.join(filter(None, [packages, os.environ.get("PYTHONPATH")])),
    }
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=TIMEOUT_S,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            coalesce_streams=True,
            startup_timeout=TIMEOUT_S,
        )
        client.execute(env=environment)
    return clean(notebook)


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook without what a run leaves in its metadata."""
    notebook.metadata = nbformat.from_dict(
        {
            "accelerator": "GPU",
            "colab": {"gpuType": "T4", "provenance": []},
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02}"
        cell.metadata = nbformat.from_dict({})
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output.metadata = nbformat.from_dict({})
    return notebook


def main(paths: Sequence[str]) -> None:
    """Execute the notebooks named, or all, in place."""
    for path in map(Path, paths or map(str, NOTEBOOKS)):
        print(path.name, flush=True)
        nbformat.write(execute(path), path)


if __name__ == "__main__":
    main(sys.argv[1:])
