"""Devices as a mesh with the axes `data`, `fsdp` and `tensor`, and what lies where on it.

Batches are cut over `data` and `fsdp`. Frozen weights are kept in pieces over `fsdp` and gathered
where they are used; heads, and the hidden units of every FFN block, are cut over `tensor`. All of
it is JAX's own: arrays with shardings, and `shard_map` around the ops whose kernels know nothing of
other devices. Without a mesh, which `jax.set_mesh` sets, nothing here does anything.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spt_jax.config import MeshConfig
from spt_jax.processes import put

DATA, FSDP, TENSOR = AXES = ("data", "fsdp", "tensor")
#: Axes over which a batch is cut.
BATCH = (DATA, FSDP)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices, of all processes, or of `devices`.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {name: getattr(config, name) for name in AXES}
    known = math.prod(size for size in sizes.values() if size != -1)
    rest = len(devices) // known if -1 in sizes.values() else 1
    shape = tuple(rest if size == -1 else size for size in sizes.values())
    if math.prod(shape) != len(devices):
        asked = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"a mesh of {asked} does not fit {len(devices)} devices: the sizes must multiply to "
            "their number, with -1 standing for what remains"
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def parse_mesh(text: str) -> MeshConfig:
    """The mesh that a text such as "data=2,tensor=4" describes; axes left out have the size 1.

    Raises:
        ValueError: it is no such text.

    Example:
        >>> parse_mesh("fsdp=-1,tensor=2")
        MeshConfig(data=1, fsdp=-1, tensor=2)
    """
    sizes = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in sizes or not re.fullmatch(r"-?\d+", size):
            raise ValueError(
                f"a mesh is described by axes and sizes such as data=2,tensor=4, of the axes "
                f"{', '.join(AXES)}; got {text!r}"
            )
        sizes[name] = int(size)
    return MeshConfig(**sizes)


class Devices:
    """Where a training run keeps its arrays; entered, the mesh that its programs are traced for.

    Args:
        config: the mesh; None for the default device, which leaves all arrays where they are.

    Raises:
        ValueError: the mesh does not fit the devices.
    """

    def __init__(self, config: MeshConfig | None) -> None:
        self.mesh = None if config is None else make_mesh(config)
        self._entered = contextlib.ExitStack()

    def places(self, tree: Any) -> Any:
        """Where each array of a pytree lies whose paths end in those of parameters.

        A model's state is such a tree, and so are an optimizer's moments. What is no parameter lies
        whole on every device. None without a mesh.
        """
        if self.mesh is None:
            return None
        place = parameter_sharding(self.mesh)

        def find(path: Any, x: Any) -> NamedSharding:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            return place(name.removesuffix(".value"), x.shape)

        return jax.tree_util.tree_map_with_path(find, tree)

    def put[Tree](self, tree: Tree) -> Tree:
        """The arrays of a tree as `places` takes, each in its place."""
        return tree if self.mesh is None else jax.tree.map(put, tree, self.places(tree))

    def rows(self, batch_size: int) -> np.ndarray:
        """Examples of a batch that devices of this process hold."""
        if self.batch_place is None:
            return np.arange(batch_size)
        parts = self.batch_place.addressable_devices_indices_map((batch_size,)).values()
        return np.unique([np.arange(batch_size)[part] for part in parts])

    def batch(self, rows: Any, batch_size: int) -> Any:
        """Arrays of a batch's `rows` as arrays of the whole batch, cut by examples."""
        if (place := self.batch_place) is None:
            return rows
        held = self.rows(batch_size)

        def whole(x: np.ndarray) -> jax.Array:
            def part(index: Any) -> np.ndarray:
                return x[np.searchsorted(held, np.arange(batch_size)[index[0]])]

            return jax.make_array_from_callback((batch_size, *x.shape[1:]), place, part)

        return jax.tree.map(whole, rows)

    @property
    def batch_place(self) -> NamedSharding | None:
        """Where examples lie; None without a mesh."""
        return None if self.mesh is None else NamedSharding(self.mesh, P(BATCH))

    @property
    def everywhere(self) -> NamedSharding | None:
        """Where that lies which every device holds whole; None without a mesh."""
        return None if self.mesh is None else NamedSharding(self.mesh, P())

    def outputs(self, state: Any) -> Any:
        """`jit`'s `out_shardings` of a step that returns the next state and metrics."""
        return None if self.mesh is None else (self.places(state), self.everywhere)

    def size(self, *axes: str) -> int:
        """Devices along these axes together."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[name] for name in axes)

    def __enter__(self) -> Self:
        if self.mesh is not None:
            self._entered.enter_context(jax.set_mesh(self.mesh))
        return self

    def __exit__(self, *_: object) -> None:
        self._entered.close()


def current() -> Any:
    """The mesh that `jax.set_mesh` set, if it has this module's axes and several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.axis_names != AXES or mesh.size == 1 or mesh.manual_axes:
        return None
    return mesh


