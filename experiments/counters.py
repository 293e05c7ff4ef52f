"""Hardware counters of the three Mosaic attention kernels, by NVIDIA Nsight Compute.

    python -m experiments.counters --out DIR
    python -m experiments.counters --rehearse

`ncu` runs a small program that attends once, forward and backward, over text-like queries and keys
(causal, 32 heads of 128, density 1/8), and reads for each kernel its time and how near the tensor
cores, L2 and device memory come to their peaks. Clocks are left alone. Writes counters.csv and,
last, metrics.json to DIR. With --rehearse the program is tiny and runs in Pallas' interpreter.
"""

from __future__ import annotations

import contextlib
import csv
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.table import Table

from experiments.comparisons import REHEARSAL, GPUSizes, attention_parts
from experiments.kernels import step_function
from experiments.methods import write_metrics
from experiments.reports import write_csv
from pallas_kernels import mosaic
from spt_jax import cli

KERNELS = ("forward", "dq", "dkv")
#: Column, metric of Nsight Compute, and its unit as `ncu --print-units base` gives it.
METRICS = {
    "ms": "gpu__time_duration.sum",
    "tensor_pipe_percent": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "l2_percent": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_hit_percent": "lts__t_sector_hit_rate.pct",
    "memory_percent": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
}
NS_PER_MS = 1e6
LENGTH = 8192


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the measurement."""

    length: int = LENGTH
    """Tokens of a sequence."""
    rehearse: bool = False
    """Run on a CPU at a tiny size, in Pallas' interpreter."""
    program: bool = False
    """Be the program that ncu looks at."""
    out: Path = Path("runs/counters")
    """Folder for the results."""


def run_kernels(options: Options) -> None:
    """Launch the three kernels, once each."""
    sizes = REHEARSAL if options.rehearse else GPUSizes(implementation="mosaic")
    length = sizes.tokens if options.rehearse else options.length
    comparison = attention_parts(sizes, length, "tile")
    method = comparison.candidates[f"{comparison.name}_whole"]
    trained, frozen = method.arguments(jax.random.key(0))
    y = jnp.ones_like(trained[0])
    jax.block_until_ready(jax.jit(step_function(method))(trained, frozen, y))


def command(options: Options) -> list[str]:
    """What runs the program under ncu."""
    return [
        "ncu",
        *("--csv", "--print-units", "base", "--clock-control", "none"),
        *("--kernel-name", f"regex:sparse_attention_({'|'.join(KERNELS)})"),
        *("--launch-count", str(len(KERNELS)), "--metrics", ",".join(METRICS.values())),
        *(sys.executable, "-m", "experiments.counters", "--program"),
        *("--length", str(options.length), *["--rehearse"] * options.rehearse),
    ]


def parse(lines: Iterable[str]) -> list[dict[str, Any]]:
    """One row a kernel, of what `ncu --csv` printed.

    Args:
        lines: its output: a line for each metric of each launch, under a header, among others.

    Returns:
        Rows of `kernel` and, of the metrics that were read, the columns of `METRICS`.

    Raises:
        ValueError: there is no table, or it lacks a kernel.
    """
    table = [line for line in lines if line.startswith('"')]
    columns = {metric: column for column, metric in METRICS.items()}
    rows: dict[str, dict[str, Any]] = {}
    for line in csv.DictReader(table):
        named = re.search(rf"sparse_attention_({'|'.join(KERNELS)})", line.get("Kernel Name") or "")
        column = columns.get(line.get("Metric Name") or "")
        if named is None or column is None:
            continue
        row = rows.setdefault(line["ID"], {"kernel": named.group()})
        with contextlib.suppress(ValueError):  # "n/a" of a chip that lacks it
            value = float(line["Metric Value"].replace(",", ""))
            row[column] = value / NS_PER_MS if column == "ms" else value
    found = {row["kernel"] for row in rows.values()}
    if absent := [name for name in KERNELS if f"sparse_attention_{name}" not in found]:
        raise ValueError(f"ncu did not measure the attention kernels {', '.join(absent)}")
    return list(rows.values())


def main() -> None:
    """Measure, or be measured."""
    options = cli.parse(Options, "experiments.counters", __doc__)
    if options.rehearse:
        jax.config.update("jax_platforms", "cpu")
    if options.program:
        with mosaic.interpreted() if options.rehearse else contextlib.nullcontext():
            run_kernels(options)
        return
    if shutil.which("ncu") is None:
        raise ValueError("ncu, of NVIDIA Nsight Compute, is not on the PATH")
    options.out.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        command(options), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    (options.out / "ncu.csv").write_text(done.stdout, encoding="utf-8")
    lines = done.stdout.splitlines()
    if done.returncode:
        said = [line for line in lines if "ERROR" in line] or lines or ["nothing"]
        sys.exit(f"error: ncu ended in exit code {done.returncode}: {said[-1]}")
    rows = parse(lines)
    table = Table(title="counters")
    for column in ("kernel", *METRICS):
        table.add_column(column)
    for row in rows:
        cells = (f"{row[column]:.3f}" if column in row else "" for column in METRICS)
        table.add_row(row["kernel"], *cells)
    cli.console().print(table)
    write_csv(options.out / "counters.csv", rows)
    write_metrics(options.out, "counters", options, {row["kernel"]: row for row in rows})


if __name__ == "__main__":
    cli.run(main)
