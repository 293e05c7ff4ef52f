"""Fine-tunes a decoder with every method for the same time, and plots loss against seconds.

    python -m experiments.time_to_quality --model smollm2 --text-file FILE --lengths 2048,4096
    python -m experiments.time_to_quality --model ID_OR_DIR --text-file FILE --eval-file FILE

Every method trains for --seconds at each length of a row, with each of --learning-rates, which stay
constant after a warm-up, so that every moment of a run is the end of a shorter one. On the way it
is judged by the mean loss on held-out text of its dense form, the adapter on the dense model, which
is what people deploy; at the end, by that of its sparse form too. A method's best rate counts.
Compilation, of all methods at once, evaluation and calibration are left out of --seconds; the time
that a method takes to LoRA's last loss is given with its calibration and without. Rows are cut from
one stream of tokens and have no padding, so that dense attention has no mask. Writes
time_to_quality.csv after every run and, last, metrics.json and time_to_quality.png to --out.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib import pyplot as plt
from rich.table import Table
from tqdm import tqdm

import spt_jax
from experiments.corpora import cpython_documentation
from experiments.measurement import FAILURES, PEAK, failure_of, in_threads, peak_bytes
from experiments.methods import (
    Method,
    MethodOptions,
    decoder_config,
    write_metrics,
)
from experiments.reports import save_figure, write_csv
from spt_jax import cli
from spt_jax.config import Form
from spt_jax.forms import has_sparse_parts
from spt_jax.models import Decoder
from spt_jax.training import (
    Examples,
    encode_documents,
    evaluator,
    next_token,
    partition,
    read_text,
    start,
    train_batches,
)

METHODS: tuple[Method, ...] = tuple(name for name in get_args(Method) if name != "full")
MOST_STEPS = 1_000_000  # the time is over before

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the comparison."""

    model: str = "smollm2"
    """Hugging Face directory, GGUF file or hub id of a causal language model."""
    text_file: Path | None = None
    """UTF-8 text to fine-tune on; by default CPython's documentation."""
    eval_file: Path | None = None
    """UTF-8 text to evaluate on; by default the end of --text-file."""
    methods: str = "lora,spt"
    """Methods to compare, separated by commas: lora, spt, and variants of spt."""
    lengths: str = "2048"
    """Tokens of a row, separated by commas."""
    seconds: float = 600.0
    """Time that each method trains for, with each learning rate."""
    learning_rates: str = "5e-4,1e-3,2e-3"
    """Learning rates, separated by commas."""
    warmup_steps: int = 3
    """Steps after which the learning rate has its value."""
    evaluations: int = 6
    """Evaluations of a run, spread over its time."""
    step_tokens: int = 2048
    """Tokens of an optimizer step: so many rows as they make, at least one."""
    eval_tokens: int = 8192
    """Tokens that are held out, at least one row."""
    calibration_tokens: int = 4096
    """Tokens that SPT is calibrated on, at least two rows."""
    serve: Literal["dense", "sparse", "none"] = "dense"
    """Whose budget spt keeps to, see experiments.glue; none has the parts below in every layer."""
    budgets: str = ""
    """Budgets that spt is tried with beside, separated by commas, each as a method of its own."""
    density: float = spt_jax.SparseAttentionConfig.density
    """Share of the keys that a query of spt attends to."""
    ffn: Literal["routed", "dense"] = "dense"
    """Whether spt may route the FFN."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype, and that of frozen weights."""
    seed: int = 0
    """Seed of adapters and the order of rows."""
    out: Path = Path("runs/time-to-quality")
    """Folder for the results."""

    def check(self) -> None:
        """Raise a ValueError for any mistake in the options."""
        cli.known_names(self.methods, METHODS, what="method", where=" in --methods")
        positive = "seconds", "warmup_steps", "evaluations"
        for name in (*positive, "step_tokens", "eval_tokens", "calibration_tokens"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be above 0, got {getattr(self, name)}"
                )
        self.variants()
        self.row_lengths()
        self.rates()

    def variants(self) -> dict[str, spt_jax.SPTConfig]:
        """What the methods, and spt with other budgets, add to the model."""
        options = MethodOptions(density=self.density, ffn=self.ffn, serve=self.serve)
        methods = cli.known_names(self.methods, METHODS, what="method")
        configs = {name: options.spt_config(name) for name in methods}
        found = {name: config for name, config in configs.items() if config is not None}
        for word in cli.distinct_names(self.budgets) if self.budgets else ():
            try:
                tried = replace(options, loss_budget=float(word)).spt_config("spt")
            except ValueError:
                raise ValueError(f"--budgets takes numbers from 0 on, got {word!r}") from None
            assert tried is not None
            found[f"spt, budget {word}"] = tried
        return found

    def row_lengths(self) -> list[int]:
        """Tokens of a row."""
        words = cli.distinct_names(self.lengths)
        if not all(word.isdecimal() and int(word) > 1 for word in words):
            raise ValueError(f"--lengths takes numbers above 1, got {self.lengths!r}")
        return [int(word) for word in words]

    def rates(self) -> list[float]:
        """Learning rates."""
        try:
            rates = [float(word) for word in cli.distinct_names(self.learning_rates)]
        except ValueError:
            rates = [0.0]
        if not all(0 < rate < float("inf") for rate in rates):
            raise ValueError(f"--learning-rates takes numbers above 0, got {self.learning_rates!r}")
        return rates


