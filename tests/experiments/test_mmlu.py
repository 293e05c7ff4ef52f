"""The command, on made questions and tiny models whose answers are known."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

import spt_jax
from experiments import mmlu
from spt_jax import cli
from spt_jax.models.config import parse_config
from spt_jax.models.decoder import Decoder
from spt_jax.models.slots import tensor_slots
from tests.spt_jax.models.builders import GOLDEN, save_model

LETTERS = mmlu.LETTERS
QUESTIONS = {"astronomy": 7, "virology": 4, "knots": 3}  # knots is none of MMLU's
WORDS = ["sun", "moon", "tide", "virus", "rope", "red", "blue", "one", "two", "three"]


def make_questions(number: int, seed: int) -> list[list[str]]:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(number):
        text = " ".join(rng.choice(WORDS, int(rng.integers(3, 9)))) + ", or\nwhat?"
        rows.append([text, *rng.choice(WORDS, 4, replace=False), str(rng.choice(list(LETTERS)))])
    return rows


def write_csv(path: Path, rows: list[list[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("mmlu")
    for seed, (subject, number) in enumerate(QUESTIONS.items()):
        write_csv(directory / "dev" / f"{subject}_dev.csv", make_questions(5, seed + 10))
        write_csv(directory / "test" / f"{subject}_test.csv", make_questions(number, seed))
    return directory


def words_tokenizer(*, end: bool = False) -> Tokenizer:
    """Words, without spaces; a beginning and, with `end`, an end that every text gets."""
    text = "The following are multiple choice questions ( with answers ) about . Answer : , or what"
    names = ["<unk>", "<s>", "</s>", "?", *LETTERS, *WORDS, *text.split(), *QUESTIONS]
    vocabulary = {name: i for i, name in enumerate(dict.fromkeys(names))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if end else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def spaced_tokenizer() -> Tokenizer:
    """Letters with the space before them as single tokens, and characters."""
    characters = sorted(set(mmlu.__doc__ + "\n0123456789()?.:,'" + "".join(WORDS)) | set(LETTERS))
    names = ["<unk>", *characters, *(f" {letter}" for letter in LETTERS), "virology", "k"]
    vocabulary = {name: i for i, name in enumerate(dict.fromkeys(names))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    pattern = Regex(r"(?<=Answer:) [A-D]|[\s\S]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    return tokenizer


def write_model(directory: Path, tokenizer: Tokenizer, favourite: str | None = None) -> Path:
    """A random LLaMA, or one that favours a token whatever comes before it."""
    raw = {
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 640,
    }
    model = Decoder(parse_config(raw), rngs=nnx.Rngs(1))
    if favourite is None:
        for slot in tensor_slots(model).values():  # so large that attention picks single tokens
            slot.variable[...] = slot.variable[...] * 20
    else:
        layer, table, head = model.layers[0], model.embedding.embedding, model.head.kernel
        for kernel in (layer.attention.o_proj.kernel, layer.ffn.down.kernel):
            kernel[...] = jnp.zeros_like(kernel[...])
        table[...] = table[...].at[:, 0].set(1.0)  # so is the first hidden state, normalised
        row = jnp.zeros(raw["vocab_size"]).at[tokenizer.token_to_id(favourite)].set(1.0)
        head[...] = jnp.zeros_like(head[...]).at[0].set(row)
    save_model(directory, raw, model)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def always_b(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("b") / "model", words_tokenizer(), "B")


@pytest.fixture(scope="module")
def random_model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("random") / "model", words_tokenizer())


def run(monkeypatch, *arguments: object) -> None:
    """The command in this process."""
    monkeypatch.setattr(sys, "argv", ["experiments.mmlu", *map(str, arguments)])
    cli.run(mmlu.main)


def share(data: Path, letter: str, subject: str) -> float:
    rows = mmlu.read_questions(data / "test" / f"{subject}_test.csv")
    return sum(LETTERS[row.answer] == letter for row in rows) / len(rows)


def test_a_model_that_answers_b_scores_the_share_of_b(
    data, always_b, monkeypatch, capsys, tmp_path
):
    run(monkeypatch, "--model", always_b, "--data-dir", data, "--out", tmp_path, "--batch-size", 4)
    output = capsys.readouterr().out
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    figures, summary = metrics["figures"], metrics["summary"]
    shares = {subject: share(data, "B", subject) for subject in QUESTIONS}
    assert {subject: figures[subject]["accuracy"] for subject in QUESTIONS} == shares
    assert {subject: figures[subject]["questions"] for subject in QUESTIONS} == QUESTIONS
    assert list(summary["categories"]) == ["STEM", "other", "unlisted"]
    assert summary["categories"]["STEM"] == {"accuracy": shares["astronomy"], "questions": 7}
    assert summary["subjects"]["accuracy"] == pytest.approx(np.mean(list(shares.values())))
    right = sum(shares[subject] * number for subject, number in QUESTIONS.items())
    assert summary["questions"] == {"accuracy": pytest.approx(right / 14), "questions": 14}
    assert 0 < right < 14
    assert (summary["fewer_shots"], summary["cut"]) == (0, 0)
    assert metrics["configuration"]["shots"] == 5
    assert {"jax", "flax"} <= metrics["versions"].keys()
    for name, value in [*shares.items(), ("all questions", right / 14)]:
        row = next(line for line in output.splitlines() if f"│ {name} " in line)
        assert f"{value:.4f}" in row
    assert "\r" not in output  # no progress bar off a terminal


@pytest.mark.parametrize("tokenizer", [words_tokenizer(), spaced_tokenizer()])
def test_answers_are_those_of_the_likeliest_continuations(data, tokenizer, tmp_path):
    shown, questions = (
        mmlu.read_questions(data / split / f"astronomy_{split}.csv") for split in ("dev", "test")
    )
    model = spt_jax.load_pretrained(write_model(tmp_path, tokenizer), task="causal-lm")
    prompts = mmlu.make_prompts("astronomy", shown[:1], questions, tokenizer, 640)
    assert {prompt.shots for prompt in prompts} == {1}
    answers = mmlu.answer(model, prompts, batch_size=4, max_length=640)
    ids = np.stack([np.pad(prompt.ids, (0, 512 - len(prompt.ids))) for prompt in prompts])
    lengths = np.array([len(prompt.ids) for prompt in prompts])
    logits = mmlu.make_score(model)(ids, lengths, np.array([p.letters for p in prompts]))

    @jax.jit
    def log_probabilities(ids):
        return jax.nn.log_softmax(model(ids[None])[0])

    head = "The following are multiple choice questions (with answers) about astronomy.\n\n"
    for question, answer, found in zip(questions, answers, logits, strict=True):
        text = head + shown[0].prompt(answered=True) + question.prompt(answered=False)
        context = tokenizer.encode(text).ids
        likelihoods = []
        for letter in LETTERS:
            whole = tokenizer.encode(f"{text} {letter}").ids
            assert whole[: len(context)] == context
            logs = log_probabilities(np.pad(whole, (0, 512 - len(whole))))
            rest = range(len(context), len(whole))
            likelihoods.append(sum(float(logs[i - 1, whole[i]]) for i in rest))
        # the logits miss the normaliser that the letters share
        np.testing.assert_allclose(found - found[0], np.subtract(likelihoods, likelihoods[0]), 1e-3)
        assert answer == np.argmax(likelihoods)


def test_the_prompt_is_that_of_hendrycks():
    question = mmlu.Question("Which?", ("one", "two", "three", "four"), 2)
    text = "Which?\nA. one\nB. two\nC. three\nD. four\nAnswer:"
    assert question.prompt(answered=False) == text
    assert question.prompt(answered=True) == text + " C\n\n"


def test_tokens_after_the_letter_do_not_matter(data):
    shown, questions = [], mmlu.read_questions(data / "test" / "virology_test.csv")
    plain, ended = (
        mmlu.make_prompts("virology", shown, questions, words_tokenizer(end=end), 640)
        for end in (False, True)
    )
    assert plain == ended


def test_long_prompts_lose_examples_then_their_beginning(data):
    tokenizer = words_tokenizer()
    shown, questions = (
        mmlu.read_questions(data / split / f"astronomy_{split}.csv") for split in ("dev", "test")
    )

    def prompts(max_length):
        return mmlu.make_prompts("astronomy", shown, questions, tokenizer, max_length)

    whole = [
        [len(p.ids) for p in mmlu.make_prompts("astronomy", shown[:n], questions, tokenizer, 640)]
        for n in range(6)
    ]
    limit = sorted(whole[3])[2]  # of some three examples fit, of others fewer
    made = prompts(limit)
    for i, prompt in enumerate(made):
        fitting = max(n for n in range(6) if whole[n][i] <= limit)
        assert (prompt.shots, len(prompt.ids), prompt.cut) == (fitting, whole[fitting][i], False)
    assert len({prompt.shots for prompt in made}) > 1
    short = prompts(20)
    assert {(prompt.shots, len(prompt.ids), prompt.cut) for prompt in short} == {(0, 20, True)}
    assert [prompt.ids for prompt in short] == [prompt.ids[-20:] for prompt in prompts(640)]


def test_lost_examples_are_reported(data, always_b, monkeypatch, capsys, tmp_path):
    run(
        monkeypatch, "--model", always_b, "--data-dir", data, "--out", tmp_path,
        "--subjects", "astronomy,virology", "--limit", 2, "--max-length", 120,
    )  # fmt: skip
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert {s: f["questions"] for s, f in metrics["figures"].items()} == {
        "astronomy": 2,
        "virology": 2,
    }
    assert metrics["summary"]["fewer_shots"] == 4
    assert metrics["figures"]["virology"]["shots"] < 5
    assert "4 prompts of more than 120 tokens show fewer than 5" in capsys.readouterr().out


def test_batches_change_no_answer(data, random_model):
    model = spt_jax.load_pretrained(random_model, task="causal-lm")
    tokenizer = spt_jax.load_tokenizer(random_model)
    questions = mmlu.read_questions(data / "test" / "astronomy_test.csv")
    prompts = mmlu.make_prompts("astronomy", [], questions, tokenizer, 640)
    assert len({len(prompt.ids) for prompt in prompts}) > 2
    three, seven = (mmlu.answer(model, prompts, batch_size=n, max_length=640) for n in (3, 7))
    np.testing.assert_array_equal(three, seven)
    assert len(set(three.tolist())) > 1


def test_an_adapter_is_used(data, always_b, monkeypatch, tmp_path):
    model = spt_jax.load_pretrained(always_b, task="causal-lm")
    config = spt_jax.SPTConfig(
        serve=None,
        lora=spt_jax.LoRAConfig(rank=1, alpha=1, targets=("ffn",)),
        attention=None,
        ffn=None,
    )
    spt_jax.adapt(model, config)
    spt_jax.save_adapter(model, tmp_path / "adapter")
    loaded = {}

    def answer(model, prompts, **options):
        loaded["model"] = model
        return np.full(len(prompts), LETTERS.index("C"))

    monkeypatch.setattr(mmlu, "answer", answer)
    run(
        monkeypatch, "--model", always_b, "--adapter", tmp_path / "adapter", "--data-dir", data,
        "--out", tmp_path, "--shots", 0, "--subjects", "astronomy",
    )  # fmt: skip
    assert loaded["model"].layers[0].ffn.up.lora is not None
    assert loaded["model"].layers[0].attention.q_proj.lora is None
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["figures"]["astronomy"]["accuracy"] == share(data, "C", "astronomy")


def test_padded_lengths_are_few_and_close():
    lengths = [mmlu.padded_length(n, 2048) for n in range(1, 2049)]
    assert all(n <= width for n, width in enumerate(lengths, 1))
    assert all(width <= 1.25 * n for n, width in enumerate(lengths, 1) if n >= mmlu.SHORTEST)
    assert len(set(lengths)) == 25
    assert mmlu.padded_length(33, 36) == 36


def test_all_subjects_have_a_category():
    assert len(mmlu.CATEGORY_OF) == 57
    assert [len(subjects) for subjects in mmlu.CATEGORIES.values()] == [18, 13, 12, 14]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["q?", "1", "2", "3", "4", "A"], ["q?", "1", "2", "3", "4"]], "line 2: 5 columns; expec"),
        ([["q\n?", "1", "2", "3", "4", "E"]], "line 2: the answer must be A, B, C or D, got 'E'"),
        ([["q?", "1", "2", "3", "4", ""]], "line 1: the answer must be A, B, C or D, got ''"),
        ([["q?", "1", "2", "3", "4", "AB"]], "line 1: the answer must be A, B, C or D, got 'AB'"),
        ([], "is empty: there is no question in it"),
    ],
)
def test_a_wrong_row_is_named(rows, message, tmp_path):
    write_csv(tmp_path / "x_test.csv", rows)
    with pytest.raises(ValueError, match=message) as error:
        mmlu.read_questions(tmp_path / "x_test.csv")
    assert "x_test.csv" in str(error.value)


@pytest.mark.parametrize("content", [b'"q?,1,2', b'"q?" 1,2\n', b"\xff\xfe,1,2,3,4,A\n"])
def test_what_is_no_csv_is_named(content, tmp_path):
    path = tmp_path / "x_test.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}, after line"):
        mmlu.read_questions(path)


def test_quotes_lines_and_spaces_are_kept(tmp_path):
    row = ['Say "no",\nor not? ', " 1", "2, 3", 'x"y', "", "D"]
    write_csv(tmp_path / "x_test.csv", [row])
    (question,) = mmlu.read_questions(tmp_path / "x_test.csv")
    assert [question.text, *question.choices, LETTERS[question.answer]] == row


def test_answers_that_cannot_be_told_apart():
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, ":": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    question = mmlu.Question("Which?", ("one", "two", "three", "four"), 2)
    with pytest.raises(ValueError, match="does not tell the answers A, B, C and D apart"):
        mmlu.make_prompts("knots", [], [question], tokenizer, 640)


def fewer_examples(directory: Path) -> None:
    write_csv(directory / "dev" / "knots_dev.csv", make_questions(2, 0))
    write_csv(directory / "test" / "knots_test.csv", make_questions(2, 0))


def no_dev(directory: Path) -> None:
    write_csv(directory / "test" / "knots_test.csv", make_questions(2, 0))


def larger_vocabulary(model: Path, directory: Path) -> None:
    shutil.copytree(model, directory)
    tokenizer = spt_jax.load_tokenizer(directory)
    tokenizer.add_tokens(["multiple choice"])
    tokenizer.save(str(directory / "tokenizer.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data-dir", "{tmp}/nowhere"], "holds no SUBJECT_test.csv; give MMLU's folder"),
        (["--data-dir", "{tmp}/fewer"], "holds 2 questions, but --shots 5 are to be shown"),
        (["--data-dir", "{tmp}/dev-less"], "knots_dev.csv does not exist"),
        (["--subjects", "astronomy,rope"], "unknown subject 'rope' in --subjects astronomy,rope"),
        (["--max-length", "641"], "max_length 641 is above the model's 640 positions"),
        (["--shots", "-1"], "shots must be at least 0, got -1"),
        (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--limit", "0"], "limit must be at least 1, got 0"),
        (["--model", "{tmp}/nowhere"], "nowhere"),
        (["--model", str(GOLDEN / "llama")], "has no tokenizer.json"),
        (["--model", "minilm"], "is a bert encoder"),
        (["--model", "{tmp}/larger"], "but the model's vocab_size is"),
        (["--adapter", "{tmp}/nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_named_in_one_line(
    arguments, message, data, always_b, tmp_path, monkeypatch, capsys
):
    fewer_examples(tmp_path / "fewer")
    no_dev(tmp_path / "dev-less")
    larger_vocabulary(always_b, tmp_path / "larger")
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    given = {"--model": always_b, "--data-dir": data, "--out": tmp_path / "out"}
    rest = [
        part for name, value in given.items() if name not in arguments for part in (name, value)
    ]
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *rest, *arguments)
    errors = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert message in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()
