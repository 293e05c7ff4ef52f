"""Compiles the GPU kernels, training steps and benchmarks for a GPU that need not be there.

    make gpu-check OUT=DIR
    make gpu-check OUT=DIR GPU=A100

Runs XLA, Mosaic or Triton, and ptxas on a description of the GPU, for about six minutes on two
cores: an H200 unless another is named, with the kernels that are its default unless
`--implementation` says otherwise. Fails where a program does not compile, a kernel spills more than
`--max-spilled-bytes` or takes more shared memory than the GPU has, or a program lacks a kernel that
it must launch. Prints registers, spills and shared memory of every kernel, and the memory of every
program.

Writes, last and atomically, `metrics.json` to DIR with these `figures`, whose values are an H200's:

* `{spt,lora,lora_best,full}_block_temp_bytes`: temporaries of the gradient of one OPT-2048 block's
  summed output on 16 sequences of 512 tokens in bfloat16. Dense attention is cuDNN's, LoRA is two
  skinny float32 products as in PEFT (742 MB), and the best of its forms, with bfloat16 products
  (473 MB); SPT takes 455 MB, full fine-tuning 470 MB;
* `spt_block_temp_bytes_by_length`: those of SPT on one sequence in a LLaMA-4096 block, and
  `spt_block_growth`, the largest ratio of its bytes a token at a length and at half of it: 1.02;
* `max_spilled_bytes`, of any kernel.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import json
import logging
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from rich.table import Table
from tqdm import tqdm

from spt_jax import cli

if TYPE_CHECKING:
    from pallas_kernels import Implementation
    from tools.gpu_cases import Case

#: Of one kernel. Mosaic: two accumulators of 64 x 128 beside the masks of token selection do not
#: quite fit the 240 registers of a thread (`sparse_attention_dkv`, 136 bytes); all but one other
#: spill none. Triton: float32 products at head width 128 (the same kernel, 256 bytes); in half
#: types none spills over 44.
MAX_SPILLED_BYTES = {"mosaic": 160, "triton": 256}
#: Where the same float32 kernel spills more (276 bytes).
MAX_SPILLED_BYTES_OF_GPU = {"RTX5090": 288}
#: The worker's log that an error shows.
LOG_CHARACTERS = 2000


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the check."""

    out: Path = Path("runs/gpu-check")
    """Folder for the results."""
    gpu: Literal["H200", "H100", "A100", "A10", "L4", "B200", "RTX5090"] = "H200"
    """The GPU to compile for."""
    implementation: Literal["mosaic", "triton"] | None = None
    """Kernels to compile; by default Mosaic's for Hopper and Triton's for other GPUs."""
    only: str = ""
    """Regular expression for the names of the programs to compile; figures need their programs."""
    all_lengths: bool = False
    """Compile the benchmarks at all lengths and densities of their sweep, not at its ends only."""
    max_spilled_bytes: int | None = None
    """Most bytes of registers that a kernel may spill; by default 160 of Mosaic, 256 of Triton."""
    processes: int = min(4, os.cpu_count() or 1)
    """Programs compiled at the same time."""
    list: bool = False
    """Print the names of the programs and stop."""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """What ptxas and Mosaic or Triton say of a kernel, the most of its variants in one program.

    Attributes:
      name: the kernel.
      registers: of a thread.
      spilled_bytes: of a thread, written or read.
      shared_bytes: of a thread block, barriers left out.
      compile_ms: of ptxas.
    """

    name: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    compile_ms: float


_ENTRY = re.compile(r"Compiling entry function '(\w+?)(?:(?:_mosaic_gpu)?_kernel)?' for")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_COMPILE_TIME = re.compile(r"Compile time = ([\d.]+) ms")
_SHARED = re.compile(r"smem_scratch_bytes=(\d+)")
_TRITON_SHARED = re.compile(r"(\w+)_kernel: shared_mem_bytes: (\d+)")


def parse_ptxas(text: str, shared_bytes: Mapping[str, int]) -> list[Kernel]:
    """Reads what ptxas printed, for one kernel after the other.

    Args:
      text: its output.
      shared_bytes: shared memory of each kernel.

    Raises:
      ValueError: a kernel's numbers are missing.
    """
    _, *parts = _ENTRY.split(text)
    kernels = []
    for name, part in zip(parts[::2], parts[1::2], strict=True):
        found = [pattern.search(part) for pattern in (_SPILLS, _REGISTERS, _COMPILE_TIME)]
        if None in found:
            raise ValueError(f"{name}: ptxas printed no registers, spills or time: {part[:200]!r}")
        spills, registers, ms = (tuple(map(float, m.groups())) for m in found if m is not None)
        kernels.append(
            Kernel(
                name=name,
                registers=int(registers[0]),
                spilled_bytes=int(max(spills)),
                shared_bytes=shared_bytes[name],
                compile_ms=ms[0],
            )
        )
    return _worst(kernels)


