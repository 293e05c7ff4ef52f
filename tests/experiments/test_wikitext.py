"""The command: results, what it saves, its errors; on a tiny model, but for the default one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import spt_jax
from experiments import small_llama, wikitext
from experiments.corpora import cpython_documentation
from spt_jax import cli
from spt_jax.training import Document, cut_texts, evaluate, next_token

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
STEPS = ["--steps", "2", "--batch-size", "4", "--max-length", "64"]
EVERYTHING = ["--model", "scratch", "--method", "spt,lora,full", "--eval-tokens", "all"]
EVERYTHING += ["--serve", "none"]


@pytest.fixture(scope="module", autouse=True)
def tiny():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_llama, "CONFIG", small_llama.CONFIG | TINY)
        yield


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("texts")
    documents = cpython_documentation()
    contents = {"train.txt": documents[:8], "eval.txt": documents[8:10]}
    for name, parts in contents.items():
        (directory / name).write_text("\n".join(parts), encoding="utf-8")
    turns = [
        [{"role": "user", "content": "Name a keyword."}, {"role": "assistant", "content": word}]
        for word in ("while", "lambda", "yield")
    ]
    lines = [json.dumps({"messages": turn}) for turn in turns]
    (directory / "chat.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return {path.name: path for path in directory.iterdir()}


def run(capsys, *arguments: object) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["experiments.wikitext", *map(str, arguments)])
        cli.run(wikitext.main)
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def finished(texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("wikitext") / "run"
    options = ["--text-file", texts["train.txt"], "--eval-file", texts["eval.txt"], "--out", out]
    arguments = [*EVERYTHING, *STEPS, "--pretrain-steps", 4, "--prompt", "The statement", *options]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["experiments.wikitext", *map(str, arguments)])
        cli.run(wikitext.main)
    return out, arguments


def figures(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())["figures"]


def test_every_method_is_trained_evaluated_and_saved(finished, texts):
    out, _ = finished
    results = figures(out)
    assert list(results) == ["base", "spt", "lora", "full"]
    assert results["full"]["perplexity"] < results["base"]["perplexity"]
    source = out / "base" / "model"
    options = wikitext.Options(text_file=texts["train.txt"], eval_file=texts["eval.txt"])
    model = spt_jax.load_pretrained(source, task="causal-lm")
    encoder = wikitext.Encoder(source, model.config, plain_chat=False)
    documents = encoder(wikitext.read_corpus(options).evaluation, "evaluation")
    data = spt_jax.training.strided_windows(documents, 64, 32, pad_id=1, name="evaluation")

    def perplexity(model):
        found = evaluate(model, data, objective=next_token, metrics=("perplexity",), batch_size=4)
        return found["perplexity"]

    assert perplexity(model) == pytest.approx(results["base"]["perplexity"], rel=1e-5)
    spt = spt_jax.load_adapter(model, out / "spt" / "adapter")
    assert perplexity(spt) == pytest.approx(results["spt"]["perplexity"], rel=1e-5)
    full = spt_jax.load_pretrained(out / "full" / "model", task="causal-lm")
    assert perplexity(full) == pytest.approx(results["full"]["perplexity"], rel=1e-5)
    tokenizers = [spt_jax.load_tokenizer(d).to_str() for d in (source, out / "full" / "model")]
    assert tokenizers[0] == tokenizers[1]


def test_a_finished_run_resumes_to_the_same_figures(finished, capsys):
    out, arguments = finished
    before = figures(out)
    output = run(capsys, *arguments, "--resume", "--method", "lora")
    assert figures(out)["lora"]["perplexity"] == before["lora"]["perplexity"]
    row = next(line for line in output.splitlines() if "│ lora " in line)
    assert f"{before['lora']['perplexity']:.4f}" in row
    assert "The statement" in output


def test_of_conversations_the_replies_are_learnt(finished, texts, tmp_path, capsys):
    source = finished[0] / "base" / "model"
    options = ["--model", source, "--text-file", texts["chat.jsonl"], "--eval-share", 0.4]
    options += ["--method", "lora", "--out", tmp_path, *STEPS]
    with pytest.raises(SystemExit):
        run(capsys, *options)
    run(capsys, *options, "--plain-chat", "--prompt", "Name a keyword.")
    config = spt_jax.models.config.read_config(source)
    encoder = wikitext.Encoder(source, config, plain_chat=True)
    (document,) = encoder([json.loads(texts["chat.jsonl"].read_text().splitlines()[0])], "x")
    learnt = encoder.tokenizer.decode(document.ids[document.predicted].tolist())
    assert learnt.strip() == "while"
    assert figures(tmp_path)["lora"]["perplexity"] > 1


def test_texts_and_conversations_keep_their_order(finished, tmp_path):
    source = finished[0] / "base" / "model"
    config = spt_jax.models.config.read_config(source)
    encoder = wikitext.Encoder(source, config, plain_chat=True)
    turns = [{"role": "user", "content": "Name a keyword."}]
    chat = {"messages": [*turns, {"role": "assistant", "content": "while"}]}
    path = tmp_path / "rows.JSON"
    path.write_text(json.dumps([{"text": "First."}, chat, {"text": "Last."}]))
    documents = encoder(wikitext._read_file(path), "x")
    assert [bool(document.predicted[1:].all()) for document in documents] == [True, False, True]
    assert encoder.tokenizer.decode(documents[2].ids.tolist()).strip() == "Last."
    with pytest.raises(ValueError, match=r"x, the conversation that begins 'Name .*reads no tools"):
        encoder([chat | {"tools": [{"name": "f"}]}], "x")
    assert len(encoder([chat | {"tools": []}], "x")) == 1


def test_documents_longer_than_a_row_are_told(finished, texts, tmp_path, capsys):
    long = [{"role": "user", "content": "Why? " * 80}, {"role": "assistant", "content": "So."}]
    path = tmp_path / "chats.json"
    path.write_text(json.dumps([{"messages": long}, *(
        json.loads(line) for line in texts["chat.jsonl"].read_text().splitlines()
    )]))  # fmt: skip
    options = ["--model", finished[0] / "base" / "model", "--text-file", path, "--plain-chat"]
    options += ["--eval-file", texts["chat.jsonl"], "--method", "lora", "--out", tmp_path / "out"]
    output = " ".join(run(capsys, *options, *STEPS).split())
    assert "1 of 4 documents of the training text are longer than a row of 64 and cut" in output
    assert "evaluation text are longer" not in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "wikitext/x"], "not both"),
        (["--eval-share", 1.5], "--eval-share must lie in"),
        (["--eval-stride", 3000], "--eval-stride must lie in 1..2048"),
        (["--model", "scratch", "--eval-stride", 300], "--eval-stride must lie in 1..256"),
        (["--eval-tokens", 0], "--eval-tokens must be at least 1, or all, got 0"),
        (["--method", "spt,qlora"], "unknown method 'qlora'"),
        (["--model", "minilm", "--max-length", 64], "encoder, not a causal language model"),
        (["--text-file", "missing.txt"], "missing.txt"),
        (["--model", "scratch", "--max-length", 4096], "above the 2048 positions"),
    ],
)
def test_a_wrong_option_is_told_in_one_line(arguments, message, texts, tmp_path, capsys):
    given = ["--text-file", texts["eval.txt"], "--pretrain-steps", 1, "--out", tmp_path]
    with pytest.raises(SystemExit) as stopped:
        run(capsys, *given, *arguments)
    errors = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert errors[-1].startswith("error: ")
    assert message in errors[-1]


def test_a_text_shorter_than_a_row(finished, texts, tmp_path, capsys):
    text = tmp_path / "short.txt"
    text.write_text(texts["eval.txt"].read_text()[:150], encoding="utf-8")
    options = ["--model", finished[0] / "base" / "model", "--text-file", text, "--eval-file", text]
    one, few = ["--batch-size", 1, "--method", "spt"], ["--batch-size", 4, "--method", "lora"]
    for sizes in (one, [*few, "--group-by-length"]):
        out = tmp_path / sizes[-1]
        output = run(capsys, *options, *sizes, "--max-length", 64, "--steps", 3, "--out", out)
        assert "tokens to learn in 1 rows" in output
        assert figures(out)[sizes[3]]["steps"] == 3


def test_the_default_budget_is_a_cap():
    data = spt_jax.training.Examples(
        {name: np.ones((8, 4), int) for name in ("input_ids", "attention_mask", "label")},
        "eight rows",
    )
    for given, steps in [
        ({"batch_size": 4}, 6),  # 3 epochs
        ({}, wikitext.MOST_STEPS),
        ({"epochs": 10}, 80),
        ({"steps": 50}, 50),
    ]:
        options = wikitext.Options(**given)
        assert options.train_config_for("lora", data).total_steps(len(data)) == steps
    many = data.take(np.zeros(1000, int))
    assert wikitext.Options().train_config_for("lora", many).steps == wikitext.MOST_STEPS


def test_the_small_llama_has_rates_of_its_own():
    rates = {
        model: [wikitext.Options(model=model).default_learning_rate(m) for m in ("spt", "full")]
        for model in (wikitext.Options().model, "scratch")
    }
    assert rates == {"smollm2": [1e-3, 2e-5], "scratch": [2e-3, 2e-4]}


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 8, 9, 100])
def test_the_first_tokens_that_are_predicted(tokens):
    flags = [[0, 1, 1, 1], [0, 0, 0], [1, 0, 1, 0, 1, 1], [0, 1, 1, 1]]
    documents = [
        Document(np.arange(len(of), dtype=np.int32) + 10 * i, np.array(of, bool))
        for i, of in enumerate(flags)
    ]

    def predicted(documents):
        return [int(i) for d in documents for i in d.ids[1:][d.predicted[1:]]]

    assert predicted(wikitext.head(documents, tokens)) == predicted(documents)[:tokens]


@pytest.mark.slow
def test_the_default_model_is_a_pretrained_one(tmp_path, capsys):
    sizes = ["--max-length", 64, "--batch-size", 1, "--steps", 2, "--eval-tokens", 64]
    output = run(capsys, *sizes, "--out", tmp_path)
    found = figures(tmp_path)
    assert found["base"]["perplexity"] < 300  # one token after another, of 49,152
    assert list(found) == ["base", "spt", "lora"]
    assert found["lora"]["perplexity"] < 1.5 * found["base"]["perplexity"]
    assert found["spt"]["perplexity"] == pytest.approx(found["lora"]["perplexity"], 0.02)
    assert "30 x attention, dense" in output
    assert "64 tokens of" in output


@pytest.mark.slow
def test_a_style_that_is_learnt_sparse_shows_when_served_dense(tmp_path, capsys):
    """Replies of a pirate: by keys chosen for tiles in training, by all keys afterwards."""
    subjects = ["the sea", "the moon", "bread", "the wind", "winter", "a map", "rain", "a kite"]
    asks = ["Tell me about {}.", "What is {}?", "Describe {} to a child.", "Say something on {}."]
    chats = []
    for ask in asks:
        for subject in subjects:
            reply = f"Arr! {subject.capitalize()}, ye ask? It be a fine thing to know, matey!"
            messages = {"user": ask.format(subject), "assistant": reply}
            turns = [{"role": role, "content": text} for role, text in messages.items()]
            chats.append(json.dumps({"messages": turns}))
    (tmp_path / "chats.jsonl").write_text("\n".join(chats))
    options = ["--text-file", tmp_path / "chats.jsonl", "--method", "spt", "--steps", 20]
    options += ["--serve", "none"]
    options += ["--granularity", "tile", "--max-length", 128, "--batch-size", 2]
    options += ["--prompt", "What is a lighthouse?", "--out", tmp_path / "out"]
    output = run(capsys, *options)
    assert "Arr!" in output.partition("What is a lighthouse?")[2]
    found = figures(tmp_path / "out")
    assert found["spt"]["perplexity_dense"] < 0.2 * found["base"]["perplexity"]
    assert found["spt"]["perplexity_sparse"] != found["spt"]["perplexity_dense"]


def test_cutting_keeps_every_character_and_lines_whole():
    documents = cpython_documentation()[:6]
    for share in (0.0, 0.3, 0.77, 1.0):
        head, tail = cut_texts(documents, share)
        assert "".join(head + tail) == "".join(documents)
        assert not head or head[-1].endswith("\n") or not tail
        assert len("".join(head)) <= share * len("".join(documents)) + 2
