"""Compares every op of the GPU kernels with its reference: output and every gradient.

    python -m experiments.smoke --out DIR
    python -m experiments.smoke --rehearse

References run on the CPU in float32, kernels on the default device in bfloat16 and, those that
take it, float32; the tolerance is that of the tests. Without --implementation both sets of kernels
are checked, and one that does not run here is named with the reason. Writes smoke.csv and, last,
metrics.json to DIR; ends in exit code 1 if a result is wrong. On a GPU it takes a minute; with
--rehearse it runs on a CPU at tiny sizes, kernels in their interpreters (Triton's with
TRITON_INTERPRET=1).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from experiments.measurement import failure_of, in_threads
from experiments.methods import write_metrics
from experiments.reports import write_csv
from experiments.tolerance import worst
from pallas_kernels import (
    Implementation,
    RoutedFFNWeights,
    mosaic,
    pq_encode,
    pq_select,
    routed_ffn,
    scoring_codewords,
    sparse_attention,
    why_not_mosaic,
    why_not_triton,
)
from pallas_kernels.triton import interpreting as triton_interpreting
from spt_jax import cli

Granularity = Literal["token", "tile"]
Kernels = Literal["mosaic", "triton"]
KERNELS: tuple[Kernels, ...] = get_args(Kernels)
#: Share of codes that may differ: those of vectors as near to two codewords, but for rounding.
DIFFERENT_CODES = 1e-3


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of all cases: none a multiple of a tile, but for the FFN's.

    Attributes:
      batch: sequences.
      length: their tokens.
      heads: attention heads.
      width: of them.
      num_keys: keys that a query keeps.
      tokens: of the FFN.
      ffn_width: its input's width.
      units: of each of its four blocks.
    """

    batch: int = 2
    length: int = 1000
    heads: int = 4
    width: int = 64
    num_keys: int = 128
    tokens: int = 1000
    ffn_width: int = 256
    units: int = 192


FULL = Sizes()
TINY = Sizes(batch=1, length=70, heads=1, width=32, num_keys=32, tokens=70, ffn_width=64, units=64)


class Result(NamedTuple):
    """One array of a case beside its reference.

    Attributes:
      name: output, or the argument whose gradient it is.
      share: error over the error allowed, of the worst element; above 1 it is wrong.
      text: of that element.
    """

    name: str
    share: float
    text: str


Check = Callable[[Implementation | None, Any, Sizes], list[Result]]


def _rounded(key: jax.Array, *size: int) -> jax.Array:
    """Normal numbers that bfloat16 holds, as float32."""
    return jax.random.normal(key, size).astype(jnp.bfloat16).astype(jnp.float32)


def _gradients(
    function: Callable[..., jax.Array], cotangent: jax.Array, *arguments: jax.Array
) -> tuple[jax.Array, ...]:
    with jax.default_matmul_precision("highest"):
        out, pullback = jax.jit(lambda *a: jax.vjp(function, *a))(*arguments)
        return out, *pullback(cotangent)


def _compared(
    function: Callable[..., jax.Array],
    implementation: Implementation | None,
    dtype: Any,
    names: str,
    *arguments: jax.Array,
) -> list[Result]:
    """`function(implementation, *arguments[1:])` and gradients, with the first as the cotangent."""
    with jax.default_device(jax.devices("cpu")[0]):
        expected = _gradients(partial(function, "reference"), *arguments)
    given = jax.device_put([a.astype(dtype) for a in arguments], jax.devices()[0])
    found = _gradients(partial(function, implementation), *given)
    return [
        Result(name, *worst(jax.device_get(ours), jax.device_get(theirs), 4096, sums=3))
        for name, ours, theirs in zip(("output", *names.split()), found, expected, strict=True)
    ]


