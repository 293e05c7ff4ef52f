"""Results on disk that take long to make and depend on nothing but their key."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from spt_jax.processes import is_first, to_host

ENVIRONMENT = "SPT_JAX_CACHE_DIR"
#: Entries that are kept, the newest ones.
MOST_ENTRIES = 64

_log = logging.getLogger(__name__)


def directory() -> Path:
    """Where entries lie: `$SPT_JAX_CACHE_DIR`, or `spt_jax` in the user's directory of caches."""
    if given := os.environ.get(ENVIRONMENT):
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "spt_jax"


def key_of(description: Any, arrays: Iterable[tuple[str, Any]] = ()) -> str:
    """A key for what depends on a description, as plain data, and on named arrays."""
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name, array in arrays:
        if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
            array = jax.random.key_data(array)
        host = np.ascontiguousarray(to_host(array) if isinstance(array, jax.Array) else array)
        digest.update(f"{name} {host.dtype} {host.shape}".encode())
        digest.update(host.reshape(-1).view(np.uint8))
    return digest.hexdigest()[:32]


def read(kind: str, key: str) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """Arrays and plain data of an entry; None where there is none that can be read."""
    path = _path(kind, key)
    try:
        with safe_open(path, framework="numpy") as file:
            content = json.loads((file.metadata() or {})["content"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        path.touch()
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        _log.warning("%s cannot be read and is made again: %s", path, error)
        return None
    return arrays, content


def write(
    kind: str, key: str, arrays: Mapping[str, np.ndarray], content: Mapping[str, Any]
) -> None:
    """Keep an entry; where that fails, the log says so."""
    if not is_first():
        return
    path = _path(kind, key)
    tensors = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                file.write(save(tensors, {"content": json.dumps(content)}))
                file.close()
                os.replace(file.name, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(file.name)
                raise
        entries = sorted(path.parent.glob("*.safetensors"), key=lambda p: p.stat().st_mtime)
        for old in entries[:-MOST_ENTRIES]:
            old.unlink(missing_ok=True)
    except OSError as error:
        _log.warning("%s is not kept for a next time: %s", path, error)


def _path(kind: str, key: str) -> Path:
    return directory() / kind / f"{key}.safetensors"
