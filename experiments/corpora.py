"""A text for language models: CPython's documentation."""

from __future__ import annotations

import hashlib
from pydoc_data.topics import topics


def cpython_documentation() -> list[str]:
    """Topics of the language reference that every CPython carries, in a fixed mixed order.

    Other Python versions carry slightly other text, so figures compare within one version.
    """
    return [topics[name] for name in sorted(topics, key=_hash)]


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