def read_shared_bytes(folder: Path) -> dict[str, int]:
    """Shared memory of the kernels that were lowered while Mosaic dumped to a folder."""
    shared: dict[str, int] = {}
    for path in folder.glob("*.resources.txt"):
        name = re.sub(r"_\d+\.resources$", "", path.stem)
        found = _SHARED.search(path.read_text())
        if found is None:
            raise ValueError(f"{path.name} names no shared memory")
        shared[name] = max(int(found[1]), shared.get(name, 0))
    return shared


def assemble_triton(folder: Path, architecture: str) -> list[Kernel]:
    """Assembles the kernels that jax-triton dumped to a folder, and forgets them.

    Args:
      folder: Of a folder a kernel.
      architecture: To assemble for, as ptxas names it.
    """
    import triton

    found: list[Kernel] = []
    for dump in folder.iterdir():
        (info,), (ptx,) = dump.glob("*.compile_info"), dump.glob("*.ptx")
        shared = _TRITON_SHARED.search(info.read_text())
        if shared is None:
            raise ValueError(f"{info.name} names no shared memory")
        command = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name", architecture, str(ptx)]
        printed = subprocess.run(
            [*command, "-o", os.devnull], capture_output=True, text=True, check=True
        )
        found += parse_ptxas(printed.stdout + printed.stderr, {shared[1]: int(shared[2])})
        shutil.rmtree(dump)
    return _worst(found)


def _worst(kernels: Iterable[Kernel]) -> list[Kernel]:
    """One of each name, with the most of everything."""
    found: dict[str, Kernel] = {}
    for kernel in kernels:
        old = found.get(kernel.name, kernel)
        most = {
            field: max(getattr(old, field), getattr(kernel, field))
            for field in ("registers", "spilled_bytes", "shared_bytes", "compile_ms")
        }
        found[kernel.name] = dataclasses.replace(kernel, **most)
    return list(found.values())


@dataclass(frozen=True, kw_only=True)
class Report:
    """What came of compiling one program.

    Attributes:
      name: the program.
      seconds: tracing, lowering and compiling.
      temp_bytes: its temporaries.
      peak_bytes: arguments, results and temporaries at their peak.
      launches: kernels that it launches, by name; a loop's body counts once.
      kernels: those that no earlier program of the process had compiled.
      error: why it could not be compiled.
    """

    name: str
    seconds: float = 0.0
    temp_bytes: int = 0
    peak_bytes: int = 0
    launches: Mapping[str, int] = dataclasses.field(default_factory=dict)
    kernels: tuple[Kernel, ...] = ()
    error: str | None = None

    def to_json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Report:
        """Undoes `to_json`."""
        fields = json.loads(line)
        fields["kernels"] = tuple(Kernel(**kernel) for kernel in fields["kernels"])
        return cls(**fields)


def missing_launches(expected: Iterable[str], launches: Iterable[str]) -> list[str]:
    """The kernels that were expected and are not launched; `*` stands for anything."""
    found = list(launches)
    return [name for name in expected if not any(fnmatch(kernel, name) for kernel in found)]


def problems(
    reports: Iterable[Report],
    expected: Mapping[str, tuple[str, ...]],
    max_spilled_bytes: int,
    max_shared_bytes: int,
) -> list[str]:
    """What is wrong, a line each.

    Args:
      reports: of all programs.
      expected: kernels that each must launch.
      max_spilled_bytes: what a kernel may spill.
      max_shared_bytes: shared memory that a thread block of the GPU can have.
    """
    found = []
    for report in reports:
        if report.error is not None:
            found.append(f"{report.name}: {report.error}")
            continue
        for name in missing_launches(expected[report.name], report.launches):
            instead = ", ".join(sorted(report.launches)) or "none"
            found.append(f"{report.name}: launches no {name}; its kernels: {instead}")
        found += [
            f"{report.name}: {kernel.name} spills {kernel.spilled_bytes} bytes, more than the "
            f"{max_spilled_bytes} allowed"
            for kernel in report.kernels
            if kernel.spilled_bytes > max_spilled_bytes
        ]
        found += [
            f"{report.name}: {kernel.name} takes {kernel.shared_bytes} bytes of shared memory, "
            f"more than the {max_shared_bytes} that there are"
            for kernel in report.kernels
            if kernel.shared_bytes > max_shared_bytes
        ]
    return found


