"""What README, the pages of docs and docstrings show works as shown."""

from __future__ import annotations

import ast
import doctest
import importlib
import itertools
import json
import pkgutil
import re
import shlex
import tomllib
import types
from pathlib import Path
from typing import Any

import pytest
import tyro
from safetensors.numpy import load_file

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
    lengths,
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
    "experiments.lengths": lengths.Options,
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


def run_python(page: Path) -> dict[str, Any]:
    """Execute a page's blocks, one after the other; the names that they leave."""
    names: dict[str, Any] = {}
    for block in code_blocks("python", PAGES[page]):
        exec(block, names)
    return names


def test_pages_with_python_are_executed():
    pages = {str(path.relative_to(ROOT)) for path, text in PAGES.items() if "```python\n" in text}
    assert pages == {"README.md", "docs/gpus.md", "docs/python.md"}


def test_python_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    labels = {"A superb film.": "good", "A dull film.": "bad"}
    rows = [{"text": text, "label": label} for text, label in labels.items()] * 100
    Path("reviews.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    names = run_python(ROOT / "README.md")
    assert names["result"].figures["accuracy"] > 0.5
    directory = tmp_path / "runs" / "films" / "adapter"
    assert names["result"].directory.resolve() == directory
    config = json.loads((directory / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"], config["r"]) == ("LORA", "SEQ_CLS", 16)
    tensors = load_file(directory / "adapter_model.safetensors")
    factors = {name for name in tensors if ".lora_A." in name}
    assert len(factors) == 6 * 6  # of six layers, four of attention and two of the FFN
    for name in factors:
        assert name.startswith("base_model.model.bert.encoder.layer.")
        assert tensors[name].shape[0] == tensors[name.replace("lora_A", "lora_B")].shape[1] == 16
        assert name.removesuffix(".lora_A.weight").endswith(tuple(config["target_modules"]))
    heads = {name for name in tensors if ".lora_" not in name}
    assert heads
    for name in heads:
        module = name.removeprefix("base_model.model.").rpartition(".")[0]
        assert module in config["modules_to_save"]


def test_python_of_the_guide():
    names = run_python(ROOT / "docs" / "python.md")
    assert names["logits"].shape == (32, 2)
    assert int(names["state"].step) == 3


def test_python_of_the_kernels():
    assert run_python(ROOT / "docs" / "gpus.md")["routed_ffn"] is pallas_kernels.routed_ffn


def test_the_readme_is_a_front_page():
    front, heading, links = PAGES[ROOT / "README.md"].partition("\n## Documentation\n")
    assert heading
    assert len(front.split()) <= 700
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert pages - {"index.md"} <= set(re.findall(r"\]\(docs/([\w-]+\.md)", links))


@pytest.mark.parametrize("command", _commands())
def test_commands_exist(command):
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    if words[:2] == ["pip", "install"]:
        (extra,) = re.fullmatch(r"\.\[(\w+)\]", words[2]).groups()
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert extra in project["optional-dependencies"]
        return
    python, flag, module, *arguments = words
    assert (python.removeprefix(".venv/bin/"), flag) == ("python", "-m")
    if module == "spt_jax.finetune":
        parse_for("classification", arguments)
        return
    options = tyro.cli(OPTIONS[module], args=arguments)
    if hasattr(options, "check"):
        options.check()


def _anchor(heading: str) -> str:
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def test_links_lead_somewhere():
    for path, text in PAGES.items():
        for link, anchor in re.findall(r"\]\(([^)#:]*)(?:#([\w-]+))?\)", text):
            target = path.parent / link if link else path
            assert target.exists(), f"{path}: {link}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.M)
                assert anchor in map(_anchor, headings), f"{path}: {link}#{anchor}"


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
