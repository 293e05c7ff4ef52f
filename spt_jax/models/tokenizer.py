"""The tokenizer beside a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from spt_jax.models.gguf import find_gguf, read_gguf
from spt_jax.models.gguf_tokenizer import read_tokenizer
from spt_jax.models.hub import TOKENIZER_FILES, find_files, read_json

CONFIG_FILE = "tokenizer_config.json"
#: Options of `tokenizer_config.json` -> attributes of BERT's normalizer.
_NORMALIZER = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
#: Classes of transformers' for which `tokenizer.json` alone says how texts are cut.
_GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
_EXTRA = ("additional_special_tokens", "extra_special_tokens")


def begun_once(ids: list[int], added: Sequence[int]) -> list[int]:
    """Token ids without the start that a tokenizer put before a text that has it itself.

    Rendered chat templates begin with the beginning-of-sequence token, which many tokenizers add.

    Args:
        ids: of the encoded text.
        added: 1 where the tokenizer added the token, its `special_tokens_mask`.
    """
    return ids[1:] if ids[:1] == ids[1:2] and list(added[:2]) == [1, 0] else ids


def load_tokenizer(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Tokenizer:
    """Load `tokenizer.json`, or build the tokenizer that a GGUF file describes.

    As in transformers 5, the files beside a `tokenizer.json` add to it the tokens that it lacks
    (`tokenizer_config.json`, and without its `added_tokens_decoder` those of
    `special_tokens_map.json` and `added_tokens.json`), and set case, accents and the leading space
    of BERT's, GPT-2's and RoBERTa's. `add_bos_token` and `add_eos_token` are not read: what is
    added to a text is what `tokenizer.json` says. Padding and truncation are off, whatever the
    files say: both are the caller's to set.

    Args:
        source: a directory, a GGUF file, a model package or a Hub id, as for `load_pretrained`. In
            a directory `tokenizer.json` comes before a GGUF file.
        revision: branch, tag or commit on the Hub.
        cache_dir: where downloads are kept; None for `huggingface_hub`'s cache.
        local_files_only: take Hub models from the cache only.

    Returns:
        The tokenizer.

    Raises:
        ValueError: the source is not found, or has no usable tokenizer.json, its files contradict
            each other, or a GGUF file's tokenizer is of a kind that is not supported.
        ConnectionError: the Hub cannot be reached.

    Example:
        >>> load_tokenizer("minilm").encode("natural words").tokens
        ['[CLS]', 'natural', 'words', '[SEP]']
    """
    directory = find_files(
        source,
        files=TOKENIZER_FILES,
        revision=revision,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    if (file := find_gguf(directory, instead_of="tokenizer.json")) is not None:
        return read_tokenizer(read_gguf(file))
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"{directory} has no tokenizer.json; save one with transformers' "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the bindings raise Exception itself
        raise ValueError(
            f"{path} is not a valid tokenizer ({error}); download or save it again"
        ) from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    fields = tokenizer_fields(directory)
    _add_tokens(tokenizer, fields, directory)
    _set_options(tokenizer, fields)
    return tokenizer


def tokenizer_fields(directory: Path) -> dict[str, Any]:
    """What `tokenizer_config.json` says, or in older directories the files beside it.

    Without `added_tokens_decoder`, fields of `special_tokens_map.json` come before its own, and
    tokens are those of `added_tokens.json`.

    Raises:
        ValueError: a file holds no JSON object.
    """

    def read(name: str) -> dict[str, Any]:
        path = directory / name
        return read_json(path) if path.is_file() else {}

    fields = read(CONFIG_FILE)
    if "added_tokens_decoder" in fields:
        return fields
    fields |= read("special_tokens_map.json")
    special = {token.content for token in _named_tokens(fields)}
    added = {
        str(i): {"content": text, "special": text in special, "normalized": text not in special}
        for text, i in read("added_tokens.json").items()
    }
    return fields | {"added_tokens_decoder": added}


def special_tokens(fields: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by what templates call them, such as bos_token."""
    return {
        name: _added_token(token).content
        for name, token in fields.items()
        if name.endswith("_token") and isinstance(token, dict | str)
    }


def _named_tokens(fields: Mapping[str, Any]) -> Iterator[AddedToken]:
    """Special tokens of the fields, named and unnamed."""
    named = [fields[name] for name in special_tokens(fields)]
    for group in map(fields.get, _EXTRA):
        named += group.values() if isinstance(group, dict) else group or []
    for token in named:
        yield _added_token(token, special=True)


def _added_token(token: Any, **options: bool) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, **options)
    if not isinstance(token, dict) or not isinstance(token.get("content"), str):
        raise ValueError(
            f"{CONFIG_FILE} has the token {token!r}, neither a text nor with a content"
        )
    kept = ("single_word", "lstrip", "rstrip", "normalized", "special")
    own = {name: token[name] for name in kept if name in token}
    return AddedToken(token["content"], **own | options)


def _add_tokens(tokenizer: Tokenizer, fields: Mapping[str, Any], directory: Path) -> None:
    """Add the tokens that `tokenizer.json` lacks."""
    stated = {int(i): _added_token(t) for i, t in fields["added_tokens_decoder"].items()}
    tokens = [token for _, token in sorted(stated.items(), key=lambda item: item[0])]
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_tokens([t for t in (*tokens, *_named_tokens(fields)) if t.content not in known])
    for i, token in stated.items():
        if (own := tokenizer.token_to_id(token.content)) != i:
            raise ValueError(
                f"{directory}: the token {token.content!r} is added with id {i}, and tokenizer.json"
                f" gives it {own}; use the tokenizer.json that belongs to the other files"
            )


def _set_options(tokenizer: Tokenizer, fields: Mapping[str, Any]) -> None:
    """Case, accents and the leading space, which some classes of transformers take as options."""
    if fields.get("tokenizer_class") in _GENERIC_CLASSES:
        return
    if isinstance(tokenizer.normalizer, normalizers.BertNormalizer):
        for name in _NORMALIZER.keys() & fields.keys():
            setattr(tokenizer.normalizer, _NORMALIZER[name], fields[name])
    prefixed = fields.get("add_prefix_space")
    if isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel) and prefixed is not None:
        tokenizer.pre_tokenizer.add_prefix_space = prefixed
