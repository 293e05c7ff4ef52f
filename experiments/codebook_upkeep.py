"""Measure how well codebooks keep up with a model that trains, and which upkeep serves them best.

    python -m experiments.codebook_upkeep --task rte --data-dir DIR --out OUT

Fine-tunes an encoder with SPT. Every so many steps, rows of the validation set go through the model
as it then is, and the share of the attention mass that the kept keys hold is measured with four
sets of codebooks:

* frozen: as they were fitted before training;
* loss: trained by SPT's codebook loss, those that the model itself uses;
* ema: k-means updates with moving averages on the training batches;
* refitted: by k-means on the calibration rows as the model sees them now, the best to hope for;

beside the oracle, which keeps the keys of most mass. A table comes on the terminal, and under --out
a plot and metrics.json.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, UInt8
from rich.table import Table
from tqdm import tqdm

import spt_jax
from experiments import glue
from experiments.attention_capture import (
    LayerActivations,
    Rule,
    layer_tokens,
    measure,
    record_layers,
)
from experiments.glue_tasks import GlueTask
from experiments.methods import Recipe, write_metrics
from experiments.reports import here_and_now, how, page, save_figure
from pallas_kernels import pq_encode
from spt_jax import cli
from spt_jax.calibration import fit_sparse_attention
from spt_jax.finetune.job import OBJECTIVES
from spt_jax.layers import Attention, SparseAttention
from spt_jax.training import Examples, write_text_atomic
from spt_jax.training.data import train_batches
from spt_jax.training.step import Partition, TrainState, partition, start

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Upkeep = Literal["frozen", "loss", "ema", "refitted"]
UPKEEPS: tuple[Upkeep, ...] = ("frozen", "loss", "ema", "refitted")
Shares = dict[str, float]  # captured mass by upkeep, and of the oracle


@dataclass(frozen=True, kw_only=True)
class Options(glue.Inputs, Recipe):
    """Options of the experiment."""

    task: glue.TaskName = "acceptability"
    """GLUE task; acceptability is a small one that needs no data."""
    steps: int | None = 1000
    """Optimizer steps, in place of --epochs."""
    batch_size: int = 16
    """Examples an optimizer step."""
    codebook_loss_weight: float = 0.01
    """Weight of the codebook loss."""
    min_keys: int = 1
    """A query keeps at least so many keys; the default leaves --density alone to decide."""
    granularity: Literal["auto", "token", "tile", "dense"] = "token"
    """Which keys those are."""
    serve: Literal["dense", "sparse", "none"] = "none"
    """Every layer is measured."""
    measure_every: int = 250
    """Steps between measurements."""
    ema_every: int = 10
    """Steps between updates by moving averages."""
    ema_decay: float = 0.9
    """Share of the old averages that stays in an update."""
    rows: int = 16
    """Validation rows, the longest, on which attention is measured."""
    seed: int = 0
    """Seed of fresh weights, k-means and the order of examples."""
    out: Path = Path("runs/codebook-upkeep")
    """Folder of the plot and of metrics.json."""
    report: Path | None = None
    """Markdown file that gets the table, and how it was made."""

    def training(self) -> glue.Options:
        """The options with which `experiments.glue` would train the same model."""
        names = [f.name for f in (*fields(Recipe), *fields(glue.Inputs))]
        return glue.Options(
            **{name: getattr(self, name) for name in names},
            task=self.task,
            method="spt",
            seed=self.seed,
            out=self.out,
        )

    def check(self) -> None:
        """Raise a ValueError for any mistake in the options, before anything is read."""
        if self.task == "all":
            raise ValueError("--task all: choose one task")
        if self.epochs is not None:
            raise ValueError("give --steps, not --epochs")
        for name in ("measure_every", "ema_every", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"--ema-decay must lie in [0, 1), got {self.ema_decay}")
        self.training().check()


def sparse_attentions(model: nnx.Module) -> list[SparseAttention]:
    """Those of all layers, in the model's order."""
    modules = (m for _, m in nnx.iter_modules(model) if isinstance(m, Attention))
    return [m.sparse for m in modules if m.sparse is not None]