def _on_cpu(sizes: Sizes) -> tuple[list[jax.Array], list[jax.Array], tuple[jax.Array, ...]]:
    """Cotangent, q, k and v; codes of q and k; codewords."""
    keys = jax.random.split(jax.random.key(0), 6)
    size = (sizes.batch, sizes.length, sizes.heads, sizes.width)
    arrays = [_rounded(key, *size) for key in keys[:4]]
    books = [_rounded(key, sizes.heads, sizes.width // 4, 16, 4) for key in keys[4:]]
    pairs = zip(arrays[1:3], books, strict=True)
    codes = [pq_encode(x, b, implementation="reference") for x, b in pairs]
    return arrays, codes, scoring_codewords(books[0], books[1])


def _selection(
    granularity: Granularity,
    implementation: Implementation | None,
    sizes: Sizes,
    codes: Any,
    codewords: Any,
) -> Any:
    options: dict[str, Any] = {"granularity": granularity, "causal": True}
    options |= {"num_keys": sizes.num_keys, "implementation": implementation}
    return jax.jit(lambda codes, words: pq_select(*codes, *words, **options))(codes, codewords)


def check_encode(implementation: Implementation | None, dtype: Any, sizes: Sizes) -> list[Result]:
    """Codes are those of the nearest codewords."""
    with jax.default_device(jax.devices("cpu")[0]):
        keys = jax.random.split(jax.random.key(0))
        x = _rounded(keys[0], sizes.batch, sizes.length, sizes.heads, sizes.width)
        books = _rounded(keys[1], sizes.heads, sizes.width // 4, 16, 4)
        expected = pq_encode(x, books, implementation="reference")
    given = jax.device_put((x.astype(dtype), books), jax.devices()[0])
    found = jax.jit(partial(pq_encode, implementation=implementation))(*given)
    share = float(np.mean(np.asarray(found) != np.asarray(expected)))
    return [Result("codes", share / DIFFERENT_CODES, f"{share:.2%} of the codes differ")]


def check_select(
    granularity: Granularity, implementation: Implementation | None, dtype: Any, sizes: Sizes
) -> list[Result]:
    """The same keys are kept; codes have no type but their own."""
    del dtype
    with jax.default_device(jax.devices("cpu")[0]):
        _, codes, codewords = _on_cpu(sizes)
        expected = _selection(granularity, "reference", sizes, codes, codewords)
    given = jax.device_put((codes, codewords), jax.devices()[0])
    found = _selection(granularity, implementation, sizes, *given)
    results = []
    for name in ("groups", "counts") if granularity == "tile" else ("threshold", "tie_radius"):
        ours, theirs = (np.asarray(getattr(s, name)) for s in (found, expected))
        differ = int((ours != theirs).sum())
        results.append(Result(name, float(differ), f"{differ} of {ours.size} differ"))
    return results


def check_attention(
    granularity: Granularity, implementation: Implementation | None, dtype: Any, sizes: Sizes
) -> list[Result]:
    """Output and gradients of q, k and v over one selection."""
    with jax.default_device(jax.devices("cpu")[0]):
        arrays, codes, codewords = _on_cpu(sizes)
        selection = _selection(granularity, "reference", sizes, codes, codewords)
    selection = jax.tree.map(np.asarray, selection)

    def attend(implementation: Implementation | None, q: Any, k: Any, v: Any) -> jax.Array:
        kept = jax.tree.map(jnp.asarray, selection)
        return sparse_attention(q, k, v, kept, causal=True, implementation=implementation)

    return _compared(attend, implementation, dtype, "dq dk dv", *arrays)


def check_ffn(
    gated: bool, implementation: Implementation | None, dtype: Any, sizes: Sizes
) -> list[Result]:
    """Output and gradients of the input, the coefficients and all weights."""
    tokens, width, units = sizes.tokens, sizes.ffn_width, sizes.units
    with jax.default_device(jax.devices("cpu")[0]):
        keys = iter(jax.random.split(jax.random.key(0), 8))
        cotangent, x = (_rounded(next(keys), tokens, width) for _ in range(2))
        ups = [_rounded(next(keys), 4, width, units) / 16 for _ in range(1 + gated)]
        w_out = _rounded(next(keys), 4, units, width) / 16
        index = jax.lax.top_k(jax.random.normal(next(keys), (tokens, 4)), 2)[1]
        coefficients = jnp.abs(_rounded(next(keys), tokens, 2))
    chosen = np.asarray(index, np.int32)

    def ffn(
        implementation: Implementation | None, x: Any, coefficients: Any, w_out: Any, *ups: Any
    ) -> jax.Array:
        w_in, w_gate = (*ups, None)[:2]
        weights = RoutedFFNWeights(w_in=w_in, w_gate=w_gate, w_out=w_out)
        options: dict[str, Any] = {"activation": "silu", "implementation": implementation}
        return routed_ffn(x, jnp.asarray(chosen), coefficients, weights, **options)

    names = "dx dcoefficients dw_out dw_in" + " dw_gate" * gated
    return _compared(ffn, implementation, dtype, names, cotangent, x, coefficients, w_out, *ups)


CHECKS: dict[str, Check] = {
    "pq_encode": check_encode,
    "pq_select token": partial(check_select, "token"),
    "pq_select tile": partial(check_select, "tile"),
    "sparse_attention token": partial(check_attention, "token"),
    "sparse_attention tile": partial(check_attention, "tile"),
    "routed_ffn": partial(check_ffn, False),
    "routed_ffn gated": partial(check_ffn, True),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the comparison."""

    implementation: str = "mosaic,triton"
    """Kernels to check, separated by commas: mosaic, triton."""
    only: str | None = None
    """Ops to check, separated by commas; by default all."""
    rehearse: bool = False
    """Run on a CPU at tiny sizes, kernels in their interpreters."""
    out: Path = Path("runs/smoke")
    """Folder for the results."""


def todo(options: Options) -> tuple[list[tuple[Kernels, str, str]], dict[Kernels, str]]:
    """Implementation, op and type of each check, and why kernels were left out.

    Raises:
      ValueError: a name is unknown, or no kernels run here.
    """
    chosen = cli.known_names(options.implementation, KERNELS, what="--implementation")
    ops = cli.known_names(options.only or ",".join(CHECKS), CHECKS, what="--only")
    types = {"mosaic": ("bfloat16",), "triton": ("bfloat16", "float32")}
    if triton_interpreting():  # it computes bfloat16 wrongly
        types["triton"] = ("float32",)
    reasons = {"mosaic": why_not_mosaic, "triton": why_not_triton}
    missing = {name: why for name in chosen if (why := reasons[name](types[name][0]))}
    if len(missing) == len(chosen):
        text = "; ".join(f"{name}: {why}" for name, why in missing.items())
        raise ValueError(f"no kernels run here: {text}")
    found = [
        (name, op, dtype)
        for name in chosen
        if name not in missing
        for op in ops
        for dtype in types[name]
    ]
    return found, missing


def rows_of(options: Options) -> Iterator[list[dict[str, Any]]]:
    """The rows of one check after the other."""
    sizes = TINY if options.rehearse else FULL
    checks, missing = todo(options)

    def run(check: tuple[Kernels, str, str]) -> list[Result] | str:
        implementation, op, dtype = check
        try:
            return CHECKS[op](implementation, jnp.dtype(dtype), sizes)
        except Exception as error:  # of a compiler or a driver, of any type
            return failure_of(error)

    # Pallas' interpreter takes one program at a time, in the thread that entered it.
    results = ((c, run(c)) for c in checks) if options.rehearse else in_threads(run, checks)
    for (implementation, op, dtype), found in results:
        row = {"op": op, "implementation": implementation, "dtype": dtype}
        if isinstance(found, str):
            yield [row | {"failure": found}]
        else:
            yield [
                row
                | {"result": name, "error_share": share}
                | ({"failure": text} if share > 1 else {})
                for name, share, text in found
            ]
    for name, why in missing.items():
        yield [{"op": "all", "implementation": name, "left_out": why}]


def main() -> None:
    """Run the checks."""
    options = cli.parse(Options, "experiments.smoke", __doc__)
    if options.rehearse:
        jax.config.update("jax_platforms", "cpu")
    rows: list[dict[str, Any]] = []
    with mosaic.interpreted() if options.rehearse else contextlib.nullcontext():
        for found in rows_of(options):
            rows += found
            write_csv(options.out / "smoke.csv", rows)
    table = Table(title=f"errors over what is allowed, {jax.devices()[0].device_kind}")
    for column in ("implementation", "op", "type", "result", "error", "remark"):
        table.add_column(column)
    for row in rows:
        error = f"{row['error_share']:.2f}" if "error_share" in row else ""
        remark = row.get("failure", row.get("left_out", ""))
        cells = (row.get(name, "") for name in ("implementation", "op", "dtype", "result"))
        table.add_row(*cells, error, remark)
    cli.console(160).print(table)
    wrong = [row for row in rows if "failure" in row]
    shares = [row["error_share"] for row in rows if "error_share" in row]
    figures = {"results": len(shares), "wrong": len(wrong), "worst": max(shares, default=None)}
    figures["sizes"] = asdict(TINY if options.rehearse else FULL)
    write_metrics(options.out, "smoke", options, figures)
    if wrong:
        first = wrong[0]
        sys.exit(
            f"error: {len(wrong)} results are wrong, the first: {first['implementation']} "
            f"{first['op']} {first.get('result', '')}: {first['failure']}"
        )


if __name__ == "__main__":
    cli.run(main)
