"""Time and memory of a training step of one Transformer block, or of a whole model.

    python -m experiments.profile --block opt-2048 --out DIR
    python -m experiments.profile --block bert-large,opt-2048,llama-4096 --remat both --out DIR
    python -m experiments.profile --block opt-2048 --seq-len 512,2048,8192 --target H200 --out DIR
    python -m experiments.profile --block llama-4096 --max-length --target H200 --out DIR

A step is forward, backward and AdamW, with donated buffers and random weights, in bfloat16 on a GPU
and float32 on a CPU; the gradient of a block's output is its square. Of a whole model (--module
model) it is the product's own, `spt_jax.training.train_step`, without dropout. Full fine-tuning
keeps float32 master weights; LoRA and SPT keep frozen weights in the compute dtype and train
float32 factors. The dense baselines are the strongest at hand: cuDNN's attention on a GPU, and
every form of LoRA that --lora-form names.

Methods take turns, so that a machine that changes its speed changes it for all. On a device that
reports its peak of memory a method is alone while it runs; elsewhere all keep their arrays until
the last turn. A table shows medians and, in brackets, the interquartile range; the compiler's peak
of memory (`experiments.measurement`: arguments, results and temporaries) and the device's where it
reports one that the step set; how many times as fast as full fine-tuning and as the fastest form of
LoRA a step is, and how many the number of operations allows. With --target it compiles for a GPU
that is not there and shows memory alone. Writes profile.csv, plots and, last, metrics.json under
--out.

With --batch-size 2 --seq-len 256 the first command takes under three minutes on 2 cores of an EPYC
with AVX2. SPT's block comes out 1.2 times as fast as LoRA's and 1.8 times as full fine-tuning's.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from rich.table import Table
from tqdm import tqdm

from experiments.blocks import (
    BlockMethod,
    BlockStep,
    LoRAForm,
    ModelStep,
)
from experiments.gpu_targets import GPUS, described_device, trace_for
from experiments.measurement import (
    FAILURES,
    OUT_OF_MEMORY,
    PEAK,
    device_peak_bytes,
    failure_of,
    in_threads,
    median_and_spread,
    peak_bytes,
    times_ms,
)
from experiments.methods import write_metrics
from experiments.reports import save_figure, write_csv
from spt_jax import cli
from spt_jax.config import MeshConfig, RoutedFFNConfig, SparseAttentionConfig
from spt_jax.models.config import ModelConfig
from spt_jax.models.presets import PRESETS, one_layer, with_positions
from spt_jax.sharding import Devices, make_mesh, parse_mesh

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Module = Literal["mha", "ffn", "block", "model"]
MODULES: tuple[Module, ...] = get_args(Module)
METHODS: tuple[BlockMethod, ...] = get_args(BlockMethod)
LORA_FORMS: tuple[LoRAForm, ...] = get_args(LoRAForm)

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
#: Share of a device's memory that XLA's allocator is given.
USABLE = 0.9
#: The longest sequence is found to within this share of it.
LENGTH_PRECISION = 1 / 16
MAX_LENGTH = 1 << 24


Choice = Literal["no", "yes", "both"]
CHOICES: Mapping[Choice, tuple[bool, ...]] = {"no": (False,), "yes": (True,), "both": (False, True)}


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """Which steps are measured, by whatever takes them."""

    block: str = "opt-2048"
    """Blocks, separated by commas: bert-large, opt-1024, opt-2048, opt-2560, llama-2560,
    llama-4096, llama3-8b, tiny-llama."""
    batch_size: str = "16"
    """Sequences of a step; several, separated by commas, for a sweep."""
    seq_len: str = "512"
    """Tokens of a sequence; several, separated by commas, for a sweep."""
    remat: Choice = "no"
    """Whether a block's activations are computed again in the backward pass."""
    steps: int = 20
    """Timed steps of each method."""
    seed: int = 0
    """Seed of the random weights and inputs."""


