"""What README and docstrings show works as shown."""

from __future__ import annotations

import ast
import doctest
import importlib
import itertools
import pkgutil
import re
import shlex
import types
from pathlib import Path

import pytest
import tyro

import experiments
import pallas_kernels
import spt_jax.training
from experiments import (
    capture,
    codebook_upkeep,
    collectives,
    frontier,
    glue,
    glue_table,
    kernels,
    mmlu,
    profile,
    wikitext,
)
from experiments.peers import runner as peers_runner
from spt_jax import predict
from spt_jax.chat import __main__ as chat
from spt_jax.finetune.arguments import parse_for

ROOT = Path(__file__).parents[1]
PAGES = {
    path: path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
OPTIONS = {
    "experiments.capture": capture.Options,
    "experiments.codebook_upkeep": codebook_upkeep.Options,
    "experiments.collectives": collectives.Options,
    "experiments.frontier": frontier.Options,
    "experiments.glue": glue.Options,
    "experiments.glue_table": glue_table.Options,
    "experiments.kernels": kernels.Options,
    "experiments.mmlu": mmlu.Options,
    "experiments.peers": peers_runner.Options,
    "experiments.profile": profile.Options,
    "experiments.wikitext": wikitext.Options,
    "spt_jax.chat": chat.Options,
    "spt_jax.predict": predict.Options,
}


def code_blocks(language: str, *texts: str) -> list[str]:
    pattern = re.compile(rf"```{language}\n(.*?)```", re.DOTALL)
    return [block for text in texts for block in pattern.findall(text)]


def _commands() -> list[str]:
    return [line for block in code_blocks("sh", *PAGES.values()) for line in block.splitlines()]


def _modules() -> list[str]:
    return [
        info.name
        for package in (spt_jax, pallas_kernels, experiments)
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    ]


@pytest.mark.parametrize("name", _modules())
def test_docstring_examples(name):
    if name == "experiments.peers.torch_steps":
        for package in peers_runner.PACKAGES:
            pytest.importorskip(package)
    if name.endswith(".triton") and name != "pallas_kernels.triton":
        pytest.importorskip("triton")
    module = importlib.import_module(name)
    assert doctest.testmod(module, extraglobs={"spt_jax": spt_jax}).failed == 0


@pytest.mark.parametrize(("page", "shape"), [("README.md", (32, 2)), ("docs/index.md", (8, 2))])
def test_python_of_a_page(page, shape):
    names: dict[str, object] = {}
    for block in code_blocks("python", PAGES[ROOT / page]):
        exec(block, names)
    assert names["logits"].shape == shape


@pytest.mark.parametrize("command", _commands())
def test_commands_exist(command):
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    python, flag, module, *arguments = words
    assert (python.removeprefix(".venv/bin/"), flag) == ("python", "-m")
    if module == "spt_jax.finetune":
        parse_for("classification", arguments)
        return
    options = tyro.cli(OPTIONS[module], args=arguments)
    if hasattr(options, "check"):
        options.check()


def test_links_lead_somewhere():
    for path, text in PAGES.items():
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (path.parent / link).exists(), f"{path}: {link}"


def _described_constants() -> set[str]:
    """Names of constants with a docstring, without which the reference leaves them out."""
    sources = (path.read_text() for path in (ROOT / "spt_jax").rglob("*.py"))
    pairs = (pair for source in sources for pair in itertools.pairwise(ast.parse(source).body))
    return {
        ast.unparse(first.targets[0])
        for first, second in pairs
        if isinstance(first, ast.Assign) and isinstance(second, ast.Expr)
    }


def test_the_reference_has_what_users_need():
    pages = "\n".join(text for path, text in PAGES.items() if path.parent.name == "api")
    named = {name: pkgutil.resolve_name(name) for name in re.findall(r"^::: (\S+)", pages, re.M)}
    packages = [module for module in named.values() if isinstance(module, types.ModuleType)]
    shown = [
        *named.values(),
        *(getattr(m, name) for m in packages for name in getattr(m, "__all__", ())),
    ]
    for name in spt_jax.__all__:
        assert getattr(spt_jax, name) in shown, f"no page of docs/api has spt_jax.{name}"
    others = {"layers.recording.recording", "chat.ChatTemplate", "chat.encode_messages"}
    others |= {"sharding.make_mesh", "sharding.parameter_sharding"}
    assert {f"spt_jax.{name}" for name in others} <= named.keys()
    constants = {
        name
        for package in (spt_jax.layers, spt_jax.training)
        for name in package.__all__
        if not isinstance(getattr(package, name), type | types.FunctionType)
    }
    assert {"ADAPTER"} <= constants <= _described_constants()
