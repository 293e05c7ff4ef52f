"""Conversations as text and tokens, through the chat template that comes with a model."""

from __future__ import annotations

import datetime
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from spt_jax.models.gguf import find_gguf, read_gguf
from spt_jax.models.gguf_tokenizer import tokenizer_config
from spt_jax.models.hub import ADDITIONAL_TEMPLATES, read_json
from spt_jax.models.tokenizer import CONFIG_FILE, special_tokens, tokenizer_fields
from spt_jax.training.text import Document, unlimited

Message = Mapping[str, Any]  # of "role", "content" and what else the template reads

#: Name of a template that transformers takes by itself for conversations with tools.
_FOR_TOOLS = "tool_use"

_PLAIN = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- message['role'] | capitalize }}: {{ message['content'] | trim -}}
{{- eos_token if message['role'] == 'assistant' }}{{ '\\n' -}}
{%- endfor -%}
{{- 'Assistant:' if add_generation_prompt -}}
"""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChatTemplate:
    r"""How a model wants a conversation written.

    Templates are Jinja programs from outside. They run in a sandbox, with the functions and
    options that transformers gives them, and see nothing but their arguments.

    Attributes:
        source: the template.
        special_tokens: what it knows them by, such as bos_token, to what they are.
        now: what templates that write the date take for it; None for the moment of the call,
            at which the same conversation differs from day to day.

    Example:
        >>> template = ChatTemplate.plain(eos_token="</s>")
        >>> template.render([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
        'User: Hi\nAssistant:'
    """

    source: str = field(repr=False)
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    now: datetime.datetime | None = None

    def __post_init__(self) -> None:
        try:
            _ = self._compiled
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template has an error: {error}") from error

    @classmethod
    def load(
        cls, directory: str | os.PathLike[str], *, now: datetime.datetime | None = None
    ) -> ChatTemplate:
        """The template of a Hugging Face model directory, or of a GGUF file.

        It is `chat_template.jinja`, or else `chat_template` in `tokenizer_config.json`, or else in
        `chat_template.json`; of several the one named "default". Others, such as those of
        `additional_chat_templates/`, are not read, which the log says, as a warning where
        transformers would take one for conversations with tools. Special tokens are those of
        `tokenizer_config.json`, or of `special_tokens_map.json`, see `load_tokenizer`. A GGUF file
        has both in its metadata.

        Args:
            directory: the model; with a GGUF file where it has no `tokenizer_config.json`, or such
                a file itself.
            now: see the attribute.

        Raises:
            ValueError: there is no template, or it or a JSON file is not well-formed.
        """
        directory = Path(directory)
        if (file := find_gguf(directory, instead_of=CONFIG_FILE)) is not None:
            config = tokenizer_config(read_gguf(file))
        else:
            config = tokenizer_fields(directory)
        named = _named_templates(directory, config)
        others = sorted(named.keys() - {"default"})
        if others and "default" not in named:
            raise ValueError(
                f'{directory} has several chat templates, but none named "default": '
                f"{', '.join(others)}; make a ChatTemplate of the one that you want"
            )
        source = named.get("default")
        if not isinstance(source, str):
            raise ValueError(
                f"{directory} has no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json, chat_template.json or a GGUF file's metadata): it holds a "
                "base model; choose a template, for example ChatTemplate.plain(eos_token=...)"
            )
        if others:
            _log.log(
                logging.WARNING if _FOR_TOOLS in others else logging.INFO,
                "%s: of its chat templates %s are not read%s; make a ChatTemplate of one to use it",
                directory,
                ", ".join(others),
                f" (transformers takes {_FOR_TOOLS} where there are tools)"
                if _FOR_TOOLS in others
                else "",
            )
        return cls(source, special_tokens(config), now)

    @classmethod
    def plain(cls, *, eos_token: str, bos_token: str = "") -> ChatTemplate:
        """A template for base models, without tokens of its own.

        Every message is a line `Role: content`, a reply of the assistant ends with `eos_token`.

        Args:
            eos_token: tells the model where a reply ends, and generation where to stop.
            bos_token: comes first.
        """
        return cls(_PLAIN, {"eos_token": eos_token, "bos_token": bos_token})

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """A conversation as text, special tokens included.

        Args:
            messages: in order.
            add_generation_prompt: end with what comes before a reply of the assistant.
            variables: what else the template reads, such as `tools`, a list of JSON schemas,
                `documents`, or `enable_thinking`.

        Raises:
            ValueError: the template refuses the messages, or reads no such variable.
        """
        if unread := [n for n, x in variables.items() if x is not None and n not in self._reads]:
            raise ValueError(
                f"the chat template reads no {', '.join(unread)}, so the model would not see them; "
                "leave them out, or give a template that writes them"
            )
        try:
            return self._compiled.render(
                **self.special_tokens,
                **{"tools": None, "documents": None} | variables,
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
            )
        except (jinja2.TemplateError, TypeError) as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise ValueError(
                f"the chat template refuses messages of the roles {roles}: {error}"
            ) from error

    @cached_property
    def _compiled(self) -> jinja2.Template:
        return self._environment.from_string(self.source)

    @cached_property
    def _reads(self) -> set[str]:
        """Names of the variables in the template."""
        return jinja2.meta.find_undeclared_variables(self._environment.parse(self.source))

    @cached_property
    def _environment(self) -> jinja2.Environment:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlocks, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = self._strftime_now
        return environment

    def _strftime_now(self, pattern: str) -> str:
        return (self.now or datetime.datetime.now()).strftime(pattern)


def encode_messages(
    messages: Sequence[Message], tokenizer: Tokenizer, template: ChatTemplate, **variables: Any
) -> list[Document]:
    """A conversation in tokens, of which the assistant's replies are predicted.

    A reply is its content and what the template writes after it to end the turn. What is
    predicted is what the model would have to generate after the template's generation prompt.

    Args:
        messages: at least one of the role "assistant".
        tokenizer: left as it is; its own truncation and padding are not used. It adds no special
            tokens, as the template writes them.
        template: of the model.
        variables: for `ChatTemplate.render`, such as `tools`.

    Returns:
        One document. But where the template writes a reply differently once more messages follow
        it (as Qwen3's, which drops earlier reasoning), one document a reply: the conversation up
        to it, with that reply predicted.

    Raises:
        ValueError: there is no reply, the template refuses what comes before one, or one does not
            begin with the template's generation prompt.
    """
    replies = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    if not replies:
        raise ValueError("no message by the assistant, so there is nothing to learn from")
    tokenizer = unlimited(tokenizer)

    def render(messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        return template.render(messages, add_generation_prompt, **variables)

    whole = render(messages)
    spans, texts = [], []
    for i in replies:
        try:
            prompt = render(messages[:i], add_generation_prompt=True)
            text = render(messages[: i + 1])
            if not text.startswith(prompt):
                raise ValueError(
                    f"reply {i} cannot be told from what is before it: the chat template renders "
                    f"{text[-80:]!r}, which does not go on from its generation prompt "
                    f"{prompt[-40:]!r}"
                )
        except ValueError as error:
            if any(message.get("role") == "user" for message in messages[:i]):
                raise
            raise ValueError(
                f"reply {i} comes before any message of the user, which the chat template needs "
                "first: begin the conversation with one, or leave the reply out"
            ) from error
        spans.append((len(prompt), len(text)))
        texts.append(text)
    if all(whole.startswith(text) for text in texts):
        return [_document(whole, spans, tokenizer)]
    return [_document(text, [span], tokenizer) for text, span in zip(texts, spans, strict=True)]


def _document(text: str, spans: Sequence[tuple[int, int]], tokenizer: Tokenizer) -> Document:
    """Tokens of `text`, of which those are predicted that end within one of the spans."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    ends = np.array([end for _, end in encoding.offsets], np.int64)
    predicted = np.zeros(len(ends), bool)
    for start, stop in spans:
        predicted |= (ends > start) & (ends <= stop)
    return Document(np.array(encoding.ids, np.int32), predicted)


def _named_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Chat templates of a directory by their names; one alone is "default".

    Args:
        directory: the model, or a GGUF file.
        config: the fields of its `tokenizer_config.json`.
    """
    alone, older = directory / "chat_template.jinja", directory / "chat_template.json"
    found = alone.read_text("utf-8") if alone.is_file() else config.get("chat_template")
    if found is None and older.is_file():
        found = read_json(older).get("chat_template")
    if isinstance(found, list):
        found = {template["name"]: template["template"] for template in found}
    named = dict(found) if isinstance(found, Mapping) else {"default": found}
    for path in (directory / ADDITIONAL_TEMPLATES).glob("*.jinja"):
        if named.get(path.stem) is None:
            named[path.stem] = path.read_text("utf-8")
    return {name: template for name, template in named.items() if template is not None}


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}` marks replies for transformers; here its content is just rendered."""

    tags = {"generation"}  # noqa: RUF012  Jinja's type

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it; Jinja's own escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
