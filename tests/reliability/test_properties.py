"""The four ops on random shapes, masks, types and values: finite, equal to the reference, zero on
masked rows, and their gradients too.

Compiling a program takes a thousand times as long as running it. So shapes, types and options come
from a list of programs, drawn at random once, and hypothesis draws a program, masks and values.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pallas_kernels import (
    RoutedFFNLoRA,
    RoutedFFNWeights,
    TokenSelection,
    kept_keys,
    pq_encode,
    pq_select,
    routed_ffn,
    scoring_codewords,
    sparse_attention,
    valid_keys,
)
from tests.tolerance import assert_close, tolerance

DTYPES = ("float32", "bfloat16", "float16")
MASKS = ("all", "random", "tail", "one", "none")
SEGMENTS = ("one", "runs", "alone")
VALUES = ("normal", "zeros", "equal", "tiny", "large")
NOT_COMPARED = ("tiny", "large")  # softmax and products at the ends of the range: finite is enough

PROGRAMS, ALL_PROGRAMS = 4, 24  # of each op: in short, in full
EXAMPLES, ALL_EXAMPLES = 60, 2600


@dataclass(frozen=True)
class Draw:
    """What hypothesis varies within a program."""

    program: int
    seed: int
    mask: str
    segments: str
    values: str

    def array(self, rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> jax.Array:
        """Random numbers of the kind drawn, of magnitude 1 unless tiny or large."""
        x = rng.standard_normal(shape)
        match self.values:
            case "zeros":
                x *= rng.random(shape) < 0.3
            case "equal":
                x = np.full(shape, x.flat[0])
            case "tiny":
                x *= 1e-30 if dtype == "float32" else 1e-6
            case "large":
                x *= 1e4 if dtype == "float32" else 30
        return jnp.asarray(x, dtype)

    def key_mask(self, rng: np.random.Generator, batch: int, length: int) -> jax.Array:
        position = np.arange(length)
        match self.mask:
            case "all":
                mask = np.ones((batch, length), bool)
            case "random":
                mask = rng.random((batch, length)) < rng.random((batch, 1))
            case "tail":
                mask = position < rng.integers(0, length + 1, (batch, 1))
            case "one":
                mask = position == rng.integers(0, length, (batch, 1))
            case _:
                mask = np.zeros((batch, length), bool)
        return jnp.asarray(mask)

    def segment_ids(self, rng: np.random.Generator, batch: int, length: int) -> jax.Array:
        match self.segments:
            case "one":
                ids = np.zeros((batch, length))
            case "runs":
                ids = np.sort(rng.integers(0, 4, (batch, length)), -1)
            case _:
                ids = np.tile(np.arange(length), (batch, 1))
        return jnp.asarray(ids, jnp.int32)


@dataclass(frozen=True)
class Attention:
    """A program of `pq_encode`, `pq_select` or `sparse_attention`."""

    batch: int
    length: int
    kv_heads: int
    group: int
    spaces: int
    codeword_width: int
    num_codewords: int
    num_keys: int
    granularity: str
    rule: str
    causal: bool
    masked: bool
    packed: bool
    block_q: int
    key_group: int
    dtype: str

    @classmethod
    def random(cls, rng: random.Random) -> Attention:
        length = rng.choice([1, 2, rng.randint(3, 30), rng.randint(31, 96)])
        return cls(
            batch=rng.randint(1, 3),
            length=length,
            kv_heads=rng.randint(1, 3),
            group=rng.randint(1, 3),
            spaces=rng.randint(1, 4),
            codeword_width=rng.randint(1, 4),
            num_codewords=rng.choice([2, 3, 16, 40]),
            num_keys=rng.randint(1, length + 2),
            granularity=rng.choice(["token", "tile"]),
            rule=rng.choice(["inner_product", "match_count"]),
            causal=rng.random() < 0.5,
            masked=rng.random() < 0.8,
            packed=rng.random() < 0.5,
            block_q=rng.choice([1, 8, 24, 64]),
            key_group=rng.choice([1, 4, 8, 16]),
            dtype=rng.choice(DTYPES),
        )

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def width(self) -> int:
        return self.spaces * self.codeword_width

    def codes(self, rng: np.random.Generator) -> tuple[jax.Array, ...]:
        """Codes and codewords, as of `pq_encode` and `scoring_codewords`."""
        shape = (self.batch, self.length)
        codes = (
            rng.integers(0, self.num_codewords, (*shape, n, self.spaces), np.uint8)
            for n in (self.heads, self.kv_heads)
        )
        books = rng.standard_normal(
            (2, self.kv_heads, self.spaces, self.num_codewords, self.codeword_width), np.float32
        )
        return *map(jnp.asarray, codes), *_codewords(*books, self.rule)

    def masks(self, draw: Draw, rng: np.random.Generator) -> dict[str, Any]:
        return {
            "key_mask": draw.key_mask(rng, self.batch, self.length) if self.masked else None,
            "segment_ids": draw.segment_ids(rng, self.batch, self.length) if self.packed else None,
        }

    def select(self, codes: Any, masks: Any, implementation: str) -> Any:
        return pq_select(
            *codes,
            num_keys=self.num_keys,
            granularity=self.granularity,
            causal=self.causal,
            block_q=self.block_q,
            key_group=self.key_group,
            implementation=implementation,
            **masks,
        )

    def valid(self, masks: Any) -> np.ndarray:
        """Keys that each query may see, `[B, S, S]`."""
        shape = (self.batch, self.length, self.length)
        found = valid_keys(self.length, self.causal, masks["key_mask"], masks["segment_ids"])
        return np.broadcast_to(np.asarray(found), shape)


_codewords = jax.jit(scoring_codewords, static_argnums=2)


@functools.cache
def _programs(kind: Any, op: str, count: int) -> list[Any]:
    rng = random.Random(op)
    return [kind.random(rng) for _ in range(count)]


def _check(
    op: str, kind: Any, full: bool, record: Callable[..., None], check: Callable[[Any, Draw], Any]
) -> None:
    """Run `check` on many draws, and record how many."""
    count, examples = (ALL_PROGRAMS, ALL_EXAMPLES) if full else (PROGRAMS, EXAMPLES)
    programs = _programs(kind, op, count)
    draws: dict[Draw, None] = {}

    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        st.builds(
            Draw,
            program=st.integers(0, count - 1),
            seed=st.integers(0, 2**32 - 1),
            mask=st.sampled_from(MASKS),
            segments=st.sampled_from(SEGMENTS),
            values=st.sampled_from(VALUES),
        )
    )
    def holds(draw: Draw) -> None:
        check(programs[draw.program], draw)
        draws[draw] = None

    holds()
    compared = sum(draw.values not in NOT_COMPARED for draw in draws)
    ran = {programs[draw.program] for draw in draws}
    assert len(draws) >= 0.99 * examples, "hypothesis ran out of draws"
    assert len(ran) == count, "a program was never drawn"
    record(
        "properties",
        op=op,
        examples=len(draws),
        compared=compared,
        programs=len(ran),
        types=", ".join(sorted({program.dtype for program in ran})),
        failures=0,
    )


def _finite(tree: Any) -> None:
    for leaf in jax.tree.leaves(tree):
        assert np.isfinite(np.asarray(leaf, np.float32)).all()


def _exact(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


@functools.cache
def _encoding(program: Attention) -> Callable[..., Any]:
    @jax.jit
    def run(x, books):
        codes = [pq_encode(x, books, implementation=i) for i in ("xla", "reference")]
        _, pullback = jax.vjp(lambda *a: pq_encode(*a).astype(jnp.float32), x, books)
        return *codes, pullback(jnp.ones(codes[0].shape))

    return run


def test_pq_encode(full, record):
    def check(program: Attention, draw: Draw) -> None:
        rng = np.random.default_rng(draw.seed)
        shape = (program.batch, program.length, program.heads, program.width)
        books = (program.kv_heads, program.spaces, program.num_codewords, program.codeword_width)
        x, codewords = (draw.array(rng, s, program.dtype) for s in (shape, books))
        if draw.seed % 2:  # on a grid distances are exact, and equal ones are many
            x, codewords = (jnp.round(2 * a) for a in (x, codewords))
        found, expected, gradients = _encoding(program)(x, codewords)
        assert found.dtype == jnp.uint8
        assert int(found.max()) < program.num_codewords
        for gradient in gradients:
            assert not np.asarray(gradient, np.float32).any()
        if draw.seed % 2 and draw.values not in NOT_COMPARED:
            np.testing.assert_array_equal(found, expected)
        parts = np.asarray(x, np.float64).reshape(*found.shape, 1, program.codeword_width)
        candidates = np.repeat(np.asarray(codewords, np.float64), program.group, 0)
        distance = np.square(parts - candidates).sum(-1)
        chosen = np.take_along_axis(distance, np.asarray(found)[..., None], -1)[..., 0]
        size = np.square(parts).sum(-1)[..., 0] + np.square(candidates).sum(-1).max(-1)
        # a type's smallest number, squared, bounds what underflows
        least = program.codeword_width * float(jnp.finfo("float32").tiny)
        limit = tolerance("float32", program.codeword_width) * size + least
        assert (chosen <= distance.min(-1) + limit).all()

    _check("pq_encode", Attention, full, record, check)


@functools.cache
def _selecting(program: Attention) -> Callable[..., Any]:
    @jax.jit
    def run(codes, masks, unit):
        found, expected = (program.select(codes, masks, i) for i in ("xla", "reference"))

        def total(unit):
            chosen = program.select(codes, masks | {"score_unit": unit}, "xla")
            floats = [x.astype(jnp.float32).sum() for x in jax.tree.leaves(chosen)]
            return sum(floats)

        return found, expected, kept_keys(found, program.length), jax.grad(total)(unit)

    return run


def test_pq_select(full, record):
    def check(program: Attention, draw: Draw) -> None:
        rng = np.random.default_rng(draw.seed)
        codes = program.codes(rng)
        if draw.values == "equal":
            codes = *(jnp.zeros_like(c) for c in codes[:2]), *codes[2:]
        masks = program.masks(draw, rng)
        unit = jnp.full(program.kv_heads, {"tiny": 1e-30, "large": 10.0}.get(draw.values, 0.01))
        found, expected, kept, gradient = _selecting(program)(codes, masks, unit)
        assert not np.asarray(gradient).any()
        valid = program.valid(masks)[:, None]
        kept = np.asarray(kept) & valid
        np.testing.assert_array_equal(kept.any(-1), np.broadcast_to(valid.any(-1), kept.shape[:-1]))
        if isinstance(found, TokenSelection):
            most = np.minimum(program.num_keys, valid.sum(-1))
            np.testing.assert_array_equal(kept.sum(-1), np.broadcast_to(most, kept.shape[:-1]))
            pairs = [(getattr(found, n), getattr(expected, n)) for n in ("threshold", "tie_radius")]
        else:
            pairs = [(found.groups, expected.groups), (found.counts, expected.counts)]
        for actual, wanted in pairs:
            np.testing.assert_array_equal(actual, wanted)

    _check("pq_select", Attention, full, record, check)


@functools.cache
def _attending(program: Attention) -> Callable[..., Any]:
    @jax.jit
    def run(q, k, v, grad, codes, masks):
        selection = program.select(codes, masks, "xla")

        def attend(implementation, q, k, v):
            return sparse_attention(
                q, k, v, selection, causal=program.causal, implementation=implementation, **masks
            )

        out, pullback = jax.vjp(functools.partial(attend, "xla"), q, k, v)
        wanted, back = jax.vjp(functools.partial(attend, "reference"), *_exact((q, k, v)))
        return (out, *pullback(grad)), (wanted, *back(_exact(grad)))

    return run


def test_sparse_attention(full, record):
    def check(program: Attention, draw: Draw) -> None:
        rng = np.random.default_rng(draw.seed)
        shape = (program.batch, program.length)
        q, k = (
            draw.array(rng, (*shape, n, program.width), program.dtype)
            for n in (program.heads, program.kv_heads)
        )
        v, grad = (
            jnp.asarray(rng.standard_normal((*shape, n, program.width)), program.dtype)
            for n in (program.kv_heads, program.heads)
        )
        masks = program.masks(draw, rng)
        codes = program.codes(rng)
        found, expected = _attending(program)(q, k, v, grad, codes, masks)
        _finite(found)
        valid = program.valid(masks)
        blind, unseen = ~valid.any(2), ~valid.any(1)
        for actual, empty in zip(found, (blind, blind, unseen, unseen), strict=True):
            assert not np.asarray(actual, np.float32)[empty].any()
        if draw.values not in NOT_COMPARED:
            reduction = max(program.length * program.group, program.width)
            for actual, wanted in zip(found, expected, strict=True):
                assert_close(actual, wanted, reduction, least=1.0)

    _check("sparse_attention", Attention, full, record, check)


@dataclass(frozen=True)
class Feedforward:
    """A program of `routed_ffn`."""

    tokens: int
    width: int
    units: int
    blocks: int
    active: int
    rank: int
    gated: bool
    biases: bool
    lora: tuple[str, ...]
    activation: str
    dtype: str

    @classmethod
    def random(cls, rng: random.Random) -> Feedforward:
        blocks = rng.randint(1, 7)
        gated = rng.random() < 0.5
        names = ["in", "out", *(["gate"] if gated else [])]
        return cls(
            tokens=rng.choice([1, rng.randint(2, 40), rng.randint(41, 200)]),
            width=rng.randint(1, 24),
            units=rng.randint(1, 20),
            blocks=blocks,
            active=rng.randint(1, blocks),
            rank=rng.randint(1, 4),
            gated=gated,
            biases=rng.random() < 0.5,
            lora=tuple(sorted(rng.sample(names, rng.randint(0, len(names))))),
            activation=rng.choice(["relu", "gelu", "gelu_tanh", "silu", "identity"]),
            dtype=rng.choice(DTYPES),
        )

    def arguments(self, draw: Draw, rng: np.random.Generator) -> tuple[Any, ...]:
        """x, coefficients, weights and LoRA; magnitude 1 after each product."""
        g, d, f, r = self.blocks, self.width, self.units, self.rank

        def normal(*shape: int, terms: int = 1) -> jax.Array:
            return jnp.asarray(rng.standard_normal(shape) * terms**-0.5, self.dtype)

        gate = self.gated
        weights = RoutedFFNWeights(
            w_in=normal(g, d, f, terms=d),
            b_in=normal(g, f) if self.biases else None,
            w_gate=normal(g, d, f, terms=d) if gate else None,
            b_gate=normal(g, f) if gate and self.biases else None,
            w_out=normal(g, f, d, terms=f),
            b_out=normal(d) if self.biases else None,
        )
        factors = {}
        for name in self.lora:
            first, second = ((g, f, r), (r, d)) if name == "out" else ((d, r), (g, r, f))
            factors[f"a_{name}"] = normal(*first, terms=first[-2])
            factors[f"b_{name}"] = normal(*second, terms=r)
        coefficients = rng.uniform(0.2, 2, (self.tokens, self.active))
        hidden = ~np.asarray(draw.key_mask(rng, 1, self.tokens))[0]
        coefficients[hidden] = 0
        x = draw.array(rng, (self.tokens, d), self.dtype)
        lora = RoutedFFNLoRA(**factors) if factors else None
        return (x, jnp.asarray(coefficients, jnp.float32), weights, lora), hidden

    def magnitudes(self, gradients: RoutedFFNWeights) -> dict[str, float]:
        """What gradients of LoRA factors are sums of: products of a factor and a weight's gradient,
        which is rounded before, and may cancel."""
        sizes = {"in": gradients.w_in, "gate": gradients.w_gate, "out": gradients.w_out}
        sizes = {n: float(jnp.sqrt(jnp.mean(x**2))) for n, x in sizes.items() if x is not None}
        wide, inner = self.blocks * self.units / self.rank, self.width / self.rank
        spread = {"a_in": wide, "a_gate": wide, "a_out": inner, "b_out": self.blocks}
        return {
            name: max(1.0, spread.get(name, 1.0) ** 0.5 * sizes[name[2:]])
            for name in ("a_in", "b_in", "a_gate", "b_gate", "a_out", "b_out")
            if name[2:] in sizes
        }

    def index(self, draw: Draw, rng: np.random.Generator) -> jax.Array:
        """Blocks of each token: at random, all tokens the same, or the first ones."""
        every = np.tile(np.arange(self.blocks), (self.tokens, 1))
        match draw.segments:
            case "one":
                every = np.tile(rng.permutation(self.blocks), (self.tokens, 1))
            case "runs":
                every = rng.permuted(every, axis=1)
        return jnp.asarray(every[:, : self.active], jnp.int32)


@functools.cache
def _feeding(program: Feedforward) -> Callable[..., Any]:
    @jax.jit
    def run(arguments, index, slopes):
        def value_and_gradients(implementation, arguments):
            def apply(x, coefficients, weights, lora):
                return routed_ffn(
                    x,
                    index,
                    coefficients,
                    weights,
                    lora=lora,
                    activation=program.activation,
                    implementation=implementation,
                )

            y, pullback = jax.vjp(apply, *arguments)
            return y, pullback(slopes.astype(y.dtype))

        found = value_and_gradients("xla", arguments)
        return found, value_and_gradients("reference", _exact(arguments))

    return run


def test_routed_ffn(full, record):
    def check(program: Feedforward, draw: Draw) -> None:
        rng = np.random.default_rng(draw.seed)
        arguments, hidden = program.arguments(draw, rng)
        slopes = jnp.asarray(rng.standard_normal(arguments[0].shape), program.dtype)
        found, expected = _feeding(program)(arguments, program.index(draw, rng), slopes)
        _finite(found)
        y, (dx, *_) = found
        bias = 0 if arguments[2].b_out is None else arguments[2].b_out
        np.testing.assert_array_equal(np.asarray(y - bias, np.float32)[hidden], 0)
        assert not np.asarray(dx, np.float32)[hidden].any()
        if draw.values not in NOT_COMPARED:
            terms = max(program.tokens, program.width, program.blocks * program.units)
            least = program.magnitudes(expected[1][2])
            leaves, _ = jax.tree.flatten_with_path(found)
            for (path, a), e in zip(leaves, jax.tree.leaves(expected), strict=True):
                size = least.get(jax.tree_util.keystr(path[-1:], simple=True), 1.0)
                assert_close(a, e, terms, sums=3, dtype=program.dtype, least=size)

    _check("routed_ffn", Feedforward, full, record, check)


def test_a_wrong_result_fails_the_check():
    """What the tests above would say of an op that is off by a hundredth."""
    x = jnp.ones((2, 3))
    with pytest.raises(AssertionError, match="apart, allowed"):
        assert_close(1.01 * x, x, 96, least=1.0)
    with pytest.raises(AssertionError):
        _finite({"x": x / 0})
