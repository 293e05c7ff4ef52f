"""GGUF, the files of llama.cpp: their metadata as a `config.json`, their tensors dequantized."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

#: Architectures, which go by the names of their Hugging Face families. Mistral's files say llama.
ARCHITECTURES = ("llama", "qwen2", "qwen3")
VERSIONS = (2, 3)
SUFFIX = ".gguf"

_MAGIC = b"GGUF"
_ALIGNMENT = 32  # bytes, where general.alignment is absent
_MOST_DIMENSIONS = 4
_LONGEST_NAME = 256
_MOST_VALUES = 1 << 24  # of an array; fifty times the largest vocabulary
#: Code of a value's type -> its `struct` format.
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9

#: Key after the architecture's name -> field of config.json. The first must be there.
_REQUIRED = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
}
_OPTIONAL = {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}
#: Further keys that are read, or say nothing of the function computed.
_OTHERS = (
    "vocab_size",
    "attention.value_length",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "rope.scaling.finetuned",
    "tensor_data_layout",
)
_SPECIAL_IDS = {
    "pad_token_id": "tokenizer.ggml.padding_token_id",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
}
#: Tokens that end a text, a turn and a message to a tool.
_END_IDS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))

_MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TENSOR = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")
#: What LLaMA 3 divides its rotary frequencies by.
_ROPE_FACTORS = "rope_freqs.weight"
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the file's header describes it.

    Attributes:
        name: in the file.
        shape: outermost dimension first, as NumPy has it; the header lists them innermost first.
        kind: code of its type.
        start: of its bytes in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True)
class GGUF:
    """The header of a GGUF file.

    Attributes:
        path: the file.
        size_bytes: of the whole file.
        metadata: its keys and values.
        tensors: its tensors by name.
    """

    path: Path
    size_bytes: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


def find_gguf(path: Path, instead_of: str) -> Path | None:
    """The GGUF file that `path` is, or that a directory holds which has no file `instead_of`.

    Raises:
        ValueError: the directory holds several.
    """
    if path.is_file():
        return path
    found = [] if (path / instead_of).exists() else sorted(path.glob(f"*{SUFFIX}"))
    if len(found) > 1:
        raise ValueError(
            f"{path} holds several GGUF files: {', '.join(file.name for file in found)}; give the "
            "path of one"
        )
    return found[0] if found else None


def read_gguf(path: Path) -> GGUF:
    """Read the header of a GGUF file.

    Raises:
        ValueError: it is no GGUF file, of another version, one part of several, truncated or
            corrupt; the message names the file.
    """
    try:
        with path.open("rb") as file:
            gguf = _read(path, file, path.stat().st_size)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is truncated or corrupt ({error}); download or save it again"
        ) from None
    if (parts := gguf.metadata.get("split.count", 0)) not in (0, 1):
        raise ValueError(
            f"{path} is one part of a model in several (split.count is {parts!r}); join them with "
            "`llama-gguf-split --merge`"
        )
    return gguf


class _Header:
    """Values of a header, read one after the other and never beyond the end of the file."""

    def __init__(self, file: BinaryIO, size_bytes: int) -> None:
        self.file, self.left = file, size_bytes

    def take(self, size: int) -> bytes:
        if size > self.left:
            raise EOFError("its header is cut short")
        self.left -= size
        return self.file.read(size)

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        return self.texts(1)[0]

    def name(self) -> str:
        name = self.text()
        if len(name) > _LONGEST_NAME or not name.isprintable():
            raise EOFError("a name in its header is not readable")
        return name

    def value(self) -> Any:
        kind = self.number("I")
        if kind != _ARRAY:
            return self.scalar(kind)
        kind, count = self.number("I"), self.number("Q")
        if count > _MOST_VALUES:
            raise EOFError(f"an array in its header is said to have {count} values")
        if (code := _SCALARS.get(kind)) is not None:
            data = self.take(count * struct.calcsize(f"<{code}"))
            return list(struct.unpack(f"<{count}{code}", data))
        if kind != _STRING:
            raise EOFError(f"an array in its header is of the unknown type {kind}")
        return self.texts(count)

    def texts(self, count: int) -> list[str]:
        texts, length = [], struct.Struct("<Q")
        for _ in range(count):
            (size,) = length.unpack(self.take(8))
            texts.append(self.take(size).decode())
        return texts

    def scalar(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind not in _SCALARS:
            raise EOFError(f"a value in its header is of the unknown type {kind}")
        return self.number(_SCALARS[kind])


def _read(path: Path, file: BinaryIO, size_bytes: int) -> GGUF:
    header = _Header(file, size_bytes)
    magic = header.take(min(size_bytes, len(_MAGIC)))
    if magic != _MAGIC:
        raise ValueError(
            f"{path} is no GGUF file: it begins with {magic!r}, not {_MAGIC!r}; download or save "
            "it again"
        )
    if (version := header.number("I")) not in VERSIONS:
        order = ", or it is big-endian" if version & 0xFFFF == 0 else ""
        raise ValueError(
            f"{path} is of GGUF version {version}{order}; supported: "
            f"{', '.join(map(str, VERSIONS))}, little-endian; convert the model again"
        )
    num_tensors, num_keys = header.number("Q"), header.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = header.name()
        if key in metadata:
            raise ValueError(f"{path} has the key {key} twice; download or save it again")
        metadata[key] = header.value()
    found: list[StoredTensor] = []
    for _ in range(num_tensors):
        name, dimensions = header.name(), header.number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise EOFError(f"tensor {name} is said to have {dimensions} dimensions")
        sizes = [header.number("Q") for _ in range(dimensions)]
        found.append(StoredTensor(name, tuple(sizes[::-1]), header.number("I"), header.number("Q")))
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"{path}: general.alignment must be a positive integer, got {alignment!r}")
    begin = size_bytes - header.left + alignment - 1
    begin -= begin % alignment
    tensors: dict[str, StoredTensor] = {}
    for one in found:
        if one.name in tensors:
            raise ValueError(f"{path} has the tensor {one.name} twice; download or save it again")
        tensors[one.name] = StoredTensor(one.name, one.shape, one.kind, begin + one.start)
    return GGUF(path, size_bytes, metadata, tensors)


# The configuration


def config_fields(gguf: GGUF) -> dict[str, Any]:
    """The fields of a `config.json` that say what the file's metadata and tensors say.

    Raises:
        ValueError: the architecture or one of its keys is not supported, or a key is missing.
            Values are left to `parse_config` to check.
    """
    raw = gguf.metadata
    kind, arch = raw.get("general.type", "model"), raw.get("general.architecture")
    if kind != "model":
        raise ValueError(f"general.type is {kind!r}, not 'model'; give the file of a whole model")
    if arch not in ARCHITECTURES:
        raise ValueError(
            f"general.architecture {arch!r} is not supported in GGUF; supported: "
            f"{', '.join(ARCHITECTURES)}"
        )
    own = {
        key.removeprefix(f"{arch}."): value
        for key, value in raw.items()
        if key.startswith(f"{arch}.")
    }
    if missing := [key for key in _REQUIRED if key not in own]:
        raise ValueError(f"the metadata needs {', '.join(f'{arch}.{key}' for key in missing)}")
    known = {*_REQUIRED, *_OPTIONAL, *_OTHERS}
    for key, value in own.items():
        if isinstance(value, list):
            raise ValueError(f"{arch}.{key} is a list of {len(value)} values; one is supported")
        if key not in known and value not in (0, ""):
            raise ValueError(
                f"{arch}.{key} = {value!r} is not supported; choose a model without it"
            )
    heads, width = own["attention.head_count"], own["embedding_length"]
    ends = [raw[key] for key in _END_IDS if key in raw]
    fields = {
        "model_type": arch,
        "hidden_act": "silu",
        "vocab_size": _vocabulary(raw, own, arch),
        "num_key_value_heads": heads,
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "attention_bias": "blk.0.attn_q.bias" in gguf.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in gguf.tensors,
        "eos_token_id": [end for i, end in enumerate(ends) if end not in ends[:i]],
    }
    fields |= {field: raw.get(key) for field, key in _SPECIAL_IDS.items()}
    fields |= {field: own[key] for key, field in (_REQUIRED | _OPTIONAL).items() if key in own}
    if isinstance(heads, int) and isinstance(width, int) and heads > 0:
        fields.setdefault("head_dim", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.get(key, fields.get("head_dim")) != fields.get("head_dim"):
            raise ValueError(
                f"{arch}.{key} = {own[key]!r} is not supported beside heads of width "
                f"{fields.get('head_dim')}"
            )
    return fields | {"rope_scaling": _rope_scaling(gguf, own, fields)}


def _vocabulary(raw: Mapping[str, Any], own: Mapping[str, Any], arch: str) -> Any:
    tokens = raw.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list):
        return len(tokens)
    if "vocab_size" not in own:
        raise ValueError(f"the metadata needs tokenizer.ggml.tokens or {arch}.vocab_size")
    return own["vocab_size"]


def _rope_scaling(
    gguf: GGUF, own: Mapping[str, Any], fields: Mapping[str, Any]
) -> dict[str, Any] | None:
    options = {key: own.get(f"rope.scaling.{key}") for key in ("type", "factor", "attn_factor")}
    kind, factor = options["type"] or "none", options["factor"]
    gain = 1.0 if options["attn_factor"] is None else options["attn_factor"]
    if _ROPE_FACTORS in gguf.tensors:
        if kind != "none":
            raise ValueError(f"{_ROPE_FACTORS} is not supported beside rope.scaling.type={kind!r}")
        return _llama3_scaling(gguf, fields)
    if kind == "none":
        return None
    if kind not in ("linear", "yarn") or (kind == "linear" and gain != 1):
        raise ValueError(
            f"rope.scaling.type={kind!r} with rope.scaling.attn_factor={gain} is not supported; "
            "supported: none, linear with 1, yarn"
        )
    scaling = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        original = own.get("rope.scaling.original_context_length")
        scaling["original_max_position_embeddings"] = original
        if isinstance(factor, float) and factor >= 1 and isinstance(gain, float):
            # llama.cpp multiplies what the paper has; Hugging Face replaces it
            scaling["attention_factor"] = gain * (1 + 0.1 * math.log(factor))
    return {key: value for key, value in scaling.items() if value is not None}


def _llama3_scaling(gguf: GGUF, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The scaling whose factors the file holds in place of it, with LLaMA 3's band of wavelengths.

    A frequency `f` in the band is divided by `1 / ((1 - s) / factor + s)`, where
    `s = (original f / 2 pi - low) / (high - low)`.
    """
    width: Any = fields.get("head_dim")
    theta = fields.get("rope_theta", 10000.0)
    tensor = gguf.tensors[_ROPE_FACTORS]
    usual = isinstance(width, int) and isinstance(theta, float) and theta > 0
    if usual and tensor.kind == 0 and tensor.shape == (width // 2,):
        stored = _bytes(gguf, tensor, 0, 4 * tensor.shape[0]).view(np.float32).astype(np.float64)
        low, high = _LLAMA3.values()
        factor = stored.max(initial=1.0)
        with np.errstate(all="ignore"):
            turns = theta ** -(np.arange(0, width, 2) / width) / (2 * math.pi)
            kept = (1 / stored - 1 / factor) / (1 - 1 / factor)
            lengths = (kept * (high - low) + low) / turns
            within = lengths[(kept > 0.01) & (kept < 0.99) & np.isfinite(lengths)]
            original = round(np.median(within)) if len(within) else 0
            kept = np.clip((original * turns - low) / (high - low), 0, 1)
            error = np.abs((kept + (1 - kept) / factor) * stored - 1).max(initial=0.0)
        if original > 0 and error < 1e-3:
            return {
                "rope_type": "llama3",
                "factor": float(factor),
                "original_max_position_embeddings": original,
            } | _LLAMA3
    raise ValueError(
        f"{_ROPE_FACTORS} of shape {tensor.shape} does not hold the factors of LLaMA 3's scaling "
        "of rotary frequencies, and no others are supported"
    )


# The tensors


def hugging_face_name(name: str) -> str:
    """Hugging Face's name of a tensor, or the same name where there is none.

    Example:
        >>> hugging_face_name("blk.3.attn_q.weight")
        'model.layers.3.self_attn.q_proj.weight'
    """
    if (parts := _TENSOR.fullmatch(name)) is None:
        return name
    layer, module, kind = parts.groups()
    if layer is None:
        return f"{_MODULES[module]}.{kind}" if module in _MODULES else name
    if module not in _LAYER_MODULES:
        return name
    return f"model.layers.{layer}.{_LAYER_MODULES[module]}.{kind}"


class GGUFTensors:
    """The tensors of a GGUF file, dequantized when asked for.

    Attributes:
        names: Hugging Face's name of every tensor -> the tensor.

    Args:
        gguf: the header.

    Raises:
        ValueError: the package gguf is not installed, or cannot dequantize a tensor; or a tensor
            reaches beyond the end of the file.
    """

    def __init__(self, gguf: GGUF) -> None:
        try:
            from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
        except ImportError:
            raise ValueError(
                f"{gguf.path}: tensors of GGUF files are read by the package gguf; install it with "
                "`pip install 'spt-jax[gguf]'`"
            ) from None
        self._gguf, self._dequantize = gguf, dequantize
        self._row_bytes: dict[str, int] = {}
        self._kinds: dict[int, Any] = {}
        for name, tensor in gguf.tensors.items():
            if tensor.kind not in self._kinds:
                try:
                    kind = GGMLQuantizationType(tensor.kind)
                    dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
                except (ValueError, NotImplementedError) as error:
                    raise ValueError(
                        f"{gguf.path}: tensor {name} is of a type that the installed package gguf "
                        f"does not dequantize ({error}); quantize the model otherwise"
                    ) from None
                self._kinds[tensor.kind] = kind
            kind = self._kinds[tensor.kind]
            block, block_bytes = GGML_QUANT_SIZES[kind]
            columns = tensor.shape[-1] if tensor.shape else 1
            if columns % block:
                raise ValueError(
                    f"{gguf.path}: tensor {name} of shape {tensor.shape} is not made of the blocks "
                    f"of {block} values that {kind.name} has; download or save it again"
                )
            inner = math.prod(tensor.shape[1:]) if len(tensor.shape) > 1 else columns
            self._row_bytes[name] = inner // block * block_bytes
            rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
            if (end := tensor.start + rows * self._row_bytes[name]) > gguf.size_bytes:
                raise ValueError(
                    f"{gguf.path} is truncated or corrupt (tensor {name} ends at byte {end} of "
                    f"{gguf.size_bytes}); download or save it again"
                )
        self.names = {
            hugging_face_name(name): tensor
            for name, tensor in gguf.tensors.items()
            if name != _ROPE_FACTORS
        }

    def rows(self, name: str, start: int, end: int) -> np.ndarray:
        """Rows of a tensor in float32, or values of a vector, in the order of Hugging Face."""
        tensor = self.names[name]
        if (order := self._order(tensor)) is None:
            return self._stored_rows(tensor, start, end)
        wanted = order[start:end]
        first = wanted.min()
        return self._stored_rows(tensor, int(first), int(wanted.max()) + 1)[wanted - first]

    def _stored_rows(self, tensor: StoredTensor, start: int, end: int) -> np.ndarray:
        kind, size = self._kinds[tensor.kind], self._row_bytes[tensor.name]
        if len(tensor.shape) < 2:
            whole = self._dequantize(_bytes(self._gguf, tensor, 0, size)[None], kind)
            return whole.reshape(tensor.shape)[start:end]
        data = _bytes(self._gguf, tensor, start * size, (end - start) * size)
        return self._dequantize(data.reshape(end - start, size), kind).reshape(
            end - start, *tensor.shape[1:]
        )

    def _order(self, tensor: StoredTensor) -> np.ndarray | None:
        """Rows in the order of Hugging Face, where llama.cpp has another.

        Rotary embeddings turn pairs of a head's rows: in Hugging Face's models row i and row
        i + H/2, in llama.cpp's LLaMA rows 2i and 2i + 1, to which it permutes them.
        """
        parts = _TENSOR.fullmatch(tensor.name)
        raw, arch = self._gguf.metadata, self._gguf.metadata.get("general.architecture")
        if arch != "llama" or parts is None or parts[2] not in ("attn_q", "attn_k"):
            return None
        heads = raw["llama.attention.head_count"]
        if parts[2] == "attn_k":
            heads = raw.get("llama.attention.head_count_kv", heads)
        rows = np.arange(tensor.shape[0])
        return rows.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _bytes(gguf: GGUF, tensor: StoredTensor, start: int, size: int) -> np.ndarray:
    try:
        with gguf.path.open("rb") as file:
            file.seek(tensor.start + start)
            data = file.read(size)
        if len(data) < size:
            raise EOFError(f"tensor {tensor.name} is cut short")
    except (OSError, EOFError) as error:
        raise ValueError(
            f"{gguf.path} is truncated or corrupt ({error}); download or save it again"
        ) from None
    return np.frombuffer(data, np.uint8)
