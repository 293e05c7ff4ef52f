"""Names of transformers and PEFT end in an error that says ours, wherever they are given."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import tyro

from spt_jax import LoRAConfig, SPTConfig, TrainConfig
from spt_jax.finetune import FinetuneConfig
from spt_jax.finetune.arguments import parse_for
from spt_jax.names import NAMES, check_options, markdown
from tests.test_documentation import PAGES, ROOT

CONFIGS = {kind.__name__: kind for kind in (LoRAConfig, TrainConfig, FinetuneConfig, SPTConfig)}
DIVIDES = "accumulation: it divides batch_size into microbatches where theirs multiplies it"


@pytest.mark.parametrize("name", NAMES.values(), ids=lambda name: name.theirs)
def test_every_name_leads_to_a_field_or_says_why_not(name):
    own = {field.name for field in fields(CONFIGS[name.owner])}
    if name.ours is None:
        assert name.note
    else:
        assert name.ours in own
    for kind in CONFIGS.values():
        if name.theirs in {field.name for field in fields(kind)}:
            continue
        with pytest.raises(TypeError) as caught:
            kind(**{name.theirs: 1})
        said = str(caught.value)
        assert said.startswith(f"{kind.__name__} has no {name.theirs}")
        assert name.note in said
        if name.ours is not None:
            owner = "" if kind.__name__ == name.owner else f" of {name.owner}"
            assert f"; spt-jax calls it {name.ours}{owner}" in said


def test_python_says_the_remedy():
    with pytest.raises(TypeError, match=r"^LoRAConfig has no r; spt-jax calls it rank"):
        LoRAConfig(r=8)
    with pytest.raises(TypeError, match="spt-jax calls it clip_norm: None, not 0"):
        replace(TrainConfig(), max_grad_norm=1.0)
    with pytest.raises(TypeError, match=DIVIDES):
        TrainConfig(gradient_accumulation_steps=4)
    with pytest.raises(TypeError, match="unexpected keyword argument 'rnak'"):
        LoRAConfig(rnak=8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--spt.lora.r 8", "^no option --spt.lora.r; spt-jax calls it --spt.lora.rank"),
        ("--spt.lora.lora_alpha=8", "--spt.lora.lora_alpha; spt-jax calls it --spt.lora.alpha"),
        ("--train.num-train-epochs 3", "--train.num-train-epochs; spt-jax calls it --train.epochs"),
        ("--num-train-epochs 3", "--num-train-epochs; spt-jax calls it --train.epochs"),
        ("--learning-rate 1e-4", "--learning-rate; spt-jax calls it --train.learning-rate"),
        ("--gradient_accumulation_steps 4", f"--train.{DIVIDES}"),
        ("--train.optim sgd", "^no option --train.optim: it is AdamW$"),
        ("--no-bf16", '^no option --no-bf16; spt-jax calls it --dtype: dtype="bfloat16"'),
        ("--no-group-by-length", "spt-jax calls it --train.group-by-length"),
    ],
)
def test_the_command_line_says_the_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse_for("classification", ["--train-file", "a.csv", *arguments.split()])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "train:\n  num_train_epochs: 3\n",
            "no option --train.num-train-epochs; .* --train.epochs",
        ),
        ("num_train_epochs: 3\n", "no option --num-train-epochs; spt-jax calls it --train.epochs"),
        ("spt:\n  lora:\n    r: 8\n", "no option --spt.lora.r; spt-jax calls it --spt.lora.rank"),
    ],
)
def test_files_say_the_remedy(text, message, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"options\.yaml: {message}"):
        parse_for("classification", ["--train-file", "a.csv"], [file])


def _options(kind, prefix=""):
    for field in fields(kind):
        yield f"--{prefix}{field.name}".replace("_", "-")


def test_our_own_options_are_taken():
    for kind, prefix in ((LoRAConfig, "spt.lora."), (TrainConfig, "train."), (FinetuneConfig, "")):
        options = list(_options(kind, prefix))
        check_options(options)
        check_options(o.replace(f"--{prefix}", f"--{prefix}no-", 1) for o in options)
    assert tyro.cli(TrainConfig, args=["--epochs", "2"]) == TrainConfig(epochs=2)


@pytest.mark.parametrize("owner", ["LoRAConfig", "TrainConfig", "FinetuneConfig"])
def test_the_page_has_the_table(owner):
    table = markdown(owner)
    page = PAGES[ROOT / "docs" / "from-transformers.md"]
    assert f"\n{table}\n" in page, f"docs/from-transformers.md lacks:\n{table}"
    rows = page.count("\n| `")
    assert rows == len(NAMES)
