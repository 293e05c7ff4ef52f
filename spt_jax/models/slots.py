"""Where the tensors of a Hugging Face checkpoint live in a model."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, cast

from flax import nnx

from spt_jax.layers import Embedding, Linear


class HuggingFaceModel(Protocol):
    """What a model tells of its names in a Hugging Face checkpoint.

    Attributes:
        base_prefix: prefix of the backbone's modules in a checkpoint with a head.
    """

    base_prefix: str

    def module_paths(self) -> dict[str, str]:
        """Hugging Face's name of every module that holds weights -> its path in the model.

        Names are those that transformers saves: with the prefix where there is a head.
        """
        ...


class Slot(NamedTuple):
    """Where a checkpoint's tensor lives in a model."""

    variable: nnx.Variable
    transpose: bool  # Hugging Face stores linear maps as [out, in]
    path: str  # of the variable in the model
    own_shape: tuple[int, ...]  # in the model, without the axis of blocks of a routed FFN

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the checkpoint."""
        return self.own_shape[::-1] if self.transpose else self.own_shape


def module_at(model: nnx.Module, path: str) -> nnx.Module:
    """The module at a dotted path; list entries by number."""
    module: Any = model
    for part in path.split("."):
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    return module


def tensor_slots(model: nnx.Module) -> dict[str, Slot]:
    """Every tensor of a Hugging Face checkpoint of `model`, by name."""
    slots = {}
    weight: Any  # typed as optional by the norms
    for name, path in cast(HuggingFaceModel, model).module_paths().items():
        match module := module_at(model, path):
            case Linear():
                kind, weight, bias, transpose = "kernel", module.kernel, module.bias, True
            case Embedding():
                kind, weight, bias, transpose = "embedding", module.embedding, None, False
            case nnx.LayerNorm():
                kind, weight, bias, transpose = "scale", module.scale, module.bias, False
            case nnx.RMSNorm():
                kind, weight, bias, transpose = "scale", module.scale, None, False
            case _:
                raise TypeError(f"{path} is a {type(module).__name__}, which holds no weights")
        shape = weight.shape
        if isinstance(module, Linear):
            shape = module.in_features, module.out_features
        slots[f"{name}.weight"] = Slot(weight, transpose, f"{path}.{kind}", shape)
        if bias is not None:
            slots[f"{name}.bias"] = Slot(bias, False, f"{path}.bias", shape[-1:])
    return slots


def numbered(names: dict[str, str], prefix: str, num_layers: int) -> dict[str, str]:
    """`names` with each `{i}` filled in for every layer, Hugging Face's names after `prefix`."""
    paths = {}
    for name, path in names.items():
        for i in range(num_layers) if "{i}" in name else (0,):
            paths[prefix + name.format(i=i)] = path.format(i=i)
    return paths
