"""SPT's own modules beside an export: sparse attention and routed FFNs.

`spt_config.json` holds the configuration of each module by its path in the model, and
`spt_modules.safetensors` its arrays. Which kernels run is the machine's affair, not the model's: a
configuration's `implementation` is not saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from spt_jax.adaptation import ADAPTATION_FILE, AdaptationReport
from spt_jax.config import RoutedFFNConfig, SparseAttentionConfig
from spt_jax.export.files import (
    Tensor,
    read_safetensors,
    write_json,
    write_safetensors,
)
from spt_jax.layers import Attention, FeedForward, HeadParam, RoutedFFN, SparseAttention
from spt_jax.layers.feed_forward import check_permutation
from spt_jax.models.hub import read_json
from spt_jax.processes import to_host

CONFIG_FILE = "spt_config.json"
MODULES_FILE = "spt_modules.safetensors"
FORMAT_VERSION = 2

_ATTENTION, _FFN, _HEAD = "sparse_attention", "routed_ffn", "head"
_RETIRED = {"token_max_length"}  # fields of configurations that nothing depends on any more
_Shapes = dict[str, tuple[int, ...]]


def sparse_modules(model: nnx.Module) -> dict[str, SparseAttention | RoutedFFN]:
    """The sparse modules by the path of the dense one that each stands for."""
    modules: dict[str, SparseAttention | RoutedFFN] = {}
    for path, module in nnx.iter_modules(model):
        if isinstance(module, SparseAttention):
            modules[_dotted(path[:-1])] = module
        elif isinstance(module, RoutedFFN):
            modules[_dotted(path)] = module
    return modules


def describe(model: nnx.Module) -> str:
    """For instance "sparse attention of 12 layers and routed FFN of 12 layers"."""
    modules = sparse_modules(model).values()
    parts = {
        "sparse attention": sum(isinstance(m, SparseAttention) for m in modules),
        "routed FFN": sum(isinstance(m, RoutedFFN) for m in modules),
    }
    return " and ".join(
        f"{name} of {number} layer{'s' * (number > 1)}" for name, number in parts.items() if number
    )


def write_modules(model: nnx.Module, directory: Path, *, with_head: bool) -> None:
    """Write sparse modules, and the task head where no other file has it."""
    config: dict[str, Any] = {"format_version": FORMAT_VERSION, _ATTENTION: {}, _FFN: {}}
    variables: dict[str, nnx.Variable] = {}
    for path, module in sparse_modules(model).items():
        kind = _ATTENTION if isinstance(module, SparseAttention) else _FFN
        config[kind][path] = asdict(module.config)
        del config[kind][path]["implementation"]
        variables |= {f"{path}.{name}": variable for name, variable in _variables(module).items()}
    if with_head:
        variables |= _head(model)
    config[_HEAD] = with_head and bool(_head(model))
    tensors = [Tensor.of(name, to_host(v[...])) for name, v in variables.items()]
    write_safetensors(directory / MODULES_FILE, tensors)
    write_json(directory / CONFIG_FILE, config)


def write_report(model: nnx.Module, directory: Path) -> None:
    """Write what `adapt` chose, if it had a choice."""
    report = getattr(model, "adaptation", None)
    if isinstance(report, AdaptationReport) and report.layers:
        report.save(directory / ADAPTATION_FILE)


class SparseModules(NamedTuple):
    """Sparse modules as they were read, checked against a model, not installed yet."""

    attention: dict[str, tuple[SparseAttentionConfig, dict[str, np.ndarray]]]
    ffn: dict[str, tuple[RoutedFFNConfig, dict[str, np.ndarray]]]
    head: dict[str, np.ndarray]

    def install(self, model: nnx.Module) -> None:
        """Put them into `model`, in place. LoRA factors come first: routing reorders them."""
        modules: dict[str, Any] = {_dotted(p): module for p, module in nnx.iter_modules(model)}
        for path, (config, arrays) in self.attention.items():
            own = arrays.get("query_codebooks")
            modules[path].sparse = SparseAttention(
                None if own is None else jnp.asarray(own),
                jnp.asarray(arrays["key_codebooks"]),
                jnp.asarray(arrays["key_center"]),
                config=config,
                causal=modules[path].causal,
            )
        for path, (ffn_config, arrays) in self.ffn.items():
            owner, _, name = path.rpartition(".")
            fitted = {key: jnp.asarray(array) for key, array in arrays.items()}
            setattr(modules[owner], name, RoutedFFN(modules[path], **fitted, config=ffn_config))
        head = _head(model)
        for name, array in self.head.items():
            head[name].set_value(jnp.asarray(array, head[name].get_value().dtype))


def read_modules(model: nnx.Module, directory: Path) -> SparseModules:
    """Read `spt_config.json` and `spt_modules.safetensors` for `model`, which is not changed.

    Raises:
        ValueError: a file is missing or corrupt, of another version, or does not fit the model.
    """
    path = directory / CONFIG_FILE
    raw = read_json(path)
    if (version := raw.get("format_version")) != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {version!r}, and this spt-jax reads {FORMAT_VERSION}"
        )
    try:
        return _read(model, directory, raw)
    except ValueError as error:
        raise ValueError(f"the SPT modules of {directory} cannot be added: {error}") from None


def _read(model: nnx.Module, directory: Path, raw: Mapping[str, Any]) -> SparseModules:
    known = {"format_version", _ATTENTION, _FFN, _HEAD}
    if unknown := raw.keys() - known:
        raise ValueError(f"{CONFIG_FILE} has the unknown fields {sorted(unknown)}")
    modules = {_dotted(path): module for path, module in nnx.iter_modules(model)}
    attention, ffn = raw.get(_ATTENTION, {}), raw.get(_FFN, {})
    found = SparseModules({}, {}, {})
    expected: _Shapes = {}
    attention_configs = {
        path: _parse(SparseAttentionConfig, path, value) for path, value in attention.items()
    }
    ffn_configs = {path: _parse(RoutedFFNConfig, path, value) for path, value in ffn.items()}
    for path, config in attention_configs.items():
        module = modules.get(path)
        if not isinstance(module, Attention):
            raise ValueError(f"the model has no attention layer {path}")
        expected |= _under(path, _attention_shapes(module, config))
    for path, ffn_config in ffn_configs.items():
        module = modules.get(path)
        if not isinstance(module, FeedForward):
            raise ValueError(f"the model has no FFN {path}")
        expected |= _under(path, _ffn_shapes(module, ffn_config))
    if raw.get(_HEAD):
        expected |= {name: variable.shape for name, variable in _head(model).items()}
    arrays = read_safetensors(directory / MODULES_FILE)
    _check_arrays(arrays, expected)
    for path, config in attention_configs.items():
        found.attention[path] = config, _taken(path, arrays)
    for path, ffn_config in ffn_configs.items():
        found.ffn[path] = ffn_config, _taken(path, arrays)
        check_permutation(f"{path}.permutation", found.ffn[path][1]["permutation"])
    return found._replace(head={name: arrays[name] for name in _head(model) if name in arrays})


def _parse[Config: (SparseAttentionConfig, RoutedFFNConfig)](
    kind: type[Config], path: str, raw: Any
) -> Config:
    types = {f.name: type(f.default) for f in fields(kind) if f.name != "implementation"}
    if not isinstance(raw, Mapping):
        raise ValueError(f"the configuration of {path} is no JSON object")
    raw = {name: value for name, value in raw.items() if name not in _RETIRED}
    if unknown := sorted(raw.keys() - types.keys()):
        raise ValueError(f"the configuration of {path} has the unknown fields {unknown}")
    for name, value in raw.items():
        accepted = (int, float) if types[name] is float else types[name]
        wrong = isinstance(value, bool) != (types[name] is bool)
        if wrong or not isinstance(value, accepted):
            raise ValueError(f"{name} of {path} must be {types[name].__name__}, got {value!r}")
    return kind(**raw)


def _attention_shapes(attention: Attention, config: SparseAttentionConfig) -> _Shapes:
    heads, width = attention.num_kv_heads, attention.head_width
    if config.codeword_width < 1 or width % config.codeword_width:
        raise ValueError(
            f"codeword_width={config.codeword_width} does not divide the head width {width}"
        )
    subspaces = width // config.codeword_width
    codebooks = (heads, subspaces, config.num_codewords, config.codeword_width)
    own = {"query_codebooks": codebooks} if config.rule == "inner_product" else {}
    return own | {"key_codebooks": codebooks, "key_center": (heads, width)}


def _ffn_shapes(ffn: FeedForward, config: RoutedFFNConfig) -> _Shapes:
    width, hidden, blocks = ffn.up.in_features, ffn.up.out_features, config.num_blocks
    if hidden % blocks:
        raise ValueError(f"{hidden} hidden units do not split into num_blocks={blocks} blocks")
    shapes: _Shapes = {
        "permutation": (hidden,),
        "router_kernel": (width, blocks),
        "router_bias": (blocks,),
        "absent_output": (blocks, width),
    }
    if rank := config.effective_absent_rank:
        shapes |= {"absent_a": (width, blocks, rank), "absent_b": (blocks, rank, width)}
    return shapes


def _check_arrays(arrays: Mapping[str, np.ndarray], expected: _Shapes) -> None:
    for name in sorted(arrays.keys() | expected.keys()):
        if name not in arrays:
            raise ValueError(f"tensor {name} is missing")
        if name not in expected:
            raise ValueError(f"tensor {name} is unknown")
        array = arrays[name]
        if array.shape != expected[name]:
            raise ValueError(f"tensor {name} has shape {array.shape}, expected {expected[name]}")
        if (array.dtype == np.int32) != name.endswith(".permutation"):
            raise ValueError(f"tensor {name} has dtype {array.dtype}")


def _under(path: str, shapes: _Shapes) -> _Shapes:
    return {f"{path}.{name}": shape for name, shape in shapes.items()}


def _taken(path: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    prefix = f"{path}."
    return {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }


def _variables(module: nnx.Module) -> dict[str, nnx.Variable]:
    return {name: v for name, v in vars(module).items() if isinstance(v, nnx.Variable)}


def _head(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Variables of the task head, by path."""
    return {
        _dotted((*path, name)): variable
        for path, module in nnx.iter_modules(model)
        for name, variable in _variables(module).items()
        if isinstance(variable, HeadParam)
    }


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