def unmasked(model: Any, batch: Any, dropout_key: jax.Array | None) -> Any:
    """`next_token` of rows without padding."""
    return next_token(model, {**batch, "attention_mask": None}, dropout_key)


def rows_of(ids: np.ndarray, length: int, name: str) -> Examples:
    """Rows of `length` tokens, one after the other; what is left over is dropped."""
    number = (len(ids) - 1) // length
    inputs, labels = (
        ids[shift : number * length + shift].reshape(number, length).astype(np.int32)
        for shift in (0, 1)
    )
    ones = np.ones_like(inputs)
    return Examples(
        {
            "input_ids": inputs,
            "label": labels,
            "attention_mask": ones,
            "weight": ones.astype(np.float32),
        },
        name,
    )


def read_tokens(options: Options) -> tuple[np.ndarray, np.ndarray | None]:
    """All tokens of the text, documents one after the other; those of --eval-file likewise."""
    tokenizer = spt_jax.load_tokenizer(options.model)

    def tokens(texts: Sequence[str]) -> np.ndarray:
        documents = encode_documents(texts, tokenizer, name="text")
        return np.concatenate([document.ids for document in documents])

    texts = cpython_documentation() if options.text_file is None else read_text(options.text_file)
    held_out = None if options.eval_file is None else tokens(read_text(options.eval_file))
    return tokens(texts), held_out


