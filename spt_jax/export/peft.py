"""LoRA adapters as PEFT writes them: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spt_jax.config import LoRAConfig
from spt_jax.export.dense import Units, factor_matrices, original_units, task_of
from spt_jax.export.files import (
    Tensor,
    read_safetensors,
    write_json,
    write_safetensors,
)
from spt_jax.layers import Embedding, HeadParam, Linear, LoRA, TableParam
from spt_jax.models.decoder import Decoder
from spt_jax.models.encoder import Encoder
from spt_jax.models.hub import read_json
from spt_jax.models.pretrained import Task, is_head
from spt_jax.models.slots import Slot, module_at, tensor_slots
from spt_jax.processes import to_host

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

#: PEFT's names begin with those of its wrappers.
_PREFIX = "base_model.model."
#: PEFT's suffix of a factor, for linear maps and for embeddings.
_LINEAR = ("lora_A.weight", "lora_B.weight")
_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
_FACTOR = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B)")

#: Linear maps of transformers' backbones that these models do not have.
_POOLERS = ("pooler.dense",)
#: A module of transformers' that holds several of ours, which PEFT saves as a whole.
_HEAD_OF_TWO = "classifier"
#: Ends of the names of modules that PEFT saves whole by itself where the task is classification.
_SAVED_BY_TASK = ("classifier", "score")
_OUTPUT = "lm_head"
#: Paths of the tables that PEFT may store untrained, and what it names them under LoRA factors.
_TABLES = ("embedding.", "embeddings.word.", "head.kernel")
_BASE = ".base_layer.weight"

#: Fields of adapter_config.json that are read here.
_READ = {
    "alpha_pattern",
    "bias",
    "init_lora_weights",
    "lora_alpha",
    "lora_dropout",
    "peft_type",
    "r",
    "rank_pattern",
    "use_rslora",
}
#: Fields that tell how factors were trained, or where, and nothing about what they compute.
_NEUTRAL = {
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "megatron_config",
    "megatron_core",
    "modules_to_save",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
#: Initialisations that leave the base weights as they are.
_PLAIN_INITIALISATIONS = ("gaussian", "eva", "mica", "orthogonal")
#: Our name of a task -> PEFT's.
_TASKS: dict[Task, str] = {
    "backbone": "FEATURE_EXTRACTION",
    "causal-lm": "CAUSAL_LM",
    "sequence-classification": "SEQ_CLS",
}


_log = logging.getLogger(__name__)


def adapted_modules(model: Encoder | Decoder) -> dict[str, Linear | Embedding]:
    """Transformers' name of each module with LoRA factors -> the module."""
    modules = {name: module_at(model, path) for name, path in model.module_paths().items()}
    return {
        name: module
        for name, module in modules.items()
        if isinstance(module, Linear | Embedding) and module.lora is not None
    }


def write_peft(
    model: Encoder | Decoder,
    adapted: Mapping[str, Linear | Embedding],
    directory: Path,
    base_model: str | None,
) -> None:
    """Write the factors of `adapted`, and the task head."""
    write_json(directory / CONFIG_FILE, _config(model, adapted, base_model))
    write_safetensors(directory / WEIGHTS_FILE, _tensors(model, adapted))


def _config(
    model: Encoder | Decoder, adapted: Mapping[str, Linear | Embedding], base_model: str | None
) -> dict[str, Any]:
    configs = {name: m.lora.config for name, m in adapted.items() if m.lora is not None}
    if len({config.use_rslora for config in configs.values()}) > 1:
        raise ValueError("factors with and without rsLoRA scaling do not fit into one adapter")
    ranks = {name: config.rank for name, config in configs.items()}
    alphas = {name: _number(config.alpha) for name, config in configs.items()}
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    others = [name for name in model.module_paths() if name not in adapted]
    others += _POOLERS
    heads = list(dict.fromkeys(_module(name) for name in _saved_whole(model)))
    two = [name for name in model.module_paths() if name.startswith(f"{_HEAD_OF_TWO}.")]
    if two and set(two) <= set(heads):
        heads = [name for name in heads if name not in two] + [_HEAD_OF_TWO]
    by_task = any(name.partition(".")[0].endswith(_SAVED_BY_TASK) for name in adapted)
    return {
        "alpha_pattern": _pattern(alphas, alpha),
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": _most_common(config.dropout for config in configs.values()),
        "modules_to_save": heads or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": _pattern(ranks, rank),
        "revision": None,
        "target_modules": _suffixes(adapted, others),
        "task_type": None if by_task else _TASKS[task_of(model)],
        "use_dora": False,
        "use_rslora": next(iter(configs.values())).use_rslora,
    }


