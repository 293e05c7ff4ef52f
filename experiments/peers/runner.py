"""Options, table and files of `experiments.peers`; nothing here needs torch to be imported."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from experiments import peers, profile
from experiments.measurement import failure_of
from experiments.methods import write_metrics
from experiments.profile import (
    CHOICES,
    Choice,
    Measurement,
    StepOptions,
    Work,
    exit_on_failures,
)
from experiments.reports import write_csv
from spt_jax import cli
from spt_jax.training import environment

#: What a peer is made of, by the names of pip.
PACKAGES = ("torch", "transformers", "peft")
MODULES = ("mha", "ffn", "block")
METHODS = ("full", "lora")


@dataclass(frozen=True, kw_only=True)
class Options(StepOptions):
    """Options of the experiment."""

    module: str = "mha,ffn,block"
    """What of them, separated by commas: mha, ffn, block."""
    method: str = "full,lora"
    """Methods, separated by commas: full, lora."""
    compile: Choice = "both"
    """Whether torch.compile makes the step."""
    autocast: Choice = "both"
    """Whether LoRA runs under torch.autocast; on a CPU it never does."""
    out: Path = Path("runs/peers")
    """Folder for the table and metrics.json."""

    def check(self) -> None:
        """Raise a ValueError for any mistake in the options."""
        cli.known_names(self.module, MODULES, what="--module")
        cli.known_names(self.method, METHODS, what="--method")
        self.profiled(gpu=False).check()

    def profiled(self, *, gpu: bool) -> profile.Options:
        """Options of `experiments.profile` for the same steps."""
        forms = {False: "skinny_float32", True: "skinny"}
        return profile.Options(
            **{field.name: getattr(self, field.name) for field in fields(StepOptions)},
            module=self.module,
            method=self.method,
            lora_form=",".join(forms[cast] for cast in CHOICES[self.autocast if gpu else "no"]),
            rounds=1,
            out=self.out,
        )


@dataclass(frozen=True, kw_only=True)
class Peer:
    """What is measured: a step of `experiments.profile`, and how PyTorch runs it.

    Attributes:
        work: the step; its form of LoRA is skinny under autocast, else skinny_float32.
        compiled: whether torch.compile makes it.
    """

    work: Work
    compiled: bool

    @property
    def autocast(self) -> bool:
        """Whether LoRA runs under torch.autocast."""
        return self.work.step.lora_form == "skinny"

    @property
    def method(self) -> str:
        """The method, as the CSV file names it."""
        words = ["torch full" if self.work.step.method == "full" else "peft lora"]
        return " ".join(words + ["autocast"] * self.autocast + ["compiled"] * self.compiled)

    @property
    def name(self) -> str:
        """The method, as the table shows it."""
        return self.method + " remat" * self.work.step.remat

    def row(self, measurement: Measurement) -> dict[str, Any]:
        """A row of the CSV file, with the columns of profile's."""
        return measurement.row() | {"method": self.method}


def workloads(options: Options, *, gpu: bool) -> list[Peer]:
    """All that the options ask for, in the order of the table."""
    works = profile.workloads(options.profiled(gpu=gpu), gpu=gpu)
    compiled = CHOICES[options.compile]
    return [Peer(work=work, compiled=c) for work in works for c in compiled]


def require_packages() -> None:
    """Raise a ValueError if a package that a peer is made of is not installed."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"experiments.peers needs {', '.join(missing)}, not installed in this environment: "
            f"pip install {' '.join(PACKAGES)}"
        )


def measure(
    todo: Sequence[Peer], options: Options, advance: Callable[[str], None]
) -> list[Measurement]:
    """Time all peers, one after the other; one that fails says why."""
    from experiments.peers import torch_steps

    found = []
    for peer in todo:
        measurement = Measurement(peer.work)
        found.append(measurement)
        try:
            measurement.times_ms, measurement.device_bytes = torch_steps.measure(
                peer.work.step,
                autocast=peer.autocast,
                compiled=peer.compiled,
                steps=options.steps,
                seed=options.seed,
            )
        except Exception as error:  # torch.compile's tools raise errors of many types
            measurement.failure = failure_of(error)
        torch_steps.release()
        advance(f"{peer.work.block} {peer.work.module} {peer.name}")
    return found


def results_table(todo: Sequence[Peer], found: Sequence[Measurement], device: str) -> Table:
    """One row a measurement."""
    on_device = any(m.device_bytes is not None for m in found)
    table = Table(title=f"a training step, {device}")
    for header in ("block", "module", "batch", "method"):
        table.add_column(header)
    for header in ["ms"] + ["device MB"] * on_device:
        table.add_column(header, justify="right")
    for peer, m in zip(todo, found, strict=True):
        step = m.work.step
        cells = [m.work.block, m.work.module, f"{step.batch} x {step.length}", peer.name]
        if m.failure is not None:
            table.add_row(*cells, m.failure)
            continue
        cells.append(f"{m.ms:.2f} ({m.spread_ms:.2f})")
        if m.device_bytes is not None:
            cells.append(f"{m.device_bytes / 1e6:.0f}")
        table.add_row(*cells)
    return table


def figures_of(todo: Sequence[Peer], found: Sequence[Measurement]) -> dict[str, dict[str, Any]]:
    """Figures by block, module, batch, length and method."""
    figures = {}
    for peer, m in zip(todo, found, strict=True):
        step = m.work.step
        words = [m.work.block, m.work.module, f"b{step.batch}", f"s{step.length}", peer.name]
        numbers: dict[str, Any] = {"ms": m.ms, "spread_ms": m.spread_ms}
        numbers |= {"device_bytes": m.device_bytes, "failure": m.failure}
        figures["_".join(words).replace(" ", "_")] = {
            name: value for name, value in numbers.items() if value is not None
        }
    return figures


def main() -> None:
    """Run the experiment."""
    options = cli.parse(Options, "experiments.peers", peers.__doc__)
    options.check()
    require_packages()
    jax.config.update("jax_platforms", "cpu")  # leaves a GPU's memory to torch
    from experiments.peers import torch_steps

    record, gpu = environment(), torch_steps.gpu_kind()
    versions, device = record["versions"] | torch_steps.versions(), record["device"]
    if gpu is not None:
        device |= {"platform": "gpu", "kind": gpu, "count": 1}
    todo = workloads(options, gpu=gpu is not None)
    options.out.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(todo), disable=not sys.stderr.isatty(), unit="peer") as bar:

        def advance(name: str) -> None:
            bar.set_description(name)
            bar.update()

        found = measure(todo, options, advance)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(results_table(todo, found, device["kind"]))
    rows = [peer.row(m) for peer, m in zip(todo, found, strict=True)]
    write_csv(options.out / "peers.csv", rows)
    figures = figures_of(todo, found)
    write_metrics(options.out, "peers", options, figures, versions=versions, device=device)
    exit_on_failures(rows, "peers")
