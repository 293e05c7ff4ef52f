"""Times the kernels against their dense equivalents.

    python -m experiments.kernels --device cpu --out DIR
    python -m experiments.kernels --device gpu --out DIR

Each comparison alternates the baselines and the candidates, and a speedup is the median over the
rounds of the ratio of their times, forward and backward together, over the fastest baseline. On two
CPU cores it takes about ten minutes; the routed FFN comes out at 1.8 times dense with half of its
blocks active and 3.3 with a quarter, sparse attention at 8.4 times dense, and SPT on four LLaMA
layers of 2048 tokens at 3.7 times LoRA.

On a GPU everything is bfloat16: the routed FFN at LLaMA's sizes against cuBLAS, a training step of
an OPT block, and causal attention of 256 to 65,536 tokens against cuDNN (and tokamax where it is
installed). With `--triton` every candidate runs a second time on the Triton kernels, which GPUs
before Hopper take anyway; the names of those figures end in `_triton`. Calls are queued until a
measurement lasts 50 ms. Beside each time stands the share of the device's limit that it reaches:
the longer of operations over peak and bytes over bandwidth, over the time, where the bytes are the
program's arguments and results. Plan a quarter of an hour.

Peak MB is what the compiler plans for forward and backward: arguments, results and temporaries
(`experiments.measurement`); `device_peak_bytes` is the high-water mark of the whole run on the
device.

Writes `kernels.csv`, plots, TensorBoard events and, last and atomically, `metrics.json` to DIR.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table
from tensorboardX import SummaryWriter
from tqdm import tqdm

from experiments import comparisons
from experiments.comparisons import Comparison, Method
from experiments.gpu_targets import kernel_launches
from experiments.measurement import (
    FAILURES,
    OUT_OF_MEMORY,
    PEAK,
    calls_for,
    device_peak_bytes,
    failure_of,
    in_threads,
    median_and_spread,
    peak_bytes,
    times_ms,
)
from experiments.reports import save_figure, write_csv
from pallas_kernels import autotune, why_not_triton
from spt_jax import cli
from spt_jax.training import environment, write_json_atomic

matplotlib.use("Agg")
from matplotlib import pyplot as plt


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the experiment."""

    device: Literal["cpu", "gpu"] = "cpu"
    """Platform that runs the kernels."""
    only: str | None = None
    """Comparisons to run, in order, separated by commas; by default all of the device's."""
    out: Path = Path("runs/kernels")
    """Folder for the results."""
    rounds: int = 7
    """Timed rounds of each comparison."""
    seed: int = 0
    """Seed of the random inputs."""
    triton: bool = False
    """On a GPU, also time the Triton kernels, the default on GPUs other than Hopper."""
    autotune: bool = False
    """Measure the kernels' tile sizes first, and keep the fastest for these shapes."""
    rehearse: bool = False
    """Go through what a GPU runs on a CPU, at tiny sizes, in plain JAX and, with --triton, in
    Triton's interpreter (TRITON_INTERPRET=1): nothing of it is a measurement."""

    @property
    def sizes(self) -> comparisons.GPUSizes:
        """Of what a GPU runs."""
        if not self.rehearse:
            return comparisons.GPUSizes()
        # Triton's interpreter computes bfloat16 wrongly.
        return replace(comparisons.REHEARSAL, dtype=jnp.float32 if self.triton else jnp.bfloat16)

    @property
    def platform(self) -> str:
        """Where it runs: with `rehearse` on a CPU."""
        return "cpu" if self.rehearse else self.device

    def check(self) -> None:
        """Raise a ValueError for any mistake in the options."""
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")
        for name in ("triton", "rehearse"):
            if getattr(self, name) and self.device != "gpu":
                raise ValueError(f"--{name}: it is of what a GPU runs; add --device gpu")

    def comparisons(self) -> list[Comparison]:
        """Those to run."""
        if self.device == "cpu":
            chosen = comparisons.cpu_comparisons()
        else:
            of_gpu = comparisons.with_triton if self.triton else comparisons.gpu_comparisons
            chosen = of_gpu(self.sizes)
        every = {comparison.name: comparison for comparison in chosen}
        if self.only is None:
            return list(every.values())
        return [every[name] for name in cli.known_names(self.only, every, what="--only")]