def constrain(x: jax.Array, *spec: Any) -> jax.Array:
    """`x` laid out by `spec` on the current mesh; axes that do not divide their dimension drop."""
    mesh = current()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, _fitting(P(*spec), x.shape, mesh))


def fitting(shape: Sequence[int], *spec: Any) -> P:
    """`spec` on the current mesh without the axes that do not divide their dimension of `shape`."""
    mesh = current()
    return P() if mesh is None else _fitting(P(*spec), shape, mesh)


def locally(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`function` of what each device holds; without a mesh `function` itself.

    Specs may have entries for arguments that are None.
    """
    mesh = current()
    if mesh is None:
        return function

    def run(*arguments: Any) -> Any:
        specs = jax.tree.map(
            lambda spec, x: None if x is None else spec,
            in_specs,
            arguments,
            is_leaf=lambda x: x is None or isinstance(x, P),
        )
        mapped = jax.shard_map(
            function, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False
        )
        return mapped(*arguments)

    return run


def gathered(weight: jax.Array, cut: str | None = None) -> jax.Array:
    """A weight `[in, out]` as it is used: whole but for what `tensor` cuts."""
    spec = {"outputs": (None, TENSOR), "inputs": (TENSOR, None), None: ()}[cut]
    return constrain(weight, *spec)


def sum_over(y: jax.Array, axes: str | tuple[str, ...]) -> jax.Array:
    """Inside `locally`: the sum over the devices along these axes."""
    mesh = jax.sharding.get_abstract_mesh()
    names = (axes,) if isinstance(axes, str) else axes
    several = TENSOR in mesh.manual_axes and any(mesh.shape[name] > 1 for name in names)
    return jax.lax.psum(y, axes) if several else y


def axes_of_rows(number: int) -> tuple[str, ...]:
    """Axes over which rows of tokens are cut that no weight is cut for: all that divide them."""
    mesh = current()
    return AXES if mesh is None or number % mesh.size == 0 else BATCH


#: Linear maps whose outputs, or inputs, are heads or hidden units.
_OUTPUTS_CUT = ("q_proj", "k_proj", "v_proj", "up", "gate")
_INPUTS_CUT = ("o_proj", "down")


def parameter_spec(path: str, shape: Sequence[int]) -> P:
    """How a parameter lies on a mesh, before axes that do not divide it are dropped.

    Args:
        path: in the model, such as "layers.0.ffn.up.kernel".
        shape: its shape. FFN weights may have an axis of blocks, `[D, G, F / G]`.
    """
    *_, owner, name = ("", "", *path.split("."))
    middle = (None,) * (len(shape) - 2)
    if owner == "lora":
        owner, name = path.split(".")[-3], f"lora.{name}"
    match name:
        case "kernel" if owner in _OUTPUTS_CUT:
            return P(FSDP, *middle, TENSOR)
        case "kernel" if owner in _INPUTS_CUT:
            return P(*middle, TENSOR, FSDP)
        case "bias" if owner in _OUTPUTS_CUT:
            return P(*(None,) * (len(shape) - 1), TENSOR)
        case "lora.b" if owner in _OUTPUTS_CUT:
            return P(None, *middle, TENSOR)
        case "lora.a" if owner in _INPUTS_CUT:
            return P(*middle, TENSOR, None)
        case "kernel":
            return P(FSDP)
        case "embedding":
            return P(None, FSDP)
        case "query_codebooks" | "key_codebooks" | "key_center":
            return P(TENSOR)
    return P()


def parameter_sharding(mesh: Mesh) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """Where each parameter lies on `mesh`; what `load_pretrained(sharding=...)` takes.

    Example:
        >>> mesh = make_mesh(MeshConfig())
        >>> tuple(parameter_sharding(mesh)("layers.0.ffn.up.kernel", (64, 256)).spec)
        ('fsdp', 'tensor')
    """

    def place(path: str, shape: tuple[int, ...]) -> NamedSharding:
        return NamedSharding(mesh, _fitting(parameter_spec(path, shape), shape, mesh))

    return place


def _fitting(spec: P, shape: Sequence[int], mesh: Any) -> P:
    """`spec` without the axes that do not divide the dimension they cut."""

    def size(entry: Any) -> int:
        names = (entry,) if isinstance(entry, str) else entry or ()
        return math.prod(mesh.shape[name] for name in names)

    return P(
        *(
            entry if length % size(entry) == 0 else None
            for entry, length in zip(spec, shape, strict=False)
        )
    )
