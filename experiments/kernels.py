"""Times the kernels against their dense equivalents.

    python -m experiments.kernels --device cpu --out DIR

Each comparison alternates the baseline and the candidates, and a speedup is the median over the
rounds of the ratio of their times, forward and backward together. On two CPU cores it takes about
two minutes; the routed FFN comes out at 1.8 times dense with half of its blocks active and 3.3 with
a quarter, sparse attention at 9.7 times dense in a twentieth of its memory.
Writes `kernels.csv`, `kernels.png`, TensorBoard events and, last and
atomically, `metrics.json` to DIR.
"""

from __future__ import annotations

import csv
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from tensorboardX import SummaryWriter
from tqdm import tqdm

from experiments import cli
from pallas_kernels import (
    RoutedFFNLoRA,
    RoutedFFNWeights,
    activation_function,
    pq_encode,
    pq_select,
    routed_ffn,
    scoring_codewords,
    sparse_attention,
)
from spt_jax.layers import lora_dot
from spt_jax.training import environment, write_json_atomic

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Trained = Any
Frozen = Any


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the experiment."""

    device: Literal["cpu"] = "cpu"
    """Platform that runs the kernels."""
    out: Path = Path("runs/kernels")
    """Folder for the results."""
    rounds: int = 7
    """Timed rounds of each comparison."""
    seed: int = 0
    """Seed of the random inputs."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way of computing something: `function(trained, frozen)`, differentiated in `trained`."""

    name: str
    function: Callable[[Trained, Frozen], jax.Array]
    trained: Trained
    frozen: Frozen = ()


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A baseline and the candidates that should beat it, on one shape."""

    name: str
    shape: str
    baseline: Method
    candidates: dict[str, Method]  # By the name of the figure: NAME_speedup.


@dataclass(frozen=True)
class FFNShape:
    """Sizes of a feed-forward network: T tokens, width D, F hidden units in G blocks."""

    tokens: int
    width: int
    hidden: int
    blocks: int = 4

    def __str__(self) -> str:
        return f"T={self.tokens} D={self.width} F={self.hidden} G={self.blocks}"


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of an attention layer, and the share of the keys that a query keeps."""

    length: int
    heads: int
    head_width: int
    density: float

    def __str__(self) -> str:
        return f"S={self.length} N={self.heads} H={self.head_width} density={self.density:g}"


LARGE = FFNShape(4096, 1024, 4096)
MINILM = FFNShape(4096, 384, 1536)  # 32 sequences of 128 tokens.
ATTENTION = AttentionShape(4096, 8, 64, 1 / 8)
LORA_RANK = 16


def _by_block(array: jax.Array, blocks: int) -> jax.Array:
    """Splits the last axis, hidden units, into blocks and puts them first."""
    return jnp.moveaxis(array.reshape(*array.shape[:-1], blocks, -1), -2, 0)


def dense_ffn(x: jax.Array, w: dict[str, jax.Array]) -> jax.Array:
    """The feed-forward network that the routed one is measured against."""
    hidden = activation_function("gelu")(x @ w["w_in"] + w["b_in"])
    return hidden @ w["w_out"] + w["b_out"]


def dense_lora_ffn(x: jax.Array, w: dict[str, jax.Array], lora: dict[str, jax.Array]) -> jax.Array:
    """Dense network with LoRA in its fastest form: merged products, skinny gradients."""
    hidden = lora_dot(x, w["w_in"], lora["a_in"], lora["b_in"], form="merged") + w["b_in"]
    hidden = activation_function("gelu")(hidden)
    y = lora_dot(hidden, w["w_out"], lora["a_out"], lora["b_out"], form="merged")
    return y + w["b_out"]


def routed(
    x: jax.Array,
    router: jax.Array,
    weights: RoutedFFNWeights,
    lora: RoutedFFNLoRA | None,
    active: int,
) -> jax.Array:
    """Router and routed FFN."""
    p = jax.nn.sigmoid(x @ router)
    chosen, index = jax.lax.top_k(p, active)
    return routed_ffn(x, index, 2 * chosen, weights, lora=lora)