@dataclass(frozen=True)
class Limits:
    """What a device can do at most, as its maker states it."""

    operations_per_s: float  # dense, bfloat16
    bytes_per_s: float


#: By `device_kind`.
LIMITS = {
    "NVIDIA H200": Limits(989e12, 4.8e12),
    "NVIDIA H100 80GB HBM3": Limits(989e12, 3.35e12),
    "NVIDIA GH200 480GB": Limits(989e12, 4.0e12),
    "NVIDIA A100-SXM4-80GB": Limits(312e12, 2.039e12),
    "NVIDIA A100-SXM4-40GB": Limits(312e12, 1.555e12),
    "NVIDIA A10": Limits(125e12, 6e11),
    "NVIDIA L4": Limits(121e12, 3e11),
}
#: A measurement lasts at least this long: of one call on a CPU, of queued calls on a GPU.
MIN_MEASUREMENT_MS = {"cpu": 0.0, "gpu": 50.0}


@dataclass(frozen=True, kw_only=True)
class Program:
    """A compiled function with its arguments.

    Attributes:
      compiled: the function.
      arguments: what it is called with.
      operations: of its products, if they were counted.
      moved_bytes: its arguments and results.
      peak_bytes: as `experiments.measurement` has it.
      launches: kernels that it launches, by name.
    """

    compiled: Callable[..., Any]
    arguments: tuple[Any, ...]
    operations: float | None
    moved_bytes: int
    peak_bytes: int
    launches: dict[str, int]

    def call(self) -> Any:
        """Run it."""
        return self.compiled(*self.arguments)

    def limit_share(self, ms: float, device_kind: str) -> float | None:
        """Share of the device's limit that a time comes to; None where a number is missing."""
        limits = LIMITS.get(device_kind)
        if limits is None or self.operations is None:
            return None
        least_s = max(
            self.operations / limits.operations_per_s, self.moved_bytes / limits.bytes_per_s
        )
        return 1e3 * least_s / ms


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Times of one method by round, and its programs; or why there are none."""

    method: Method
    programs: tuple[Program, Program] | None = None  # forward, and forward with backward
    forward_ms: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    step_ms: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    failure: str | None = None

    @property
    def peak_bytes(self) -> int:
        """Of forward with backward."""
        return 0 if self.programs is None else self.programs[1].peak_bytes

    def figures(self) -> dict[str, Any]:
        """Medians, spreads (interquartile ranges), memory, and how near the limit they are."""
        if self.programs is None:
            return {"failure": self.failure}
        times = {
            "forward": self.forward_ms,
            "backward": self.step_ms - self.forward_ms,
            "step": self.step_ms,
        }
        figures: dict[str, Any] = {}
        for name, values in times.items():
            figures[f"{name}_ms"], figures[f"{name}_spread_ms"] = median_and_spread(values)
        figures["peak_bytes"] = self.peak_bytes
        kind = jax.devices()[0].device_kind
        for name, program in zip(("forward", "step"), self.programs, strict=True):
            figures[f"{name}_bytes"] = program.moved_bytes
            figures[f"{name}_launches"] = sum(program.launches.values())
            if program.operations is not None:
                figures[f"{name}_operations"] = program.operations
            share = program.limit_share(figures[f"{name}_ms"], kind)
            if share is not None:
                figures[f"{name}_limit_share"] = share
        return figures


def step_function(method: Method) -> Callable[[Any, Any, Any], Any]:
    """`step(trained, frozen, cotangent)`: the result of a method and its gradient in `trained`.

    As in a model, the cotangent is there only once the result is.
    """

    def step(trained: Any, frozen: Any, cotangent: Any) -> Any:
        y, pullback = jax.vjp(lambda t: method.function(t, frozen), trained)
        y, cotangent = jax.lax.optimization_barrier((y, cotangent))
        return y, pullback(cotangent)

    return step


def _program(function: Callable[..., Any], arguments: Any, operations: float | None) -> Program:
    compiled = jax.jit(function).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    if memory is None:
        raise NotImplementedError("this platform reports no memory use of compiled programs")
    return Program(
        compiled=compiled,
        arguments=arguments,
        operations=operations,
        moved_bytes=memory.argument_size_in_bytes + memory.output_size_in_bytes,
        peak_bytes=peak_bytes(compiled),
        launches=dict(kernel_launches(compiled.as_text() or "")),
    )


def _step(method: Method, arguments: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Forward with backward, and its arguments; forward where nothing is differentiated."""
    if not jax.tree.leaves(arguments[0]):
        return method.function, arguments
    result = jax.eval_shape(method.function, *arguments)
    cotangent = jax.tree.map(lambda y: jnp.ones(y.shape, y.dtype), result)
    return step_function(method), (*arguments, cotangent)