def _suffixes(wanted: Iterable[str], others: Iterable[str]) -> list[str]:
    """Shortest endings, in whole parts, that the names `wanted` have and `others` have not."""
    others = list(others)
    endings = []
    for name in wanted:
        parts = name.split(".")
        tails = [".".join(parts[i:]) for i in reversed(range(len(parts)))]
        endings += [t for t in tails if not any(f".{o}".endswith(f".{t}") for o in others)][:1]
    return list(dict.fromkeys(endings))


def _pattern(values: Mapping[str, Any], common: Any) -> dict[str, Any]:
    """`{ending: value}` for the names whose value is not the common one."""
    pattern: dict[str, Any] = {}
    for value in sorted(set(values.values()) - {common}):
        wanted = [name for name in values if values[name] == value]
        others = [name for name in values if values[name] != value]
        pattern |= {re.escape(e): value for e in _suffixes(wanted, others)}
    return pattern


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _most_common(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _saved_whole(model: Encoder | Decoder) -> dict[str, Slot]:
    """Tensors that are saved whole; a table that is the output matrix too, under both names."""
    slots = tensor_slots(model)
    found = {name: slot for name, slot in slots.items() if isinstance(slot.variable, HeadParam)}
    if _is_tied(model) and (table := _table(slots)) in found:
        found[f"{_OUTPUT}.weight"] = slots[table]
    return found


def _is_tied(model: Encoder | Decoder) -> bool:
    """Whether the model's output matrix is its word embedding."""
    return (
        isinstance(model, Decoder) and task_of(model) == "causal-lm" and model.config.tie_embeddings
    )


def _table(slots: Mapping[str, Slot]) -> str:
    """Name of a decoder's word embedding."""
    return next(name for name, slot in slots.items() if slot.path == "embedding.embedding")


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _tensors(model: Encoder | Decoder, adapted: Mapping[str, Linear | Embedding]) -> list[Tensor]:
    units = original_units(model)
    tensors: dict[str, np.ndarray] = {}
    for name, module in adapted.items():
        assert module.lora is not None
        order = units.get(id(module), Units())
        suffixes = _LINEAR if isinstance(module, Linear) else _EMBEDDING
        a, b = factor_matrices(module.lora.a[...], module.lora.b[...])
        factors = a[order.rows], b[:, order.columns]
        for suffix, factor in zip(suffixes, factors, strict=True):
            tensors[f"{_PREFIX}{name}.{suffix}"] = factor.T
    tables = {
        _module(name) + _BASE: slot
        for name, slot in tensor_slots(model).items()
        if isinstance(slot.variable, TableParam)
    }
    for name, slot in (_saved_whole(model) | tables).items():
        tensors[_PREFIX + name] = _whole(model, slot, units)
    return [Tensor.of(name, array) for name, array in tensors.items()]


def _whole(model: Encoder | Decoder, slot: Slot, units: Mapping[int, Units]) -> np.ndarray:
    """A tensor as transformers has it."""
    order = units.get(id(module_at(model, _module(slot.path))), Units())
    array = to_host(slot.variable[...]).reshape(slot.own_shape)
    if array.ndim == 1:
        return array[order.columns]
    array = order.of(array)
    return array.T if slot.transpose else array


class _Factors(NamedTuple):
    config: LoRAConfig
    a: np.ndarray  # [in, r]
    b: np.ndarray  # [r, out]

    def to_module(self) -> LoRA:
        shape = len(self.a), self.b.shape[1]
        lora = nnx.eval_shape(lambda: LoRA(*shape, config=self.config, rngs=nnx.Rngs(0)))
        lora.a.set_value(jnp.asarray(self.a))
        lora.b.set_value(jnp.asarray(self.b))
        return lora


class PEFTAdapter(NamedTuple):
    """A PEFT adapter as it was read, checked against a model, not installed yet."""

    factors: dict[str, _Factors]  # by path of the module
    weights: dict[str, np.ndarray]  # saved whole and trainable, by transformers' name of the tensor
    tables: dict[str, np.ndarray]  # tables under LoRA that are not the model's own, likewise

    def install(self, model: Encoder | Decoder) -> None:
        """Put it into `model`, in place."""
        for path, factors in self.factors.items():
            module: Any = module_at(model, path)
            module.lora = factors.to_module()
            for name, variable in vars(module).items():
                if isinstance(variable, HeadParam):  # under LoRA a head is frozen, as in PEFT
                    setattr(module, name, nnx.Param(variable.get_value()))
        slots = tensor_slots(model)
        for name, array in (self.weights | self.tables).items():
            slot = slots[name]
            old = slot.variable.get_value()
            array = array.T if slot.transpose else array
            value = jax.device_put(array.astype(old.dtype), old.sharding)
            path, _, attribute = slot.path.rpartition(".")
            kind = HeadParam if name in self.weights else TableParam
            setattr(module_at(model, path), attribute, kind(value))


def read_peft(model: Encoder | Decoder, directory: Path) -> PEFTAdapter:
    """Read a PEFT adapter for `model`, which is not changed.

    Raises:
        ValueError: it is incomplete, of a kind that is not supported, or does not fit the model.
    """
    path = directory / CONFIG_FILE
    config = read_json(path)
    try:
        _check_supported(config)
        default = LoRAConfig(
            rank=config.get("r", 8),
            alpha=config.get("lora_alpha", 8),
            use_rslora=bool(config.get("use_rslora")),
            dropout=config.get("lora_dropout") or 0.0,
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not (directory / WEIGHTS_FILE).is_file():
        pickles = sorted(p.name for p in directory.glob("*.bin"))
        found = f"only {', '.join(pickles)}, which is a pickle" if pickles else "no weights"
        raise ValueError(
            f"{directory} needs {WEIGHTS_FILE} and holds {found}; save the adapter anew with "
            "peft's save_pretrained(..., safe_serialization=True)"
        )
    try:
        return _fit(model, config, default, read_safetensors(directory / WEIGHTS_FILE))
    except ValueError as error:
        raise ValueError(f"the adapter {directory} cannot be added: {error}") from None


def _check_supported(config: Mapping[str, Any]) -> None:
    if (kind := config.get("peft_type")) != "LORA":
        raise ValueError(f"peft_type {kind!r} is not supported, only LORA")
    if config.get("use_dora"):
        raise ValueError(
            "the adapter is a DoRA one (use_dora), which is not supported; merge it into its model "
            "with peft's merge_and_unload, and load that"
        )
    if (bias := config.get("bias", "none")) != "none":
        raise ValueError(f"bias={bias!r} is not supported: the adapter changes biases too")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _PLAIN_INITIALISATIONS:
        raise ValueError(
            f"init_lora_weights={init!r} is not supported: it changes the base weights; convert "
            "the adapter to plain LoRA with peft's path_initial_model_for_weight_conversion"
        )
    for name in sorted(config.keys() - _NEUTRAL - _READ):
        if config[name]:
            raise ValueError(f"{name}={config[name]!r} is not supported")


def _fit(
    model: Encoder | Decoder,
    config: Mapping[str, Any],
    default: LoRAConfig,
    tensors: Mapping[str, np.ndarray],
) -> PEFTAdapter:
    """Sort the tensors of an adapter by what they are to the model.

    Raises:
        ValueError: one of them is nothing to it.
    """
    paths = model.module_paths()
    names = {_plain(model, name): name for name in paths}
    slots = tensor_slots(model)
    pairs: dict[str, dict[str, np.ndarray]] = {}  # by the adapter's names, which patterns match
    found = PEFTAdapter({}, {}, {})
    outputs: dict[str, np.ndarray] = {}  # stored for the output matrix of a tied model
    skipped: dict[str, None] = {}
    for key, array in tensors.items():
        stored = key.removeprefix(_PREFIX)
        if task_of(model) == "backbone" and is_head(_plain(model, stored)):
            skipped[stored] = None
            continue
        if _is_tied(model) and stored.startswith(f"{_OUTPUT}."):
            outputs[stored] = array
            continue
        if match := _FACTOR.fullmatch(stored):
            if _plain(model, match[1]) not in names:
                raise ValueError(f"the model has no module {match[1]}")
            pairs.setdefault(match[1], {})[match[2]] = array.astype(np.float32)
            continue
        base = stored.removesuffix(_BASE)
        own = names.get(_plain(model, base if base != stored else _module(stored)))
        name = f"{own}.{stored.rpartition('.')[2]}"
        if name not in slots:
            raise ValueError(f"tensor {key} is nothing that the model has")
        if array.shape != slots[name].shape:
            raise ValueError(f"tensor {key} has shape {array.shape}, expected {slots[name].shape}")
        (found.weights if base == stored else found.tables)[name] = array
    if any(map(_FACTOR.fullmatch, outputs)):
        raise _tied(f"with its LoRA factors {_OUTPUT}")
    if not pairs:
        raise ValueError("it has no LoRA factors")
    for name, factors in pairs.items():
        path = paths[names[_plain(model, name)]]
        if path == "position":
            raise ValueError(f"LoRA factors of {name} are not supported")
        made_by = default.of_module(name)
        found.factors[path] = _factors(module_at(model, path), name, factors, made_by)
    _leave_out_tables(model, slots, found, outputs, config.get("modules_to_save") or ())
    for name in map(_module, list(found.weights)):
        if missing := [n for n in slots if _module(n) == name and n not in found.weights]:
            raise ValueError(f"tensor {missing[0]} is missing")
        if paths[name] in found.factors:
            raise ValueError(f"{name} has LoRA factors and is saved whole too")
    if skipped:
        _log.warning("the model has no head; skipped of the adapter: %s", ", ".join(skipped))
    return found


def _plain(model: Encoder | Decoder, name: str) -> str:
    """A module's name whatever head its model has."""
    return name.removeprefix(model.base_prefix)


def _factors(
    module: nnx.Module, name: str, found: Mapping[str, np.ndarray], config: LoRAConfig
) -> _Factors:
    match module:
        case Linear():
            suffixes, rows, columns = _LINEAR, module.in_features, module.out_features
        case Embedding():
            suffixes, rows, columns = _EMBEDDING, module.num_embeddings, module.width
        case _:
            raise ValueError(f"{name} is a {type(module).__name__}, which takes no LoRA factors")
    shapes = ((config.rank, rows), (columns, config.rank))
    for suffix, shape in zip(suffixes, shapes, strict=True):
        if suffix not in found:
            raise ValueError(f"tensor {name}.{suffix} is missing")
        if found[suffix].shape != shape:
            raise ValueError(
                f"tensor {name}.{suffix} has shape {found[suffix].shape}, expected {shape}"
            )
    if unknown := found.keys() - set(suffixes):
        raise ValueError(f"tensor {name}.{min(unknown)} does not fit a {type(module).__name__}")
    a, b = (np.ascontiguousarray(found[suffix].T) for suffix in suffixes)
    return _Factors(config, a, b)


def _leave_out_tables(
    model: Encoder | Decoder,
    slots: Mapping[str, Slot],
    found: PEFTAdapter,
    outputs: Mapping[str, np.ndarray],
    modules_to_save: Sequence[str],
) -> None:
    """Drop tables that are stored beside an adapter and are the model's own.

    PEFT's `save_embedding_layers` stores them untrained.

    Raises:
        ValueError: the model's output matrix is tied to its embedding, and the adapter would make
            them differ; or it changes another weight that has LoRA factors.
    """
    tables = [name for name, slot in slots.items() if slot.path.startswith(_TABLES)]
    own = [
        name for name in found.weights if name in tables and _is(slots[name], found.weights[name])
    ]
    for name, array in list(found.tables.items()):
        if _is(slots[name], array):
            del found.tables[name]
        elif name not in tables:
            raise ValueError(
                f"{name} differs from the model's, under LoRA factors, which is not supported; "
                "merge the adapter with peft's merge_and_unload, and load that"
            )
    for name in own:
        asked = any(f".{_module(name)}".endswith(f".{ending}") for ending in modules_to_save)
        if not asked or (_is_tied(model) and not outputs):
            del found.weights[name]
    if not _is_tied(model):
        return
    table = _table(slots)
    new = found.weights.get(table, found.tables.get(table))
    for name, array in outputs.items():
        if not (_is(slots[table], array) if new is None else np.array_equal(array, new)):
            raise _tied(name)
    if table in found.weights and not outputs:
        raise _tied(table)


def _is(slot: Slot, array: np.ndarray) -> bool:
    """Whether an array is what the model holds, in the model's type."""
    own = to_host(slot.variable[...])
    return np.array_equal(own, (array.T if slot.transpose else array).astype(own.dtype))


def _tied(name: str) -> ValueError:
    return ValueError(
        f"{name} differs from the model's, whose output matrix is tied to its embedding; merge the "
        "adapter with peft's merge_and_unload, and load that"
    )
