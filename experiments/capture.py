"""Measure what sparse attention and the routed FFN keep of a model, on activations on real text.

    python -m experiments.capture --text-file valid.txt --out DIR
    python -m experiments.capture --model DIR_OR_HUB_ID --text-file FILE --no-sweep
    python -m experiments.capture --model smollm2 --text-file valid.txt --eval-file test.txt \
        --length 2048 --rows 4 --measure perplexity

Nothing is trained. Codebooks, blocks and routers are fitted to some rows of the text, as
`spt_jax.adapt` fits them, and measured on others, layer by layer and head by head:

* attention: the share of the true attention mass that the kept keys hold, of the oracle (the keys
  of most mass), of a local window, of the paper's match count, and of the library's rules; by
  density, codeword width, number of codewords, and of tiles by the size of the key groups;
* FFN: the error of the routed output relative to the dense one with random blocks and a random
  router, with fitted ones, and with an oracle that picks the best blocks for each token;
* of a decoder, perplexity: of the dense model, and with each part alone. This is what counts: of
  two rules that keep as much of the attention one may cost a decoder nothing, and one its use.

Of a decoder the causal half is measured alone; of an encoder attention is also masked causally, to
see both. Tables come on the terminal; under --out `attention.csv`, `ffn.csv`, plots and, last,
`metrics.json`, whose figures are those of the defaults. On WikiText-2's validation text the default
rules keep, of MiniLM's attention, 0.69 of the mass by token (oracle 0.71) and 0.45 by tile (0.47),
causally 0.84 (0.85) and 0.62 (0.64); the routed FFN's relative error is 0.19 (random 0.64, oracle
0.19). That takes three minutes on 2 CPU cores with --no-sweep, and a quarter of an hour without.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import matplotlib
import numpy as np
from flax import nnx
from rich.table import Table
from tqdm import tqdm

import spt_jax
from experiments.attention_capture import (
    Capture,
    LayerActivations,
    Rule,
    fit,
    measure,
    record_layers,
)
from experiments.corpora import cpython_documentation
from experiments.methods import write_metrics
from experiments.perplexity import (
    Perplexity,
    measure_perplexities,
    perplexity_figures,
    perplexity_table,
)
from experiments.reports import here_and_now, how, page, save_figure, write_csv
from experiments.routing_error import (
    RoutingError,
    Way,
    dense_ffns,
    ffn_inputs,
    mean_error,
    measure_layer,
)
from spt_jax import cli
from spt_jax.config import RoutedFFNConfig, SparseAttentionConfig
from spt_jax.layers import SparseAttention
from spt_jax.models import DecoderConfig
from spt_jax.models.config import read_config
from spt_jax.models.hub import CONFIG_FILES, find_files
from spt_jax.training import write_text_atomic

matplotlib.use("Agg")
from matplotlib import pyplot as plt

DENSITY = SparseAttentionConfig.density
DENSITIES = (1 / 16, 1 / 8, 1 / 4)
#: Codeword widths and numbers of codewords beside the default's.
QUANTIZERS = ((2, 8), (2, 32), (4, 16), (4, 64), (8, 16), (8, 64))
KEY_GROUPS = (8, 16, 32, 64)
KINDS: tuple[Literal["oracle", "window", "pq"], ...] = ("oracle", "window", "pq")
BLOCKS = (4, 8, 16, 32)
MEASURES = ("perplexity", "attention", "ffn")
#: The paper's rule with its codewords.
MATCH_COUNT = Rule(score="match_count", codeword_width=8, num_codewords=16)
DIRECTION = {True: "causal", False: "bidirectional"}
WAYS: Mapping[Way, str] = {
    "random": "random blocks and router",
    "random_blocks": "random blocks, fitted router",
    "fitted": "fitted",
    "oracle": "fitted blocks, oracle router",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the experiment."""

    model: str = "minilm"
    """Hugging Face directory or hub id; minilm is the model that the set-up installs."""
    text_file: Path | None = None
    """UTF-8 text; by default CPython's documentation."""
    eval_file: Path | None = None
    """UTF-8 text whose rows are measured; by default other rows of --text-file."""
    measure: str = "perplexity,attention,ffn"
    """What is measured, separated by commas; perplexity is that of decoders alone, and without ffn
    leaves the routed FFN out, which takes minutes to fit."""
    length: int = 512
    """Tokens of a row on which attention is measured."""
    rows: int = 16
    """Such rows; as many others calibrate."""
    ffn_length: int = 128
    """Tokens of a row on which the FFN is measured."""
    ffn_rows: int = 64
    """Such rows; as many others calibrate."""
    sweep: bool = True
    """Measure other densities, quantizers, groups and blocks too, not the defaults alone."""
    seed: int = 0
    """Seed of k-means, random blocks and random routers."""
    out: Path = Path("runs/capture")
    """Folder for the tables, plots and metrics.json."""
    report: Path | None = None
    """Markdown file that gets the tables, and how they were made."""

    def check(self) -> None:
        """Raise a ValueError for any mistake in the options."""
        for name in ("length", "rows", "ffn_length", "ffn_rows"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if unknown := [name for name in self.measured if name not in MEASURES]:
            raise ValueError(
                f"--measure {unknown[0]!r} is unknown; choose from {', '.join(MEASURES)}"
            )

    @property
    def measured(self) -> list[str]:
        """What is measured."""
        return self.measure.split(",")


def token_ids(model: str, path: Path | None) -> np.ndarray:
    """A text as one run of token ids, special tokens left out; None for CPython's documentation.

    Raises:
        ValueError: the file is empty or no UTF-8.
    """
    if path is None:
        text = "\n".join(cpython_documentation())
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    if not text.strip():
        raise ValueError(f"{path} holds no text")
    tokenizer = spt_jax.load_tokenizer(model)
    tokenizer.no_truncation()
    return np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)


