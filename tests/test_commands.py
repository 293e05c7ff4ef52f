"""The commands of README and the guides, each run as written but for options that make it small."""

from __future__ import annotations

import importlib
import importlib.util
import io
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
from tests.spt_jax.finetune.models import write_decoder
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
    "spt_jax.chat": "--max-new-tokens 4",
    "spt_jax.finetune": "--train.steps 2 --train.batch-size 4 --spt.serve none",
    "spt_jax.predict": "--max-new-tokens 4",
    "experiments.profile": "--steps 2 --out runs/profile",
    "experiments.peers": "--out runs/peers",
    "experiments.capture": "--length 64 --rows 2 --ffn-length 32 --ffn-rows 4 --no-sweep",
}
#: What a command prints, where that is no table.
SHOWN = {"spt_jax.chat": "\n", "spt_jax.finetune": "train_loss", "spt_jax.predict": "predict"}
#: What appears under runs/.
MADE = (
    *("reviews/adapter", "pairs/adapter", "scores/adapter", "mail/adapter"),
    *("chats/adapter", "book/adapter", "merged/model"),
    *("mrpc/spt", "table/mrpc/lora/seed-2", "wikitext/spt/adapter", "capture-0", "capture-1"),
)
#: In an order in which each command finds what it names.
RUN_PAGES = (
    "README.md",
    "docs/classify.md",
    "docs/long-documents.md",
    "docs/chat.md",
    "docs/serve.md",
    "docs/results/index.md",
)


def commands() -> list[list[str]]:
    """Modules and options in the order of the pages, each command once."""
    texts = [PAGES[ROOT / page] for page in RUN_PAGES]
    lines = "\n".join(code_blocks("sh", *texts)).splitlines()
    words = [tuple(shlex.split(line, comments=True)) for line in lines]
    return [list(w) for w in dict.fromkeys(line[2:] for line in words if line[1:2] == ("-m",))]


def small(module: str, options: list[str]) -> list[str]:
    """Options after a command's own that make it small."""
    more = SMALL[module]
    if module == "spt_jax.finetune":
        writes = {"chats.jsonl", "book.txt"} & set(options)
        more += " --model writer --max-length 64" if writes else " --model tiny --max-length 16"
    elif module == "experiments.capture":
        decoder = "smollm2" in options
        more += f" --model {'writer' if decoder else 'tiny'} --out runs/capture-{int(decoder)}"
    elif module == "experiments.wikitext" and "--model" not in options:
        more += " --model scratch"
    return shlex.split(more)


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> Path:
    """A directory with what the commands name."""
    monkeypatch.chdir(tmp_path)
    write_readable_checkpoint(
        tmp_path / "tiny", num_positions=64, width=8, num_heads=2, hidden=16,
        num_layers=1,
    )  # fmt: skip
    write_decoder(tmp_path / "writer")
    task = TASKS["mrpc"]
    rows = {"train": random_rows(task, 16, 0), "validation": random_rows(task, 8, 1)}
    write_task(tmp_path / "DIR", task, rows)
    text = "\n".join(cpython_documentation())
    texts = {"book": text[:20_000], "eval": text[-2_000:], "valid": text, "test": text[-20_000:]}
    for name, part in texts.items():
        (tmp_path / f"{name}.txt").write_text(part, encoding="utf-8")
    turns = [
        [{"role": "user", "content": "Name a keyword."}, {"role": "assistant", "content": word}]
        for word in ("while", "lambda", "yield") * 4
    ]
    lines = [json.dumps({"messages": turn}) for turn in turns]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "questions.txt").write_text("Name a keyword.\nAnd another.\n", encoding="utf-8")
    reviews = "text,label\n" + "A good one.,good\nA bad one.,bad\n" * 10
    rows = {
        "reviews": reviews,
        "new": reviews,
        "pairs": "premise,hypothesis,gold\n" + "It is good.,It is bad.,no\nA,A,yes\n" * 10,
        "scores": "text,stars\n" + "A good one.,4.5\nA bad one.,1\n" * 10,
        "mail": "text,urgent,spam\n" + "Now!,1,0\nA gift,0,1\n" * 10,
    }
    for name, part in rows.items():
        (tmp_path / f"{name}.csv").write_text(part, encoding="utf-8")
    for split in ("dev", "test"):
        path = tmp_path / "mmlu" / split / f"astronomy_{split}.csv"
        write_csv(path, make_questions(5, seed=0))
    monkeypatch.setattr(small_llama, "CONFIG", small_llama.CONFIG | TINY)
    tiny_block = opt_config(width=32, heads=2, hidden=64, layers=2, vocabulary=50)
    monkeypatch.setattr(profile, "PRESETS", {"opt-2048": tiny_block})
    return tmp_path


@pytest.mark.slow
def test_the_commands_of_the_pages_run(workspace, monkeypatch, capsys):
    base = workspace / "runs" / "wikitext" / "base" / "model"
    names = [words[0] for words in commands()]
    assert names.count("experiments.wikitext") == 3
    for module, *options in commands():
        hub_ids = {"meta-llama/Llama-3.2-1B", "Qwen/Qwen3-0.6B"} & set(options)
        for hub_id in hub_ids if module.startswith("experiments") else ():
            if not (workspace / hub_id).exists():  # the model that the command before has made
                shutil.copytree(base, workspace / hub_id)
        arguments = [*options, *small(module, options)]
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hello!\n"))
        if module == "experiments.peers":
            if all(map(importlib.util.find_spec, runner.PACKAGES)):
                continue  # it would time a block of full size
            with pytest.raises(SystemExit):
                cli.run(runner.main)
            assert "experiments.peers needs" in capsys.readouterr().err
            continue
        package = module in ("spt_jax.finetune", "spt_jax.chat")
        cli.run(importlib.import_module(f"{module}.__main__" if package else module).main)
        shown = SHOWN.get(module, "│")
        assert shown in capsys.readouterr().out, arguments
    for made in MADE:
        assert (workspace / "runs" / made).exists(), made
    assert (workspace / "glue.md").exists()
    assert len((workspace / "predicted.csv").read_text().splitlines()) == 21
    assert len((workspace / "answers.jsonl").read_text().splitlines()) == 2
