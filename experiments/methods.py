"""What experiments that compare fine-tuning methods share: options, tables and records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rich.table import Table

import spt_jax
from spt_jax.training import TrainResult, environment, write_json_atomic

Method = Literal["spt", "lora", "full"]

LEARNING_RATES: Mapping[Method, float] = {"spt": 1e-3, "lora": 1e-3, "full": 5e-5}


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """Options of every such experiment."""

    method: str = "spt,lora"
    """Methods to compare, separated by commas: spt, lora, full."""
    resume: bool = False
    """Go on with the run in --out."""
    overwrite: bool = False
    """Delete the run in --out."""

    epochs: float | None = None
    """Passes over the training examples; by default 3, and 1 for the built-in task of glue."""
    steps: int | None = None
    """Optimizer steps, in place of --epochs."""
    batch_size: int = 32
    """Examples an optimizer step."""
    accumulation: int = 1
    """Microbatches into which a batch is cut to save memory."""
    learning_rate: float | None = None
    """Peak learning rate; by default 1e-3 for spt and lora, and for full 5e-5 in glue and 1e-4 in
    wikitext."""
    warmup: float = 0.06
    """Warm-up: share of the steps below 1, number of steps from 1 on."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay of the learning rate."""
    eval_every: int | None = None
    """Steps between evaluations; by default once an epoch."""
    patience: int | None = None
    """Stop after so many evaluations without improvement."""
    result: Literal["last", "best"] = "last"
    """Which evaluation the table shows."""
    seed: int = 0
    """Seed of fresh weights, the order of examples, and dropout."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype, and that of frozen weights."""
    remat: bool = False
    """Recompute activations in the backward pass to save memory."""

    rank: int = 16
    """LoRA rank."""
    density: float = 1 / 8
    """Share of the keys that a query attends to."""
    num_blocks: int = 4
    """Blocks of FFN units."""
    active_blocks: int = 2
    """Blocks that a token computes."""

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods named by `method`, in order."""
        names = tuple(dict.fromkeys(name.strip() for name in self.method.split(",")))
        unknown = [name for name in names if name not in get_args(Method)]
        if unknown:
            raise ValueError(
                f"unknown method {unknown[0]!r} in --method {self.method}; choose from "
                f"{', '.join(get_args(Method))}"
            )
        return names  # type: ignore[return-value]

    @property
    def default_epochs(self) -> float:
        """Epochs where neither --epochs nor --steps is given."""
        return 3.0

    def default_learning_rate(self, method: Method) -> float:
        """Peak learning rate where --learning-rate is not given."""
        return LEARNING_RATES[method]

    def spt_config(self, method: Method) -> spt_jax.SPTConfig | None:
        """What `method` adds to the model; None for nothing."""
        lora = spt_jax.LoRAConfig(rank=self.rank)
        if method == "full":
            return None
        if method == "lora":
            return spt_jax.SPTConfig(lora=lora, attention=None, ffn=None)
        return spt_jax.SPTConfig(
            lora=lora,
            attention=spt_jax.SparseAttentionConfig(density=self.density),
            ffn=spt_jax.RoutedFFNConfig(
                num_blocks=self.num_blocks, active_blocks=self.active_blocks
            ),
        )

    def train_config(self, method: Method) -> spt_jax.TrainConfig:
        """How `method` trains."""
        rate = self.learning_rate
        return spt_jax.TrainConfig(
            trainable="all" if method == "full" else "adapter",
            epochs=self.default_epochs if self.epochs is None else self.epochs,
            steps=self.steps,
            batch_size=self.batch_size,
            accumulation=self.accumulation,
            learning_rate=self.default_learning_rate(method) if rate is None else rate,
            warmup=self.warmup,
            schedule=self.schedule,
            remat=self.remat,
            eval_every=self.eval_every,
            patience=self.patience,
            result=self.result,
            seed=self.seed,
        )

    def check(self) -> None:
        """Raise a ValueError for any mistake in the options, before anything is read."""
        for method in self.methods:
            self.spt_config(method)
            self.train_config(method)


def results_table(title: str, results: Mapping[str, TrainResult]) -> Table:
    """One row a method."""
    table = Table(title=title)
    metrics = [name for name in next(iter(results.values())).metrics if name != "eval_loss"]
    headers = ["method", *metrics, "train loss", "step ms", "tokens/s", "peak MB", "trainable"]
    for header in headers:
        table.add_column(header, justify="left" if header == "method" else "right")
    for method, result in results.items():
        table.add_row(
            method,
            *(f"{result.metrics[name]:.4f}" for name in metrics),
            f"{result.train_loss:.4f}",
            f"{result.step_ms:.0f}",
            f"{result.tokens_per_s:.0f}",
            f"{result.peak_bytes / 1e6:.0f}",
            f"{result.trainable_parameters:,}",
        )
    return table


def speed_note(results: Mapping[str, TrainResult]) -> str | None:
    """A sentence on SPT's step beside LoRA's, where both ran."""
    if not {"spt", "lora"} <= results.keys():
        return None
    ratio = results["lora"].step_ms / results["spt"].step_ms
    return f"an spt step is {ratio:.2f}x as fast as a lora step"


def write_metrics(
    out: Path, experiment: str, options: Any, figures: Mapping[str, Any], **more: Any
) -> None:
    """Write `metrics.json`: the options, the environment, the figures, and what else is given."""
    configuration = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in asdict(options).items()
    }
    write_json_atomic(
        out / "metrics.json",
        {
            "experiment": experiment,
            "configuration": configuration,
            "seed": configuration.get("seed"),
            **environment(),
            "figures": figures,
            **more,
        },
    )
