"""Talk to a model, whose answers appear as they are written.

    python -m spt_jax.chat --model runs/chats/adapter

The model is a directory that `spt_jax.finetune` wrote, of an adapter or a whole model, or any
causal language model that `load_pretrained` loads. Every line of standard input is what the user
says; /new begins a new conversation, and the end of the input ends the program.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers.decoders import DecodeStream

from spt_jax import cli
from spt_jax.config import Form
from spt_jax.finetune.encoding import Encoder
from spt_jax.finetune.loading import Loaded, load_trained
from spt_jax.generation import generate
from spt_jax.models import DecoderConfig

_NEW = "/new"
#: Prompts are padded to a multiple of it: each width compiles once.
_PROMPT_MULTIPLE = 256


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the command."""

    model: str = "smollm2"
    """Directory of an adapter or of a model, a GGUF file, or a hub id."""
    base_model: str | None = None
    """Base model, in place of the one that the adapter names."""
    system: str | None = None
    """What the system says first."""
    max_new_tokens: int = 256
    """Tokens of an answer at most."""
    temperature: float = 0.0
    """Divisor of the logits before sampling; 0 takes the most likely token."""
    top_p: float | None = None
    """Sample from the fewest most likely tokens with at least this probability together."""
    seed: int = 0
    """Seed of the sampling."""
    plain_chat: bool = False
    """Write conversations as lines `Role: content`, whatever template the model has."""
    form: Form | None = None
    """Form of the model; by default the one that it was judged in."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype, and that of weights."""


def talk(
    loaded: Loaded,
    lines: Iterable[str],
    options: Options,
    *,
    write: Callable[[str], Any],
    tell: Callable[[str], Any],
) -> None:
    """Answer lines, one conversation until a line says /new.

    Args:
        loaded: a causal language model.
        lines: what the user says; blank ones are left out.
        options: how to answer.
        write: takes pieces of the answers, each answer ended by a line break.
        tell: takes notes on the conversation.

    Raises:
        ValueError: the model is no causal language model, or has no chat template.
    """
    if loaded.trained.task != "language" or not isinstance(loaded.config, DecoderConfig):
        raise ValueError(
            f"{options.model} does not write: it was trained for {loaded.trained.task}, "
            "which python -m spt_jax.predict is for"
        )
    plain = options.plain_chat or loaded.trained.plain_chat
    encoder = Encoder(loaded.source, loaded.config, plain_chat=plain)
    encoder.template()  # fails now, not at the first line
    room = loaded.config.max_length - options.max_new_tokens
    first = [] if options.system is None else [{"role": "system", "content": options.system}]
    messages: list[dict[str, Any]] = []
    for line in lines:
        if line.strip() == _NEW:
            messages = []
            continue
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line.strip()})
        ids = encoder.prompt({"messages": first + messages})
        while len(ids) > room and len(messages) > 1:
            messages = messages[2:]  # the oldest turn and its answer
            ids = encoder.prompt({"messages": first + messages})
            tell("the conversation is longer than the model's positions: its oldest turn is left")
        answer = _answer(loaded, encoder, ids, options, write)
        write("\n")
        messages.append({"role": "assistant", "content": answer})


def _answer(
    loaded: Loaded, encoder: Encoder, ids: list[int], options: Options, write: Callable[[str], Any]
) -> str:
    stream, pieces = DecodeStream(skip_special_tokens=True), []

    def take(_: int, tokens: list[int]) -> None:
        for token in tokens:
            if piece := stream.step(encoder.tokenizer, token):
                pieces.append(piece)
                write(piece)

    (new,) = generate(
        loaded.model,
        [ids],
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        progress_bar=False,
        on_tokens=take,
        prompt_multiple=min(_PROMPT_MULTIPLE, loaded.config.max_length),
    )
    whole = encoder.tokenizer.decode([int(token) for token in new])
    if rest := whole[len("".join(pieces)) :]:
        write(rest)  # bytes that are no whole character
    return whole


def main() -> None:
    """Run the command."""
    options = cli.parse(Options, "spt_jax.chat", __doc__)
    loaded = load_trained(
        options.model, base_model=options.base_model, dtype=options.dtype, form=options.form
    )

    def write(piece: str) -> None:
        print(piece, end="", flush=True)

    def tell(note: str) -> None:
        print(note, file=sys.stderr, flush=True)

    try:
        talk(loaded, _lines(), options, write=write, tell=tell)
    except BrokenPipeError:
        sys.stderr.close()  # who read the answers has gone


def _lines() -> Iterable[str]:
    """Lines of standard input, asked for on a terminal."""
    asked = sys.stdin.isatty() and sys.stdout.isatty()
    while True:
        if asked:
            print("> ", end="", flush=True)
        if not (line := sys.stdin.readline()):
            return
        yield line


if __name__ == "__main__":
    cli.run(main)
