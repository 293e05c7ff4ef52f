"""What a budget buys: the loss that sparse parts add, and the time that they save.

    python -m experiments.frontier --text-file FILE --eval-file FILE
    python -m experiments.frontier --model ID_OR_DIR --length 4096 --budgets 0.01,0.1

The model is adapted with each of --budgets, nothing is trained. On rows of another text the sparse
form's loss is then compared with the dense model's: what the budget promised, and what it holds. A
training step's time is that of its attention and FFNs, as measured for the choice. Writes
frontier.csv, frontier.png and metrics.json to --out.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from matplotlib import pyplot as plt
from rich.table import Table
from tqdm import tqdm

import spt_jax
from experiments.capture import Texts, token_ids, two_sets
from experiments.methods import write_metrics
from experiments.reports import here_and_now, how, page, save_figure, write_csv
from spt_jax import budget, cli
from spt_jax.models.config import read_config
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.hub import CONFIG_FILES, find_files
from spt_jax.training import write_text_atomic

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the experiment."""

    model: str = "smollm2"
    """Hugging Face directory, GGUF file or hub id."""
    text_file: Path | None = None
    """UTF-8 text to adapt on; by default CPython's documentation."""
    eval_file: Path | None = None
    """UTF-8 text that is measured; by default other rows of --text-file."""
    length: int = 512
    """Tokens of a row."""
    rows: int = 16
    """Rows to adapt on, a quarter of which decides; and as many to measure."""
    budgets: str = "0.01,0.02,0.05,0.1"
    """Budgets, separated by commas: nats a token, or for encoders the relative change of the final
    hidden states."""
    seed: int = 0
    """Seed of random fits."""
    out: Path = Path("runs/frontier")
    """Folder for the table, the plot and metrics.json."""
    report: Path | None = None
    """Markdown file that gets the table, and how it was made."""

    def check(self) -> None:
        """Raise a ValueError for any mistake in the options."""
        self.limits()
        for name, least in {"length": 2, "rows": 2}.items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}")

    def limits(self) -> list[float]:
        """The budgets."""
        try:
            limits = [float(word) for word in cli.distinct_names(self.budgets)]
        except ValueError:
            limits = [-1.0]
        if not all(0 <= limit < float("inf") for limit in limits):
            raise ValueError(f"--budgets takes numbers from 0 on, got {self.budgets!r}")
        return limits


def load(options: Options) -> nnx.Module:
    """The dense model: a causal language model, or an encoder without a head."""
    config = read_config(find_files(options.model, files=CONFIG_FILES))
    if options.length > config.max_length:
        raise ValueError(
            f"--length {options.length} is above the {config.max_length} positions of the model"
        )
    return spt_jax.load_pretrained(
        options.model,
        task="causal-lm" if isinstance(config, DecoderConfig) else "backbone",
        rngs=nnx.Rngs(options.seed),
    )


def measure(options: Options) -> tuple[list[Row], list[spt_jax.AdaptationReport]]:
    """A row for each budget, and its report."""
    dense, evaluation = load(options), options.eval_file
    texts = Texts(
        token_ids(options.model, options.text_file),
        None if evaluation is None else token_ids(options.model, evaluation),
    )
    calibration, held_out = two_sets(texts, options.length, options.rows)
    inputs = {"input_ids": jax.numpy.asarray(held_out)}
    judge = budget.judge_of(dense, inputs)
    rows, reports = [], []
    quiet = not sys.stderr.isatty()
    for limit in tqdm(options.limits(), desc="budgets", disable=quiet):
        model = load(options)
        config = spt_jax.SPTConfig(loss_budget=limit)
        spt_jax.adapt(
            model,
            config,
            calibration_batch={"input_ids": calibration},
            rngs=nnx.Rngs(options.seed),
        )
        report: spt_jax.AdaptationReport = model.adaptation  # type: ignore[attr-defined]
        sparse = judge.of(model)
        kinds = {
            part: [line.active for line in report.layers if line.part == part]
            for part in ("attention", "ffn")
        }
        rows.append(
            {
                "budget": limit,
                "measure": report.measure,
                "calibrated": report.added,
                "added": sparse - judge.dense,
                "dense": judge.dense,
                "sparse_attention_layers": sum(share < 1 for share in kinds["attention"]),
                "routed_ffn_layers": sum(share < 1 for share in kinds["ffn"]),
                "ffn_share": float(np.mean(kinds["ffn"])) if kinds["ffn"] else 1.0,
                "saved": report.saved,
                "adapt_s": report.seconds,
            }
        )
        reports.append(report)
        jax.clear_caches()
    return rows, reports


def table_of(rows: Sequence[Row], title: str) -> Table:
    """Budgets, what they hold and what they save."""
    unit = "nats" if rows[0]["measure"] == "loss" else "relative change"
    table = Table(title=title)
    headers = (
        f"budget, {unit}",
        "on calibration rows",
        "on other text",
        "sparse attention",
        "routed FFN",
        "units left",
        "time saved",
        "adapt s",
    )
    for header in headers:
        table.add_column(header, justify="right")
    for row in rows:
        table.add_row(
            f"{row['budget']:g}",
            f"{row['calibrated']:.4f}",
            f"{row['added']:.4f}",
            str(row["sparse_attention_layers"]),
            str(row["routed_ffn_layers"]),
            f"{row['ffn_share']:.0%}",
            f"{row['saved']:.1%}",
            f"{row['adapt_s']:.0f}",
        )
    return table


def plot(rows: Sequence[Row], path: Path) -> None:
    """Loss added against time saved."""
    figure, axes = plt.subplots(figsize=(6, 4))
    saved = [100 * row["saved"] for row in rows]
    axes.plot(saved, [row["budget"] for row in rows], "o--", label="budget")
    axes.plot(saved, [row["added"] for row in rows], "o-", label="measured on other text")
    axes.set_xlabel("time of attention and FFNs saved, %")
    axes.set_ylabel("nats a token" if rows[0]["measure"] == "loss" else "relative change")
    axes.legend()
    figure.tight_layout()
    save_figure(figure, path)


def write_report(options: Options, table: Table) -> None:
    """The page of results."""
    assert options.report is not None
    text = page(
        "What a loss budget buys",
        "The sparse form's loss after `adapt`, before any training, on text that nothing was "
        "fitted to, beside the budget; the layers that were chosen, and the share of the time of "
        "attention and FFNs, forward and backward, that they save. The adapter's dense form loses "
        "nothing by it.",
        table,
        how("experiments.frontier", options, here_and_now()),
    )
    write_text_atomic(options.report, text)


def main() -> None:
    """Run the experiment."""
    options = cli.parse(Options, "experiments.frontier", __doc__)
    options.check()
    options.out.mkdir(parents=True, exist_ok=True)
    console = cli.console()
    console.print(cli.device_line("float32"))
    rows, reports = measure(options)
    table = table_of(rows, f"{options.model}, rows of {options.length} tokens")
    console.print(table)
    write_csv(options.out / "frontier.csv", rows)
    plot(rows, options.out / "frontier.png")
    if options.report is not None:
        write_report(options, table)
    figures = {f"added_{row['budget']:g}": row["added"] for row in rows}
    figures |= {f"saved_{row['budget']:g}": row["saved"] for row in rows}
    more = {"rows": rows, "reports": [report.to_json() for report in reports]}
    write_metrics(options.out, "frontier", options, figures, **more)


if __name__ == "__main__":
    cli.run(main)
