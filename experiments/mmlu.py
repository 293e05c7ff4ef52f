"""Measure a causal language model, with or without an adapter, on MMLU with few-shot prompts.

    python -m experiments.mmlu --model DIR --data-dir data
    python -m experiments.mmlu --model DIR --adapter ADAPTER --data-dir data --subjects astronomy

--data-dir holds the CSV files of github.com/hendrycks/test: dev/SUBJECT_dev.csv and
test/SUBJECT_test.csv, each row a question, the choices A to D and the letter of the right one. The
prompt is theirs: up to --shots answered questions of dev, then the question and "Answer:". The
model answers with the letter that it holds the likeliest to follow; guessing scores 0.25. Beside
the table a run writes metrics.json under --out.
"""

from __future__ import annotations

import csv
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jaxtyping import Array, Float, Int
from rich.table import Table
from tokenizers import Tokenizer
from tqdm import tqdm

import spt_jax
from experiments.methods import write_metrics
from spt_jax import cli
from spt_jax.config import Form
from spt_jax.models.decoder import Decoder

LETTERS = "ABCD"
SHORTEST = 32  # tokens to which a batch of short prompts is padded

#: Categories of hendrycks/test.
CATEGORIES: Mapping[str, tuple[str, ...]] = {
    "STEM": (
        "abstract_algebra",
        "astronomy",
        "college_biology",
        "college_chemistry",
        "college_computer_science",
        "college_mathematics",
        "college_physics",
        "computer_security",
        "conceptual_physics",
        "electrical_engineering",
        "elementary_mathematics",
        "high_school_biology",
        "high_school_chemistry",
        "high_school_computer_science",
        "high_school_mathematics",
        "high_school_physics",
        "high_school_statistics",
        "machine_learning",
    ),
    "humanities": (
        "formal_logic",
        "high_school_european_history",
        "high_school_us_history",
        "high_school_world_history",
        "international_law",
        "jurisprudence",
        "logical_fallacies",
        "moral_disputes",
        "moral_scenarios",
        "philosophy",
        "prehistory",
        "professional_law",
        "world_religions",
    ),
    "social sciences": (
        "econometrics",
        "high_school_geography",
        "high_school_government_and_politics",
        "high_school_macroeconomics",
        "high_school_microeconomics",
        "high_school_psychology",
        "human_sexuality",
        "professional_psychology",
        "public_relations",
        "security_studies",
        "sociology",
        "us_foreign_policy",
    ),
    "other": (
        "anatomy",
        "business_ethics",
        "clinical_knowledge",
        "college_medicine",
        "global_facts",
        "human_aging",
        "management",
        "marketing",
        "medical_genetics",
        "miscellaneous",
        "nutrition",
        "professional_accounting",
        "professional_medicine",
        "virology",
    ),
}
CATEGORY_OF = {subject: name for name, subjects in CATEGORIES.items() for subject in subjects}
UNLISTED = "unlisted"  # category of subjects that are not MMLU's


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the experiment."""

    model: str
    """Hugging Face directory or hub id of a causal language model."""
    data_dir: Path
    """Folder that holds dev/ and test/."""
    adapter: str | None = None
    """Adapter of the model: a directory or hub id of save_adapter or PEFT."""
    evaluate_as: Annotated[Form, tyro.conf.arg(name="as")] = "dense"
    """Form of the adapted model: dense, as other tools serve the adapter, or sparse, as it was
    trained."""
    out: Path = Path("runs/mmlu")
    """Folder for metrics.json."""
    subjects: str = "all"
    """Subjects, separated by commas; all for those of test/."""
    shots: int = 5
    """Answered questions before each question."""
    limit: int | None = None
    """Questions a subject, its first ones; by default all."""

    batch_size: int = 8
    """Prompts a batch."""
    max_length: int | None = None
    """Longest prompt in tokens; by default what the model has positions for. Longer ones lose
    answered questions, the last first."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the weights and of computation."""

    def __post_init__(self) -> None:
        for name, least in {"shots": 0, "limit": 1, "batch_size": 1, "max_length": 1}.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")


