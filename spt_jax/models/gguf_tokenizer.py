"""The tokenizer and the chat template in the metadata of a GGUF file."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from spt_jax.models.gguf import GGUF

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
#: The words of LLaMA 3 and Qwen2, which differ in how many digits make one.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Kind(NamedTuple):
    """A byte-level BPE by what llama.cpp calls its pre-tokenizer.

    Attributes:
        patterns: expressions that cut the text, each what the one before it left whole.
        composed: whether text is brought into Unicode's composed form (NFC) first.
        whole_words: whether a word that is a token is taken whole, whatever the merges say.
        begins: whether a text begins with the BOS token where the metadata does not say.
    """

    patterns: tuple[str, ...]
    composed: bool = False
    whole_words: bool = False
    begins: bool = False


_LLAMA3 = _Kind((_WORDS.format(digits="{1,3}"),), whole_words=True, begins=True)
#: As in the tokenizer.json of these models; "default" as in llama.cpp, whose own it is.
KINDS = {
    "default": _Kind((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": _Kind((_GPT2,)),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _Kind((_WORDS.format(digits=""),), composed=True),
    "smollm": _Kind((r"\p{N}", _GPT2)),
}

#: What SentencePiece writes for a space.
_SPACE = "\u2581"

#: Types of tokens.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
#: What Hugging Face calls a token -> how its key in the metadata begins.
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_ORIGINAL = "; give the directory of its original tokenizer.json"


def read_tokenizer(gguf: GGUF) -> Tokenizer:
    """The tokenizer in the metadata, with padding and truncation off.

    Control tokens are its special tokens. BOS and EOS are added to texts as the metadata says.

    Raises:
        ValueError: there is none, it is of a kind that is not supported, or it is not well-formed.
    """
    model = gguf.metadata.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise ValueError(
            f"{gguf.path}: tokenizer.ggml.model {model!r} is not supported; supported: 'gpt2' "
            f"(byte-level BPE) and 'llama' (BPE of SentencePiece){_ORIGINAL}"
        )
    tokens = _texts(gguf, "tokens")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocabulary[token] != i)
        raise ValueError(f"{gguf.path}: tokenizer.ggml.tokens holds {twice!r} twice{_ORIGINAL}")
    kinds = _numbers(gguf, "token_type", len(tokens), default=_NORMAL)
    if model == "gpt2":
        tokenizer, begins = _byte_level(gguf, vocabulary)
    else:
        tokenizer, begins = _sentence_piece(gguf, vocabulary, kinds), True
    special, own = (
        [token for token, kind in zip(tokens, kinds, strict=True) if kind in chosen]
        for chosen in ((_UNKNOWN, _CONTROL), (_USER_DEFINED,))
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in own])
    begins = _flag(gguf, "add_bos_token", default=begins)
    _add_template(gguf, tokenizer, tokens, begins=begins, ends=_flag(gguf, "add_eos_token"))
    return tokenizer


def _byte_level(gguf: GGUF, vocabulary: dict[str, int]) -> tuple[Tokenizer, bool]:
    """A byte-level BPE, and whether texts begin with BOS where the metadata does not say."""
    pre = gguf.metadata.get("tokenizer.ggml.pre")
    if not isinstance(pre, str) or pre not in KINDS:
        raise ValueError(
            f"{gguf.path}: tokenizer.ggml.pre {pre!r} is not supported; supported: "
            f"{', '.join(KINDS)}{_ORIGINAL}"
        )
    kind = KINDS[pre]
    merges: list[Any] = [tuple(merge.split(" ")) for merge in _texts(gguf, "merges")]
    if wrong := [" ".join(merge) for merge in merges if len(merge) != 2]:
        raise ValueError(
            f"{gguf.path}: tokenizer.ggml.merges holds {wrong[0]!r}, not two tokens{_ORIGINAL}"
        )
    try:
        tokenizer = Tokenizer(BPE(vocabulary, merges, ignore_merges=kind.whole_words))
    except Exception as error:  # the bindings raise Exception itself
        raise ValueError(f"{gguf.path}: tokenizer.ggml.merges: {error}{_ORIGINAL}") from None
    if kind.composed:
        tokenizer.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in kind.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, kind.begins


def _sentence_piece(gguf: GGUF, vocabulary: dict[str, int], kinds: list[Any]) -> Tokenizer:
    """SentencePiece's BPE, which makes the piece of the highest score of two that are adjacent.

    Every way to make a piece of two others is a merge, those of a higher score first.
    """
    scores = _numbers(gguf, "scores", len(vocabulary))
    normal = {
        token: score
        for token, score, kind in zip(vocabulary, scores, kinds, strict=True)
        if kind == _NORMAL
    }
    ways = [
        (-score, -i, piece[:i], piece[i:])
        for piece, score in normal.items()
        for i in range(1, len(piece))
        if piece[:i] in normal and piece[i:] in normal
    ]
    merges = [(left, right) for *_, left, right in sorted(ways)]
    unknown = _special_id(gguf, "unk", len(vocabulary))
    name = next(itertools.islice(vocabulary, unknown or 0, None), None)
    tokenizer = Tokenizer(
        BPE(vocabulary, merges, unk_token=name, fuse_unk=True, byte_fallback=True)
    )
    prefixed = _flag(gguf, "add_space_prefix", default=True)
    first = [normalizers.Prepend(_SPACE)] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", _SPACE)])
    last = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    )
    return tokenizer


def tokenizer_config(gguf: GGUF) -> dict[str, Any]:
    """The fields of a `tokenizer_config.json`: special tokens, and the chat template if any.

    Raises:
        ValueError: a token's id is not in the vocabulary.
    """
    tokens = _texts(gguf, "tokens")
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name in _SPECIAL:
        if (i := _special_id(gguf, name, len(tokens))) is not None:
            config[f"{name}_token"] = tokens[i]
    if (template := gguf.metadata.get("tokenizer.chat_template")) is not None:
        config["chat_template"] = template
    return config


def _texts(gguf: GGUF, name: str) -> list[str]:
    texts = gguf.metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        found = "absent" if texts is None else f"a {type(texts).__name__}"
        raise ValueError(
            f"{gguf.path}: tokenizer.ggml.{name} must be a list of texts, and is {found}{_ORIGINAL}"
        )
    return texts


def _numbers(gguf: GGUF, name: str, count: int, *, default: int | None = None) -> list[Any]:
    """A number for each token; they are the default where the key is absent and there is one."""
    numbers: Any = gguf.metadata.get(f"tokenizer.ggml.{name}")
    if numbers is None and default is not None:
        return [default] * count
    fits = isinstance(numbers, list) and len(numbers) == count
    if not fits or not all(isinstance(number, int | float) for number in numbers):
        raise ValueError(
            f"{gguf.path}: tokenizer.ggml.{name} must be a list of {count} numbers, one a token"
            f"{_ORIGINAL}"
        )
    return numbers


def _flag(gguf: GGUF, name: str, *, default: bool = False) -> bool:
    value = gguf.metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, bool):
        raise ValueError(
            f"{gguf.path}: tokenizer.ggml.{name} must be true or false, got {value!r}{_ORIGINAL}"
        )
    return value


def _special_id(gguf: GGUF, name: str, vocab_size: int) -> int | None:
    key = f"tokenizer.ggml.{_SPECIAL[name]}_token_id"
    value = gguf.metadata.get(key)
    if value is not None and not (isinstance(value, int) and 0 <= value < vocab_size):
        raise ValueError(
            f"{gguf.path}: {key} must be an id below {vocab_size}, got {value!r}{_ORIGINAL}"
        )
    return value


def _add_template(
    gguf: GGUF, tokenizer: Tokenizer, tokens: list[str], *, begins: bool, ends: bool
) -> None:
    """Have the tokenizer add BOS and EOS to every text, each text of a pair included."""
    used: dict[str, int] = {}
    around: list[list[str]] = []
    for name, wanted in (("bos", begins), ("eos", ends)):
        i = _special_id(gguf, name, len(tokens))
        if wanted and i is None:
            raise ValueError(
                f"{gguf.path}: tokenizer.ggml.add_{name}_token asks for a token that "
                f"tokenizer.ggml.{name}_token_id does not name{_ORIGINAL}"
            )
        around.append([tokens[i]] if wanted and i is not None else [])
        used |= {tokens[i]: i} if wanted and i is not None else {}
    if used:
        begin, end = around
        first, second = (
            [f"{piece}:{number}" for piece in (*begin, f"${text}", *end)]
            for number, text in enumerate("AB")
        )
        tokenizer.post_processor = TemplateProcessing(
            single=first, pair=first + second, special_tokens=list(used.items())
        )
