"""Reads `model.safetensors`, whole or in shards, or a GGUF file, one tensor at a time."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from spt_jax.models.gguf import GGUFTensors, find_gguf, read_gguf

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

#: A file beside the index: no folders, so no way out of the directory.
_SHARD = re.compile(r"[\w.-]+\.safetensors")

#: Floating dtypes of a safetensors header.
_FLOATS = ("F64", "F32", "F16", "BF16")

_BAND = 1 << 22  # bytes read and converted at a time
_ALIGNMENT = 64  # bytes; what XLA's CPU client asks of a buffer


class Checkpoint:
    """The tensors of safetensors files, read from disk when asked for.

    A file is mapped only while one of its tensors is read, so that no more than that is resident.

    Attributes:
        names: all tensors.
        described_in: what tells the model's sizes.

    Args:
        files: the safetensors files.

    Raises:
        ValueError: a file is truncated or corrupt, or two hold a tensor of one name.
    """

    described_in = "config.json"

    def __init__(self, files: Iterable[Path]) -> None:
        self._owner: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            with _naming(path), safe_open(path, framework="numpy") as file:
                names = file.keys()
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            if shared := self._owner.keys() & shapes:
                raise ValueError(f"tensor {min(shared)} is in {path} and in another shard too")
            self._owner |= dict.fromkeys(shapes, path)
            self._shapes |= shapes
        self.names: list[str] = list(self._owner)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._shapes[name]

    def read(self, name: str, dtype: np.dtype, *, transpose: bool = False) -> np.ndarray:
        """A floating-point tensor, converted and transposed a band of rows at a time.

        The result is aligned such that JAX takes it over on a CPU, without a copy.

        Raises:
            ValueError: it is of another type, or its bytes cannot be read.
        """
        shape = self._shapes[name]
        array = _aligned(shape[::-1] if transpose else shape, dtype)
        rows = array.T if transpose else array
        for start, end in _bands(len(rows), array.nbytes):
            rows[start:end] = self._rows(name, start, end).astype(dtype, copy=False)
        return array

    def same(self, one: str, other: str) -> bool:
        """Whether two floating-point tensors hold the same numbers.

        Raises:
            ValueError: as `read`.
        """
        if (shape := self._shapes[one]) != self._shapes[other]:
            return False
        return all(
            np.array_equal(self._rows(one, *band), self._rows(other, *band))
            for band in _bands(shape[0], 4 * math.prod(shape))
        )

    def _rows(self, name: str, start: int, end: int) -> np.ndarray:
        path = self._owner[name]
        with _naming(path), safe_open(path, framework="numpy") as file:
            part = file.get_slice(name)
            if part.get_dtype() not in _FLOATS:
                raise ValueError(
                    f"{path}: tensor {name} has dtype {part.get_dtype()}; supported: "
                    f"{', '.join(_FLOATS)}"
                )
            return part[start:end]


class GGUFCheckpoint(Checkpoint):
    """The tensors of a GGUF file under Hugging Face's names, dequantized when asked for.

    Args:
        path: the file.

    Raises:
        ValueError: as `read_gguf` and `GGUFTensors`.
    """

    described_in = "metadata"

    def __init__(self, path: Path) -> None:
        self._tensors = GGUFTensors(read_gguf(path))
        self._shapes = {name: tensor.shape for name, tensor in self._tensors.names.items()}
        self.names = list(self._shapes)

    def _rows(self, name: str, start: int, end: int) -> np.ndarray:
        return self._tensors.rows(name, start, end)


def open_checkpoint(source: Path) -> Checkpoint:
    """Open a checkpoint.

    Args:
        source: a directory with `model.safetensors`, or with the shards of
            `model.safetensors.index.json`; or a GGUF file, or a directory with one and without
            `config.json`.

    Raises:
        ValueError: there are no weights, the index is wrong, or a file is truncated or corrupt;
            the message names the file.
    """
    if (file := find_gguf(source, instead_of="config.json")) is not None:
        return GGUFCheckpoint(file)
    directory = source
    single = directory / WEIGHTS_FILE
    if single.is_file():
        return Checkpoint([single])
    shards = _read_index(directory)
    for path, expected in shards.items():
        if (names := set(Checkpoint([path]).names)) != expected:
            raise ValueError(
                f"{INDEX_FILE} and {path} disagree: missing {sorted(expected - names)}, not "
                f"listed {sorted(names - expected)}"
            )
    return Checkpoint(shards)


def _bands(rows: int, nbytes: int) -> Iterator[tuple[int, int]]:
    """Ranges of the rows of an array that are read at a time."""
    size = max(1, _BAND * rows // max(1, nbytes))
    return ((start, min(start + size, rows)) for start in range(0, rows, size))


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is truncated or corrupt ({error}); download or save it again"
        ) from None


def _read_index(directory: Path) -> dict[Path, set[str]]:
    """Shard -> names of its tensors."""
    path = directory / INDEX_FILE
    if not path.is_file():
        pickles = sorted(p.name for p in directory.glob("*.bin"))
        found = f"only {', '.join(pickles)}, which is a pickle" if pickles else "neither of them"
        raise ValueError(
            f"{directory} needs {WEIGHTS_FILE} or {INDEX_FILE} and holds {found}; convert the "
            "weights to safetensors, for instance with transformers' save_pretrained"
        )
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        entries = list(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path} is no index: it needs a JSON object with a weight_map") from None
    shards: dict[Path, set[str]] = {}
    for tensor, name in entries:
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise ValueError(
                f"{path}: the shard {name!r} of tensor {tensor} is not a plain file name"
            )
        shard = directory / name
        if not shard.is_file():
            raise ValueError(f"{path}: the shard {name} of tensor {tensor} does not exist")
        shards.setdefault(shard, set()).add(tensor)
    if not shards:
        raise ValueError(f"{path} lists no tensors")
    return shards
