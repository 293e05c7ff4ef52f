"""The tokenizer beside a checkpoint."""

from __future__ import annotations

import os

from tokenizers import Tokenizer

from spt_jax.models.hub import TOKENIZER_FILES, find_files


def load_tokenizer(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Tokenizer:
    """Load `tokenizer.json`, with padding and truncation off: both are the caller's to set.

    Args:
        source: a directory, a model package or a Hub id, as for `load_pretrained`.
        revision: branch, tag or commit on the Hub.
        cache_dir: where downloads are kept; None for `huggingface_hub`'s cache.
        local_files_only: take Hub models from the cache only.

    Returns:
        The tokenizer.

    Raises:
        ValueError: the source is not found, or has no usable tokenizer.json.
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
