"""SPT's training step beside LoRA's at several lengths, and what its sparse form loses.

    python -m experiments.lengths                                  # MiniLM, 32 to 512 tokens
    python -m experiments.lengths --models smollm2 --lengths 512,1024,2048,4096 --ffn dense

At each length the model is adapted by LoRA alone and by SPT within its budget, on rows of a text.
Then both take training steps in turn. Where SPT leaves everything dense it is LoRA, and is not
timed apart. Writes lengths.csv, a plot of each model and metrics.json to --out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx
from matplotlib import pyplot as plt
from rich.table import Table

import spt_jax
from experiments.capture import Texts, token_ids, two_sets
from experiments.methods import write_metrics
from experiments.reports import here_and_now, how, page, save_figure, write_csv
from spt_jax import cli
from spt_jax.models import Decoder
from spt_jax.models.config import read_config
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.hub import CONFIG_FILES, find_files
from spt_jax.training import Objective, cross_entropy, next_token, supervised, write_text_atomic
from spt_jax.training.memory import compiled_peak_bytes
from spt_jax.training.step import partition, start

Row = dict[str, Any]
LORA = spt_jax.SPTConfig(attention=None, ffn=None)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the experiment."""

    models: str = "minilm"
    """Hugging Face directories, GGUF files or hub ids, separated by commas."""
    text_file: Path | None = None
    """UTF-8 text to adapt and to train on; by default CPython's documentation."""
    lengths: str = "32,64,128,256,512"
    """Tokens of a row, separated by commas."""
    ffn: Literal["routed", "dense"] = "routed"
    """Whether SPT may route FFNs; of a decoder that costs more than it saves."""
    step_tokens: int = 2048
    """Tokens of a training step, but for one row."""
    rows: int = 32
    """Rows to adapt on, at most; fewer where they would have more than 8,192 tokens."""
    turns: int = 7
    """Steps of each that are timed, one of each in turn, after one that is not."""
    seed: int = 0
    """Seed of random fits."""
    out: Path = Path("runs/lengths")
    """Folder for the table and metrics.json."""
    report: Path | None = None
    """Markdown file that gets the table, and how it was made."""

    def check(self) -> None:
        """Raise a ValueError for any mistake in the options."""
        self.sizes()
        self.names()
        for name, least in {"step_tokens": 1, "rows": 2, "turns": 1}.items():
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} must be at least {least}, got {getattr(self, name)}")

    def names(self) -> list[str]:
        """The models."""
        names = list(cli.distinct_names(self.models))
        if not all(names):
            raise ValueError(f"--models takes names with commas between them, got {self.models!r}")
        return names

    def sizes(self) -> list[int]:
        """The lengths."""
        words = cli.distinct_names(self.lengths)
        if not words or not all(word.isdecimal() and int(word) >= 2 for word in words):
            raise ValueError(f"--lengths takes whole numbers from 2 on, got {self.lengths!r}")
        return [int(word) for word in words]


class Step(NamedTuple):
    """A compiled training step.

    Attributes:
        take: takes it, and waits for its end.
        peak_bytes: memory that the compiler plans for it.
    """

    take: Callable[[], None]
    peak_bytes: int


def load(name: str, seed: int) -> nnx.Module:
    """The dense model: a causal language model, or an encoder with a head of two classes."""
    config = read_config(find_files(name, files=CONFIG_FILES))
    causal = isinstance(config, DecoderConfig)
    return spt_jax.load_pretrained(
        name,
        task="causal-lm" if causal else "sequence-classification",
        num_labels=2,
        rngs=nnx.Rngs(seed),
    )


def adapted(name: str, config: spt_jax.SPTConfig, calibration: np.ndarray, seed: int) -> nnx.Module:
    """The model adapted."""
    batch = {"input_ids": calibration}
    rngs = nnx.Rngs(seed)
    return spt_jax.adapt(load(name, seed), config, calibration_batch=batch, rngs=rngs)


def compiled(model: nnx.Module, ids: np.ndarray) -> Step:
    """The product's training step of a model on rows `[B, S]`."""
    rows, length = ids.shape
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    objective: Objective = next_token
    if isinstance(model, Decoder):
        batch |= {"label": np.roll(ids, -1, 1), "weight": np.ones((rows, length), np.float32)}
    else:
        objective = supervised(cross_entropy)
        batch |= {"label": np.arange(rows) % 2, "weight": np.ones(rows, np.float32)}
    parts = partition(model, "adapter")
    config = spt_jax.TrainConfig(steps=1000, batch_size=rows, learning_rate=1e-4)
    state, step = start(parts, config, total_steps=1000, objective=objective)
    batch = jax.device_put(batch)
    program = jax.jit(step, donate_argnums=0).lower(state, parts.frozen, batch).compile()
    held = {"state": state}

    def take() -> None:
        held["state"], values = program(held["state"], parts.frozen, batch)
        jax.block_until_ready(values)

    return Step(take, compiled_peak_bytes(program))


def in_turn(steps: Sequence[Step], turns: int) -> list[list[float]]:
    """Seconds of each step, by turn; the order changes from turn to turn."""
    for step in steps:
        step.take()
    seconds: list[list[float]] = [[] for _ in steps]
    for turn in range(turns):
        order = range(len(steps)) if turn % 2 else reversed(range(len(steps)))
        for i in order:
            begun = time.perf_counter()
            steps[i].take()
            seconds[i].append(time.perf_counter() - begun)
    return seconds


