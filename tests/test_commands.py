"""The README's commands, each run as written but for options that make it small."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from experiments import profile, small_llama
from experiments.corpora import cpython_documentation
from experiments.glue_tasks import TASKS
from experiments.peers import runner
from spt_jax import cli
from spt_jax.models.presets import opt_config
from tests.experiments.test_mmlu import make_questions, write_csv
from tests.experiments.test_wikitext import TINY
from tests.experiments.tfds_directory import random_rows, write_task
from tests.spt_jax.models.builders import write_readable_checkpoint
from tests.test_documentation import PAGES, ROOT, code_blocks

FEW_STEPS = "--steps 2 --batch-size 4"
CLASSIFY = f"--model tiny --data-dir DIR {FEW_STEPS} --max-length 16"
SMALL = {
    "experiments.glue": CLASSIFY,
    "experiments.glue_table": f"{CLASSIFY} --tasks mrpc --methods lora --out runs/table",
    "experiments.wikitext": (
        f"{FEW_STEPS} --max-length 64 --pretrain-steps 2 --eval-file eval.txt --plain-chat "
        "--method spt --overwrite"
    ),
    "experiments.mmlu": "",
    "spt_jax.finetune": (
        "--model tiny --max-length 16 --train.steps 2 --train.batch-size 4 --spt.serve none"
    ),
    "spt_jax.predict": "",
    "experiments.profile": "--steps 2 --out runs/profile",
    "experiments.peers": "--out runs/peers",
    "experiments.capture": (
        "--model tiny --length 64 --rows 2 --ffn-length 32 --ffn-rows 4 --no-sweep "
        "--out runs/capture"
    ),
}


def commands() -> list[list[str]]:
    """Modules and options, in the README's order."""
    lines = "\n".join(code_blocks("sh", PAGES[ROOT / "README.md"])).splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[2:] for line in words if line[1:2] == ["-m"]]


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> Path:
    """A directory with what the commands name."""
    monkeypatch.chdir(tmp_path)
    write_readable_checkpoint(
        tmp_path / "tiny", num_positions=64, width=8, num_heads=2, hidden=16,
        num_layers=1,
    )  # fmt: skip
    task = TASKS["mrpc"]
    rows = {"train": random_rows(task, 16, 0), "validation": random_rows(task, 8, 1)}
    write_task(tmp_path / "DIR", task, rows)
    text = "\n".join(cpython_documentation())
    for name, part in {"book": text[:20_000], "eval": text[-2_000:], "valid": text}.items():
        (tmp_path / f"{name}.txt").write_text(part, encoding="utf-8")
    turns = [
        [{"role": "user", "content": "Name a keyword."}, {"role": "assistant", "content": word}]
        for word in ("while", "lambda", "yield")
    ]
    lines = [json.dumps({"messages": turn}) for turn in turns]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines), encoding="utf-8")
    reviews = "text,label\n" + "A good one.,good\nA bad one.,bad\n" * 10
    for name in ("reviews", "new"):
        (tmp_path / f"{name}.csv").write_text(reviews, encoding="utf-8")
    for split in ("dev", "test"):
        path = tmp_path / "mmlu" / split / f"astronomy_{split}.csv"
        write_csv(path, make_questions(5, seed=0))
    monkeypatch.setattr(small_llama, "CONFIG", small_llama.CONFIG | TINY)
    tiny_block = opt_config(width=32, heads=2, hidden=64, layers=2, vocabulary=50)
    monkeypatch.setattr(profile, "PRESETS", {"opt-2048": tiny_block})
    return tmp_path


@pytest.mark.slow
def test_the_commands_of_the_readme_run(workspace, monkeypatch, capsys):
    base = workspace / "runs" / "wikitext" / "base" / "model"
    names = [words[0] for words in commands()]
    assert names.count("experiments.wikitext") == 3
    for module, *options in commands():
        for hub_id in {"meta-llama/Llama-3.2-1B", "Qwen/Qwen3-0.6B"} & set(options):
            if not (workspace / hub_id).exists():  # the model that the command before has made
                shutil.copytree(base, workspace / hub_id)
        arguments = [*options, *shlex.split(SMALL[module])]
        if module == "experiments.wikitext" and "--model" not in options:
            arguments += ["--model", "scratch"]
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        if module == "experiments.peers":
            if all(map(importlib.util.find_spec, runner.PACKAGES)):
                continue  # it would time a block of full size
            with pytest.raises(SystemExit):
                cli.run(runner.main)
            assert "experiments.peers needs" in capsys.readouterr().err
            continue
        program = f"{module}.__main__" if module == "spt_jax.finetune" else module
        cli.run(importlib.import_module(program).main)
        shown = "predict" if module.startswith("spt_jax") else "│"
        if module == "spt_jax.finetune":
            shown = "train_loss"
        assert shown in capsys.readouterr().out, arguments
    for made in ("mrpc/spt", "table/mrpc/lora/seed-2", "wikitext/spt/adapter", "capture"):
        assert (workspace / "runs" / made).exists(), made
    assert (workspace / "glue.md").exists()
    assert len((workspace / "predicted.csv").read_text().splitlines()) == 21
