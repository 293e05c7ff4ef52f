"""Texts and conversations to documents in tokens."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from spt_jax.chat import ChatTemplate, encode_messages
from spt_jax.models import DecoderConfig, load_tokenizer
from spt_jax.models.hub import TOKENIZER_FILES, find_files
from spt_jax.models.tokenizer import begun_once
from spt_jax.training import Document, Examples, encode_documents

#: What chat templates take for today, so that the same file is the same data on any day. It is the
#: date that Llama 3's template falls back on.
TODAY = datetime.datetime(2024, 7, 26)

Record = str | dict[str, Any]  # a text, or a conversation as `read_jsonl` reads it


class Encoder:
    """Records to documents in tokens.

    Args:
        source: directory or id of the model.
        config: of the model.
        plain_chat: whether conversations are written plainly, not by the model's template.
    """

    def __init__(self, source: str | Path, config: DecoderConfig, *, plain_chat: bool) -> None:
        self.tokenizer: Tokenizer = load_tokenizer(source)
        self.config = config
        self._source, self._plain = source, plain_chat
        self._template: ChatTemplate | None = None
        self.eos_id = config.eos_token_ids[0] if config.eos_token_ids else None

    def template(self) -> ChatTemplate:
        """How conversations are written."""
        if self._template is None:
            self._template = self._load_template()
        return self._template

    def _load_template(self) -> ChatTemplate:
        if not self._plain:
            return ChatTemplate.load(find_files(self._source, files=TOKENIZER_FILES), now=TODAY)
        if self.eos_id is None:
            raise ValueError("the model has no eos_token_id to end a reply with")
        bos = self.config.bos_token_id
        return ChatTemplate.plain(
            eos_token=self.tokenizer.id_to_token(self.eos_id) or "",
            bos_token="" if bos is None else self.tokenizer.id_to_token(bos) or "",
        )

    def __call__(self, records: Sequence[Record], name: str) -> list[Document]:
        """Encode texts whole and of conversations the assistant's part as what is predicted."""
        documents: list[Document] = []
        template: ChatTemplate | None = None
        for kind, group in itertools.groupby(records, type):
            if kind is str:
                texts = [str(text) for text in group]
                documents += encode_documents(texts, self.tokenizer, name=name, eos_id=self.eos_id)
                continue
            template = template or self.template()
            for chat in group:
                documents += self._replies(chat, template, name)
        return documents

    def prompt(self, record: Record) -> list[int]:
        """Token ids that a model goes on from: a text, or a conversation up to its reply."""
        if isinstance(record, str):
            encoding = self.tokenizer.encode(record)
            return begun_once(encoding.ids, encoding.special_tokens_mask)
        rendered = self.template().render(
            record["messages"], add_generation_prompt=True, **_variables(record)
        )
        return self.tokenizer.encode(rendered, add_special_tokens=False).ids

    def _replies(self, chat: Any, template: ChatTemplate, name: str) -> list[Document]:
        try:
            return encode_messages(chat["messages"], self.tokenizer, template, **_variables(chat))
        except ValueError as error:
            first = chat["messages"][0].get("content")
            raise ValueError(
                f"{name}, the conversation that begins {first!r:.60}: {error}"
            ) from error


def _variables(chat: dict[str, Any]) -> dict[str, Any]:
    """What a template reads beside the messages."""
    variables = {key: chat[key] for key in ("tools", "documents") if chat.get(key)}
    return variables | chat.get("chat_template_kwargs", {})


def cut_note(data: Examples, documents: Sequence[Document]) -> str | None:
    """Says how many documents are longer than a row; None where none is."""
    if not data.num_truncated:
        return None
    return (
        f"{data.num_truncated} of {len(documents)} documents of the {data.name} are longer than a "
        f"row of {data.length} and cut into pieces, of which later ones do not see the beginning, "
        "in a conversation the question (--max-length)"
    )