def ffn_comparison(name: str, shape: FFNShape, mode: str, key: jax.Array) -> Comparison:
    """Compares routed and dense networks.

    Args:
      name: Prefix of the figures.
      shape: Sizes.
      mode: What trains beside the input and the router: "full" (all weights), "frozen" (none) or
        "lora" (low-rank factors).
      key: Source of the random inputs.
    """
    keys = iter(jax.random.split(key, 10))
    d, f, g, r = shape.width, shape.hidden, shape.blocks, LORA_RANK

    def normal(*size: int, scale: float = 1.0) -> jax.Array:
        return scale * jax.random.normal(next(keys), size)

    x, router = normal(shape.tokens, d), normal(d, g, scale=d**-0.5)
    dense = {
        "w_in": normal(d, f, scale=d**-0.5),
        "b_in": normal(f),
        "w_out": normal(f, d, scale=f**-0.5),
        "b_out": normal(d),
    }
    weights = RoutedFFNWeights(
        w_in=_by_block(dense["w_in"], g),
        b_in=_by_block(dense["b_in"], g),
        w_out=dense["w_out"].reshape(g, -1, d),
        b_out=dense["b_out"],
    )
    factors = {
        "a_in": normal(d, r, scale=d**-0.5),
        "b_in": normal(r, f, scale=r**-0.5),
        "a_out": normal(f, r, scale=f**-0.5),
        "b_out": normal(r, d, scale=r**-0.5),
    }
    lora = RoutedFFNLoRA(
        a_in=factors["a_in"],
        b_in=_by_block(factors["b_in"], g),
        a_out=factors["a_out"].reshape(g, -1, r),
        b_out=factors["b_out"],
    )

    def candidate(active: int) -> Method:
        if mode == "full":
            return Method(
                name=f"routed, {active} of {g}",
                function=lambda t, _: routed(t[0], t[1], t[2], None, active),
                trained=(x, router, weights),
            )
        return Method(
            name=f"routed, {active} of {g}",
            function=lambda t, fixed: routed(t[0], t[1], fixed, t[2], active),
            trained=(x, router, lora if mode == "lora" else None),
            frozen=weights,
        )

    baseline = {
        "full": Method(
            name="dense", function=lambda t, _: dense_ffn(*t), trained=(x, dense), frozen=()
        ),
        "frozen": Method(name="dense", function=dense_ffn, trained=x, frozen=dense),
        "lora": Method(
            name="dense, merged LoRA",
            function=lambda t, fixed: dense_lora_ffn(t[0], fixed, t[1]),
            trained=(x, factors),
            frozen=dense,
        ),
    }[mode]
    return Comparison(
        name=name,
        shape=str(shape),
        baseline=baseline,
        candidates={f"{name}_half": candidate(g // 2), f"{name}_quarter": candidate(g // 4)},
    )


def attention_comparison(name: str, shape: AttentionShape, key: jax.Array) -> Comparison:
    """Compares sparse attention, encoding and selection included, with dense attention."""
    size = (1, shape.length, shape.heads, shape.head_width)
    qkv = tuple(jax.random.normal(k, size) for k in jax.random.split(key, 3))
    # Codebooks of 16 codewords of width 4, made of vectors of the input: speed depends on shapes.
    codebooks = tuple(
        jnp.moveaxis(t[0, :16].reshape(16, shape.heads, -1, 4), 0, 2) for t in qkv[:2]
    )

    def sparse(qkv: Trained, codebooks: Frozen) -> jax.Array:
        q, k, v = qkv
        codes = pq_encode(q, codebooks[0]), pq_encode(k, codebooks[1])
        selection = pq_select(
            *codes,
            *scoring_codewords(*codebooks),
            num_keys=round(shape.length * shape.density),
            granularity="tile",
        )
        return sparse_attention(q, k, v, selection)

    return Comparison(
        name=name,
        shape=str(shape),
        baseline=Method(
            name="jax.nn.dot_product_attention",
            function=lambda t, _: jax.nn.dot_product_attention(*t),
            trained=qkv,
        ),
        candidates={
            name: Method(name="sparse, tile", function=sparse, trained=qkv, frozen=codebooks)
        },
    )


def cpu_comparisons(key: jax.Array) -> Iterator[Comparison]:
    """The comparisons that a CPU runs, in float32; built one at a time to keep memory small."""
    keys = jax.random.split(key, 4)
    yield ffn_comparison("routed_ffn", LARGE, "full", keys[0])
    yield ffn_comparison("routed_ffn_frozen", LARGE, "frozen", keys[1])
    yield ffn_comparison("routed_ffn_minilm_lora", MINILM, "lora", keys[2])
    yield attention_comparison("sparse_attention", ATTENTION, keys[3])


# A platform with kernels of its own gets its comparisons, baselines and types here.
COMPARISONS = {"cpu": cpu_comparisons}
NUM_COMPARISONS = {"cpu": 4}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Times of one method by round, and its memory."""

    method: Method
    forward_ms: np.ndarray
    step_ms: np.ndarray
    peak_bytes: int

    def figures(self) -> dict[str, float]:
        """Medians, and spreads: interquartile ranges."""
        times = {
            "forward": self.forward_ms,
            "backward": self.step_ms - self.forward_ms,
            "step": self.step_ms,
        }
        figures: dict[str, float] = {}
        for name, values in times.items():
            low, middle, high = np.percentile(values, (25, 50, 75))
            figures |= {f"{name}_ms": float(middle), f"{name}_spread_ms": float(high - low)}
        return figures | {"peak_bytes": self.peak_bytes}


def _compile(method: Method) -> tuple[Callable[[], Any], Callable[[], Any], int]:
    """Compiles forward, and forward with backward; also returns the latter's peak memory."""

    def step(trained: Trained, frozen: Frozen) -> Any:
        y, pullback = jax.vjp(lambda t: method.function(t, frozen), trained)
        return y, pullback(jnp.ones_like(y))

    arguments = (method.trained, method.frozen)
    forward = jax.jit(method.function).lower(*arguments).compile()
    both = jax.jit(step).lower(*arguments).compile()
    memory = both.memory_analysis()
    if memory is None:
        raise NotImplementedError("this platform reports no memory use of compiled programs")
    peak = memory.temp_size_in_bytes + memory.output_size_in_bytes
    return lambda: forward(*arguments), lambda: both(*arguments), peak


def _time_ms(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function())
    return 1e3 * (time.perf_counter() - start)


def measure(comparison: Comparison, rounds: int, advance: Callable[[], Any]) -> list[Measurement]:
    """Times the baseline and then the candidates, round by round; the first round is not kept."""
    methods = [comparison.baseline, *comparison.candidates.values()]
    compiled = [_compile(method) for method in methods]
    times = np.zeros((rounds + 1, len(methods), 2))
    for row in times:
        for cell, (forward, step, _) in zip(row, compiled, strict=True):
            jax.block_until_ready(forward())  # pays for what the method before it left behind
            cell[:] = _time_ms(forward), _time_ms(step)
        advance()
    return [
        Measurement(method=m, forward_ms=t[:, 0], step_ms=t[:, 1], peak_bytes=c[2])
        for m, t, c in zip(methods, times[1:].swapaxes(0, 1), compiled, strict=True)
    ]


def run(options: Options) -> dict[str, Any]:
    """Runs all comparisons of the device and returns the figures."""
    figures: dict[str, Any] = {}
    table = Table(title=f"{jax.devices()[0].device_kind}, medians of {options.rounds} rounds")
    for column in ("comparison", "shape", "method"):
        table.add_column(column)
    for column in ("forward ms", "backward ms", "step ms", "spread ms", "peak MB", "speedup"):
        table.add_column(column, justify="right")
    rows = []
    total = NUM_COMPARISONS[options.device] * (options.rounds + 1)
    with tqdm(total=total, disable=not sys.stderr.isatty(), unit="round") as progress:
        for comparison in COMPARISONS[options.device](jax.random.key(options.seed)):
            progress.set_description(comparison.name)
            baseline, *candidates = measure(comparison, options.rounds, progress.update)
            dense = baseline.figures()
            figures[f"{comparison.name}_dense"] = dense
            entries: list[tuple[str, Measurement, dict[str, float], float]] = [
                (f"{comparison.name}_dense", baseline, dense, 1.0)
            ]
            for name, candidate in zip(comparison.candidates, candidates, strict=True):
                mine = candidate.figures()
                speedup = float(np.median(baseline.step_ms / candidate.step_ms))
                figures |= {
                    name: mine,
                    f"{name}_speedup": speedup,
                    f"{name}_forward_speedup": float(
                        np.median(baseline.forward_ms / candidate.forward_ms)
                    ),
                    f"{name}_peak_ratio": candidate.peak_bytes / baseline.peak_bytes,
                }
                entries.append((name, candidate, mine, speedup))
            for name, measurement, mine, speedup in entries:
                times = (f"{mine[f'{k}_ms']:.1f}" for k in ("forward", "backward", "step"))
                table.add_row(
                    comparison.name,
                    comparison.shape,
                    measurement.method.name,
                    *times,
                    f"{mine['step_spread_ms']:.1f}",
                    f"{mine['peak_bytes'] / 1e6:.1f}",
                    f"{speedup:.2f}",
                )
                rows.append(
                    {
                        "comparison": comparison.name,
                        "shape": comparison.shape,
                        "name": name,
                        "method": measurement.method.name,
                        **mine,
                        "speedup": speedup,
                    }
                )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    _write_csv(options.out / "kernels.csv", rows)
    _plot(options.out / "kernels.png", rows)
    return figures


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _plot(path: Path, rows: list[dict[str, Any]]) -> None:
    rows = [row for row in rows if not row["name"].endswith("_dense")]
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(rows) + 1.5), layout="constrained")
    names, speedups = [row["name"] for row in rows], [row["speedup"] for row in rows]
    axes.bar_label(axes.barh(names, speedups), fmt="%.2f", padding=3)
    axes.axvline(1, color="black", linewidth=1, linestyle="--")
    axes.invert_yaxis()
    axes.set_xlabel("speedup over dense, forward and backward")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Run the comparisons of a device."""
    options = tyro.cli(Options, prog="experiments.kernels", description=__doc__)
    if options.rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {options.rounds}")
    jax.config.update("jax_platforms", options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    figures = run(options)
    with SummaryWriter(str(options.out)) as writer:
        for name, value in figures.items():
            if isinstance(value, float):
                writer.add_scalar(name, value, 0)
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


if __name__ == "__main__":
    cli.run(main)