class Question(NamedTuple):
    """A row of a CSV file."""

    text: str
    choices: tuple[str, ...]
    answer: int  # index of the right choice

    def prompt(self, *, answered: bool) -> str:
        """As it stands in a prompt, ending with "Answer:" or in the answer and an empty line."""
        lines = [f"{letter}. {c}" for letter, c in zip(LETTERS, self.choices, strict=True)]
        end = f" {LETTERS[self.answer]}\n\n" if answered else ""
        return "\n".join([self.text, *lines, "Answer:"]) + end


class Prompt(NamedTuple):
    """A tokenized question.

    Attributes:
        subject: of the question.
        ids: tokens up to those in which the answers differ.
        letters: the next token of each answer.
        answer: index of the right one.
        shots: answered questions before it.
        cut: whether the question itself was too long and lost its beginning.
    """

    subject: str
    ids: list[int]
    letters: tuple[int, ...]
    answer: int
    shots: int
    cut: bool


def read_questions(path: Path) -> list[Question]:
    """The rows of a CSV file of MMLU.

    Raises:
        ValueError: the file is absent, empty or no UTF-8, or a row is wrong; the message names the
            file and the line.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; --data-dir must hold MMLU's dev/ and test/")
    questions = []
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file, strict=True)
        try:
            for row in filter(None, rows):
                where = f"{path}, line {rows.line_num}"
                if len(row) != 6:
                    raise ValueError(
                        f"{where}: {len(row)} columns; expected 6: the question, four choices and "
                        "the letter of the right one"
                    )
                if len(row[-1]) != 1 or row[-1] not in LETTERS:
                    raise ValueError(f"{where}: the answer must be A, B, C or D, got {row[-1]!r}")
                questions.append(Question(row[0], tuple(row[1:5]), LETTERS.index(row[-1])))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, after line {rows.line_num}: {error}") from None
    if not questions:
        raise ValueError(f"{path} is empty: there is no question in it")
    return questions


def find_subjects(options: Options) -> list[str]:
    """The subjects to measure.

    Raises:
        ValueError: there is none, or a subject has no test file.
    """
    folder = options.data_dir / "test"
    found = sorted(p.name.removesuffix("_test.csv") for p in folder.glob("*_test.csv"))
    if not found:
        raise ValueError(f"{folder} holds no SUBJECT_test.csv; give MMLU's folder as --data-dir")
    if options.subjects == "all":
        return found
    names = list(dict.fromkeys(name.strip() for name in options.subjects.split(",")))
    if unknown := [name for name in names if name not in found]:
        raise ValueError(
            f"unknown subject {unknown[0]!r} in --subjects {options.subjects}; {folder} holds "
            f"{', '.join(found)}"
        )
    return names


def read_subject(options: Options, subject: str) -> tuple[list[Question], list[Question]]:
    """Questions to be shown with their answers, and those to be answered.

    Raises:
        ValueError: a file is wrong, or there are fewer than `shots` questions to be shown.
    """
    questions = read_questions(options.data_dir / "test" / f"{subject}_test.csv")[: options.limit]
    if not options.shots:
        return [], questions
    path = options.data_dir / "dev" / f"{subject}_dev.csv"
    shown = read_questions(path)
    if len(shown) < options.shots:
        raise ValueError(
            f"{path} holds {len(shown)} questions, but --shots {options.shots} are to be shown"
        )
    return shown[: options.shots], questions


def make_prompts(
    subject: str,
    shown: Sequence[Question],
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    max_length: int,
) -> list[Prompt]:
    """Tokenize a subject's questions, each with as many of `shown` before it as fit.

    The four texts that end in " A", " B", " C" and " D" are tokenized whole and compared up to
    the first token in which they differ. It is the letter itself, whether or not the tokenizer
    takes the space with it.

    Raises:
        ValueError: the tokenizer does not tell the answers apart.
    """
    about = subject.replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about {about}.\n\n"

    def tokenized(waiting: Sequence[Question], shots: int) -> Iterator[Prompt]:
        start = head + "".join(question.prompt(answered=True) for question in shown[:shots])
        texts = [
            f"{start}{question.prompt(answered=False)} {letter}"
            for question in waiting
            for letter in LETTERS
        ]
        encodings = iter(tokenizer.encode_batch(texts))
        for question in waiting:
            answers = [encoding.ids for encoding in itertools.islice(encodings, len(LETTERS))]
            same = itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*answers, strict=False))
            context = [ids[0] for ids in same]
            letters = tuple(ids[len(context)] for ids in answers if len(ids) > len(context))
            if len(set(letters)) < len(LETTERS):
                raise ValueError(
                    "the tokenizer does not tell the answers A, B, C and D apart: their tokens "
                    f"after {tokenizer.decode(context[-4:])!r} are {list(letters)}"
                )
            cut = not shots and len(context) > max_length
            ids = context[-max_length:] if cut else context
            yield Prompt(subject, ids, letters, question.answer, shots, cut)

    prompts: list[Prompt | None] = [None] * len(questions)
    waiting = list(range(len(questions)))
    for shots in range(len(shown), -1, -1):
        made = tokenized([questions[i] for i in waiting], shots)
        for i, prompt in zip(waiting, made, strict=True):
            prompts[i] = prompt if len(prompt.ids) <= max_length else None
        waiting = [i for i in waiting if prompts[i] is None]
    return [prompt for prompt in prompts if prompt is not None]


def padded_length(length: int, max_length: int) -> int:
    """The smallest of 32, 40, 48, 56, 64, 80, ... that is at least `length`, or `max_length`.

    So few lengths are compiled, and at most a fifth of a long batch's width is padding.
    """
    width = SHORTEST
    while width < length:
        width += 1 << (width.bit_length() - 3)
    return min(width, max_length)


Score = Callable[
    [Int[np.ndarray, "B S"], Int[np.ndarray, " B"], Int[np.ndarray, "B 4"]], Float[Array, "B 4"]
]


def make_score(model: Decoder) -> Score:
    """A compiled function from prompts, their lengths and letters to the letters' logits.

    Logits of one position share their normaliser, so they order the letters as likelihoods do. No
    others are formed, and these in float32.
    """
    graph, state = nnx.split(model)

    @jax.jit
    def score(
        state: nnx.State, ids: jax.Array, lengths: jax.Array, letters: jax.Array
    ) -> jax.Array:
        copy = nnx.merge(graph, state)
        hidden, _ = copy.hidden_states(ids, jnp.arange(ids.shape[1]) < lengths[:, None])
        last = hidden[jnp.arange(len(ids)), lengths - 1]
        columns = copy.output_kernel()[:, letters]
        return jnp.einsum("be,ebc->bc", last, columns, preferred_element_type=jnp.float32)

    return lambda ids, lengths, letters: score(state, ids, lengths, letters)


def answer(
    model: Decoder, prompts: Sequence[Prompt], *, batch_size: int, max_length: int
) -> Int[np.ndarray, " n"]:
    """The index of the letter that the model gives each prompt."""
    score = make_score(model)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    answers = np.zeros(len(prompts), np.int32)
    with tqdm(total=len(prompts), disable=not sys.stderr.isatty(), unit="question") as bar:
        for chosen in itertools.batched(order, batch_size):
            longest = len(prompts[chosen[-1]].ids)
            ids = np.zeros((batch_size, padded_length(longest, max_length)), np.int32)
            lengths = np.ones(batch_size, np.int32)
            letters = np.zeros((batch_size, len(LETTERS)), np.int32)
            for row, i in enumerate(chosen):
                lengths[row] = len(prompts[i].ids)
                ids[row, : lengths[row]] = prompts[i].ids
                letters[row] = prompts[i].letters
            logits = np.asarray(score(ids, lengths, letters))[: len(chosen)]
            if not np.isfinite(logits).all():
                raise ValueError("the model's logits are not finite; try --dtype float32")
            answers[list(chosen)] = logits.argmax(1)
            bar.update(len(chosen))
    return answers


def count(prompts: Sequence[Prompt], answers: Int[np.ndarray, " n"]) -> dict[str, Any]:
    """Figures of one subject, or of several."""
    right = np.array([prompt.answer for prompt in prompts]) == answers
    return {
        "accuracy": float(right.mean()),
        "correct": int(right.sum()),
        "questions": len(prompts),
        "shots": float(np.mean([prompt.shots for prompt in prompts])),
        "cut": sum(prompt.cut for prompt in prompts),
    }


def summarize(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Averages over the subjects of each category and of all, and over all questions."""
    by_category: dict[str, list[Mapping[str, Any]]] = {}
    for subject, values in figures.items():
        by_category.setdefault(CATEGORY_OF.get(subject, UNLISTED), []).append(values)

    def average(subjects: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {
            "accuracy": float(np.mean([values["accuracy"] for values in subjects])),
            "questions": sum(values["questions"] for values in subjects),
        }

    order = [name for name in (*CATEGORIES, UNLISTED) if name in by_category]
    overall = average(list(figures.values()))
    correct = sum(values["correct"] for values in figures.values())
    return {
        "categories": {name: average(by_category[name]) for name in order},
        "subjects": overall,
        "questions": overall | {"accuracy": correct / overall["questions"]},
    }


def results_table(figures: Mapping[str, Mapping[str, Any]], summary: Mapping[str, Any]) -> Table:
    """One row a subject, then the averages."""
    table = Table(title="MMLU")
    table.add_column("subject")
    for header in ("accuracy", "questions", "shots"):
        table.add_column(header, justify="right")
    for subject, values in figures.items():
        shots = f"{values['shots']:.1f}".removesuffix(".0")
        table.add_row(subject, f"{values['accuracy']:.4f}", f"{values['questions']:,}", shots)
    averages = {f"{name}, average": values for name, values in summary["categories"].items()}
    averages |= {
        "all subjects, average": summary["subjects"],
        "all questions": summary["questions"],
    }
    table.add_section()
    for name, values in averages.items():
        table.add_row(name, f"{values['accuracy']:.4f}", f"{values['questions']:,}")
    return table


def _check_tokens(prompts: Sequence[Prompt], vocab_size: int) -> None:
    highest = max(max(*prompt.ids, *prompt.letters) for prompt in prompts)
    if highest >= vocab_size:
        raise ValueError(
            f"the tokenizer gives token {highest}, but the model's vocab_size is {vocab_size}; "
            "they do not belong together"
        )


def main() -> None:
    """Run the experiment."""
    options = cli.parse(Options, "experiments.mmlu", __doc__)
    console = cli.console()
    data = {subject: read_subject(options, subject) for subject in find_subjects(options)}
    tokenizer = spt_jax.load_tokenizer(options.model)
    model = spt_jax.load_pretrained(options.model, task="causal-lm", dtype=options.dtype)
    assert isinstance(model, Decoder)
    if options.adapter is not None:
        model = spt_jax.load_adapter(model, options.adapter)
        model.set_attributes(strict=True, raise_if_not_found=False)  # as in training's evaluation
        spt_jax.set_form(model, options.evaluate_as)
    positions = model.config.max_length
    max_length = positions if options.max_length is None else options.max_length
    if max_length > positions:
        raise ValueError(f"max_length {max_length} is above the model's {positions} positions")
    prompts = [
        prompt
        for subject, (shown, questions) in data.items()
        for prompt in make_prompts(subject, shown, questions, tokenizer, max_length)
    ]
    _check_tokens(prompts, model.config.vocab_size)
    options.out.mkdir(parents=True, exist_ok=True)  # fails now, not at the end of a long run
    tokens = sum(len(prompt.ids) for prompt in prompts)
    console.print(f"{len(prompts):,} questions of {len(data)} subjects, {tokens:,} tokens")
    began = time.perf_counter()
    answers = answer(model, prompts, batch_size=options.batch_size, max_length=max_length)
    wall_s = time.perf_counter() - began
    subjects = np.array([prompt.subject for prompt in prompts])
    figures = {}
    for subject in data:
        rows = np.flatnonzero(subjects == subject)
        figures[subject] = count([prompts[i] for i in rows], answers[rows])
    summary = summarize(figures)
    console.print(results_table(figures, summary))
    fewer = sum(prompt.shots < options.shots for prompt in prompts)
    cut = sum(prompt.cut for prompt in prompts)
    if fewer:
        console.print(
            f"{fewer:,} prompts of more than {max_length:,} tokens show fewer than "
            f"{options.shots} answered questions; {cut:,} of them lost their beginning too"
        )
    summary |= {"fewer_shots": fewer, "cut": cut, "wall_s": wall_s}
    write_metrics(options.out, "mmlu", options, figures, summary=summary)


if __name__ == "__main__":
    cli.run(main)