def growth(temp_bytes_by_length: Mapping[int, int]) -> float:
    """Largest ratio of the bytes a token at one length to those at the next shorter one."""
    rates = [temp_bytes_by_length[n] / n for n in sorted(temp_bytes_by_length)]
    return max(b / a for a, b in itertools.pairwise(rates))


def figures_of(
    reports: Mapping[str, Report],
    figure_names: Mapping[str, str],
    length_cases: Mapping[int, str],
) -> dict[str, Any]:
    """The figures, of programs that were compiled.

    Args:
      reports: by name.
      figure_names: the figure that holds a program's temporaries.
      length_cases: the program for each length of the growth figure.
    """
    done = {name: report for name, report in reports.items() if report.error is None}
    figures: dict[str, Any] = {
        figure: done[name].temp_bytes for name, figure in figure_names.items() if name in done
    }
    lora = [v for name, v in figures.items() if name.startswith("lora_")]
    if lora:
        figures["lora_best_block_temp_bytes"] = min(lora)
    by_length = {n: done[name].temp_bytes for n, name in length_cases.items() if name in done}
    if len(by_length) > 1:
        figures["spt_block_temp_bytes_by_length"] = {str(n): b for n, b in by_length.items()}
        figures["spt_block_growth"] = growth(by_length)
    kernels = {kernel for report in reports.values() for kernel in report.kernels}
    figures["max_spilled_bytes"] = max((k.spilled_bytes for k in kernels), default=0)
    return figures


