"""Texts for language models: CPython's documentation, and cutting texts in two."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pydoc_data.topics import topics


def cpython_documentation() -> list[str]:
    """Topics of the language reference that every CPython carries, in a fixed mixed order.

    Other Python versions carry slightly other text, so figures compare within one version.
    """
    return [topics[name] for name in sorted(topics, key=_hash)]


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def cut(texts: Sequence[str], share: float) -> tuple[list[str], list[str]]:
    r"""The first `share` of the characters, up to the end of a line, and the rest.

    Args:
        texts: documents, of which one may be cut in two.
        share: in [0, 1].

    Example:
        >>> cut(["one\ntwo\n", "three\nfour\n"], 0.25)
        (['one\n'], ['two\n', 'three\nfour\n'])
    """
    wanted, seen = share * sum(map(len, texts)), 0
    head: list[str] = []
    tail: list[str] = []
    for text in texts:
        inside = max(0, round(wanted) - seen)
        end = len(text) if inside >= len(text) else (text.rfind("\n", 0, inside + 1) + 1 or inside)
        seen += len(text)
        for part, texts_of_part in ((text[:end], head), (text[end:], tail)):
            if part.strip():
                texts_of_part.append(part)
    return head, tail
