"""LoRA's modules and patterns on the command line and in configuration files."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml

from spt_jax.config import LoRAConfig, SPTConfig
from spt_jax.finetune.arguments import parse_for, write_config

BASE = ["--train-file", "a.csv"]


def lora(*arguments, files=()):
    return parse_for("classification", [*BASE, *arguments], files).spt.lora


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["q_proj", "v_proj"], ("q_proj", "v_proj")),
        (["q_proj"], ("q_proj",)),
        (["layers.0.self_attn.q_proj"], ("layers.0.self_attn.q_proj",)),
        (["all-linear"], "all-linear"),
        ([r".*\.(q|v)_proj"], r".*\.(q|v)_proj"),
        (["none"], None),
    ],
)
def test_target_modules_on_the_command_line(words, expected):
    assert lora("--spt.lora.target-modules", *words).target_modules == expected


def test_patterns_on_the_command_line():
    words = ["--spt.lora.rank-pattern", "q_proj", "8", r"layers\.0\..*", "4"]
    words += ["--spt.lora.alpha-pattern", "q_proj", "1.5", "--spt.lora.modules-to-save", "norm"]
    assert lora(*words) == LoRAConfig(
        rank_pattern={"q_proj": 8, r"layers\.0\..*": 4},
        alpha_pattern={"q_proj": 1.5},
        modules_to_save=("norm",),
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rank-pattern", "q_proj"], "every pattern needs a number after it, got q_proj"),
        (["rank-pattern", "q_proj", "many"], "--spt.lora.rank-pattern: .*'many'"),
        (["rank-pattern", "q_proj", "0"], "rank_pattern of 'q_proj' must be at least 1, got 0"),
        (["alpha-pattern", "(", "2"], r"alpha_pattern has the pattern '\(', which is no regular"),
        (["target-modules"], "target_modules is empty; name modules"),
    ],
)
def test_mistakes_are_named(words, message):
    with pytest.raises(ValueError, match=message):
        lora(f"--spt.lora.{words[0]}", *words[1:])


@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(),
        LoRAConfig(target_modules="all-linear"),
        LoRAConfig(target_modules=r".*layers\.(0|1)\.self_attn\.q_proj", modules_to_save=("norm",)),
        LoRAConfig(
            target_modules=("q_proj", "up_proj"),
            rank_pattern={r"layers\.0\..*q_proj": 8, "q_proj": 3, "up_proj": 2},
            alpha_pattern={"up_proj": 1.5},
        ),
    ],
)
def test_a_written_configuration_is_read_as_it_was(config, tmp_path):
    run = replace(parse_for("classification", BASE), spt=SPTConfig(lora=config))
    write_config(run, tmp_path / "config.yaml")
    again = parse_for("classification", [], [tmp_path / "config.yaml"])
    assert again == run
    assert list(again.spt.lora.rank_pattern.items()) == list(config.rank_pattern.items())
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())["spt"]["lora"]
    assert written["rank_pattern"] == dict(config.rank_pattern)
    more = lora("--spt.lora.rank-pattern", "v_proj", "7", files=[tmp_path / "config.yaml"])
    assert more == replace(config, rank_pattern={"v_proj": 7})


def test_a_file_takes_a_part_and_names_in_text(tmp_path):
    file = tmp_path / "part.yaml"
    file.write_text(
        "spt:\n  lora:\n    target_modules: [query, value]\n    rank_pattern: {query: 4}\n"
        "    alpha_pattern: {}\n    modules_to_save: [LayerNorm]\n"
    )
    assert lora(files=[file]) == LoRAConfig(
        target_modules=("query", "value"), rank_pattern={"query": 4}, modules_to_save=("LayerNorm",)
    )