@dataclass(frozen=True, kw_only=True)
class Options(StepOptions):
    """Options of the experiment."""

    module: str = "mha,ffn,block"
    """What of them, separated by commas: mha, ffn, block, model."""
    method: str = "full,lora,spt"
    """Methods, separated by commas: full, lora, spt."""
    density: str = "0.125"
    """Share of the keys that SPT keeps; several, separated by commas, for a sweep."""
    granularity: Literal["auto", "token", "tile", "dense"] = "auto"
    """Which keys those are; auto keeps all of them up to 1,024 tokens."""
    active_blocks: str = "2"
    """FFN blocks that a token of SPT computes; several, separated by commas, for a sweep."""
    num_blocks: int = 4
    """Blocks of SPT's FFN."""
    spt_ffn: Literal["routed", "dense"] = "routed"
    """SPT's FFN; dense leaves it as LoRA's, so that attention alone is sparse."""
    lora_form: str = "auto"
    """How LoRA takes its products, separated by commas: auto (what the library chooses), merged,
    factored, skinny, skinny_float32 (as PEFT does)."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Compute dtype; by default bfloat16 on a GPU, float32 on a CPU."""
    rounds: int = 4
    """Turns in which they are taken, at least one step in each."""
    target: str | None = None
    """Compile for a described GPU, H200 or H100, and run nothing."""
    max_length: bool = False
    """Find the longest sequence whose step fits the memory, in place of timing --seq-len."""
    memory_gb: float | None = None
    """Memory for --max-length, 10^9 bytes; by default 90% of the device's."""
    mesh: str | None = None
    """Devices that take the step together, such as data=4 or fsdp=4,tensor=2; memory is that of
    one of them."""
    out: Path = Path("runs/profile")
    """Folder for the table, plots and metrics.json."""

    def check(self) -> None:
        """Raise a ValueError for any mistake in the options."""
        for name, known in (("block", PRESETS), ("module", MODULES), ("method", METHODS)):
            cli.known_names(getattr(self, name), known, what=f"--{name}")
        cli.known_names(self.lora_form, ("auto", *LORA_FORMS), what="--lora-form")
        if self.target is not None and self.target not in GPUS:
            raise ValueError(f"unknown --target {self.target}; choose from {', '.join(GPUS)}")
        for name in ("steps", "rounds", "num_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
        if self.mesh is not None:
            if self.target is not None or self.max_length:
                raise ValueError("--mesh is of devices at hand: leave out --target, --max-length")
            make_mesh(parse_mesh(self.mesh))
        if self.memory_gb is not None and not self.max_length:
            raise ValueError("--memory-gb is what --max-length looks for a fit in")
        for work in workloads(self):
            hidden = work.step.config.hidden
            if work.step.method == "spt" and work.step.ffn and hidden % self.num_blocks:
                raise ValueError(
                    f"{hidden} hidden units do not split into --num-blocks {self.num_blocks}"
                )


def _numbers[Number: (int, float)](option: str, text: str, kind: type[Number]) -> list[Number]:
    try:
        numbers = [kind(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} takes numbers separated by commas, got {text!r}") from None
    for number in numbers:
        if not (math.isfinite(number) and number > 0):
            raise ValueError(f"{option} takes numbers above 0, got {number:g}")
    return numbers


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is measured: one method on one module of one block.

    Attributes:
        block: its name.
        module: what of it.
        step: the training step.
    """

    block: str
    module: Module
    step: BlockStep

    @property
    def name(self) -> str:
        """The method, as tables show it."""
        words: list[str] = [self.step.method]
        if self.step.method == "lora" and self.step.lora_form is not None:
            words.append(self.step.lora_form)
        return " ".join(words + ["remat"] * self.step.remat)

    @property
    def label(self) -> str:
        """The method, and of SPT its density and active blocks."""
        step = self.step
        if step.method != "spt":
            return self.name
        ffn = f"{step.ffn.active_blocks}/{step.ffn.num_blocks}" if step.ffn else "dense"
        return f"{self.name} {step.attention.density:g}, {ffn}"

    @property
    def comparison(self) -> tuple[Any, ...]:
        """The same for works that are compared: all but the method and what belongs to it."""
        step = self.step
        return self.block, self.module, step.batch, step.length, step.remat

    def columns(self) -> dict[str, Any]:
        """What it is; for the table."""
        step, spt = self.step, self.step.method == "spt"
        return {
            "block": self.block,
            "module": self.module,
            "method": step.method,
            "lora_form": (step.lora_form or "auto") if step.method == "lora" else None,
            "remat": step.remat,
            "batch_size": step.batch,
            "seq_len": step.length,
            "density": step.attention.density if spt else None,
            "num_blocks": step.ffn.num_blocks if spt and step.ffn else None,
            "active_blocks": step.ffn.active_blocks if spt and step.ffn else None,
            "dtype": jnp.dtype(step.dtype).name,
        }


def workloads(options: Options, *, gpu: bool = False) -> list[Work]:
    """All that the options ask for, in the order of the table."""
    dtype = DTYPES[options.dtype or ("bfloat16" if gpu else "float32")]
    sizes = itertools.product(
        cli.known_names(options.block, PRESETS, what="--block"),
        _numbers("--batch-size", options.batch_size, int),
        _numbers("--seq-len", options.seq_len, int),
        cli.known_names(options.module, MODULES, what="--module"),
        CHOICES[options.remat],
    )
    found = []
    for block, batch, length, module, remat in sizes:
        step = (ModelStep if module == "model" else BlockStep)(
            config=_sized(PRESETS[block], module, length),
            part="block" if module == "model" else module,
            batch=batch,
            length=length,
            method="full",
            remat=remat,
            dense_attention="cudnn" if gpu else "xla",
            dtype=dtype,
            param_dtype=jnp.float32,
        )
        for method in cli.known_names(options.method, METHODS, what="--method"):
            for variant in _variants(step, method, options):
                found.append(Work(block=block, module=module, step=variant))
    return found


def _sized(config: ModelConfig, module: Module, length: int) -> ModelConfig:
    """One layer of a model, or the model with positions enough."""
    return with_positions(config, length) if module == "model" else one_layer(config)


def _variants(step: BlockStep, method: BlockMethod, options: Options) -> Iterator[BlockStep]:
    if method == "full":
        yield step
    elif method == "lora":
        for form in cli.known_names(options.lora_form, ("auto", *LORA_FORMS), what="--lora-form"):
            yield replace(step, method="lora", lora_form=None if form == "auto" else form)
    else:
        densities = _numbers("--density", options.density, float)
        active = _numbers("--active-blocks", options.active_blocks, int)
        densities = densities[:1] if step.part == "ffn" else densities
        dense = options.spt_ffn == "dense"
        active = active[:1] if step.part == "mha" or dense else active
        for density, number in itertools.product(densities, active):
            ffn = RoutedFFNConfig(num_blocks=options.num_blocks, active_blocks=number)
            attention = SparseAttentionConfig(density=density, granularity=options.granularity)
            yield replace(step, method="spt", attention=attention, ffn=None if dense else ffn)


def training_step(step: BlockStep) -> tuple[Callable[..., Any], Callable[[jax.Array], Any]]:
    """A training step, and what makes its arguments.

    Returns:
        `run(state, frozen, inputs) -> (state, result)`, whose state is to be donated, and
        `arguments(key) -> (state, frozen, inputs)`. The result is the gradient for the layers below
        or, of a whole model, what `spt_jax.training.train_step` tells.
    """
    if isinstance(step, ModelStep):
        return step.training_step()
    optimizer = optax.adamw(1e-4)

    def arguments(key: jax.Array) -> Any:
        (trained, inputs), frozen = step.arguments(key)
        return (trained, optimizer.init(trained)), frozen, inputs

    def run(state: Any, frozen: Any, inputs: Any) -> Any:
        trained, optimizer_state = state
        (y, aux), pullback = jax.vjp(lambda t, x: step.run((t, x), frozen), trained, inputs)
        # Did it not depend on y, XLA would leave out the last product. Of a normed y the square
        # still has a gradient, the sum of squares none.
        gradient, result = pullback((y * y, jax.tree.map(jnp.ones_like, aux)))
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, trained)
        return (optax.apply_updates(trained, updates), optimizer_state), result

    return run, arguments


@dataclass
class Measurement:
    """Time and memory of a work, or why there is none.

    Attributes:
        work: what was measured.
        times_ms: of each step.
        planned_bytes: the compiler's peak: arguments, results and temporaries.
        device_bytes: the device's peak, where this step set it.
        failure: why it did not run.
    """

    work: Work
    times_ms: list[float] = field(default_factory=list)
    planned_bytes: int | None = None
    device_bytes: int | None = None
    failure: str | None = None

    @property
    def ms(self) -> float | None:
        """Median time of a step."""
        return median_and_spread(self.times_ms)[0] if self.times_ms else None

    @property
    def spread_ms(self) -> float | None:
        """Interquartile range of the steps' times."""
        return median_and_spread(self.times_ms)[1] if self.times_ms else None

    @property
    def operations(self) -> float:
        """Floating-point operations of a step's products."""
        return self.work.step.operations()[1]

    def row(self) -> dict[str, Any]:
        """A row of the CSV file."""
        return {
            **self.work.columns(),
            "ms": self.ms,
            "spread_ms": self.spread_ms,
            "steps": len(self.times_ms),
            "planned_bytes": self.planned_bytes,
            "device_bytes": self.device_bytes,
            "operations": self.operations,
            "failure": self.failure,
        }


class Program:
    """A compiled training step."""

    def __init__(
        self, work: Work, seed: int, target: Any = None, mesh: MeshConfig | None = None
    ) -> None:
        run, arguments = training_step(work.step)
        self._key = jax.random.key(seed)
        self._held: Any = None
        shapes = jax.eval_shape(arguments, self._key)
        devices = Devices(mesh)
        state, frozen, inputs = shapes
        places = None
        if mesh is not None:
            of_inputs = jax.tree.map(lambda _: devices.batch_place, inputs)
            places = devices.places(state), devices.places(frozen), of_inputs
        self._arguments: Any = jax.jit(arguments, out_shardings=places)
        jitted = jax.jit(
            run, donate_argnums=0, in_shardings=places, out_shardings=places and (places[0], None)
        )
        if target is None:
            with devices:
                self._compiled = jitted.lower(*shapes).compile()
        else:
            traced = trace_for(target, jitted, *shapes)
            with jax.default_device(target):
                self._compiled = traced.lower().compile()
        self.planned_bytes = peak_bytes(self._compiled)

    def text(self) -> str:
        """The compiled program."""
        return self._compiled.as_text() or ""

    def prepare(self) -> None:
        """Compile what `time_ms` needs beside the step; unlike it, in several threads at once."""
        # It runs a few times at most, so that optimizing it takes longer than it saves.
        options: Any = {"xla_backend_optimization_level": 1}
        self._arguments = self._arguments.lower(self._key).compile(options)

    def time_ms(self, steps: int, *, hold: bool) -> list[float]:
        """Times of so many steps.

        Args:
            steps: their number.
            hold: whether the next call goes on with the same arrays, kept in memory until then. A
                call with new ones begins with a step whose time is not kept.
        """
        held, self._held = self._held, None
        state, frozen, inputs = held or self._arguments(self._key)
        warm_up = held is None
        del held

        def step() -> Any:
            nonlocal state
            state, result = self._compiled(state, frozen, inputs)
            return state, result

        times = times_ms(step, steps, warm_up=warm_up)
        self._held = (state, frozen, inputs) if hold else None
        return times


def measure(
    works: Sequence[Work], options: Options, target: Any, advance: Callable[[str], None]
) -> list[Measurement]:
    """Compile all works, those of one comparison after the other, and time them in turns."""
    found: list[Measurement] = []
    mesh = None if options.mesh is None else parse_mesh(options.mesh)
    for _, compared in itertools.groupby(works, key=lambda work: work.comparison):
        group = list(compared)
        measured: dict[Work, Measurement] = {}
        ready: list[tuple[Program, Measurement]] = []

        def compiled(work: Work) -> Program | str:
            try:
                program = Program(work, options.seed, target, mesh)
                if target is None:
                    program.prepare()
                return program
            except FAILURES as error:
                return failure_of(error)

        # SPT takes the longest to compile, so it begins.
        order = sorted(group, key=lambda work: work.step.method != "spt")
        for work, program in in_threads(compiled, order):
            measurement = measured[work] = Measurement(work)
            if isinstance(program, str):
                measurement.failure = program
            else:
                measurement.planned_bytes = program.planned_bytes
                ready.append((program, measurement))
            advance(f"{work.block} {work.module} {work.name}")
        found += [measured[work] for work in group]
        ready.sort(key=lambda pair: pair[0].planned_bytes)  # so that each can set the peak
        hold = device_peak_bytes() is None  # where a peak is reported it is to be of one method
        rounds = min(options.rounds, options.steps)
        for number in range(0 if target is not None else rounds):
            share = options.steps * (number + 1) // rounds - options.steps * number // rounds
            for program, measurement in ready:
                if measurement.failure is not None:
                    continue
                before = device_peak_bytes() or 0
                try:
                    measurement.times_ms += program.time_ms(share, hold=hold)
                except FAILURES as error:
                    measurement.failure, measurement.times_ms = failure_of(error), []
                if (peak := device_peak_bytes() or 0) > before:
                    measurement.device_bytes = peak
        jax.clear_caches()
    return found


def longest(fits: Callable[[int], bool], start: int) -> int:
    """The longest sequence that fits, to within a sixteenth; 0 if `start` does not.

    Example:
        >>> longest(lambda length: length <= 5000, 1024)
        4864
    """
    if not fits(start):
        return 0
    low = start
    while low < MAX_LENGTH and fits(2 * low):
        low *= 2
    high = 2 * low
    while high - low > max(1, LENGTH_PRECISION * low):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def find_longest(
    works: Sequence[Work], options: Options, target: Any, advance: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Rows with the longest sequence of each work."""
    limit = memory_limit(options)
    rows = []
    for work in works:
        peaks: dict[int, int] = {}

        def fits(length: int, work: Work = work, peaks: dict[int, int] = peaks) -> bool:
            config = _sized(PRESETS[work.block], work.module, length)
            longer = replace(work, step=replace(work.step, length=length, config=config))
            advance(f"{work.block} {work.module} {work.name} {length}")
            try:
                program = Program(longer, options.seed, target)
            except FAILURES as error:
                if failure_of(error) == OUT_OF_MEMORY:  # some compilers refuse what does not fit
                    return False
                raise
            peaks[length] = program.planned_bytes
            return program.planned_bytes <= limit

        length = longest(fits, work.step.length)
        row = {**work.columns(), "max_length": length, "memory_bytes": limit}
        rows.append({**row, "planned_bytes": peaks.get(length)})
        jax.clear_caches()
    return rows


def memory_limit(options: Options) -> int:
    """Bytes that a step may take.

    Raises:
        ValueError: the device does not say how much memory it has.
    """
    if options.memory_gb is not None:
        return int(1e9 * options.memory_gb)
    if options.target is not None:
        return int(USABLE * GPUS[options.target].memory_bytes)
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in statistics:
        raise ValueError(
            "--max-length: this device does not say how much memory it has; give --memory-gb, or "
            "--target for a GPU that is not there"
        )
    return statistics["bytes_limit"]


def ratios(found: Sequence[Measurement]) -> list[dict[str, float]]:
    """For each measurement, its time and memory beside full fine-tuning's and the best LoRA's.

    Returns:
        Of `speedup_over_full`, `speedup_over_lora`, `operations_full`, `operations_lora` (the
        speedups that the operations allow), `memory_of_full` and `memory_of_lora`, those that are
        known. The best LoRA is the fastest form for time and the smallest for memory.
    """
    groups: dict[tuple[Any, ...], list[Measurement]] = {}
    for m in found:
        groups.setdefault(m.work.comparison, []).append(m)
    rows = []
    for m in found:
        row: dict[str, float] = {}
        for method in ("full", "lora"):
            baselines = [o for o in groups[m.work.comparison] if o.work.step.method == method]
            times = [o.ms for o in baselines if o.ms is not None]
            sizes = [o.planned_bytes for o in baselines if o.planned_bytes is not None]
            if times and m.ms is not None:
                row[f"speedup_over_{method}"] = min(times) / m.ms
            if baselines:
                row[f"operations_{method}"] = baselines[0].operations / m.operations
            if sizes and m.planned_bytes is not None:
                row[f"memory_of_{method}"] = m.planned_bytes / min(sizes)
        rows.append(row)
    return rows


def results_table(found: Sequence[Measurement], device: str) -> Table:
    """One row a measurement."""
    timed = any(m.times_ms for m in found)
    on_device = any(m.device_bytes is not None for m in found)
    table = Table(title=f"a training step, {device}", caption=PEAK)
    for header in ("block", "module", "batch", "method"):
        table.add_column(header)
    headers = ["ms"] * timed + ["peak MB"] + ["device MB"] * on_device
    for method in ("full", "LoRA"):
        headers += [f"x {method}", "operations"] * timed + [f"MB of {method}"]
    for header in headers:
        table.add_column(header, justify="right")
    for m, ratio in zip(found, ratios(found), strict=True):
        step = m.work.step
        cells = [m.work.block, m.work.module, f"{step.batch} x {step.length}", m.work.label]
        if m.failure is not None:
            table.add_row(*cells, m.failure)
            continue
        if timed:
            cells.append(f"{m.ms:.2f} ({m.spread_ms:.2f})")
        cells.append(f"{(m.planned_bytes or 0) / 1e6:.0f}")
        if on_device:
            cells.append("" if m.device_bytes is None else f"{m.device_bytes / 1e6:.0f}")
        for method in ("full", "lora"):
            names = [f"speedup_over_{method}", f"operations_{method}"] * timed
            for name in (*names, f"memory_of_{method}"):
                cells.append(f"{ratio[name]:.2f}" if name in ratio else "")
        table.add_row(*cells)
    return table


def longest_table(rows: Sequence[Mapping[str, Any]], device: str) -> Table:
    """One row a method."""
    limit = rows[0]["memory_bytes"]
    title = f"longest sequence whose step takes at most {limit / 1e9:.1f} GB, {device}"
    table = Table(title=title, caption=PEAK)
    for header in ("block", "module", "batch", "method"):
        table.add_column(header)
    for header in ("tokens", "x LoRA", "peak MB"):
        table.add_column(header, justify="right")

    def baseline(row: Mapping[str, Any]) -> int:
        same = ("block", "module", "batch_size", "remat")
        others = [r for r in rows if r["method"] == "lora" and all(r[n] == row[n] for n in same)]
        return max((r["max_length"] for r in others), default=0)

    for row in rows:
        words = [row["method"], row["lora_form"] or "", "remat" * row["remat"]]
        lora, peak = baseline(row), row["planned_bytes"]
        table.add_row(
            row["block"],
            row["module"],
            str(row["batch_size"]),
            " ".join(word for word in words if word),
            f"{row['max_length']:,}",
            f"{row['max_length'] / lora:.2f}" if lora else "",
            "" if peak is None else f"{peak / 1e6:.0f}",
        )
    return table


def figures_of(found: Sequence[Measurement]) -> dict[str, dict[str, Any]]:
    """Figures by block, module, batch, length and method."""
    figures = {}
    for m, ratio in zip(found, ratios(found), strict=True):
        step = m.work.step
        words = [m.work.block, m.work.module, f"b{step.batch}", f"s{step.length}", m.work.name]
        if step.method == "spt":
            words.append(f"d{step.attention.density:g}")
            words.append(f"a{step.ffn.active_blocks}" if step.ffn else "dense_ffn")
        name = "_".join(words).replace(" ", "_")
        numbers: dict[str, Any] = {
            "ms": m.ms,
            "spread_ms": m.spread_ms,
            "planned_bytes": m.planned_bytes,
        }
        numbers |= {"device_bytes": m.device_bytes, "failure": m.failure, **ratio}
        figures[name] = {name: value for name, value in numbers.items() if value is not None}
    return figures


def plot_sizes(path: Path, found: Sequence[Measurement]) -> None:
    """Time and memory of one block by batch and length, halves of the block stacked."""
    there = {m.work.module for m in found}
    modules = ("mha", "ffn") if {"mha", "ffn"} <= there else (found[0].work.module,)
    bars: dict[str, dict[str, dict[str, Measurement]]] = {}  # by method, size, module
    for m in found:
        size = f"{m.work.step.batch} x {m.work.step.length}"
        if m.work.module in modules and m.failure is None:
            bars.setdefault(m.work.label, {}).setdefault(size, {})[m.work.module] = m
    timed = any(m.times_ms for m in found)
    panels = [("ms", lambda m: m.ms or 0)] * timed
    panels += [("peak MB", lambda m: (m.planned_bytes or 0) / 1e6)]
    sizes = list(dict.fromkeys(size for by_size in bars.values() for size in by_size))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(6 * len(panels), 4), squeeze=False, layout="constrained"
    )
    width = 0.8 / max(1, len(bars))
    for ax, (label, value) in zip(axes[0], panels, strict=True):
        for i, (method, by_size) in enumerate(bars.items()):
            place = np.arange(len(sizes)) + width * (i - (len(bars) - 1) / 2)
            bottom = np.zeros(len(sizes))
            for j, module in enumerate(modules):
                heights = np.array(
                    [
                        value(by_size[size][module]) if module in by_size.get(size, {}) else 0.0
                        for size in sizes
                    ]
                )
                ax.bar(
                    place, heights, width, bottom, color=f"C{i}", alpha=1 - 0.4 * j,
                    label=f"{method}, {module}",
                )  # fmt: skip
                bottom = bottom + heights
        ax.set_xticks(np.arange(len(sizes)), sizes)
        ax.set(xlabel="sequences x tokens", ylabel=label)
    axes[0][-1].legend(fontsize="small")
    axes[0][0].set_title(found[0].work.block)
    save_figure(figure, path)


def plot_densities(path: Path, found: Sequence[Measurement]) -> None:
    """Speedups over full fine-tuning by density, and what the operations allow."""
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for m, ratio in zip(found, ratios(found), strict=True):
        step = m.work.step
        if step.method != "spt" or step.ffn is None or "speedup_over_full" not in ratio:
            continue
        share = step.ffn.density if m.work.module == "ffn" else step.attention.density
        active = f", {step.ffn.active_blocks} of {step.ffn.num_blocks}"
        name = f"{m.work.module}, S={step.length}" + active * (m.work.module in ("block", "model"))
        speedups = ratio["speedup_over_full"], ratio["operations_full"]
        lines.setdefault(name + ", remat" * step.remat, []).append((share, *speedups))
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for i, (name, points) in enumerate(lines.items()):
        shares, speedups, limits = zip(*sorted(points), strict=True)
        axes.plot(shares, speedups, marker="o", color=f"C{i}", label=name)
        axes.plot(shares, limits, linestyle="--", color=f"C{i}")
    axes.set(
        xlabel="density (of an FFN: share of the active blocks)",
        ylabel="times as fast as full fine-tuning",
        title=f"{found[0].work.block}; dashed: what the operations allow",
        xscale="log",
    )
    axes.legend(fontsize="small")
    save_figure(figure, path)


def _write_plots(out: Path, found: Sequence[Measurement]) -> None:
    for block in dict.fromkeys(m.work.block for m in found):
        of_block = [m for m in found if m.work.block == block]
        plot_sizes(out / f"{block}.png", of_block)
        spt = [m.work.step for m in of_block if m.work.step.method == "spt"]
        swept = {(step.attention.density, step.ffn.active_blocks) for step in spt if step.ffn}
        if len(swept) > 1 and any(m.times_ms for m in of_block):
            plot_densities(out / f"{block}-density.png", of_block)


def exit_on_failures(rows: Sequence[Mapping[str, Any]], what: str) -> None:
    """End the program with exit code 1 if anything but memory kept a row from being measured."""
    failures = [row for row in rows if row.get("failure") not in (None, OUT_OF_MEMORY)]
    if failures:
        first = failures[0]
        sys.exit(
            f"error: {len(failures)} {what} failed, the first: {first['block']} {first['module']} "
            f"{first['method']}: {first['failure']}"
        )


def main() -> None:
    """Run the experiment."""
    options = cli.parse(Options, "experiments.profile", __doc__)
    options.check()
    target = None
    if options.target is not None:
        jax.config.update("jax_platforms", "cpu")
        target = described_device(GPUS[options.target])
    gpu = target is not None or jax.default_backend() == "gpu"
    works = workloads(options, gpu=gpu)
    device = options.target or jax.devices()[0].device_kind
    options.out.mkdir(parents=True, exist_ok=True)
    total = None if options.max_length else len(works)
    with tqdm(total=total, disable=not sys.stderr.isatty(), unit="program") as bar:

        def advance(name: str) -> None:
            bar.set_description(name)
            bar.update()

        console = cli.console(160)
        if options.max_length:
            rows = find_longest(works, options, target, advance)
            console.print(longest_table(rows, device))
            figures: dict[str, Any] = {"max_length": rows}
        else:
            found = measure(works, options, target, advance)
            rows = [m.row() | ratio for m, ratio in zip(found, ratios(found), strict=True)]
            console.print(results_table(found, device))
            _write_plots(options.out, found)
            figures = figures_of(found)
    write_csv(options.out / "profile.csv", rows)
    write_metrics(options.out, "profile", options, figures)
    exit_on_failures(rows, "programs")


if __name__ == "__main__":
    cli.run(main)
