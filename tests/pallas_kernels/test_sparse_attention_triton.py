"""The Triton kernels of sparse attention against the specification: output and every gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import TileSelection, sparse_attention
from pallas_kernels.pq.reference import kept_keys, valid_keys
from tests.pallas_kernels import triton
from tests.pallas_kernels.test_sparse_attention import (
    CASES,
    Case,
    inputs,
    options,
    results,
    selected,
)
from tests.tolerance import assert_close

pytestmark = [pytest.mark.triton, triton.needs_triton]

FORWARD = {"sparse_attention_forward": 1}
BACKWARD = FORWARD | {"sparse_attention_dq": 1, "sparse_attention_dkv": 1}

CASES = {name: dataclasses.replace(case, limit=None) for name, case in CASES.items()} | {
    "single_keys": Case(130, 4, 2, width=24, num_keys=40, causal=True, block_q=64, key_group=1),
    "whole_blocks": Case(
        100, 2, 1, width=40, num_keys=40, block_q=64, key_group=16, key_mask=True, segments=True
    ),
    "large_groups": Case(
        300, 1, 1, width=32, num_keys=140, block_q=96, key_group=128, batch=1, causal=True
    ),
    "shared_parts": Case(
        130, 6, 2, width=24, num_keys=40, causal=True, block_q=40, key_group=16, share_heads=True
    ),
    "odd_groups": Case(70, 2, 1, num_keys=20, block_q=24, key_group=5, causal=True, batch=1),
}
TILE_ONLY = {"shared_parts", "single_keys", "whole_blocks", "large_groups", "odd_groups"}
BOTH = [
    (granularity, name)
    for name in CASES
    for granularity in ("tile", "token")
    if granularity == "tile" or name not in TILE_ONLY
]


def check(granularity, name, dtype):
    """Gradients are sums over weights, rounded, that hang on outputs, rounded, which are sums."""
    case = CASES[name]
    expected = results(case, granularity, "reference")
    actual = results(case, granularity, "triton", dtype)
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == dtype
        assert_close(a, b, case.length, sums=1 if i == 0 else 2)
    return case, actual


@pytest.mark.parametrize(("granularity", "name"), BOTH)
def test_equals_the_reference(granularity, name):
    case, (out, dq, dk, dv) = check(granularity, name, jnp.float32)
    _, _, masks = inputs(case)
    valid = np.asarray(valid_keys(case.length, case.causal, *masks))
    valid = np.broadcast_to(valid, (case.batch, *valid.shape[1:]))
    blind, unseen = ~valid.any(2), ~valid.any(1)
    assert blind.any() == case.key_mask
    for a, empty in ((out, blind), (dq, blind), (dk, unseen), (dv, unseen)):
        np.testing.assert_array_equal(np.asarray(a)[empty], 0)


@pytest.mark.parametrize(
    ("granularity", "name"),
    [("tile", "single_keys"), ("tile", "whole_blocks"), ("token", "grouped_heads")],
)
def test_equals_the_reference_in_half_precision(granularity, name):
    check(granularity, name, triton.half())


@pytest.mark.parametrize("granularity", ["tile", "token"])
def test_results_repeat_exactly(granularity):
    case = CASES["grouped_heads"]
    arrays, _, masks = inputs(case)
    selection = selected(case, granularity)

    @jax.jit
    def gradients(q, k, v, grad):
        attend = functools.partial(
            sparse_attention, selection=selection, implementation="triton", **options(case, masks)
        )
        out, pullback = jax.vjp(attend, q, k, v)
        return out, *pullback(grad)

    for a, b in zip(gradients(*arrays), gradients(*arrays), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("granularity", ["tile", "token"])
def test_under_vmap_checkpoint_and_scan(granularity):
    case = dataclasses.replace(CASES["groups_across_tiles"], length=40)
    arrays, _, _ = inputs(case)
    selection = selected(case, granularity)
    selection = jax.tree.map(lambda a: a[:1] if a.shape[0] == case.batch else a, selection)

    @jax.checkpoint
    def one(q, k, v):
        out = sparse_attention(
            *(a[None] for a in (q, k, v)), selection, causal=True, implementation="triton"
        )
        return out[0]

    @jax.jit
    def run(q, k, v, grad):
        def scanned(*a):
            steps = [x.reshape(2, 2, *x.shape[1:]) for x in a]
            out = jax.lax.scan(lambda _, x: (None, jax.vmap(one)(*x)), None, steps)[1]
            return out.reshape(4, *out.shape[2:])

        out, pullback = jax.vjp(scanned, q, k, v)
        return out, *pullback(grad)

    found = run(*arrays)
    for i in range(case.batch):

        def attend(q, k, v):
            return sparse_attention(q, k, v, selection, causal=True, implementation="reference")

        out, pullback = jax.vjp(attend, *(a[i : i + 1] for a in arrays[:3]))
        for a, b in zip(found, (out, *pullback(arrays[3][i : i + 1])), strict=True):
            assert_close(a[i], b[0], case.length)


@pytest.mark.parametrize("granularity", ["tile", "token"])
def test_launches_the_kernels(granularity):
    case = CASES["grouped_heads"]
    arrays, _, masks = inputs(case)
    selection = selected(case, granularity)

    def attention(q, k, v):
        return sparse_attention(q, k, v, selection, implementation="triton", **options(case, masks))

    assert triton.launches(attention, *arrays[:3]) == FORWARD
    loss = jax.grad(lambda *arrays: attention(*arrays).sum(), (0, 1, 2))
    assert triton.launches(loss, *arrays[:3]) == BACKWARD


@pytest.mark.parametrize("group", [1, 3, 8, 16, 128])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_lists_by_key_hold_what_the_lists_hold(group, heads):
    from pallas_kernels.sparse_attention import triton as kernels

    rng = np.random.default_rng(0)
    length, block_q, listed = 500, 64, 5
    shape = 2, heads[0], -(-length // block_q)
    number = -(-length // group)
    listed = min(listed, number)
    groups = np.sort(np.argsort(rng.random((*shape, number)), -1)[..., :listed], -1)
    counts = rng.integers(0, listed + 1, shape)
    selection = TileSelection(
        groups=jnp.asarray(groups, jnp.int32),
        counts=jnp.asarray(counts, jnp.int32),
        block_q=block_q,
        key_group=group,
    )
    q, k = (jnp.zeros((2, length, n, 32)) for n in heads)
    problem = kernels.problem_of(q, k, selection, 1.0, False)
    lists = jax.jit(functools.partial(kernels._transposed, problem))(selection)
    entries, starts = np.asarray(lists["entries"]), np.asarray(lists["starts"])
    bits = None if lists["bits"] is None else np.asarray(lists["bits"])
    kept = np.zeros((2, heads[0], length, length), bool)
    blocks = problem.key_blocks
    for line in range(2 * heads[1] * blocks):
        found = entries[starts[line] : starts[line + 1]]
        assert (np.diff(found) > 0).all()
        (pair, block), per = divmod(line, blocks), problem.per_block
        for entry in found:
            rest, tile = divmod(entry // listed, shape[2])
            sequence, head = divmod(rest, heads[0])
            assert (sequence, head // (heads[0] // heads[1])) == divmod(pair, heads[1])
            tile_bits = 1 if bits is None else bits.ravel()[entry]
            for i in range(per):
                start = (block * per + i) * group
                if tile_bits >> i & 1:
                    rows = slice(tile * block_q, (tile + 1) * block_q)
                    kept[sequence, head, rows, start : start + group] = True
    np.testing.assert_array_equal(kept, np.asarray(kept_keys(selection, length)))


def test_what_does_not_fit_is_said():
    q = jnp.zeros((1, 3, 1, 257))
    case = CASES["one_position"]
    selection = jax.eval_shape(lambda: selected(case, "tile"))
    selection = dataclasses.replace(
        selection, counts=jnp.zeros((1, 1, 1), jnp.int32), groups=jnp.zeros((1, 1, 1, 1), jnp.int32)
    )
    with pytest.raises(NotImplementedError, match="width 256 at most, and got 257"):
        sparse_attention(q, q, q, selection, implementation="triton")
