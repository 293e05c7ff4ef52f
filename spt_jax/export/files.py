"""Directories that appear whole or not at all, and the safetensors and JSON in them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from spt_jax.processes import exchange, is_first

#: A directory with one of these is an earlier export, which may be overwritten.
MARKERS = ("config.json", "adapter_config.json", "spt_config.json")

#: NumPy's name of a dtype -> that of a safetensors header.
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
}


class Tensor(NamedTuple):
    """A tensor to write; `make` is called when its turn comes, so that few are held at once."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @classmethod
    def of(cls, name: str, array: np.ndarray) -> Tensor:
        """A tensor at hand."""
        return cls(name, array.shape, array.dtype, lambda: array)

    @property
    def size_bytes(self) -> int:
        """Bytes in the file."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@contextmanager
def new_directory(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary directory beside `target` that takes its place when the block ends.

    If the block fails, `target` is as it was and the temporary directory is gone. Of several
    processes, all of which must come here, only the first one's directory takes the place.

    Raises:
        ValueError: `target` is a file, or holds files and must not be replaced.
        OSError: the files cannot be written.
    """
    if not is_first():
        with tempfile.TemporaryDirectory() as directory:
            yield Path(directory)
        exchange(None)  # wait until it is there
        return
    target = target.expanduser().resolve()
    check_replaceable(target, overwrite=overwrite)
    tag = uuid.uuid4().hex[:8]
    new, old = (target.with_name(f".{target.name}.{kind}-{tag}") for kind in ("new", "old"))
    try:
        new.mkdir(parents=True)
        yield new
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            error.errno,
            f"cannot write {target} ({reason}); nothing was changed there. Make room or choose "
            "another directory",
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        exchange(None)


def check_replaceable(target: Path, *, overwrite: bool) -> None:
    """Raise a ValueError unless `target` is absent, empty, or an export to overwrite."""
    if not is_first():  # what others see may be the result already
        return
    if target.is_file():
        raise ValueError(f"{target} is a file; give a directory")
    if not target.exists() or not (found := sorted(target.iterdir())):
        return
    if not overwrite:
        raise ValueError(
            f"{target} is not empty; choose another directory, or pass overwrite=True to replace "
            "an earlier export"
        )
    if not any((target / name).is_file() for name in MARKERS):
        raise ValueError(f"{target} holds no model or adapter, so it is not overwritten")
    if folders := [path.name for path in found if path.is_dir()]:
        raise ValueError(
            f"{target} holds the folders {', '.join(folders)}, so it is not overwritten as a whole"
        )


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a file.

    Raises:
        ValueError: the file is missing or cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or corrupt ({error})") from None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, indented."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_safetensors(path: Path, tensors: Sequence[Tensor]) -> None:
    """Write tensors in the safetensors format, making and writing one after the other.

    Processes but the first only help to make them.
    """
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)  # aligns them
    if not is_first():
        for tensor in ordered:
            tensor.make()
        return
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        begin, end = end, end + tensor.size_bytes
        header[tensor.name] = {
            "dtype": _DTYPES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            array = np.ascontiguousarray(tensor.make(), tensor.dtype)
            assert array.shape == tensor.shape, (tensor.name, array.shape, tensor.shape)
            file.write(array.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