def _arguments(method: Method, key: jax.Array) -> Any:
    return (method.arguments if method.eager else jax.jit(method.arguments))(key)


def _on_others(programs: tuple[Program, Program], method: Method, key: jax.Array) -> Any:
    """The programs with the arguments of a method of the same shapes."""
    arguments = _arguments(method, key)
    forward, step = programs
    others = replace(forward, arguments=arguments)
    if step is forward:
        return others, others
    return others, replace(step, arguments=(*arguments, *step.arguments[len(arguments) :]))


def _compile(method: Method, key: jax.Array) -> tuple[Program, Program]:
    """The forward pass, and forward with backward; the same where nothing is differentiated."""
    arguments = _arguments(method, key)
    forward_operations, step_operations = method.operations or (None, None)
    forward = _program(method.function, arguments, forward_operations)
    step, step_arguments = _step(method, arguments)
    if step is method.function:
        return forward, forward
    return forward, _program(step, step_arguments, step_operations)


def _tune(method: Method, key: jax.Array) -> None:
    """Measures tile sizes for the kernels of a method."""

    def report(line: str) -> None:
        tqdm.write(line, file=sys.stderr)

    try:
        step, arguments = _step(method, _arguments(method, key))
        autotune(step, *arguments, report=report)
    except FAILURES as error:
        report(f"{method.name} keeps its tile sizes: {failure_of(error)}")


def measure(
    comparison: Comparison,
    key: jax.Array,
    rounds: int,
    least_ms: float,
    advance: Callable[[], Any],
    tune: bool = False,
) -> dict[str, Measurement]:
    """Times baselines and candidates in turn, round by round; the first round is not kept.

    A method that fails is left out of the rounds, and its measurement says why. With `tune`, tile
    sizes are measured before.

    Returns:
      Measurements by the names of `comparison.baselines` and `comparison.candidates`.
    """
    methods = comparison.baselines | comparison.candidates
    done: dict[str, Measurement] = {}
    ready: dict[str, tuple[Program, Program, int, int]] = {}

    def compiled(method: Method) -> tuple[Program, Program] | str:
        try:
            return _compile(method, key)
        except FAILURES as error:
            return failure_of(error)

    own = {name: method for name, method in methods.items() if method.program_of is None}
    if tune:
        for method in own.values():
            if method.kernels:
                _tune(method, key)
    # All are compiled before any runs: compilation would slow the calls that are timed.
    results = in_threads(compiled, list(own.values()))
    programs = {name: found for name, (_, found) in zip(own, results, strict=True)}
    for name, method in methods.items():
        found = programs[method.program_of or name]
        if method.program_of is not None and not isinstance(found, str):
            found = _on_others(found, method, key)
        if isinstance(found, str):
            done[name] = Measurement(method=method, failure=found)
            continue
        forward, step = found
        try:
            calls = calls_for(forward.call, least_ms), calls_for(step.call, least_ms)
        except FAILURES as error:
            done[name] = Measurement(method=method, failure=failure_of(error))
        else:
            ready[name] = (forward, step, *calls)
    times = {name: np.zeros((rounds + 1, 2)) for name in ready}
    for i in range(rounds + 1):
        for name, (forward, step, forward_calls, step_calls) in ready.items():
            (forward_ms,) = times_ms(forward.call, 1, calls=forward_calls)
            step_ms = forward_ms
            if step is not forward:
                (step_ms,) = times_ms(step.call, 1, calls=step_calls, warm_up=False)
            times[name][i] = forward_ms, step_ms
        advance()
    for name, (forward, step, *_) in ready.items():
        kept = times[name][1:]
        done[name] = Measurement(
            method=methods[name],
            programs=(forward, step),
            forward_ms=kept[:, 0],
            step_ms=kept[:, 1],
        )
    return {name: done[name] for name in methods}


