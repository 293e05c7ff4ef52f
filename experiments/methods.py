"""What experiments that compare fine-tuning methods share: options, tables and records."""

from __future__ import annotations

import ctypes
import gc
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import jax
import tyro
from rich.table import Table

import spt_jax
from spt_jax import cli
from spt_jax.config import Form, LearningRateMultipliers
from spt_jax.forms import FORMS
from spt_jax.models import DecoderConfig
from spt_jax.models.config import read_config
from spt_jax.models.hub import CONFIG_FILES, find_files
from spt_jax.processes import is_first, several, start_processes
from spt_jax.sharding import make_mesh, parse_mesh
from spt_jax.training import (
    TrainResult,
    environment,
    finite,
    form_of,
    write_json_atomic,
)

Method = Literal[
    "spt",
    "lora",
    "full",
    "spt-dense-attention",
    "spt-dense-ffn",
    "spt-routed-ffn",
    "spt-match-count",
    "spt-random-router",
]
Family = Literal["spt", "lora", "full"]

DESCRIPTIONS: Mapping[Method, str] = {
    "full": "all weights, nothing added",
    "lora": "LoRA alone",
    "spt": "LoRA and, where they save time within the budget of --serve, sparse parts",
    "spt-dense-attention": "LoRA and a routed FFN",
    "spt-dense-ffn": "LoRA and sparse attention",
    "spt-routed-ffn": "LoRA, sparse attention and a routed FFN",
    "spt-match-count": "spt that selects keys by the paper's match count",
    "spt-random-router": "spt with the paper's start of the FFN: random blocks, random router",
}
MOST_LOSS_ADDED = 0.1  # by the sparse form, in nats, before a warning
LEARNING_RATES: Mapping[Family, float] = {"spt": 1e-3, "lora": 1e-3, "full": 5e-5}


def family(method: Method) -> Family:
    """The method by whose recipe `method` trains: spt for spt's ablations."""
    if method == "lora" or method == "full":
        return method
    return "spt"


