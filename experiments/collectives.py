"""What the devices of a mesh send each other in a training step, read from the compiled program.

    python -m experiments.collectives --block opt-2048 --method spt --mesh fsdp=4,tensor=2

compiles a step of a block (see experiments.profile for what there is) for as many virtual CPU
devices as the mesh has, runs nothing, and prints a table of collectives with their bytes.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import jax
from rich.table import Table

from experiments import cli, profile
from spt_jax.sharding import parse_mesh

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
_COLLECTIVE = re.compile(
    r"= (?P<type>.*?) "
    r"(?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|"
    r"ragged-all-to-all|collective-broadcast)(-start)?\("
)


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
    """Those of a compiled program's text; an operation in a loop's body counts once.

    Args:
        program: `jax.stages.Compiled.as_text()`.

    Example:
        >>> collectives("%x = f32[8,2]{1,0} all-reduce(%y), channel_id=1")
        [Collective(kind='all-reduce', dtype='f32', shape=(8, 2))]
    """
    found = []
    for match in _COLLECTIVE.finditer(program):
        arrays = _ARRAY.findall(match["type"])
        if match[0].rstrip("(").endswith("-start"):  # a pair of operands and results
            arrays = arrays[len(arrays) // 2 :]
        for dtype, shape in arrays:
            lengths = tuple(int(length) for length in shape.split(",") if length)
            found.append(Collective(match["kind"], dtype, lengths))
    return found


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


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the experiment."""

    block: str = "opt-2048"
    """A block that experiments.profile knows."""
    method: str = "spt"
    """Methods, separated by commas: full, lora, spt."""
    mesh: str = "fsdp=4,tensor=2"
    """Sizes of the mesh's axes data, fsdp and tensor."""
    batch_size: str = "16"
    """Sequences of a step, of all devices together."""
    seq_len: str = "512"
    """Tokens of a sequence."""


def main() -> None:
    """Run the experiment."""
    options = cli.parse(Options, "experiments.collectives", __doc__)
    sizes = parse_mesh(options.mesh)
    if -1 in (sizes.data, sizes.fsdp, sizes.tensor):
        raise ValueError(f"--mesh needs every size, got {options.mesh}")
    number = sizes.data * sizes.fsdp * sizes.tensor
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", number)
    console = cli.console()
    works = profile.workloads(
        profile.Options(
            block=options.block,
            method=options.method,
            batch_size=options.batch_size,
            seq_len=options.seq_len,
            module="block",
            mesh=options.mesh,
        )
    )
    for work in works:
        program = profile.Program(work, seed=0, mesh=sizes)
        title = f"{work.block}, {work.name}, {options.mesh}: {work.step}"
        console.print(table(title, collectives(program.text())))


if __name__ == "__main__":
    cli.run(main)
