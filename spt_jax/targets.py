"""Which modules of a model get LoRA factors, and which are trained whole beside them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from flax import nnx

from spt_jax.calibration import Path
from spt_jax.config import LoRAConfig, first_match
from spt_jax.layers import Attention, Embedding, FeedForward, HeadParam, Linear, LoRA
from spt_jax.models import Decoder, Encoder
from spt_jax.models.slots import module_at

ALL_LINEAR = "all-linear"
#: Names that a message lists.
_MOST_NAMES = 16


class Factors(NamedTuple):
    """A module that is to get LoRA factors, and what they are made by."""

    module: Linear | Embedding
    config: LoRAConfig


class LoRAPlan(NamedTuple):
    """What a configuration of LoRA means for a model, which is not changed yet.

    Attributes:
        factors: by the module's name.
        whole: modules that are trained whole, by name.
    """

    factors: Mapping[str, Factors]
    whole: Mapping[str, nnx.Module]

    def factors_of(self, module: nnx.Module) -> LoRAConfig | None:
        """What a module's factors are made by; None where it gets none."""
        return next((f.config for f in self.factors.values() if f.module is module), None)

    def trains_whole(self, module: nnx.Module) -> bool:
        """Whether a module's weights are trained."""
        return any(module is other for other in self.whole.values())

    def install(self, rngs: nnx.Rngs) -> None:
        """Add the factors, and make the weights trainable, in place."""
        for module, config in self.factors.values():
            module.lora = LoRA(*_weight(module).shape, config=config, rngs=rngs)
        for whole in self.whole.values():
            train_whole(whole)


def train_whole(module: nnx.Module) -> None:
    """Make a module's weights of the type that is trained and saved with an adapter, in place."""
    for name, variable in vars(module).items():
        if isinstance(variable, nnx.Param):
            setattr(module, name, HeadParam(variable.get_value()))


def plan_lora(model: nnx.Module, config: LoRAConfig) -> LoRAPlan:
    """Find the modules that a configuration names.

    Args:
        model: dense; not changed.
        config: of LoRA.

    Raises:
        ValueError: a pattern matches nothing, or what cannot get factors; or a module is to get
            factors and to be trained whole.
    """
    modules = dict(nnx.iter_modules(model))
    names = _names(model, modules)
    if config.target_modules is None:
        targets = _by_type(modules, config, names)
    else:
        targets = _by_name(model, config.target_modules, names)
    for name, target in targets.items():
        check_unstacked(name, _weight(target))
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field):
            if not any(first_match([pattern], name) for name in targets):
                raise ValueError(
                    f"{field}: {pattern!r} matches no module that gets LoRA factors; those are "
                    f"{_some(targets)}"
                )
    whole = _whole(model, config.modules_to_save, names)
    if both := next((name for name in whole if name in targets), None):
        raise ValueError(
            f"{both} is to get LoRA factors and is in modules_to_save, which trains it whole; "
            "leave it out of one of them: target_modules says exactly what gets factors"
        )
    factors = {name: Factors(m, config.of_module(name)) for name, m in targets.items()}
    return LoRAPlan(factors, whole)


def check_unstacked(name: str, weight: nnx.Variable) -> None:
    """Raise a ValueError unless a weight is a matrix."""
    if weight.ndim != 2:
        raise ValueError(
            f"{name} is several layers, stacked by nnx.vmap or nnx.scan (a weight is "
            f"{list(weight.shape)}): keep them one by one in an nnx.List, and adapt that model"
        )


def _weight(module: Linear | Embedding) -> nnx.Variable:
    return module.kernel if isinstance(module, Linear) else module.embedding


def _names(model: nnx.Module, modules: Mapping[Path, nnx.Module]) -> dict[str, nnx.Module]:
    """Every module with weights of its own by transformers' name, or by its path where it has none.

    Those that transformers knows come first, in its order.
    """
    found: dict[str, nnx.Module] = {}
    if isinstance(model, Encoder | Decoder):
        for name, path in model.module_paths().items():
            with contextlib.suppress(IndexError):  # of layers that were taken away
                found[name] = module_at(model, path)
    known = {id(module) for module in found.values()}
    return found | {
        ".".join(map(str, path)): module
        for path, module in modules.items()
        if id(module) not in known
        and any(isinstance(variable, nnx.Param) for variable in vars(module).values())
    }