def _work(gpu: str, implementation: Implementation | None, all_lengths: bool) -> None:
    """Compiles the programs named on standard input, a line each; writes a report for each.

    What the compilers print goes to standard error, but for ptxas, whose words are read.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryDirectory() as dumps:
        os.dup2(printed.fileno(), 1)
        os.environ["JAX_TRITON_DUMP_DIR"] = dumps  # read when jax-triton is imported
        from experiments.gpu_targets import GPUS, described_device
        from tools import gpu_cases

        cases = gpu_cases.cases(all_lengths=all_lengths, implementation=implementation)
        device = described_device(GPUS[gpu])
        for line in sys.stdin:
            printed.truncate(0)
            report = _compile(
                cases[line.strip()], device, GPUS[gpu].architecture, printed, Path(dumps)
            )
            answers.write(report.to_json() + "\n")


def _compile(
    case: Case, device: Any, architecture: str, printed: IO[str], triton_dumps: Path
) -> Report:
    """Compiles one program; what is printed meanwhile goes to a file."""
    import jax

    from experiments.gpu_targets import kernel_launches, trace_for

    start = time.perf_counter()
    try:
        with jax.default_device(device), tempfile.TemporaryDirectory() as folder:
            function, arguments = case.program()
            traced = trace_for(device, function, *arguments)
            os.environ["MOSAIC_GPU_DUMP_TO"] = folder  # resources, under the kernels' names
            lowered = traced.lower()
            shared_bytes = read_shared_bytes(Path(folder))
            del os.environ["MOSAIC_GPU_DUMP_TO"]  # would make the compiler dump all it has
            os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
            compiled = lowered.compile()
            del os.environ["MOSAIC_GPU_DUMP_PTXAS"]
        ctypes.CDLL(None).fflush(None)
        printed.seek(0)
        kernels = parse_ptxas(printed.read(), shared_bytes)
        kernels += assemble_triton(triton_dumps, architecture)
        memory: Any = compiled.memory_analysis()
        return Report(
            name=case.name,
            seconds=time.perf_counter() - start,
            temp_bytes=memory.temp_size_in_bytes,
            peak_bytes=memory.peak_memory_in_bytes,
            launches=dict(kernel_launches(compiled.as_text() or "")),
            kernels=tuple(kernels),
        )
    except Exception as error:
        text = " ".join(str(error).split())
        return Report(name=case.name, error=f"{type(error).__name__}: {text[:LOG_CHARACTERS]}")


class _Worker:
    """A process that compiles one program after another."""

    def __init__(self, *options: Any) -> None:
        self.log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"from tools import gpu_check as g; g._work(*{options!r})",
            ],
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    def compile(self, name: str) -> Report:
        """The report on one program; an error if the process dies of it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(name + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            return Report.from_json(line)
        code = self.process.wait()
        self.log.seek(0)
        log = " ".join(self.log.read().split())[-LOG_CHARACTERS:]
        return Report(name=name, error=f"the compiler ended with code {code}: {log}")

    @property
    def alive(self) -> bool:
        """Whether it can compile another program."""
        return self.process.poll() is None

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


def compile_all(
    names: Iterable[str], processes: int, advance: Callable[[str], None], *options: Any
) -> dict[str, Report]:
    """Compiles programs in several processes, with `_work`'s options; the reports by name."""
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    order = list(names)
    for name in order:
        waiting.put(name)
    reports: dict[str, Report] = {}

    def serve() -> None:
        worker = _Worker(*options)
        while True:
            try:
                name = waiting.get_nowait()
            except queue.Empty:
                break
            reports[name] = worker.compile(name)
            advance(name)
            if not worker.alive:
                worker = _Worker(*options)
        worker.close()

    threads = [threading.Thread(target=serve) for _ in range(min(processes, len(order)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {name: reports[name] for name in order}


def _kernel_table(reports: Iterable[Report]) -> Table:
    """One row for each different outcome of a kernel."""
    table = Table(title="kernels")
    table.add_column("kernel")
    table.add_column("first in")
    for column in ("registers", "spilled bytes", "shared bytes", "ptxas ms"):
        table.add_column(column, justify="right")
    seen: dict[tuple[Any, ...], tuple[Kernel, str]] = {}
    for report in reports:
        for k in report.kernels:
            key = (k.name, k.registers, k.spilled_bytes, k.shared_bytes)
            seen.setdefault(key, (k, report.name))
    for key in sorted(seen):
        kernel, first = seen[key]
        table.add_row(kernel.name, first, *map(str, key[1:]), f"{kernel.compile_ms:.0f}")
    return table


def _program_table(reports: Iterable[Report]) -> Table:
    table = Table(title="programs")
    table.add_column("program")
    for column in ("temporaries MB", "peak MB", "kernels launched", "seconds"):
        table.add_column(column, justify="right")
    for report in reports:
        if report.error is not None:
            table.add_row(report.name, "failed")
            continue
        table.add_row(
            report.name,
            f"{report.temp_bytes / 1e6:.1f}",
            f"{report.peak_bytes / 1e6:.1f}",
            str(sum(report.launches.values())),
            f"{report.seconds:.1f}",
        )
    return table


def main() -> None:
    """Compile the programs, print what they take, and judge it."""
    options = cli.parse(Options, "tools.gpu_check", __doc__)
    os.environ["JAX_PLATFORMS"] = "cpu"
    # JAX says that the GPU packages are not enough to run on a GPU
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.CRITICAL)
    from experiments.gpu_targets import GPUS
    from spt_jax.training import environment, write_json_atomic
    from tools import gpu_cases

    implementation = options.implementation
    if implementation is None and GPUS[options.gpu].capability[0] != 9:
        implementation = "triton"
    max_spilled_bytes = options.max_spilled_bytes
    if max_spilled_bytes is None:
        most = MAX_SPILLED_BYTES[implementation or "mosaic"]
        max_spilled_bytes = MAX_SPILLED_BYTES_OF_GPU.get(options.gpu, most)
    every = gpu_cases.cases(all_lengths=options.all_lengths, implementation=implementation)
    cases = {name: case for name, case in every.items() if re.search(options.only, name)}
    if not cases:
        raise ValueError(f"--only {options.only!r} matches no program; see --list")
    if options.list:
        print("\n".join(cases))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(cases), disable=not sys.stderr.isatty(), unit="program") as progress:

        def advance(name: str) -> None:
            progress.set_description(name)
            progress.update()

        reports = compile_all(
            cases, options.processes, advance, options.gpu, implementation, options.all_lengths
        )
    console = cli.console(140)
    console.print(_kernel_table(reports.values()))
    console.print(_program_table(reports.values()))
    figures = figures_of(
        reports,
        {name: case.figure for name, case in cases.items() if case.figure is not None},
        {n: gpu_cases.GROWTH_CASE.format(n) for n in gpu_cases.GROWTH_LENGTHS},
    )
    table = Table(title="figures")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in figures.items():
        for key, number in value.items() if isinstance(value, dict) else (("", value),):
            table.add_row(
                f"{name} {key}", f"{number:.3f}" if isinstance(number, float) else f"{number:,}"
            )
    console.print(table)
    write_json_atomic(
        options.out / "metrics.json",
        {
            "experiment": "gpu_check",
            "configuration": dataclasses.asdict(options) | {"out": str(options.out)},
            **environment(),
            "figures": figures,
            "programs": {name: dataclasses.asdict(report) for name, report in reports.items()},
        },
    )
    wrong = problems(
        reports.values(),
        {name: case.launches for name, case in cases.items()},
        max_spilled_bytes,
        GPUS[options.gpu].block_shared_memory_bytes,
    )
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        checks = "1 check" if len(wrong) == 1 else f"{len(wrong)} checks"
        sys.exit(f"error: {checks} failed, the first: {wrong[0]}")


if __name__ == "__main__":
    cli.run(main)
