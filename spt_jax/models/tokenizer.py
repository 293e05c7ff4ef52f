"""The tokenizer beside a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from spt_jax.models.gguf import find_gguf, read_gguf
from spt_jax.models.gguf_tokenizer import read_tokenizer
from spt_jax.models.hub import TOKENIZER_FILES, find_files


def check_token_ids(ids: np.ndarray, vocab_size: int | None, name: str) -> None:
    """Raise a ValueError unless all token ids lie in the model's vocabulary.

    Args:
        ids: integers of any shape.
        vocab_size: ids must be below it; None for any that are not negative.
        name: what the message calls them.
    """
    high = np.inf if vocab_size is None else vocab_size
    if (wrong := (ids < 0) | (ids >= high)).any():
        raise ValueError(
            f"{name}: token id {ids[wrong][0]} is outside the model's vocabulary of {vocab_size}; "
            "use the tokenizer that belongs to the model"
        )


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

    Padding and truncation are off: both are the caller's to set.

    Args:
        source: a directory, a GGUF file, a model package or a Hub id, as for `load_pretrained`. In
            a directory `tokenizer.json` comes before a GGUF file.
        revision: branch, tag or commit on the Hub.
        cache_dir: where downloads are kept; None for `huggingface_hub`'s cache.
        local_files_only: take Hub models from the cache only.

    Returns:
        The tokenizer.

    Raises:
        ValueError: the source is not found, or has no usable tokenizer.json, or a GGUF file's
            tokenizer is of a kind that is not supported.
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
    return tokenizer