def _by_type(
    modules: Mapping[Path, nnx.Module], config: LoRAConfig, names: Mapping[str, nnx.Module]
) -> dict[str, Linear | Embedding]:
    """What `targets` means."""
    found: list[Linear | Embedding] = []
    for path, module in modules.items():
        match module:
            case Attention() if "attention" in config.targets:
                found += [module.q_proj, module.k_proj, module.v_proj, module.o_proj]
            case FeedForward() if "ffn" in config.targets:
                found += [m for m in (module.up, module.gate, module.down) if m is not None]
            # not OPT's positions, see `_checked_target`
            case Embedding() if "embeddings" in config.targets and path != ("position",):
                found.append(module)
    name_of = {id(module): name for name, module in names.items()}
    return {name_of[id(module)]: module for module in found}


def _by_name(
    model: nnx.Module, wanted: str | tuple[str, ...], names: Mapping[str, nnx.Module]
) -> dict[str, Linear | Embedding]:
    """What `target_modules` means."""
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        output = model.head if isinstance(model, Decoder) else None
        return {
            name: module
            for name, module in names.items()
            if isinstance(module, Linear) and module is not output and not _is_head(module)
        }
    found: dict[str, Linear | Embedding] = {}
    for pattern in (wanted,) if isinstance(wanted, str) else wanted:
        if isinstance(wanted, str):
            matches = [name for name in names if re.fullmatch(pattern, name)]
        else:
            matches = [name for name in names if _ends_with(name, pattern)]
        if not matches:
            raise _no_match("target_modules", pattern, model, names)
        others = [name for name in matches if not _is_head(names[name])]
        if not others:
            raise ValueError(
                f"target_modules: {pattern!r} matches only {_some(matches)}, of the task's head, "
                "which is trained and saved whole; leave it out"
            )
        found |= {name: _checked_target(model, pattern, name, names[name]) for name in others}
    return {name: found[name] for name in names if name in found}


def _checked_target(
    model: nnx.Module, pattern: str, name: str, module: nnx.Module
) -> Linear | Embedding:
    what = f"target_modules: {pattern!r} matches {name}, "
    if not isinstance(module, Linear | Embedding):
        raise ValueError(
            f"{what}a {type(module).__name__}, which takes no LoRA factors; match linear maps and "
            "embeddings alone, and train others whole by modules_to_save"
        )
    if isinstance(model, Decoder) and module is model.position:
        raise ValueError(
            f"{what}OPT's positions, which take no LoRA factors, for PEFT looks up rows without "
            "their offset; train them whole by modules_to_save"
        )
    return module


def _whole(
    model: nnx.Module, wanted: Sequence[str], names: Mapping[str, nnx.Module]
) -> dict[str, nnx.Module]:
    """What `modules_to_save` means."""
    found: set[str] = set()
    for pattern in wanted:
        matches = [
            name for name in names if any(_ends_with(part, pattern) for part in _with_owners(name))
        ]
        if not matches:
            raise _no_match("modules_to_save", pattern, model, names)
        found |= set(matches)
    return {name: module for name, module in names.items() if name in found}


def _with_owners(name: str) -> list[str]:
    """A module's name, and those of the modules that hold it."""
    parts = name.split(".")
    return [".".join(parts[:number]) for number in range(1, len(parts) + 1)]


def _ends_with(name: str, ending: str) -> bool:
    """Whether a name has this ending, in whole parts."""
    return f".{name}".endswith(f".{ending}")


def _is_head(module: nnx.Module) -> bool:
    """Whether a module belongs to the head of a task."""
    return any(isinstance(variable, HeadParam) for variable in vars(module).values())


def _no_match(
    field: str, pattern: str, model: nnx.Module, names: Mapping[str, nnx.Module]
) -> ValueError:
    said = f"{field}: {pattern!r} matches no module; there are {_some(names)}"
    if pattern == "lm_head" and isinstance(model, Decoder) and model.config.tie_embeddings:
        said += "; the output matrix is the word embedding, to which it is tied"
    elif pattern == ALL_LINEAR:
        said += f"; {ALL_LINEAR} is given as a text, target_modules={ALL_LINEAR!r}, in no tuple"
    return ValueError(said)


def _some(names: Iterable[str]) -> str:
    """Names, of those that differ in numbers alone the first one."""
    kinds: dict[str, str] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\d+", "0", name), name)
    shown = list(kinds.values())
    more = f" and {len(shown) - _MOST_NAMES} more kinds" if len(shown) > _MOST_NAMES else ""
    return ", ".join(shown[:_MOST_NAMES]) + more
