"""Rows for a language model as texts or conversations, whatever their layout."""

from __future__ import annotations

import json
from typing import Any

from spt_jax.finetune.config import DataConfig
from spt_jax.finetune.encoding import Record
from spt_jax.finetune.rows import BadRow, Row
from spt_jax.training.text import checked_record

#: ShareGPT's names of who speaks -> roles.
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
_FOR_TEMPLATES = ("tools", "documents", "chat_template_kwargs")


def record_of(row: Row, data: DataConfig) -> Record:
    """The text of a row, or its conversation: `messages`, and what templates read beside them.

    Args:
        row: of a file.
        data: its layout and columns.

    Raises:
        BadRow: the row is not of the layout, or holds nothing to learn.
    """
    try:
        checked = checked_record(_record(row, data), row.where)
    except BadRow:
        raise
    except ValueError as error:
        raise BadRow(str(error)) from None
    return checked.get("text", checked)


def question_of(row: Row, data: DataConfig) -> Record:
    """What a model is to go on from: a text or prompt, or messages without their last reply.

    Args:
        row: of a file; replies may be missing.
        data: its layout and columns.

    Raises:
        BadRow: the row is not of the layout, or blank.
    """
    if data.layout == "text":
        return _string(row, data.text_columns[0])
    record = _record(row, data, with_reply=False)
    messages = record["messages"]
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise BadRow(f"{row.where}: messages must be a list of objects")
    while messages and messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    if not messages:
        raise BadRow(f"{row.where}: there is no message to answer")
    return record | {"messages": messages}


def _record(row: Row, data: DataConfig, *, with_reply: bool = True) -> dict[str, Any]:
    beside = {name: row.values[name] for name in _FOR_TEMPLATES if name in row.values}
    match data.layout:
        case "text":
            return {"text": _string(row, data.text_columns[0])}
        case "messages":
            return {"messages": _parsed(row, "messages")} | beside
        case "sharegpt":
            return {"messages": _from_sharegpt(row)} | beside
        case "alpaca":
            more = row.values.get("input") or ""
            if not isinstance(more, str):
                raise BadRow(f"{row.where}: column 'input' is {more!r:.40}, not a text")
            prompt = _string(row, "instruction") + (f"\n\n{more}" if more.strip() else "")
            answer = "output"
        case _:
            prompt, answer = _string(row, data.prompt_column), data.completion_column
    messages = [{"role": "user", "content": prompt}]
    if isinstance(system := row.values.get("system"), str) and system.strip():
        messages.insert(0, {"role": "system", "content": system})
    if with_reply:
        messages.append({"role": "assistant", "content": _string(row, answer)})
    return {"messages": messages} | beside


def _string(row: Row, column: str) -> str:
    value = row.values.get(column)
    if not isinstance(value, str) or not value.strip():
        found = "missing" if value is None else "blank" if value == "" else f"{value!r:.40}"
        raise BadRow(
            f"{row.where}: column {column!r} is {found}; a text is needed that is not blank"
        )
    return value


def _parsed(row: Row, column: str) -> Any:
    """A value of JSON, which a CSV file has as text."""
    value = row.values.get(column)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise BadRow(f"{row.where}: column {column!r} holds no JSON: {value!r:.40}") from None


def _from_sharegpt(row: Row) -> list[dict[str, Any]]:
    turns = _parsed(row, "conversations")
    if not isinstance(turns, list) or not turns:
        raise BadRow(f'{row.where}: "conversations" must be a list that is not empty')
    messages = []
    for index, turn in enumerate(turns):
        said = turn if isinstance(turn, dict) else {}
        speaker, value = said.get("from", said.get("role")), said.get("value", said.get("content"))
        if speaker not in _SPEAKERS or not isinstance(value, str):
            raise BadRow(
                f'{row.where}: turn {index} must be an object with strings "from", one of '
                f'{", ".join(_SPEAKERS)}, and "value", got {turn!r:.60}'
            )
        messages.append({"role": _SPEAKERS[speaker], "content": value})
    return messages
