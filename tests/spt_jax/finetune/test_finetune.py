"""Runs from a file to predictions and answers: on tiny models, and on MiniLM."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import spt_jax
from spt_jax.config import LoRAConfig, SPTConfig, TrainConfig
from spt_jax.finetune import DataConfig, FinetuneConfig, finetune
from spt_jax.finetune.__main__ import main as finetune_main
from spt_jax.finetune.arguments import parse_arguments
from spt_jax.predict import main as predict_main
from spt_jax.predict import predict
from tests.spt_jax.finetune.models import write_decoder
from tests.spt_jax.finetune.test_rows import LAYOUTS
from tests.spt_jax.models.builders import write_readable_checkpoint

WORDS = {"good": ("great", "lovely", "superb"), "bad": ("awful", "dull", "poor")}
LORA = SPTConfig(lora=LoRAConfig(rank=4), attention=None, ffn=None)
SHORT = TrainConfig(steps=3, batch_size=4, learning_rate=1e-2)


def reviews(number: int, seed: int) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    labels = [rng.choice(list(WORDS)) for _ in range(number)]
    return [(f"The film was {rng.choice(WORDS[label])}.", label) for label in labels]


def write_csv(path: Path, header: list[str], rows: list[tuple]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("models") / "encoder"
    sizes = {"num_positions": 64, "width": 8, "num_heads": 2, "hidden": 16, "num_layers": 1}
    return str(write_readable_checkpoint(directory, **sizes))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> str:
    return str(write_decoder(tmp_path_factory.mktemp("models") / "decoder"))


def run(main, module: str, *arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, *map(str, arguments)])
        main()


def program(*arguments: object, stdin: str = "") -> str:
    """What a new process prints."""
    root = str(Path(spt_jax.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": root},
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_minilm_learns_classes_of_a_csv_and_a_new_process_predicts(tmp_path):
    train = write_csv(tmp_path / "reviews.csv", ["text", "label"], reviews(200, 0))
    new = write_csv(tmp_path / "new.csv", ["text", "label"], reviews(12, 1))
    out = tmp_path / "run"
    config = FinetuneConfig(
        data=DataConfig(train_file=train),
        spt=SPTConfig(attention=None, ffn=None),
        train=TrainConfig(steps=12, batch_size=16, learning_rate=2e-3),
        max_length=16,
        out=out,
    )
    result = finetune(config)
    assert result.figures["accuracy"] > 0.9
    report = json.loads((out / "report.json").read_text())
    assert report["rows"] == {"train": 180, "evaluation": 20, "left_out": 0, "cut": 0}
    assert report["classes"] == ["bad", "good"]
    described = json.loads((result.directory / "finetune.json").read_text())
    assert described["id2label"] == {"0": "bad", "1": "good"}
    assert json.loads((result.directory / "adapter_config.json").read_text())["r"] == 16
    found = tmp_path / "found.csv"
    program("spt_jax.predict", "--model", result.directory, "--input", new, "--output", found)
    rows = list(csv.DictReader(io.StringIO(found.read_text())))
    assert len(rows) == 12
    right = [row["prediction"] == row["label"] for row in rows]
    assert sum(right) >= 11
    for row in rows:
        shares = [float(row[f"probability_{name}"]) for name in ("bad", "good")]
        assert sum(shares) == pytest.approx(1, abs=1e-5)
        assert float(row["probability"]) == max(shares)


def test_the_command_s_resolved_configuration_is_taken_again(encoder, tmp_path, capsys):
    train = write_csv(tmp_path / "a.csv", ["review", "stars"], reviews(20, 0))
    out = tmp_path / "run"
    options = ["--train-file", train, "--label-columns", "stars", "--model", encoder, "--out", out]
    options += ["--spt.ffn", "none", "--spt.attention", "none", "--spt.lora.rank", 3]
    options += ["--train.steps", 2, "--train.batch-size", 4, "--train.mesh.data", 1, "--merge"]
    options += ["--train.learning-rate-multipliers.head", 2]
    run(finetune_main, "spt_jax.finetune", *options)
    assert "accuracy" in capsys.readouterr().out
    written = yaml.safe_load((out / "config.yaml").read_text())
    assert written["spt"]["ffn"] is None
    assert written["spt"]["lora"]["rank"] == 3
    assert written["train"]["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1}
    assert written["train"]["learning_rate_multipliers"]["head"] == 2
    config = parse_arguments(["--config", str(out / "config.yaml")])
    assert config.data == DataConfig(
        train_file=train, text_columns=("review",), label_columns=("stars",)
    )
    assert config.train.steps == 2
    assert config == parse_arguments(["--config", str(out / "config.yaml"), "--task",
                                      "classification"])  # fmt: skip
    again = tmp_path / "again"
    run(finetune_main, "spt_jax.finetune", "--config", out / "config.yaml", "--out", again)
    former, latter = (json.loads((x / "report.json").read_text()) for x in (out, again))
    assert former["figures"]["train_loss"] == latter["figures"]["train_loss"]


def test_mistakes_are_named_before_long_work(encoder, decoder, tmp_path):
    train = write_csv(tmp_path / "a.csv", ["text", "label"], reviews(20, 0))
    data = DataConfig(train_file=train)
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="max_length 100 is above the 64 positions"):
        finetune(FinetuneConfig(model=encoder, data=data, max_length=100, out=out))
    none = SPTConfig(lora=None, attention=None, ffn=None)
    with pytest.raises(ValueError, match="no adapter to train"):
        finetune(FinetuneConfig(model=encoder, data=data, spt=none, out=out))
    chats = tmp_path / "chats.jsonl"
    chats.write_text("\n".join(json.dumps(LAYOUTS["alpaca"]) for _ in range(4)))
    with pytest.raises(ValueError, match="not a causal language model"):
        finetune(FinetuneConfig(model=encoder, data=DataConfig(train_file=chats), out=out))
    (out / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds a run already"):
        finetune(FinetuneConfig(model=encoder, data=data, out=out))
    (tmp_path / "part.yaml").write_text("train:\n  steps: 3\n")
    part = ["--config", str(tmp_path / "part.yaml")]
    config = parse_arguments([*part, "--train-file", str(train), "--train.batch-size", "4"])
    assert (config.train.steps, config.train.batch_size) == (3, 4)
    assert config.train.learning_rate == 1e-3  # of the recipe
    with pytest.raises(ValueError, match="--train-file"):
        parse_arguments(part)
    for text, message in {"steps: 3": "steps", "- a": "a mapping", "a: [": "no YAML"}.items():
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(ValueError, match=rf"x\.yaml: .*{message}"):
            parse_arguments(["--config", str(tmp_path / "x.yaml"), "--train-file", str(train)])


def test_pairs_scores_and_several_classes(encoder, tmp_path):
    rng = random.Random(0)
    pairs = [(f"a {rng.random()}", "b", round(rng.random(), 2)) for _ in range(12)]
    several = [
        {"text": f"x{i}", "labels": [n for n in ("a", "b", "c") if rng.random() < 0.5]}
        for i in range(12)
    ]
    score = write_csv(tmp_path / "s.tsv.csv", ["sentence1", "sentence2", "score"], pairs)
    multi = tmp_path / "m.json"
    multi.write_text(json.dumps(several))
    for file, task, merge in ((score, "regression", False), (multi, "multi-label", True)):
        config = FinetuneConfig(
            model=encoder, data=DataConfig(train_file=file), spt=LORA, train=SHORT, merge=merge,
            out=tmp_path / task,
        )  # fmt: skip
        result = finetune(config)
        assert result.report["task"] == task
        found = tmp_path / f"{task}.jsonl"
        arguments = ["--model", result.directory, "--input", file, "--output", found]
        run(predict_main, "spt_jax.predict", *arguments)
        rows = [json.loads(line) for line in found.read_text().splitlines()]
        assert len(rows) == 12
        if task == "regression":
            assert all(isinstance(row["prediction"], float) for row in rows)
            (again,) = predict(result.directory, [pairs[3][:2]])
            assert again["prediction"] == pytest.approx(rows[3]["prediction"], abs=1e-5)
        else:
            assert all(list(row["probabilities"]) == ["a", "b", "c"] for row in rows)
            stored = json.loads((result.directory / "config.json").read_text())
            assert stored["id2label"] == {"0": "a", "1": "b", "2": "c"}
            assert stored["problem_type"] == "multi_label_classification"
            (result.directory / "finetune.json").unlink()  # as a model from elsewhere
            (again,) = predict(result.directory, [several[0]["text"]])
            assert again["probabilities"] == pytest.approx(rows[0]["probabilities"], abs=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_chats_of_every_layout(layout, decoder, tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(json.dumps(LAYOUTS[layout]) for _ in range(8)))
    config = FinetuneConfig(
        model=decoder, data=DataConfig(train_file=file, eval_share=0.25), spt=LORA,
        train=TrainConfig(steps=60, batch_size=2, learning_rate=5e-2), out=tmp_path / "run",
    )  # fmt: skip
    result = finetune(config)
    assert result.figures["perplexity"] < result.report["before"]["perplexity"]
    found = predict(result.directory, [LAYOUTS[layout], LAYOUTS[layout]], max_new_tokens=4)
    assert found == [{"prediction": "A"}] * 2
    assert predict(result.directory, ["Q"], max_new_tokens=4) == [{"prediction": "A"}]


def test_chat_answers_lines_of_standard_input(decoder, tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(json.dumps(LAYOUTS["messages"]) for _ in range(8)))
    config = FinetuneConfig(
        model=decoder, data=DataConfig(train_file=file), spt=LORA,
        train=TrainConfig(steps=60, batch_size=2, learning_rate=5e-2), out=tmp_path / "run",
    )  # fmt: skip
    directory = finetune(config).directory
    options = ["--max-new-tokens", 4]
    assert program("spt_jax.chat", "--model", directory, *options, stdin="Q\n/new\nQ\n") == "A\nA\n"
    plain = program("spt_jax.chat", "--model", decoder, *options, stdin="Q\n")
    assert plain != "A\n"


def test_text_is_cut_and_told(decoder, tmp_path, caplog):
    file = tmp_path / "book.txt"
    file.write_text("\n".join(f"line {i} of a book" for i in range(100)))
    config = FinetuneConfig(
        model=decoder, data=DataConfig(train_file=file), spt=LORA, train=SHORT, max_length=64,
        out=tmp_path / "run",
    )  # fmt: skip
    with caplog.at_level("INFO", "spt_jax"):
        result = finetune(config)
    assert "longer than a row of 64 and cut" in caplog.text
    assert result.report["rows"]["cut"] == 2
    assert result.report["rows"]["evaluation"] == 1