def parse_methods(names: str, option: str) -> tuple[Method, ...]:
    """Methods named by a command-line option, separated by commas.

    Raises:
        ValueError: there is no such method.
    """
    return cli.known_names(names, get_args(Method), what="method", where=f" in {option} {names}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What all methods have in common: budget, optimizer, sizes of the parts."""

    epochs: float | None = None
    """Passes over the training examples; by default 3, and 1 for the built-in task of glue."""
    steps: int | None = None
    """Optimizer steps, in place of --epochs."""
    batch_size: int = 32
    """Examples an optimizer step."""
    accumulation: int = 1
    """Microbatches into which a batch is cut to save memory."""
    group_by_length: bool = False
    """Put examples of like length into a batch and pad it less: faster where lengths differ."""
    learning_rate: float | None = None
    """Peak learning rate; by default 1e-3 for spt and lora, and for full 5e-5."""
    lora_learning_rate_multiplier: float = 1.0
    """Factor on the learning rate of LoRA factors."""
    router_learning_rate_multiplier: float = 0.01
    """Factor on the learning rate of FFN routers."""
    codebook_learning_rate_multiplier: float = 1.0
    """Factor on the learning rate of codewords, which train with --codebook-loss-weight alone."""
    head_learning_rate_multiplier: float = 1.0
    """Factor on the learning rate of the task head."""
    warmup: float = 0.06
    """Warm-up: share of the steps below 1, number of steps from 1 on."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay of the learning rate."""
    eval_every: int | None = None
    """Steps between evaluations; by default once an epoch."""
    result: Literal["last", "best"] = "last"
    """Which evaluation the table shows."""
    evaluate_as: Annotated[Form, tyro.conf.arg(name="as")] = "dense"
    """Form of the model that is judged: dense, as other tools serve the adapter, or sparse, as it
    trains. Tables and metrics.json have both."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype, and that of frozen weights."""
    remat: bool = False
    """Recompute activations in the backward pass to save memory."""

    mesh: str | None = None
    """Devices to train on together, such as data=4 or fsdp=4,tensor=2; -1 takes what remains."""

    serve: Literal["dense", "sparse", "none"] = "dense"
    """What spt is chosen for, layer by layer and by measurement: the form in which the model will
    be used, which says how much loss its sparse form may cost. none gives every layer the parts
    that the options below have, as the ablations of spt have them."""
    loss_budget: float | None = None
    """What spt's sparse form may lose, in place of the budget of --serve: nats a token, or for
    encoders the relative change of the final hidden states."""
    rank: int = 16
    """LoRA rank."""
    lora_dropout: float = 0.0
    """Probability with which an input feature of a LoRA factor is dropped."""
    density: float = 1 / 8
    """Share of the keys that a query attends to."""
    min_keys: int = spt_jax.SparseAttentionConfig.min_keys
    """A query attends to at least so many keys."""
    granularity: Literal["auto", "token", "tile", "dense"] = "auto"
    """Which keys that is: "token", each query's own; "tile", those of 64 queries; "dense", all; or
    auto: dense up to 1,024 tokens, where sparse attention gains nothing, tile above."""
    codebook_loss_weight: float = spt_jax.SparseAttentionConfig.codebook_loss_weight
    """Weight of the paper's codebook loss, there 0.01; 0 leaves codebooks as they were fitted."""
    ffn: Literal["routed", "dense"] = "routed"
    """Whether spt routes the FFN."""
    num_blocks: int = 4
    """Blocks of FFN units."""
    active_blocks: int = 2
    """Blocks that a token computes."""
    absent_rank: int = spt_jax.RoutedFFNConfig.absent_rank
    """Rank of the linear map that stands for a left-out block."""


@dataclass(frozen=True, kw_only=True)
class MethodOptions(Recipe):
    """Options of an experiment that compares methods in one run."""

    method: str = "spt,lora"
    """Methods to compare, separated by commas: spt, lora, full, and variants of spt:
    spt-dense-attention, spt-dense-ffn, spt-routed-ffn, spt-match-count, spt-random-router."""
    seed: int = 0
    """Seed of fresh weights, the order of examples, and dropout."""
    patience: int | None = None
    """Stop after so many evaluations without improvement."""
    resume: bool = False
    """Go on with the run in --out."""
    overwrite: bool = False
    """Delete the run in --out."""
    coordinator: str | None = None
    """Train in several processes that are all started with this command: address and port of
    process 0, or auto to find the processes in the environment of a cluster."""
    num_processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """Which of them this is, from 0."""

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods named by `method`, in order."""
        return parse_methods(self.method, "--method")

    @property
    def default_epochs(self) -> float:
        """Epochs where neither --epochs nor --steps is given."""
        return 3.0

    def default_learning_rate(self, method: Method) -> float:
        """Peak learning rate where --learning-rate is not given."""
        return LEARNING_RATES[family(method)]

    def spt_config(self, method: Method) -> spt_jax.SPTConfig | None:
        """What `method` adds to the model; None for nothing."""
        lora = spt_jax.LoRAConfig(rank=self.rank, dropout=self.lora_dropout)
        attention = spt_jax.SparseAttentionConfig(
            density=self.density,
            min_keys=self.min_keys,
            granularity=self.granularity,
            codebook_loss_weight=self.codebook_loss_weight,
        )
        ffn = spt_jax.RoutedFFNConfig(
            num_blocks=self.num_blocks,
            active_blocks=self.active_blocks,
            absent_rank=self.absent_rank,
        )
        both = spt_jax.SPTConfig(lora=lora, attention=attention, ffn=ffn, serve=None)
        spt = both if self.ffn == "routed" else replace(both, ffn=None)
        match method:
            case "spt":
                serve = None if self.serve == "none" else self.serve
                return replace(spt, serve=serve, loss_budget=self.loss_budget)
            case "spt-routed-ffn":
                return both
            case "lora":
                return replace(spt, attention=None, ffn=None)
            case "full":
                return None
            case "spt-dense-attention":
                return replace(both, attention=None)
            case "spt-dense-ffn":
                return replace(spt, ffn=None)
            case "spt-match-count":
                paper = replace(attention, rule="match_count", codeword_width=8)
                return replace(spt, attention=paper)
            case "spt-random-router":
                return replace(both, ffn=replace(ffn, calibration="random"))

    def train_config(self, method: Method) -> spt_jax.TrainConfig:
        """How `method` trains."""
        rate = self.learning_rate
        return spt_jax.TrainConfig(
            trainable="all" if method == "full" else "adapter",
            epochs=self.default_epochs if self.epochs is None else self.epochs,
            steps=self.steps,
            batch_size=self.batch_size,
            accumulation=self.accumulation,
            group_by_length=self.group_by_length,
            learning_rate=self.default_learning_rate(method) if rate is None else rate,
            learning_rate_multipliers=LearningRateMultipliers(
                lora=self.lora_learning_rate_multiplier,
                router=self.router_learning_rate_multiplier,
                codebook=self.codebook_learning_rate_multiplier,
                head=self.head_learning_rate_multiplier,
            ),
            warmup=self.warmup,
            schedule=self.schedule,
            remat=self.remat,
            eval_every=self.eval_every,
            patience=self.patience,
            result=self.result,
            evaluate_as=self.evaluate_as,
            seed=self.seed,
            mesh=self.mesh_config(),
        )

    def mesh_config(self) -> spt_jax.MeshConfig | None:
        """The mesh asked for; without one, several processes cut batches."""
        if self.mesh is None:
            return spt_jax.MeshConfig() if several() else None
        return parse_mesh(self.mesh)

    def check(self) -> None:
        """Raise a ValueError for any mistake in the options, before anything is read."""
        if self.resume and self.overwrite:
            raise ValueError("give --resume or --overwrite, not both")
        for method in self.methods:
            self.spt_config(method)
            self.train_config(method)
        if self.mesh is not None:
            make_mesh(parse_mesh(self.mesh))

    def start(self) -> None:
        """Join the other processes, whose devices a mesh counts too, and check the options.

        Raises:
            ValueError: an option is wrong.
            ConnectionError: the processes did not come together.
        """
        start_processes(self.coordinator, self.num_processes, self.process_id)
        if not is_first():
            logging.getLogger("spt_jax").setLevel(logging.WARNING)
        self.check()


def decoder_config(source: str | Path) -> DecoderConfig:
    """The configuration of a causal language model, without its weights.

    Raises:
        ValueError: it is another kind of model.
    """
    config = read_config(find_files(source, files=CONFIG_FILES))
    if not isinstance(config, DecoderConfig):
        raise ValueError(f"{source} is a {config.model_type} encoder, not a causal language model")
    return config


def release() -> None:
    """Give up what a finished model leaves behind, before the next one needs the memory.

    That is arrays in cycles of references, compiled programs, and freed memory that the C library
    keeps for itself.
    """
    gc.collect()
    jax.clear_caches()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def results_table(title: str, results: Mapping[str, TrainResult]) -> Table:
    """One row a method; a metric has a column for each form that any of the models has."""
    table = Table(title=title)
    first = next(iter(results.values())).metrics
    columns = {
        f"{name}_{form}": f"{name}, {form}"
        for name in first
        if form_of(name) is None and not name.startswith("eval_loss")
        for form in reversed(FORMS)
        if any(f"{name}_{form}" in result.metrics for result in results.values())
    }
    headers = [
        "method",
        *columns.values(),
        "train loss",
        "step ms",
        "adapt s",
        "tokens/s",
        "peak MB",
        "trainable",
    ]
    for header in headers:
        table.add_column(header, justify="left" if header == "method" else "right")
    for method, result in results.items():
        table.add_row(
            method,
            *(f"{result.metrics[name]:.4f}" if name in result.metrics else "-" for name in columns),
            f"{result.train_loss:.4f}",
            f"{result.step_ms:.0f}",
            "-" if result.adapt_s is None else f"{result.adapt_s:.0f}",
            f"{result.tokens_per_s:.0f}",
            f"{result.peak_bytes / 1e6:.0f}",
            f"{result.trainable_parameters:,}",
        )
    return table


def speed_note(results: Mapping[str, TrainResult]) -> str | None:
    """A sentence on SPT's step beside LoRA's, where both ran, with what it reached."""
    if not {"spt", "lora"} <= results.keys():
        return None
    spt, lora = results["spt"], results["lora"]
    ratio = lora.step_ms / spt.step_ms
    speed = f"{ratio:.2f}x as fast as" if ratio >= 1 else f"{1 / ratio:.2f}x as slow as"
    name = next(iter(spt.metrics))
    return (
        f"an spt step is {speed} a lora step; {name} {spt.metrics[name]:.4f} beside "
        f"{lora.metrics[name]:.4f}"
    )


def form_note(results: Mapping[str, TrainResult]) -> str | None:
    """A warning where a model's sparse form predicts clearly worse than its dense form."""
    added = {
        method: max(
            x - result.metrics[name.replace("_sparse", "_dense")]
            for name, x in result.metrics.items()
            if name.startswith("eval_loss") and form_of(name) == "sparse"
        )
        for method, result in results.items()
        if any(form_of(name) == "sparse" for name in result.metrics)
    }
    worse = [f"{method} by {x:.2f}" for method, x in added.items() if x > MOST_LOSS_ADDED]
    if not worse:
        return None
    return f"sparse, the loss is higher than dense ({', '.join(worse)}): serve the adapter dense"


def write_metrics(
    out: Path, experiment: str, options: Any, figures: Mapping[str, Any], **more: Any
) -> None:
    """Write `metrics.json`: the options, the environment, the figures, and what else is given.

    JSON has no infinity: an infinite figure, as a perplexity may be, is written as null.
    Of several processes, the first one does.
    """
    if not is_first():
        return
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
            "figures": finite(figures),
            **more,
        },
    )
