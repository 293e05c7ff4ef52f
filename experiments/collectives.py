"""What the devices of a mesh send each other in a training step, read from the compiled program.

    python -m experiments.collectives --block opt-2048 --meshes "fsdp=8 fsdp=4,tensor=2"

compiles a step of a block (see experiments.profile for what there is) for as many virtual CPU
devices as a mesh has, runs nothing, and prints for each mesh the memory of a device, and a table of
collectives with their bytes.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import jax
from rich.table import Table

from experiments import profile
from experiments.reports import here_and_now, how, page
from spt_jax import cli
from spt_jax.sharding import make_mesh, parse_mesh
from spt_jax.training import write_text_atomic

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
_COLLECTIVE = re.compile(
    r"= (?P<type>.*?) "
    r"(?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|"
    r"ragged-all-to-all|collective-broadcast)(-start)?\("
)
#: Groups of one device each, listed, by their numbers, or as axes of a mesh.
_ALONE = re.compile(r"replica_groups=(\{\{\d+\}|\[\d+,1\])")
_AXES = re.compile(r"replica_groups=mesh\[(?P<mesh>[^]]*)\] \{(?P<axes>[^}]*)\}")


class Collective(NamedTuple):
    """One array that a collective operation of a program hands each device.

    Attributes:
        kind: of the operation, as XLA names it.
        dtype: of the array, as XLA names it.
        shape: of the array, on one device.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the array."""
        return _BYTES[self.dtype] * math.prod(self.shape)


def collectives(program: str) -> list[Collective]:
    """Those of a compiled program's text by which devices send each other something.

    An operation in a loop's body counts once.

    Args:
        program: `jax.stages.Compiled.as_text()`.

    Example:
        >>> collectives("%x = f32[8,2]{1,0} all-reduce(%y), channel_id=1")
        [Collective(kind='all-reduce', dtype='f32', shape=(8, 2))]
        >>> collectives("%x = f32[8]{0} all-reduce(%y), replica_groups=mesh['a'=2,'b'=1] {'b'}")
        []
    """
    found = []
    for line in program.splitlines():
        if (match := _COLLECTIVE.search(line)) is None or _alone(line):
            continue
        arrays = _ARRAY.findall(match["type"])
        if match[0].rstrip("(").endswith("-start"):  # a pair of operands and results
            arrays = arrays[len(arrays) // 2 :]
        for dtype, shape in arrays:
            lengths = tuple(int(length) for length in shape.split(",") if length)
            found.append(Collective(match["kind"], dtype, lengths))
    return found


def _alone(attributes: str) -> bool:
    """Whether an operation's groups have one device each, which sends nothing."""
    if (match := _AXES.search(attributes)) is None:
        return _ALONE.search(attributes) is not None
    sizes = {axis: int(n) for axis, n in re.findall(r"'(\w+)'=(\d+)", match["mesh"])}
    return all(sizes[axis] == 1 for axis in re.findall(r"'(\w+)'", match["axes"]))


def table(title: str, found: Iterable[Collective]) -> Table:
    """One row for each kind and shape."""
    rows = Table(title=title)
    for header in ("collective", "array", "number", "MB"):
        rows.add_column(header, justify="left" if header in ("collective", "array") else "right")
    groups = Counter(found).items()
    for collective, number in sorted(groups, key=lambda item: -item[0].size_bytes * item[1]):
        shape = ",".join(map(str, collective.shape))
        megabytes = collective.size_bytes * number / 1e6
        rows.add_row(
            collective.kind, f"{collective.dtype}[{shape}]", str(number), f"{megabytes:.3f}"
        )
    return rows


def summary(peaks: Mapping[str, int], found_by_mesh: Mapping[str, Sequence[Collective]]) -> Table:
    """One row a mesh: memory of a device in bytes, and what it is handed in a step."""
    rows = Table(title="A step on one of the devices")
    for header in ("mesh", "peak MB", "collectives", "gathered MB", "summed MB"):
        rows.add_column(header, justify="left" if header == "mesh" else "right")
    for mesh, found in found_by_mesh.items():
        gathered = [c for c in found if c.kind == "all-gather"]
        sizes = [sum(c.size_bytes for c in part) for part in (gathered, found)]
        rows.add_row(
            mesh,
            f"{peaks[mesh] / 1e6:,.0f}",
            str(len(found)),
            f"{sizes[0] / 1e6:,.1f}",
            f"{(sizes[1] - sizes[0]) / 1e6:,.1f}",
        )
    return rows


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the experiment."""

    block: str = "opt-2048"
    """A block that experiments.profile knows."""
    method: Literal["full", "lora", "spt"] = "spt"
    """How it is trained."""
    meshes: str = "data=8 fsdp=8 tensor=8 fsdp=4,tensor=2"
    """Meshes of so many devices as the first one has, separated by spaces."""
    batch_size: int = 16
    """Sequences of a step, of all devices together."""
    seq_len: int = 512
    """Tokens of a sequence."""
    report: Path | None = None
    """Markdown page that gets the tables."""


def main() -> None:
    """Run the experiment."""
    options = cli.parse(Options, "experiments.collectives", __doc__)
    meshes = {text: parse_mesh(text) for text in options.meshes.split()}
    sizes = [(mesh.data, mesh.fsdp, mesh.tensor) for mesh in meshes.values()]
    if not sizes or -1 in itertools.chain(*sizes):
        raise ValueError(f"--meshes needs every size, got {options.meshes!r}")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", math.prod(sizes[0]))
    for sizes_of in meshes.values():
        make_mesh(sizes_of)
    console = cli.console()
    peaks: dict[str, int] = {}
    found: dict[str, list[Collective]] = {}
    for text, mesh in {"one device": None, **meshes}.items():
        (work, *_) = profile.workloads(
            profile.Options(
                block=options.block,
                method=options.method,
                batch_size=str(options.batch_size),
                seq_len=str(options.seq_len),
                module="block",
                mesh=None if mesh is None else text,
            )
        )
        program = profile.Program(work, seed=0, mesh=mesh)
        peaks[text], found[text] = program.planned_bytes, collectives(program.text())
    parts = [summary(peaks, found), *(table(text, found[text]) for text in meshes)]
    for part in parts:
        console.print(part)
    if options.report is None:
        return
    what = (
        f"A training step of one {options.block} block, {options.method}, {options.batch_size} "
        f"sequences of {options.seq_len} tokens on {math.prod(sizes[0])} virtual devices of a CPU: "
        "what the compiler plans for one of them. Peak: arguments, results and temporaries. "
        "Weights are gathered; activations are summed over `tensor` alone, and gradients over all."
    )
    conditions = here_and_now()
    made = how("experiments.collectives", options, conditions)
    write_text_atomic(options.report, page("Several devices, measured", what, *parts, made))


if __name__ == "__main__":
    cli.run(main)
