"""The built-in demonstration task: was a sentence's word order scrambled?

Sentences come from the language reference that every CPython carries (`pydoc_data.topics`), so the
task needs no download. Each appears twice in its split: as it is (label 1) and shuffled (label 0).
The split is fixed: it depends on the text of a sentence alone. Other Python versions carry slightly
other text, so figures compare within one Python version.
"""

from __future__ import annotations

import hashlib
import random
import re
from pydoc_data.topics import topics

MIN_WORDS, MAX_WORDS = 6, 30
_VALIDATION_SHARE = 0.2
_PLAIN_SHARE = 0.75
_PLAIN = re.compile(r"[A-Za-z'-]+[,;:]?")
_WORD = re.compile(
    r"\(?[\w'-]+(\.[\w'-]+)*(\(\))?\)?[,;:]?"
)  # names, calls and parentheses are allowed too


def sentences() -> list[str]:
    """Distinct plain English sentences of CPython's language reference, in a fixed order."""
    found: dict[str, None] = {}
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            text = re.sub(r"\[[^]]*\]|[*`\"]", "", " ".join(paragraph.split()))
            for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", text):
                words = sentence.rstrip(".!?").split()
                if (
                    sentence.endswith(".")
                    and MIN_WORDS <= len(words) <= MAX_WORDS
                    and all(_WORD.fullmatch(word) for word in words)
                    and sum(map(bool, map(_PLAIN.fullmatch, words))) >= _PLAIN_SHARE * len(words)
                ):
                    found[" ".join(words) + "."] = None
    return list(found)


def examples(split: str) -> list[dict[str, str | int]]:
    """Rows `{"sentence": str, "label": 0 or 1}` of a split: 1 natural, 0 scrambled.

    Raises:
        ValueError: there is no such split.
    """
    if split not in ("train", "validation"):
        raise ValueError(f"acceptability has the splits train and validation, not {split!r}")
    rows: list[dict[str, str | int]] = []
    for sentence in sentences():
        rng = random.Random(hashlib.sha256(sentence.encode()).digest())
        held_out = rng.random() < _VALIDATION_SHARE
        if held_out == (split == "validation"):
            rows += [
                {"sentence": sentence, "label": 1},
                {"sentence": _scramble(sentence, rng), "label": 0},
            ]
    return rows


def _scramble(sentence: str, rng: random.Random) -> str:
    words = sentence.rstrip(".").split()
    shuffled = words[:]
    while shuffled == words:
        rng.shuffle(shuffled)
    return " ".join(shuffled) + "."