class Texts(NamedTuple):
    """What is calibrated on and what is measured, as runs of token ids `[n]`.

    Attributes:
        text: of --text-file.
        evaluation: of --eval-file; None where rows of `text` are measured.
    """

    text: np.ndarray
    evaluation: np.ndarray | None = None


def two_sets(texts: Texts, length: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to calibrate on and rows to measure on, evenly spread over their text.

    Of a single text they are taken in turn.

    Args:
        texts: token ids.
        length: tokens of a row.
        rows: rows of each set.

    Raises:
        ValueError: a text is too short.
    """
    if texts.evaluation is not None:
        calibration = _spread_rows(texts.text, length, rows, "--text-file")
        return calibration, _spread_rows(texts.evaluation, length, rows, "--eval-file")
    both = _spread_rows(texts.text, length, 2 * rows, "--text-file")
    return both[::2], both[1::2]


def _spread_rows(ids: np.ndarray, length: int, rows: int, option: str) -> np.ndarray:
    there = len(ids) // length
    if there < rows:
        raise ValueError(
            f"the text has {len(ids)} tokens, and {rows} rows of {length} need "
            f"{rows * length}: give a longer {option}, or fewer or shorter rows"
        )
    chosen = np.linspace(0, there - 1, rows).astype(int)
    return ids[: there * length].reshape(there, length)[chosen]


@dataclass
class Quantizers:
    """Fitted codebooks of all layers, each pair of width and number fitted once."""

    calibration: Sequence[LayerActivations]
    seed: int
    fitted: dict[tuple[Any, ...], list[SparseAttention]] = field(default_factory=dict)

    def of(self, rule: Rule, *, causal: bool) -> list[SparseAttention]:
        """One module a layer; codebooks depend neither on the mask nor on the granularity."""
        key = rule.score, rule.codeword_width, rule.num_codewords
        if key not in self.fitted:
            self.fitted[key] = [
                fit(layer, rule, causal=causal, seed=self.seed + i)
                for i, layer in enumerate(self.calibration)
            ]
        modules = [nnx.clone(module) for module in self.fitted[key]]
        for module in modules:
            module.config, module.causal = rule.config(), causal
        return modules


def attention_rules(*, sweep: bool) -> Iterator[tuple[Rule, float]]:
    """Rules and densities to measure; tiles have their oracles beside them."""
    token, tile = Rule(), Rule(granularity="tile")
    for density in DENSITIES if sweep else (DENSITY,):
        for kind in KINDS:
            yield replace(token, kind=kind), density
        yield MATCH_COUNT, density
    for width, number in QUANTIZERS if sweep else ():
        yield replace(token, codeword_width=width, num_codewords=number), DENSITY
    for group in KEY_GROUPS if sweep else (tile.key_group,):
        for density in (DENSITY, 2 * DENSITY) if sweep else (DENSITY,):
            for kind in KINDS:
                yield replace(tile, kind=kind, key_group=group), density


def measure_attention(
    options: Options, texts: Texts, *, model: nnx.Module, directions: Sequence[bool]
) -> list[tuple[float, Capture]]:
    """Densities, and what each rule captures."""
    calibration, held_out = two_sets(texts, options.length, options.rows)
    quantizers = Quantizers(record_layers(model, calibration), options.seed)
    layers = record_layers(model, held_out)
    width = layers[0].q.shape[-1]
    jobs = [
        (rule, density, causal)
        for rule, density in attention_rules(sweep=options.sweep)
        for causal in directions
        if rule.kind != "pq" or width % rule.codeword_width == 0
    ]
    found = []
    for rule, density, causal in tqdm(jobs, desc="attention", disable=not sys.stderr.isatty()):
        sparse = quantizers.of(rule, causal=causal) if rule.kind == "pq" else None
        num_keys = max(1, round(density * options.length))
        capture = measure(layers, rule, num_keys=num_keys, causal=causal, sparse=sparse)
        found.append((density, capture))
    return found


def ffn_configs(hidden: int, *, sweep: bool) -> list[RoutedFFNConfig]:
    """Numbers of blocks and of active ones to measure."""
    default = RoutedFFNConfig()
    if not sweep:
        return [default]
    blocks = [g for g in BLOCKS if hidden % g == 0]
    shares = [(g, g // 2) for g in blocks] + [(4, 1), (4, 3)]
    return [replace(default, num_blocks=g, active_blocks=a) for g, a in shares]


FFNErrors = dict[tuple[int, int], dict[str, dict[Way, RoutingError]]]  # by (G, A), then layer


def measure_ffn(options: Options, texts: Texts, *, model: nnx.Module) -> FFNErrors:
    """Errors of each layer with each way of routing."""
    sets = two_sets(texts, options.ffn_length, options.ffn_rows)
    calibration, held_out = (ffn_inputs(model, {"input_ids": rows}) for rows in sets)
    ffns = dense_ffns(model)
    configs = ffn_configs(next(iter(ffns.values())).up.out_features, sweep=options.sweep)
    found: FFNErrors = {}
    jobs = [(config, path) for config in configs for path in ffns]
    for config, path in tqdm(jobs, desc="FFN", disable=not sys.stderr.isatty()):
        errors = measure_layer(
            ffns[path], calibration[path], held_out[path], config, seed=options.seed
        )
        found.setdefault((config.num_blocks, config.active_blocks), {})[path] = errors
    return found


def rule_name(rule: Rule) -> str:
    """For tables and plots."""
    if rule.kind != "pq":
        return rule.kind
    return f"{rule.score}, C={rule.codeword_width} E={rule.num_codewords}"


def attention_tables(found: Sequence[tuple[float, Capture]]) -> Iterator[Table]:
    """One table of the token rules, and one of the tile rules."""
    directions = list(dict.fromkeys(capture.causal for _, capture in found))
    for granularity in ("token", "tile"):
        rows: dict[tuple[str, ...], dict[bool, Capture]] = {}
        for density, capture in found:
            rule = capture.rule
            if rule.granularity == granularity:
                group = (str(rule.key_group),) if granularity == "tile" else ()
                key = (f"{density:g}", *group, rule_name(rule))
                rows.setdefault(key, {})[capture.causal] = capture
        block = f" of {found[0][1].rule.block_q} queries" if granularity == "tile" else ""
        table = Table(title=f"Attention mass kept, by {granularity}{block}")
        for header in ("density", *(["group"] if granularity == "tile" else []), "rule"):
            table.add_column(header)
        for causal in directions:
            table.add_column(DIRECTION[causal], justify="right")
            table.add_column("of oracle", justify="right")
        for key, by_direction in rows.items():
            cells = []
            for causal in directions:
                share = by_direction[causal].share
                oracle = rows[(*key[:-1], "oracle")][causal].share
                cells += [f"{share:.3f}", f"{share / oracle:.3f}"]
            table.add_row(*key, *cells)
        yield table


def ffn_table(found: FFNErrors) -> Table:
    """Mean errors over layers."""
    table = Table(title="Relative error of the routed FFN's output, mean of layers")
    for header in ("blocks", "active", "routing"):
        table.add_column(header)
    for header in ("error", "centred", "of a token", "busiest block"):
        table.add_column(header, justify="right")
    for (blocks, active), by_layer in found.items():
        for way, name in WAYS.items():
            e = mean_error([errors[way] for errors in by_layer.values()])
            numbers = e.relative_error, e.centered_error, e.token_error, e.load_balance
            table.add_row(str(blocks), str(active), name, *(f"{x:.3f}" for x in numbers))
    return table


def figures_of(attention: Sequence[tuple[float, Capture]], ffn: FFNErrors) -> dict[str, float]:
    """The figures of the defaults: shares of attention mass, and relative errors of the FFN."""
    figures: dict[str, float] = {}
    default = Rule()
    for density, capture in attention:
        rule = capture.rule
        if density != DENSITY or rule.kind == "window":
            continue
        if replace(rule, kind="pq", granularity="token") != default:
            continue
        kind = "capture" if rule.kind == "pq" else "oracle"
        figures[f"{rule.granularity}_{kind}_{DIRECTION[capture.causal]}"] = capture.share
    if not ffn:
        return figures
    config = RoutedFFNConfig()
    by_layer = ffn[config.num_blocks, config.active_blocks].values()
    names: dict[Way, str] = {way: way for way in WAYS} | {"fitted": "default"}
    for way, name in names.items():
        error = mean_error([errors[way] for errors in by_layer])
        figures[f"routed_error_{name}"] = error.relative_error
        figures[f"routed_centered_error_{name}"] = error.centered_error
        figures[f"routed_token_error_{name}"] = error.token_error
    figures["routed_load_balance_default"] = mean_error(
        [errors["fitted"] for errors in by_layer]
    ).load_balance
    return figures


def write_tables(
    out: Path,
    perplexities: Sequence[Perplexity],
    attention: Sequence[tuple[float, Capture]],
    ffn: FFNErrors,
) -> None:
    """Write what was measured: `perplexity.csv`, `attention.csv`, a row a head, and `ffn.csv`."""
    if perplexities:
        write_csv(out / "perplexity.csv", [asdict(one) for one in perplexities])
    if attention:
        _write_attention(out / "attention.csv", attention)
    if ffn:
        _write_ffn(out / "ffn.csv", ffn)


def _write_attention(path: Path, attention: Sequence[tuple[float, Capture]]) -> None:
    write_csv(
        path,
        [
            {
                **asdict(capture.rule),
                "mask": DIRECTION[capture.causal],
                "length": capture.length,
                "density": density,
                "keys": capture.num_keys,
                "keys_kept_mean": capture.kept,
                "layer": layer,
                "head": head,
                "share": share,
            }
            for density, capture in attention
            for layer, shares in enumerate(capture.shares.tolist())
            for head, share in enumerate(shares)
        ],
    )


def _write_ffn(path: Path, ffn: FFNErrors) -> None:
    write_csv(
        path,
        [
            {"blocks": blocks, "active": active, "layer": path, "routing": way, **asdict(error)}
            for (blocks, active), by_layer in ffn.items()
            for path, errors in by_layer.items()
            for way, error in errors.items()
        ],
    )


def plot_densities(path: Path, attention: Sequence[tuple[float, Capture]]) -> None:
    """Kept mass over density, a panel a mask."""
    directions = list(dict.fromkeys(capture.causal for _, capture in attention))
    figure, panels = plt.subplots(
        1, len(directions), figsize=(5 * len(directions), 4), squeeze=False, layout="constrained"
    )
    default = Rule()
    shown = {replace(default, kind=kind) for kind in KINDS} | {MATCH_COUNT}
    for causal, axes in zip(directions, panels[0], strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for density, capture in attention:
            if capture.causal == causal and capture.rule in shown:
                lines.setdefault(rule_name(capture.rule), []).append((density, capture.share))
        for name, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        axes.set(title=DIRECTION[causal], xlabel="share of the keys kept", xscale="log")
        axes.set_ylim(0, 1)
    panels[0][0].set_ylabel("share of the attention mass")
    panels[0][-1].legend()
    save_figure(figure, path)


def plot_heads(path: Path, attention: Sequence[tuple[float, Capture]]) -> None:
    """The default rule's share of the oracle's mass, by layer and head."""
    by_rule = {
        (c.rule.kind, c.causal): c.shares
        for density, c in attention
        if density == DENSITY and replace(c.rule, kind="pq") == Rule()
    }
    directions = list(dict.fromkeys(causal for _, causal in by_rule))
    figure, panels = plt.subplots(
        1, len(directions), figsize=(5 * len(directions), 4), squeeze=False, layout="constrained"
    )
    for causal, axes in zip(directions, panels[0], strict=True):
        ratio = by_rule["pq", causal] / by_rule["oracle", causal]
        image = axes.imshow(ratio, vmin=0.5, vmax=1, aspect="auto", cmap="viridis")
        axes.set(title=f"{DIRECTION[causal]}, mean {ratio.mean():.3f}", xlabel="head")
    panels[0][0].set_ylabel("layer")
    figure.colorbar(image, ax=list(panels[0]), label="kept mass over the oracle's")
    save_figure(figure, path)


def plot_ffn(path: Path, found: FFNErrors) -> None:
    """Errors by numbers of blocks, a bar a way of routing."""
    figure, axes = plt.subplots(figsize=(1.5 * len(found) + 3, 4), layout="constrained")
    place = np.arange(len(found))
    for i, (way, name) in enumerate(WAYS.items()):
        heights = [
            mean_error([errors[way] for errors in by_layer.values()]).relative_error
            for by_layer in found.values()
        ]
        axes.bar(place + 0.2 * (i - 1.5), heights, 0.2, label=name)
    axes.set_xticks(place, [f"{active} of {blocks}" for blocks, active in found])
    axes.set_xlabel("active blocks")
    axes.set_ylabel("relative error of the output")
    axes.legend()
    save_figure(figure, path)


def main() -> None:
    """Run the experiment."""
    options = cli.parse(Options, "experiments.capture", __doc__)
    options.check()
    options.out.mkdir(parents=True, exist_ok=True)  # fails now, not at the end of a long run
    config = read_config(find_files(options.model, files=CONFIG_FILES))
    lengths = {"length": options.length, "ffn_length": options.ffn_length}
    for name, value in lengths.items():
        if value > config.max_length:
            raise ValueError(
                f"--{name.replace('_', '-')} {value} is above the {config.max_length} positions of "
                f"{options.model}"
            )
    texts = Texts(
        token_ids(options.model, options.text_file),
        None if options.eval_file is None else token_ids(options.model, options.eval_file),
    )
    sets = two_sets(texts, options.length, options.rows)
    two_sets(texts, options.ffn_length, options.ffn_rows)
    causal, measured = isinstance(config, DecoderConfig), options.measured
    perplexities: list[Perplexity] = []
    if causal and "perplexity" in measured:
        perplexities = measure_perplexities(
            options.model, *sets, density=DENSITY, seed=options.seed, ffn="ffn" in measured
        )
        jax.clear_caches()
    attention: list[tuple[float, Capture]] = []
    ffn: FFNErrors = {}
    if "attention" in measured or "ffn" in measured:
        rngs = nnx.Rngs(options.seed)
        model = spt_jax.load_pretrained(options.model, task="backbone", rngs=rngs)
        if "attention" in measured:
            directions = (True,) if causal else (True, False)
            attention = measure_attention(options, texts, model=model, directions=directions)
            jax.clear_caches()
        if "ffn" in measured:
            ffn = measure_ffn(options, texts, model=model)
    console = cli.console(140)
    tables = [
        *([perplexity_table(perplexities)] if perplexities else []),
        *(attention_tables(attention) if attention else []),
        *([ffn_table(ffn)] if ffn else []),
    ]
    for table in tables:
        console.print(table)
    if options.report is not None:
        text, other = (
            path.name if path else None for path in (options.text_file, options.eval_file)
        )
        conditions = how(
            "experiments.capture",
            options,
            [
                f"Model {options.model}; attention on {options.rows} rows of {options.length} "
                f"tokens, FFN on {options.ffn_rows} of {options.ffn_length}; fitted to as many "
                "others.",
                f"Text: {text or 'CPython documentation'}"
                + (f"; measured on {other}." if other else "."),
                *here_and_now(),
            ],
        )
        write_text_atomic(options.report, page("What sparsity keeps", *tables, conditions))
    write_tables(options.out, perplexities, attention, ffn)
    if attention:
        plot_densities(options.out / "attention.png", attention)
        plot_heads(options.out / "heads.png", attention)
    if ffn:
        plot_ffn(options.out / "ffn.png", ffn)
    figures = figures_of(attention, ffn)
    if perplexities:
        figures |= perplexity_figures(perplexities)
    write_metrics(options.out, "capture", options, figures)


if __name__ == "__main__":
    cli.run(main)