def measure(name: str, length: int, ids: np.ndarray, options: Options) -> Row:
    """SPT beside LoRA at a length.

    Args:
        name: of the model.
        length: tokens of a row.
        ids: tokens of the text.
        options: of the experiment.
    """
    rows = max(2, min(options.rows, 8192 // length))
    calibration, trained = two_sets(Texts(ids), length, rows)
    batch = np.resize(trained, (max(1, options.step_tokens // length), length))
    config = spt_jax.SPTConfig() if options.ffn == "routed" else spt_jax.SPTConfig(ffn=None)
    spt = adapted(name, config, calibration, options.seed)
    report: spt_jax.AdaptationReport = getattr(spt, "adaptation")  # noqa: B009
    lora = compiled(adapted(name, LORA, calibration, options.seed), batch)
    sparse = any(line.active < 1 for line in report.layers)
    steps = [lora, compiled(spt, batch)] if sparse else [lora]
    seconds = in_turn(steps, options.turns)
    kinds = {
        part: [line.active for line in report.layers if line.part == part]
        for part in ("attention", "ffn")
    }
    return {
        "model": name,
        "length": length,
        "rows": len(batch),
        "sparse_attention_layers": sum(share < 1 for share in kinds["attention"]),
        "routed_ffn_layers": sum(share < 1 for share in kinds["ffn"]),
        "ffn_share": statistics.fmean(kinds["ffn"]) if kinds["ffn"] else 1.0,
        "measure": report.measure,
        "added": report.added or 0.0,
        "lora_ms": 1e3 * statistics.median(seconds[0]),
        "spt_ms": 1e3 * statistics.median(seconds[-1]),
        "speed": statistics.median(a / b for a, b in zip(seconds[0], seconds[-1], strict=True)),
        "lora_bytes": lora.peak_bytes,
        "spt_bytes": steps[-1].peak_bytes,
        "adapt_s": report.seconds,
    }


def table_of(rows: Sequence[Row]) -> Table:
    """Lengths, what is sparse there, what it costs and what it saves."""
    table = Table(title="SPT's training step beside LoRA's")
    headers = (
        "model",
        "tokens a row",
        "rows",
        "sparse attention",
        "routed FFN",
        "units left",
        "sparse form loses",
        "LoRA ms",
        "SPT ms",
        "times as fast",
        "memory",
        "adapt s",
    )
    for header in headers:
        table.add_column(header, justify="left" if header == "model" else "right")
    for row in rows:
        unit = "nats" if row["measure"] == "loss" else "relative"
        sparse = row["sparse_attention_layers"] + row["routed_ffn_layers"]
        table.add_row(
            row["model"],
            str(row["length"]),
            str(row["rows"]),
            str(row["sparse_attention_layers"]),
            str(row["routed_ffn_layers"]),
            f"{row['ffn_share']:.0%}",
            f"{row['added']:.3f} {unit}" if sparse else "",
            f"{row['lora_ms']:.0f}",
            f"{row['spt_ms']:.0f}" if sparse else "as LoRA",
            f"{row['speed']:.2f}",
            f"{row['spt_bytes'] / row['lora_bytes']:.2f}",
            f"{row['adapt_s']:.0f}",
        )
    return table


def plot(rows: Sequence[Row], path: Path) -> None:
    """Time and memory of a model's step by length, and what its sparse form loses."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained")
    lengths = [row["length"] for row in rows]
    for axis, what, unit in ((axes[0], "ms", 1e3), (axes[1], "bytes", 1e6)):
        for method, style in (("lora", "o--"), ("spt", "o-")):
            values = [row[f"{method}_{what}"] / unit for row in rows]
            axis.plot(lengths, values, style, label={"lora": "LoRA", "spt": "SPT"}[method])
        axis.set_ylim(bottom=0)
        axis.legend()
    axes[2].plot(lengths, [row["added"] for row in rows], "o-", color="tab:orange")
    loses = "nats a token" if rows[0]["measure"] == "loss" else "relative change"
    titles = ("a step, s", "memory, MB", f"the sparse form loses, {loses}")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title)
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axis.set_xlabel("tokens a row")
    axes[2].set_ylim(bottom=min(0.0, *(row["added"] for row in rows)))
    save_figure(figure, path)


def write_report(options: Options, table: Table) -> None:
    """The page of results."""
    assert options.report is not None
    text = page(
        "SPT's step beside LoRA's, by length",
        "Training steps in turn, medians; SPT within its default budget, which leaves dense what "
        "saves no time at a length. What the sparse form loses was measured before any training: "
        "nats a token of language models, of encoders the relative change of the final hidden "
        "states. Where nothing is sparse SPT is LoRA. Memory is what the compiler plans for a "
        "step, as a share of LoRA's.",
        table,
        how("experiments.lengths", options, here_and_now()),
    )
    write_text_atomic(options.report, text)


def main() -> None:
    """Run the experiment."""
    options = cli.parse(Options, "experiments.lengths", __doc__)
    options.check()
    for name in options.names():
        positions = read_config(find_files(name, files=CONFIG_FILES)).max_length
        if (longest := max(options.sizes())) > positions:
            raise ValueError(f"--lengths: {longest} is above the {positions} positions of {name}")
    options.out.mkdir(parents=True, exist_ok=True)
    console = cli.console()
    console.print(cli.device_line("float32"))
    rows: list[Row] = []
    for name in options.names():
        ids = token_ids(name, options.text_file)
        for length in options.sizes():
            rows.append(measure(name, length, ids, options))
            jax.clear_caches()
            table = table_of(rows)
            write_csv(options.out / "lengths.csv", rows)
            own = [row for row in rows if row["model"] == name]
            plot(own, options.out / f"{Path(name).stem}.png")
            if options.report is not None:
                write_report(options, table)
    console.print(table)
    figures = {f"{row['model']}_{row['length']}": row["speed"] for row in rows}
    write_metrics(options.out, "lengths", options, figures, rows=rows)


if __name__ == "__main__":
    cli.run(main)
