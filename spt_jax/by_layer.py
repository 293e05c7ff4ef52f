"""Models that run layer by layer, each a program of its own: layers that are alike compile once.

One program of a whole model takes longer to compile than to run a few times.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import jax
from flax import nnx
from jaxtyping import Int

from spt_jax.layers import recording
from spt_jax.models import Decoder, Encoder

Path = tuple[Any, ...]  # of a module in a model, as nnx.iter_modules gives it
Calls = list[dict[str, jax.Array]]  # what a module recorded, by call


def by_layer(model: Decoder | Encoder) -> Any:
    """A model of the same arrays, to be called outside of `jit`."""
    return _with_layers(model, [partial(_called, *nnx.split(layer)) for layer in model.layers])


def recorded(
    model: Decoder | Encoder,
    inputs: Mapping[str, jax.Array],
    tokens: Int[jax.Array, "T"],
    paths: Collection[Path],
    names: Collection[str],
) -> dict[Path, Calls]:
    """What modules of a model's layers read at some tokens; layers behind them do not run.

    Args:
        model: dense or adapted; not changed.
        inputs: its arguments.
        tokens: places in the flattened rows.
        paths: of the modules.
        names: of what is kept.
    """
    found: dict[Path, Calls] = {}
    last = max((path[1] for path in paths), default=-1)

    def run(number: int, layer: nnx.Module, *arguments: Any) -> Any:
        if number > last:
            raise _Enough
        own = tuple(path[2:] for path in paths if path[1] == number)
        output, read = _recording(
            *nnx.split(layer), tokens, *arguments, paths=own, names=tuple(names)
        )
        found.update(
            {("layers", number, *path): calls for path, calls in zip(own, read, strict=True)}
        )
        return output

    layers = [partial(run, number, layer) for number, layer in enumerate(model.layers)]
    with contextlib.suppress(_Enough):
        _with_layers(model, layers).hidden_states(**inputs)
    return found


class _Enough(Exception):
    """All that was asked for is there."""


def _with_layers(model: Decoder | Encoder, layers: Sequence[Any]) -> Any:
    own: Any = nnx.clone(model)
    own.set_attributes(remat=False, raise_if_not_found=False)
    object.__setattr__(own, "layers", layers)  # of a model that is called and no more
    return own


@partial(jax.jit, static_argnums=0)
def _called(graphdef: Any, state: Any, *arguments: Any) -> Any:
    layer: Any = nnx.merge(graphdef, state)
    return layer(*arguments)


@partial(jax.jit, static_argnums=0, static_argnames=("paths", "names"))
def _recording(
    graphdef: Any,
    state: Any,
    tokens: jax.Array,
    *arguments: Any,
    paths: tuple[Path, ...],
    names: tuple[str, ...],
) -> tuple[Any, list[Any]]:
    layer: Any = nnx.merge(graphdef, state)
    with recording() as records:
        output = layer(*arguments)
    modules = {path: module for path, module in nnx.iter_modules(layer) if path in paths}
    return output, [
        [
            {n: x.reshape(-1, *x.shape[2:])[tokens] for n, x in call.items() if n in names}
            for call in records.get(id(modules[path]), [])
        ]
        for path in paths
    ]