def compare(
    comparison: Comparison, measured: dict[str, Measurement]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures by name, and a row of the table for every method."""
    baselines = {name: measured[name] for name in comparison.baselines}
    usable = {name: m for name, m in baselines.items() if m.failure is None}
    figures: dict[str, Any] = {}
    rows = []

    def fastest(what: str) -> Measurement | None:
        return min(usable.values(), key=lambda m: np.median(getattr(m, what)), default=None)

    def ratio(over: Measurement | None, candidate: Measurement, what: str) -> float | None:
        if over is None or candidate.failure is not None:
            return None
        return float(np.median(getattr(over, what) / getattr(candidate, what)))

    best, best_forward = fastest("step_ms"), fastest("forward_ms")
    for name, measurement in measured.items():
        mine = measurement.figures()
        speedup = ratio(best, measurement, "step_ms")
        full_name = f"{comparison.name}_{name}" if name in baselines else name
        figures[full_name] = mine
        rows.append(
            {
                "comparison": comparison.name,
                "shape": comparison.shape,
                "length": comparison.length,
                "density": comparison.density.get(name),
                "baseline": name in baselines,
                "name": full_name,
                "method": measurement.method.name,
                **mine,
                "speedup": speedup,
            }
        )
        if name in baselines or speedup is None or best is None:
            continue
        figures[f"{name}_speedup"] = speedup
        figures[f"{name}_forward_speedup"] = ratio(best_forward, measurement, "forward_ms")
        figures[f"{name}_peak_ratio"] = measurement.peak_bytes / best.peak_bytes
        for suffix, over in usable.items() if len(baselines) > 1 else ():
            figures[f"{name}_speedup_over_{suffix}"] = ratio(over, measurement, "step_ms")
            figures[f"{name}_peak_ratio_over_{suffix}"] = measurement.peak_bytes / over.peak_bytes
    return figures, rows


def run(options: Options) -> tuple[dict[str, Any], list[str]]:
    """Runs all comparisons of the device.

    Returns:
      The figures, and what failed though nothing but memory and optional packages may be missing.
    """
    figures: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    chosen = options.comparisons()
    keys = jax.random.split(jax.random.key(options.seed), len(chosen))
    total = len(chosen) * (options.rounds + 1)
    with tqdm(total=total, disable=not sys.stderr.isatty(), unit="round") as progress:
        for comparison, key in zip(chosen, keys, strict=True):
            progress.set_description(comparison.name)
            least_ms = MIN_MEASUREMENT_MS[options.platform]
            measured = measure(
                comparison, key, options.rounds, least_ms, progress.update, options.autotune
            )
            more, new_rows = compare(comparison, measured)
            figures |= more
            rows += new_rows
            failures += [
                f"{comparison.name}, {m.method.name}: {m.failure}"
                for m in measured.values()
                if m.failure not in (None, OUT_OF_MEMORY) and not m.method.optional
            ]
            write_csv(options.out / "kernels.csv", rows)
    _print(rows, options.rounds)
    _plot(options.out / "kernels.png", rows)
    if any(row["length"] is not None for row in rows):
        _plot_sweep(options.out / "attention.png", rows)
    if options.platform == "gpu":
        _plot_limits(options.out / "limits.png", rows)
    return figures, failures


def _print(rows: list[dict[str, Any]], rounds: int) -> None:
    limits = any("step_limit_share" in row for row in rows)
    table = Table(title=f"{jax.devices()[0].device_kind}, medians of {rounds} rounds", caption=PEAK)
    for column in ("comparison", "shape", "method"):
        table.add_column(column)
    numbers = ["forward ms", "backward ms", "step ms", "spread ms", "peak MB", "speedup"]
    if limits:
        numbers += ["TFLOP", "GB", "forward of limit", "step of limit"]
    for column in numbers:
        table.add_column(column, justify="right")

    def number(row: dict[str, Any], name: str, form: str, factor: float = 1) -> str:
        return "" if row.get(name) is None else format(factor * row[name], form)

    for row in rows:
        cells = [row["comparison"], row["shape"], row["method"]]
        if "failure" in row:
            table.add_row(*cells, row["failure"])
            continue
        precision = ".3f" if limits else ".1f"
        cells += [number(row, f"{k}_ms", precision) for k in ("forward", "backward", "step")]
        cells += [
            number(row, "step_spread_ms", precision),
            number(row, "peak_bytes", ".1f", 1e-6),
            number(row, "speedup", ".2f"),
        ]
        if limits:
            cells += [
                number(row, "step_operations", ".2f", 1e-12),
                number(row, "step_bytes", ".2f", 1e-9),
                number(row, "forward_limit_share", ".0%"),
                number(row, "step_limit_share", ".0%"),
            ]
        table.add_row(*cells)
    width = 220 if limits else 160
    Console(width=None if sys.stdout.isatty() else width).print(table)


def _plot(path: Path, rows: list[dict[str, Any]]) -> None:
    rows = [row for row in rows if not row["baseline"] and row["speedup"] is not None]
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(rows) + 1.5), layout="constrained")
    names, speedups = [row["name"] for row in rows], [row["speedup"] for row in rows]
    axes.bar_label(axes.barh(names, speedups), fmt="%.2f", padding=3)
    axes.axvline(1, color="black", linewidth=1, linestyle="--")
    axes.invert_yaxis()
    axes.set_xlabel("speedup over the fastest dense form, forward and backward")
    save_figure(figure, path)


def _plot_sweep(path: Path, rows: list[dict[str, Any]]) -> None:
    """Time a token over the length of the sequence, dense and for each density."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["length"] is not None and "failure" not in row:
            lines.setdefault(row["method"], []).append((row["length"], row["step_ms"]))
    for name, points in lines.items():
        style = "--" if name.startswith("dense") else "-"
        axes.plot(*zip(*points, strict=True), style, marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens of a sequence")
    axes.set_ylabel("ms, forward and backward")
    axes.legend()
    save_figure(figure, path)


def _plot_limits(path: Path, rows: list[dict[str, Any]]) -> None:
    """How near to the device's limit every method comes."""
    rows = [row for row in rows if "step_limit_share" in row]
    figure, axes = plt.subplots(figsize=(8, 0.3 * len(rows) + 1.5), layout="constrained")
    names = [row["name"] for row in rows]
    shares = [100 * row["step_limit_share"] for row in rows]
    axes.bar_label(axes.barh(names, shares), fmt="%.0f", padding=3)
    axes.invert_yaxis()
    axes.set_xlabel("% of the limit, forward and backward")
    save_figure(figure, path)


def _require(device: str) -> None:
    """Makes JAX use a platform, and says so where it is not there."""
    jax.config.update("jax_platforms", {"cpu": "cpu", "gpu": "cuda"}[device])
    try:
        jax.devices()
    except RuntimeError as error:
        raise ValueError(
            f"--device {device}: JAX finds no such device; for a GPU install spt-jax[cuda13] "
            f"({' '.join(str(error).split())})"
        ) from None


def main() -> None:
    """Run the comparisons of a device."""
    options = cli.parse(Options, "experiments.kernels", __doc__)
    options.check()
    _require(options.platform)
    if options.triton and (reason := why_not_triton(options.sizes.dtype)) is not None:
        raise ValueError(f"--triton: {reason}")
    options.out.mkdir(parents=True, exist_ok=True)
    figures, failures = run(options)
    with SummaryWriter(str(options.out)) as writer:
        for name, value in figures.items():
            for key, number in value.items() if isinstance(value, dict) else (("", value),):
                if isinstance(number, int | float):
                    writer.add_scalar(f"{name}/{key}" if key else name, number, 0)
    if (peak := device_peak_bytes()) is not None:
        figures["device_peak_bytes"] = peak
    write_json_atomic(
        options.out / "metrics.json",
        {
            "experiment": "kernels",
            "configuration": dataclasses.asdict(options) | {"out": str(options.out)},
            "seed": options.seed,
            **environment(),
            "figures": figures,
        },
    )
    if failures:
        sys.exit(f"error: {len(failures)} methods failed, the first: {failures[0]}")


if __name__ == "__main__":
    cli.run(main)