def ema_update(
    codebooks: Float[Array, "K M E C"],
    counts: Float[Array, "K M E"],
    x: Float[Array, "B S N H"],
    codes: UInt8[Array, "B S N M"],
    mask: Bool[Array, "B S"] | None = None,
    *,
    decay: float = 0.99,
) -> tuple[Float[Array, "K M E C"], Float[Array, "K M E"]]:
    """One exponential-moving-average k-means step.

    With n_e vectors of sum s_e assigned to codeword e: counts' = decay counts + (1 - decay) n,
    codebooks' = (decay counts codebooks + (1 - decay) s) / counts'. A codeword that has never had a
    vector stays where it is.

    Args:
      codebooks: Codewords.
      counts: Running number of vectors of each codeword.
      x: Vectors; head n uses codebook n // (N // K).
      codes: Their codes, as `pq_encode` returns them.
      mask: False where a token is padding; None for none.
      decay: Share of the old averages that stays, in [0, 1).

    Returns:
      New codebooks and counts.

    References:
      van den Oord et al., "Neural Discrete Representation Learning", arXiv 1711.00937, appendix A.
    """
    batch, length, heads, _ = x.shape
    kv_heads, spaces, num_codewords, codeword_width = codebooks.shape
    groups = (batch, length, kv_heads, heads // kv_heads, spaces)
    members = jax.nn.one_hot(codes.reshape(groups), num_codewords)
    if mask is not None:
        members = jnp.where(mask[:, :, None, None, None, None], members, 0)
    vectors = jax.lax.stop_gradient(x).astype(jnp.float32).reshape(*groups, codeword_width)
    sums = jnp.einsum("bskrme,bskrmc->kmec", members, vectors)
    new_counts = decay * counts + (1 - decay) * members.sum((0, 1, 3))
    totals = (decay * counts)[..., None] * codebooks + (1 - decay) * sums
    seen = new_counts > 0
    means = totals / jnp.where(seen, new_counts, 1)[..., None]
    return jnp.where(seen[..., None], means, codebooks).astype(codebooks.dtype), new_counts


class MovingAverages:
    """Codebooks of all layers, kept up by k-means with exponential moving averages."""

    def __init__(self, model: nnx.Module, tokens: Sequence[LayerActivations]) -> None:
        self.modules = [nnx.clone(module) for module in sparse_attentions(model)]
        self._counts = [
            [jnp.zeros(books.shape[:3]) for books in self._books(module)] for module in self.modules
        ]
        self.update(tokens, decay=0.0)

    def update(self, tokens: Sequence[LayerActivations], *, decay: float) -> None:
        """One update of each codebook with a batch."""
        for module, counts, layer in zip(self.modules, self._counts, tokens, strict=True):
            sides = layer.q[None], layer.k[None] - module.key_center[...]
            for side, (x, books) in enumerate(zip(sides, self._books(module), strict=True)):
                codes = pq_encode(x, books[...])
                books[...], counts[side] = ema_update(
                    books[...], counts[side], x, codes, decay=decay
                )

    @staticmethod
    def _books(module: SparseAttention) -> tuple[nnx.Variable, nnx.Variable]:
        assert module.query_codebooks is not None
        return module.query_codebooks, module.key_codebooks


def longest_rows(examples: Examples, number: int) -> np.ndarray:
    """Token ids of the longest examples, all cut to the shortest of them."""
    lengths = np.asarray(examples.columns["attention_mask"]).sum(1)
    chosen = np.sort(np.argsort(-lengths, kind="stable")[:number])
    return np.asarray(examples.columns["input_ids"])[chosen, : lengths[chosen].min()]


def captured_shares(
    model: nnx.Module,
    books: Mapping[str, Sequence[SparseAttention]],
    rows: np.ndarray,
    num_keys: int,
) -> Shares:
    """Mass that a model's attention on rows without padding keeps by each set of codebooks.

    Args:
        model: as it is now.
        books: sets of codebooks by name, of all layers.
        rows: token ids, `[n, S]`.
        num_keys: keys that a query keeps.

    Returns:
        Shares by name, and the oracle's.
    """
    layers = record_layers(model, rows)
    causal = next(iter(books.values()))[0].causal
    capture = partial(measure, layers, num_keys=num_keys, causal=causal)
    kept = {name: capture(Rule(), sparse=sparse).share for name, sparse in books.items()}
    return {**kept, "oracle": capture(Rule(kind="oracle")).share}


def refitted(model: nnx.Module, calibration: Mapping[str, Any], seed: int) -> list[SparseAttention]:
    """Codebooks fitted to the model as it is."""
    return [
        fit_sparse_attention(
            *layer, config=module.config, causal=module.causal, key=jax.random.key(seed + i)
        )
        for i, (layer, module) in enumerate(
            zip(layer_tokens(model, calibration), sparse_attentions(model), strict=True)
        )
    ]


def train_and_measure(
    task: GlueTask, options: Options, data: glue.Data
) -> Iterator[tuple[int, Shares, float]]:
    """Step, captured shares, and mean training loss since the measurement before."""
    training = options.training()
    config = training.train_config("spt")
    job = glue.job_of(task, "spt", training, options.out)
    rngs = nnx.Rngs(options.seed)
    base = job.load(rngs)
    job.adapt(base, data.train, rngs=rngs)
    model: nnx.Module = base
    calibration = job.calibration(data.train).columns
    rows = longest_rows(next(iter(data.validation.values())), options.rows)
    num_keys = max(1, round(options.density * rows.shape[1]))
    frozen_books = [nnx.clone(module) for module in sparse_attentions(model)]
    averages = MovingAverages(model, layer_tokens(model, calibration))
    parts = partition(model, "adapter")
    total = config.total_steps(len(data.train))
    state, run = start(parts, config, total_steps=total, objective=OBJECTIVES[job.task])
    step = jax.jit(run, donate_argnums=0)
    loss_tokens = frozen_books[0].config.codebook_loss_tokens  # as many for the averages
    batches = train_batches(data.train, config.batch_size, seed=options.seed)
    losses: list[float] = []
    bar = tqdm(range(total + 1), unit="step", disable=not sys.stderr.isatty())
    for number in bar:
        if number % options.measure_every == 0 or number == total:
            model = current(parts, state)
            books = {
                "frozen": frozen_books,
                "loss": sparse_attentions(model),
                "ema": averages.modules,
                "refitted": refitted(model, calibration, options.seed),
            }
            loss = float(np.mean(losses)) if losses else float("nan")
            yield number, captured_shares(model, books, rows, num_keys), loss
            losses = []
        if number == total:
            return
        batch = next(batches)
        if number % options.ema_every == 0 and number:
            tokens = layer_tokens(current(parts, state), batch, most=loss_tokens)
            averages.update(tokens, decay=options.ema_decay)
        state, values = step(state, parts.frozen, batch)
        losses.append(float(values["task_loss"]))
        bar.set_postfix_str(f"loss {losses[-1]:.4f}", refresh=False)


def current(parts: Partition, state: TrainState) -> nnx.Module:
    """The model with the parameters of `state`."""
    return parts.merge(state.params, parts.frozen)


def results_table(found: Mapping[int, Shares], losses: Mapping[int, float]) -> Table:
    """One row a measurement."""
    table = Table(title="Attention mass kept while a model trains, mean of layers and heads")
    for header in ("step", *UPKEEPS, "oracle", "train loss"):
        table.add_column(header, justify="right")
    for step, shares in found.items():
        cells = [f"{shares[name]:.4f} ({shares[name] / shares['oracle']:.1%})" for name in UPKEEPS]
        loss = "" if math.isnan(losses[step]) else f"{losses[step]:.4f}"
        table.add_row(str(step), *cells, f"{shares['oracle']:.4f}", loss)
    return table


def plot(path: Path, found: Mapping[int, Shares]) -> None:
    """Share of the oracle's mass against steps."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in UPKEEPS:
        ratios = [shares[name] / shares["oracle"] for shares in found.values()]
        axes.plot(list(found), ratios, marker="o", label=name)
    axes.set(xlabel="step", ylabel="captured mass / oracle's")
    axes.legend()
    save_figure(figure, path)


def main() -> None:
    """Run the experiment."""
    options = cli.parse(Options, "experiments.codebook_upkeep", __doc__)
    options.check()
    options.out.mkdir(parents=True, exist_ok=True)
    task = glue.named_task(options.task)
    config = glue.read_model_config(options)
    data = glue.load_data(task, options, spt_jax.load_tokenizer(options.model), config)
    found: dict[int, Shares] = {}
    losses: dict[int, float] = {}
    for step, shares, loss in train_and_measure(task, options, data):
        found[step], losses[step] = shares, loss
        shown = ", ".join(f"{name} {share:.4f}" for name, share in shares.items())
        tqdm.write(f"step {step}: {shown}", file=sys.stderr)
    table = results_table(found, losses)
    cli.console().print(table)
    if options.report is not None:
        conditions = how(
            "experiments.codebook_upkeep",
            options,
            [
                f"Model {options.model}, task {options.task}; batches of {options.batch_size}, "
                f"texts of at most {data.train.length} tokens; density {options.density:g}; "
                f"measured on {options.rows} of the longest rows; in brackets the share of the "
                "oracle's mass.",
                *here_and_now(),
            ],
        )
        write_text_atomic(options.report, page("Upkeep of codebooks", table, conditions))
    plot(options.out / "capture.png", found)
    last = found[max(found)]
    figures = {f"capture_{name}": share for name, share in last.items()}
    write_metrics(
        options.out,
        "codebook_upkeep",
        options,
        figures,
        steps=[{"step": step, **shares} for step, shares in found.items()],
    )


if __name__ == "__main__":
    cli.run(main)