def split(
    ids: np.ndarray, held_out: np.ndarray | None, length: int, options: Options
) -> tuple[Examples, Examples]:
    """Rows to train and to evaluate on; the latter the end of the text, or the start of another.

    Raises:
        ValueError: a text is too short.
    """
    number = max(1, options.eval_tokens // length) * length + 1
    if held_out is None:
        ids, held_out = ids[:-number], ids[-number:]
    for name, found in {"text": ids, "evaluation text": held_out}.items():
        if len(found) <= length:
            raise ValueError(
                f"the {name} has {len(found)} tokens, and rows of {length} need {length + 1}; give "
                "a longer one, or shorter --lengths"
            )
    return (
        rows_of(ids, length, "training text"),
        rows_of(held_out[:number], length, "evaluation text"),
    )


def load(source: str | Path, options: Options) -> Decoder:
    """The dense model."""
    model = spt_jax.load_pretrained(
        source, task="causal-lm", dtype=options.dtype, param_dtype=options.dtype
    )
    assert isinstance(model, Decoder)
    return model


@dataclass(kw_only=True)
class Training:
    """A method about to train.

    Attributes:
        parts: the adapted model, cut in what trains and what is frozen.
        begin: gives the state before the first step.
        step: `(rate, state, frozen, batch)`, the training step.
        batches: gives them, endless.
        judges: give the metrics of each form, dense first.
        calibrated_s: time that adapting took.
        chosen: what it made sparse.
    """

    parts: Any
    begin: Callable[[], Any]
    step: Callable[..., Any]
    batches: Callable[[], Iterator[Any]]
    judges: dict[Form, Callable[[Any], dict[str, float]]]
    calibrated_s: float
    chosen: str


def prepared(
    config: spt_jax.SPTConfig, train: Examples, evaluation: Examples, options: Options
) -> Training:
    """The model with a method's adapter, and its training step."""
    model = load(options.model, options)
    begun = time.perf_counter()
    few = np.arange(min(len(train), max(2, options.calibration_tokens // train.length)))
    calibration = train.take(few).columns
    rngs = nnx.Rngs(options.seed)
    model = spt_jax.adapt(model, config, calibration_batch=calibration, rngs=rngs)
    jax.block_until_ready(nnx.state(model))
    calibrated_s = time.perf_counter() - begun
    forms: tuple[Form, ...] = ("dense", "sparse") if has_sparse_parts(model) else ("dense",)
    # The rate multiplies whole updates, which are proportional to it, so one program serves all.
    train_config = spt_jax.TrainConfig(
        steps=MOST_STEPS, learning_rate=1.0, schedule="constant", warmup=options.warmup_steps,
        seed=options.seed,
    )  # fmt: skip
    batch_size = max(1, options.step_tokens // train.length)
    parts = partition(model, "adapter")
    step: Any = start(parts, train_config, total_steps=MOST_STEPS, objective=unmasked)[1]
    optimizer = step.keywords["optimizer"]

    def begin() -> Any:
        fresh = replace(parts, params=jax.tree.map(jnp.copy, parts.params))
        return start(fresh, train_config, total_steps=MOST_STEPS, objective=unmasked)[0]

    def run_step(rate: jax.Array, *arguments: Any) -> Any:
        def update(*given: Any) -> Any:
            updates, state = optimizer.update(*given)
            return jax.tree.map(lambda u: rate * u, updates), state

        scaled = optax.GradientTransformation(optimizer.init, update)
        return step(*arguments, optimizer=scaled)

    return Training(
        parts=parts,
        begin=begin,
        step=run_step,
        batches=partial(train_batches, train, batch_size, seed=options.seed),
        judges={
            form: evaluator(parts, evaluation, objective=unmasked, batch_size=batch_size, form=form)
            for form in forms
        },
        calibrated_s=calibrated_s,
        chosen=chosen_of(model),
    )


def chosen_of(model: Decoder) -> str:
    """What of a model is sparse."""
    report: spt_jax.AdaptationReport = getattr(model, "adaptation")  # noqa: B009
    sparse = [f"{n} x {name}" for name, n in report.counts().items() if not name.endswith("dense")]
    return "; ".join(sparse) or "nothing: it trains as lora does"


def compiled_step(training: Training) -> tuple[jax.stages.Compiled, float]:
    """The step as a program, and the seconds that compiling it took."""
    begun = time.perf_counter()
    jitted = jax.jit(training.step, donate_argnums=1)
    batch = next(training.batches())
    lowered = jitted.lower(np.float32(0), training.begin(), training.parts.frozen, batch)
    return lowered.compile(), time.perf_counter() - begun


def trained(
    training: Training, compiled: jax.stages.Compiled, rate: float, options: Options
) -> Row:
    """Train for the time given, and evaluate on the way; losses in nats a token."""
    state, batches = training.begin(), training.batches()

    def loss(form: Form) -> float:
        return training.judges[form](state.params)["eval_loss"]

    curve = [(0.0, loss("dense"))]
    batch = jax.device_put(next(batches))
    steps, trained_s = 0, 0.0
    while trained_s < options.seconds:
        begun = time.perf_counter()
        state, metrics = compiled(np.float32(rate), state, training.parts.frozen, batch)
        batch = jax.device_put(next(batches))
        finite = bool(metrics["finite"])  # waits for the step
        trained_s += time.perf_counter() - begun
        steps += 1
        if not finite:
            raise RuntimeError(f"the loss of step {steps} at rate {rate} is not finite")
        if trained_s >= len(curve) * options.seconds / options.evaluations:
            curve.append((trained_s, loss("dense")))
    return {
        "steps": steps,
        "trained_s": trained_s,
        "step_ms": 1e3 * trained_s / steps,
        "loss_before": curve[0][1],
        "loss_dense": curve[-1][1],
        **{f"loss_{form}": loss(form) for form in training.judges if form != "dense"},
        "curve": curve,
    }


def seconds_to(loss: float, curve: Sequence[tuple[float, float]]) -> float | None:
    """When a curve first comes down to a loss, between its points on straight lines.

    Example:
        >>> seconds_to(2.5, [(0.0, 4.0), (10.0, 3.0), (20.0, 2.0)])
        15.0
        >>> seconds_to(1.0, [(0.0, 4.0), (10.0, 3.0)]) is None
        True
    """
    if curve[0][1] <= loss:
        return curve[0][0]
    for (first, above), (second, below) in itertools.pairwise(curve):
        if below <= loss:
            return first + (second - first) * (above - loss) / (above - below)
    return None


def best_rows(rows: Sequence[Row]) -> list[Row]:
    """Of each length and method the run that ended best, with its way to LoRA's last loss."""
    done = [row for row in rows if "failure" not in row]
    best: dict[tuple[int, str], Row] = {}
    for row in sorted(done, key=lambda row: row["loss_dense"]):
        best.setdefault((row["length"], row["method"]), row)
    found = []
    for (length, _), row in sorted(best.items(), key=lambda item: rows.index(item[1])):
        lora, row = best.get((length, "lora")), dict(row)
        if lora is not None:
            without = seconds_to(lora["loss_dense"], row["curve"])
            row["seconds_to_lora_uncalibrated"] = without
            row["seconds_to_lora"] = None if without is None else without + row["calibrated_s"]
        found.append(row)
    return found


def run(options: Options) -> Iterator[Row]:
    """One row for each length, method and learning rate; one that fails says why."""
    ids, held_out = read_tokens(options)
    lengths = options.row_lengths()
    config = decoder_config(options.model)
    if max(lengths) > config.max_length:
        raise ValueError(
            f"--lengths {max(lengths)} is above the {config.max_length} positions of the model"
        )
    if any(window is not None for window in config.windows):
        raise ValueError("the model attends in windows, which SPT's attention does not know")
    methods = options.variants()
    for length in lengths:
        train, evaluation = split(ids, held_out, length, options)
        ready = [_tried(prepared, spt, train, evaluation, options) for spt in methods.values()]
        # All are compiled before any trains: compilation would slow its steps.
        programs = [*in_threads(_compiled, ready)]
        for method, (training, found) in zip(methods, programs, strict=True):
            row: Row = {"length": length, "method": method}
            if isinstance(training, str) or isinstance(found, str):
                yield row | {"failure": found}
                continue
            row |= {"calibrated_s": training.calibrated_s, "chosen": training.chosen}
            compiled, row["compiled_s"] = found
            row["peak_bytes"] = peak_bytes(compiled)
            for rate in options.rates():
                row["learning_rate"] = rate
                try:
                    yield row | trained(training, compiled, rate, options)
                except FAILURES as error:
                    yield row | {"failure": failure_of(error)}
        del ready, programs
        jax.clear_caches()


def _tried[**P, Result](
    function: Callable[P, Result], *args: P.args, **kwargs: P.kwargs
) -> Result | str:
    """What a function returns, or why it failed."""
    try:
        return function(*args, **kwargs)
    except FAILURES as error:
        return failure_of(error)


def _compiled(training: Training | str) -> tuple[jax.stages.Compiled, float] | str:
    return training if isinstance(training, str) else _tried(compiled_step, training)


def table_of(best: Sequence[Row], seconds: float) -> Table:
    """Of every method its best run."""
    table = Table(title=f"{seconds:g} s of training, mean loss of a token", caption=PEAK)
    headers = (
        "length",
        "method",
        "sparse layers",
        "rate",
        "steps",
        "step ms",
        "calibrated s",
        "compiled s",
    )
    judged = ("before", "dense", "sparse", "s to LoRA's", "without calibration", "peak MB")
    for header in (*headers, *judged):
        table.add_column(header, justify="left" if header == "method" else "right")

    def cell(row: Row, name: str, form: str) -> str:
        return "-" if row.get(name) is None else format(row[name], form)

    for row in best:
        table.add_row(
            str(row["length"]),
            row["method"],
            row["chosen"],
            f"{row['learning_rate']:g}",
            str(row["steps"]),
            *(cell(row, name, ".1f") for name in ("step_ms", "calibrated_s", "compiled_s")),
            *(cell(row, f"loss_{name}", ".4f") for name in ("before", "dense", "sparse")),
            *(cell(row, f"seconds_to_lora{end}", ".1f") for end in ("", "_uncalibrated")),
            f"{row['peak_bytes'] / 1e6:.0f}",
        )
    return table


def plot(best: Sequence[Row], path: Path) -> None:
    """Dense loss against seconds, calibration counted; a panel for each length."""
    lengths = list(dict.fromkeys(row["length"] for row in best))
    figure, axes = plt.subplots(
        1, len(lengths), figsize=(5 * len(lengths), 4), squeeze=False, layout="constrained"
    )
    for axis, length in zip(axes[0], lengths, strict=True):
        for row in best:
            if row["length"] == length:
                seconds, losses = zip(*row["curve"], strict=True)
                label = f"{row['method']}, {row['learning_rate']:g}"
                axis.plot([row["calibrated_s"] + s for s in seconds], losses, "o-", label=label)
        axis.set(title=f"rows of {length} tokens", xlabel="seconds", ylabel="loss, dense form")
        axis.legend()
    save_figure(figure, path)


def main() -> None:
    """Run the comparison."""
    options = cli.parse(Options, "experiments.time_to_quality", __doc__)
    options.check()
    options.out.mkdir(parents=True, exist_ok=True)
    console = cli.console()
    console.print(cli.device_line(options.dtype))
    rows: list[Row] = []
    with tqdm(disable=not sys.stderr.isatty(), unit="run") as bar:
        for row in run(options):
            rows.append(row)
            flat = [{name: x for name, x in row.items() if name != "curve"} for row in rows]
            write_csv(options.out / "time_to_quality.csv", flat)
            bar.update()
    if best := best_rows(rows):
        console.print(table_of(best, options.seconds))
        plot(best, options.out / "time_to_quality.png")
    figures = {f"s{row['length']}_{row['method']}": row for row in best}
    write_metrics(options.out, "time_to_quality", options, figures, runs=rows)
    if failures := [row for row in rows if "failure" in row]:
        first = failures[0]
        sys.exit(
            f"error: {len(failures)} runs failed, the first: {first['method']} at "
            f"{first['length']} tokens: {first['failure']}"
        )


if __name__ == "__main__":
    cli.run(main)
