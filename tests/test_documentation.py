"""What README and docstrings show works as shown."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import shlex
from pathlib import Path

import pytest
import tyro

import experiments
import pallas_kernels
import spt_jax
from experiments import capture, glue, glue_table, kernels, mmlu, wikitext
from experiments.methods import MethodOptions

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
OPTIONS = {
    "experiments.capture": capture.Options,
    "experiments.glue": glue.Options,
    "experiments.glue_table": glue_table.Options,
    "experiments.kernels": kernels.Options,
    "experiments.mmlu": mmlu.Options,
    "experiments.wikitext": wikitext.Options,
}


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def _modules() -> list[str]:
    return [
        info.name
        for package in (spt_jax, pallas_kernels, experiments)
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    ]


@pytest.mark.parametrize("name", _modules())
def test_docstring_examples(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module, extraglobs={"spt_jax": spt_jax}).failed == 0


def test_readme_python():
    blocks = _blocks("python")
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    assert names["logits"].shape == (32, 2)


@pytest.mark.parametrize("command", [c for block in _blocks("sh") for c in block.splitlines()])
def test_readme_commands_exist(command):
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    python, flag, module, *arguments = words
    assert (python, flag) == (".venv/bin/python", "-m")
    options = tyro.cli(OPTIONS[module], args=arguments)
    if isinstance(options, MethodOptions | glue_table.Options | capture.Options):
        options.check()
