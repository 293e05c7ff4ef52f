"""Kernels of a decoding step against their specifications and the kernels of whole sequences."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    RoutedFFNLoRA,
    RoutedFFNWeights,
    pq_select,
    routed_ffn,
    routed_ffn_decode,
    scoring_codewords,
    sparse_attention,
    sparse_decode,
    split_blocks,
)
from pallas_kernels.routed_ffn import decode
from tests.tolerance import assert_close


@dataclasses.dataclass(frozen=True)
class Cache:
    length: int
    num_keys: int
    heads: int = 2
    kv_heads: int = 2
    batch: int = 3
    codewords: int = 6
    rule: str = "inner_product"


CACHES = {
    "one_place": Cache(1, 4),
    "grouped_heads": Cache(37, 5, heads=6),
    "many_ties": Cache(70, 9, kv_heads=1, codewords=2, rule="match_count"),
}


@functools.cache
def cache_inputs(case, dtype=jnp.float32):
    """Positions before heads: q of the last position, k, v, codes, codewords, and the mask."""
    rng = np.random.default_rng(0)
    shape, width = (case.batch, case.length), 6
    q, k, v = (
        jnp.asarray(rng.normal(size=(*shape, n, width)).astype(jnp.bfloat16), dtype)
        for n in (case.heads, case.kv_heads, case.kv_heads)
    )
    codes = [
        jnp.asarray(rng.integers(0, case.codewords, (*shape, n, 2), np.uint8))
        for n in (case.heads, case.kv_heads)
    ]
    books = rng.normal(size=(2, case.kv_heads, 2, case.codewords, 3)).astype(np.float32)
    mask = rng.random(shape) < 0.7
    mask[:, -1] = True
    mask[0, :-1] = False  # a row with one key
    return q, k, v, codes, scoring_codewords(*map(jnp.asarray, books), case.rule), jnp.asarray(mask)


def decoded(case, implementation, dtype=jnp.float32, key_mask=None):
    q, k, v, codes, codewords, mask = cache_inputs(case, dtype)

    @functools.partial(jax.jit, static_argnames="num_keys")
    def run(q, k, v, codes, codewords, mask, num_keys):
        return sparse_decode(
            q[:, -1],
            k.swapaxes(1, 2),
            v.swapaxes(1, 2),
            codes[0][:, -1],
            codes[1].transpose(0, 2, 3, 1),
            *codewords,
            num_keys=num_keys,
            key_mask=mask,
            implementation=implementation,
        )

    return run(q, k, v, codes, codewords, mask if key_mask is None else key_mask, case.num_keys)


@functools.cache
def last_of_whole_sequence(case):
    q, k, v, codes, codewords, mask = cache_inputs(case)

    @jax.jit
    def run(q, k, v, codes, codewords, mask):
        masks = {"causal": True, "key_mask": mask, "implementation": "reference"}
        selection = pq_select(
            *codes, *codewords, num_keys=case.num_keys, granularity="token", **masks
        )
        return sparse_attention(q, k, v, selection, **masks)[:, -1]

    return run(q, k, v, codes, codewords, mask)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("name", CACHES)
def test_sparse_decode_equals_the_last_position_of_a_whole_sequence(name, implementation):
    case = CACHES[name]
    actual = decoded(case, implementation)
    assert_close(actual, last_of_whole_sequence(case), case.length)


def test_sparse_decode_in_bfloat16_accumulates_in_float32():
    case = CACHES["grouped_heads"]
    actual = decoded(case, "xla", jnp.bfloat16)
    assert actual.dtype == jnp.bfloat16
    assert_close(actual, last_of_whole_sequence(case), case.length)


def test_sparse_decode_without_a_valid_key_gives_zeros():
    case = CACHES["grouped_heads"]
    mask = cache_inputs(case)[-1].at[1].set(False)
    for implementation in ("reference", "xla"):
        out = np.asarray(decoded(case, implementation, key_mask=mask))
        np.testing.assert_array_equal(out[1], 0)
        assert (out[[0, 2]] != 0).all()


def test_sparse_decode_keeps_the_last_of_equal_keys_in_a_long_cache():
    length, num_keys, last = 131_072, 3, 100_000
    position = jnp.arange(length)
    v = jnp.asarray(position, jnp.float32)[None, None, :, None]
    rows = jnp.array([[[[127], [127]]]], jnp.int8)
    out = jax.jit(functools.partial(sparse_decode, num_keys=num_keys))(
        jnp.zeros((1, 1, 1)),
        jnp.zeros_like(v),
        v,
        jnp.zeros((1, 1, 1), jnp.uint8),
        jnp.zeros((1, 1, 1, length), jnp.uint8),
        rows,
        rows,
        key_mask=(position <= last)[None],
    )
    assert out.item() == last - 1  # the mean of the last three


@pytest.mark.usefixtures("unhooked")
def test_sparse_decode_names_what_is_wrong():
    q, k, v, codes, codewords, mask = cache_inputs(CACHES["grouped_heads"])
    given = {
        "q": q[:, -1],
        "k": k.swapaxes(1, 2),
        "v": v.swapaxes(1, 2),
        "query_codes": codes[0][:, -1],
        "key_codes": codes[1].transpose(0, 2, 3, 1),
        "query_codewords": codewords[0],
        "key_codewords": codewords[1],
        "key_mask": mask,
        "num_keys": 3,
    }
    for changes, message in [
        (
            {"q": q[:, -1, :5], "query_codes": codes[0][:, -1, :5]},
            "5 query heads are not a multiple of 2",
        ),
        ({"v": v}, "v is"),
        ({"key_codes": codes[1]}, "key_codes is"),
        ({"key_mask": mask[:, 1:]}, "key_mask is"),
        ({"num_keys": 0}, "num_keys must be at least 1, got 0"),
        ({"implementation": "fast"}, "unknown implementation"),
    ]:
        with pytest.raises(ValueError, match=message):
            sparse_decode(**given | changes)
    with pytest.raises(NotImplementedError, match="bound by memory"):
        sparse_decode(**given, implementation="mosaic")


BLOCKS, WIDTH, HIDDEN, RANK = 4, 16, 48, 3


def ffn_inputs(tokens, *, gated=True, biases=True, dtype=jnp.float32):
    rng = np.random.default_rng(1)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    weights = RoutedFFNWeights(
        w_in=normal(WIDTH, HIDDEN),
        b_in=normal(HIDDEN) if biases else None,
        w_gate=normal(WIDTH, HIDDEN) if gated else None,
        b_gate=normal(HIDDEN) if gated and biases else None,
        w_out=normal(HIDDEN, WIDTH),
        b_out=normal(WIDTH) if biases else None,
    )
    lora = RoutedFFNLoRA(
        a_in=normal(WIDTH, RANK),
        b_in=normal(RANK, HIDDEN),
        a_out=normal(HIDDEN, RANK),
        b_out=normal(RANK, WIDTH),
    )
    index = np.stack([rng.permutation(BLOCKS)[:2] for _ in range(tokens)]).astype(np.int32)
    return normal(tokens, WIDTH), jnp.asarray(index), normal(tokens, 2), weights, lora


@functools.partial(jax.jit, static_argnames=("implementation", "activation"))
def decode_ffn(x, index, coefficients, weights, lora, implementation="xla", activation="silu"):
    return routed_ffn_decode(
        x,
        index,
        coefficients,
        weights,
        lora=lora,
        num_blocks=BLOCKS,
        activation=activation,
        implementation=implementation,
    )


@pytest.mark.parametrize(("tokens", "gated", "with_lora"), [(1, True, True), (5, False, False)])
def test_routed_ffn_decode_equals_the_op_of_whole_sequences(tokens, gated, with_lora, monkeypatch):
    # tiles of 4 of a block's 12 units
    monkeypatch.setattr(decode, "TILE_BYTES", 4 * 4 * WIDTH)
    x, index, coefficients, weights, lora = ffn_inputs(tokens, gated=gated, biases=with_lora)
    lora = lora if with_lora else None
    split = split_blocks(weights, lora, BLOCKS)
    expected = routed_ffn(
        x,
        index,
        coefficients,
        split[0],
        lora=split[1],
        activation="silu",
        implementation="reference",
    )
    for implementation in ("reference", "xla"):
        actual = decode_ffn(x, index, coefficients, weights, lora, implementation)
        assert_close(actual, expected, HIDDEN)


def test_routed_ffn_decode_in_bfloat16_takes_weights_of_float32():
    x, index, coefficients, weights, lora = ffn_inputs(3)
    expected = decode_ffn(x, index, coefficients, weights, lora, "reference")
    actual = decode_ffn(x.astype(jnp.bfloat16), index, coefficients, weights, lora)
    assert actual.dtype == jnp.bfloat16
    assert_close(actual, expected, HIDDEN, sums=6)


def test_routed_ffn_decode_reads_active_blocks_alone():
    x, _, coefficients, weights, lora = ffn_inputs(2)
    index = jnp.array([[0, 3], [3, 1]], jnp.int32)  # nobody takes block 2
    units = slice(2 * HIDDEN // BLOCKS, 3 * HIDDEN // BLOCKS)
    expected = decode_ffn(x, index, coefficients, weights, lora)
    poisoned = dataclasses.replace(
        weights,
        w_in=weights.w_in.at[:, units].set(jnp.nan),
        b_in=weights.b_in.at[units].set(jnp.nan),
        w_gate=weights.w_gate.at[:, units].set(jnp.nan),
        w_out=weights.w_out.at[units].set(jnp.nan),
    )
    poisoned_lora = dataclasses.replace(lora, a_out=lora.a_out.at[units].set(jnp.nan))
    actual = decode_ffn(x, index, coefficients, poisoned, poisoned_lora)
    np.testing.assert_array_equal(actual, expected)


def test_routed_ffn_decode_makes_nothing_of_a_weight_s_size():
    arguments = ffn_inputs(2, dtype=jnp.bfloat16)
    text = decode_ffn.lower(*arguments).compile().as_text()
    sizes = rf"\[(?:{WIDTH},{HIDDEN}|{HIDDEN},{WIDTH}|{BLOCKS},\d+,\d+)\]"
    made = re.findall(rf"= \w+{sizes}\S* (\w[\w-]*)\(", text)
    assert set(made) <= {"parameter", "get-tuple-element", "bitcast"}, set(made)
    assert "parameter" in made


@pytest.mark.usefixtures("unhooked")
def test_routed_ffn_decode_names_what_is_wrong():
    x, index, coefficients, weights, lora = ffn_inputs(2)
    arguments = x, index, coefficients, weights
    with pytest.raises(ValueError, match="48 hidden units do not split into 5 blocks"):
        routed_ffn_decode(*arguments, num_blocks=5)
    with pytest.raises(ValueError, match="block_index runs from"):
        routed_ffn_decode(x, index + 4, coefficients, weights, num_blocks=BLOCKS)
    half = dataclasses.replace(lora, b_in=None)
    with pytest.raises(ValueError, match="lora has only one of a_in and b_in"):
        routed_ffn_decode(*arguments, num_blocks=BLOCKS, lora=half)
    with pytest.raises(NotImplementedError, match="bound by memory"):
        routed_ffn_decode(*arguments, num_blocks=BLOCKS, implementation="mosaic")
