"""Values of JSON files, each with its place for messages."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_ROLES = ("system", "developer", "user", "assistant", "tool")


def decode_file(path: str | os.PathLike[str]) -> str:
    """The text of a file in UTF-8, without a byte order mark.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 at byte {error.start}; convert it, for example with iconv"
        ) from error


def json_values(path: str | os.PathLike[str]) -> Iterator[tuple[Any, str]]:
    """Values of a file of JSON lines, blank ones skipped, or of one JSON array.

    Returns:
        Each value with its place, such as "chats.jsonl, line 3".

    Raises:
        ValueError: the file is not UTF-8, or a line is not JSON.
    """
    text = decode_file(path)
    if (array := json_array(text)) is not None:
        yield from ((value, f"{path}, record {n}") for n, value in enumerate(array, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _parsed(line, where := f"{path}, line {number}"), where


def json_array(text: str) -> list[Any] | None:
    """The JSON array that a text is, or None."""
    if text.lstrip()[:1] == "[":
        with contextlib.suppress(json.JSONDecodeError, RecursionError):
            return json.loads(text)
    return None


def check_messages(messages: Any, where: str) -> None:
    """Raise a ValueError unless these are messages of a conversation with a reply.

    Args:
        messages: objects with `role` and `content`, the latter optional beside `tool_calls`.
        where: what the message calls their place.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'{where}: "messages" must be a list that is not empty')
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not (
            isinstance(message.get("role"), str) and _has_content(message)
        ):
            raise ValueError(
                f'{where}: message {index} must be an object with strings "role" and "content"'
            )
        if message["role"] not in _ROLES:
            raise ValueError(
                f"{where}: message {index} has the unknown role {message['role']!r}; "
                f"roles are {', '.join(_ROLES)}"
            )
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(
            f"{where}: no message by the assistant, so there is nothing to learn from; "
            'add its reply with "role": "assistant", or remove the line'
        )


def _has_content(message: dict[str, Any]) -> bool:
    content = message.get("content")
    return isinstance(content, str) or (content is None and bool(message.get("tool_calls")))


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where} is not JSON: {error.msg} at column {error.colno}; write one object a line"
        ) from None
    except RecursionError:
        raise ValueError(
            f"{where} is not JSON that can be read: nested too deeply; write one object a line"
        ) from None
