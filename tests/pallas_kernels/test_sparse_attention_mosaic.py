"""The Hopper kernels of sparse attention against the specification: output and every gradient."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels import TileSelection, sparse_attention
from pallas_kernels.pq.reference import kept_keys, valid_keys
from pallas_kernels.sparse_attention import mosaic as kernels
from tests.pallas_kernels import mosaic
from tests.pallas_kernels.test_sparse_attention import Case, attend, inputs, options, select
from tests.tolerance import assert_close

pytestmark = pytest.mark.mosaic

FORWARD = {"sparse_attention_forward": 1}
BACKWARD = FORWARD | {"sparse_attention_dq": 1, "sparse_attention_dkv": 1}

Case = functools.partial(Case, width=32, num_keys=40, block_q=64, key_group=16, batch=1)

TILE = {
    "one_position": Case(1, causal=True),
    "one_group": Case(64, num_keys=1, key_group=64, causal=True),
    "grouped_heads": Case(100, 3, 1, causal=True),
    "packed": Case(130, 2, 2, width=64, key_group=8, key_mask=True, segments=True, batch=2),
    "packed_causal": Case(129, 2, 1, key_group=32, causal=True, key_mask=True, segments=True),
    "large_groups": Case(257, 1, 1, num_keys=140, block_q=128, key_group=128),
    "two_warpgroups": Case(200, 2, 1, num_keys=64, block_q=128, key_group=8, causal=True),
    "three_warpgroups": Case(390, 1, 1, num_keys=100, block_q=192, key_group=32, causal=True),
    "every_key": Case(70, 2, 2, num_keys=70),
    "shared_heads": Case(100, 8, 2, causal=True, block_q=16, share_heads=True),
    "shared_packed": Case(
        70, 6, 2, key_group=8, causal=True, key_mask=True, segments=True, share_heads=True
    ),
    "width_80": Case(64, 1, 1, width=80, key_group=64, causal=True),
    "width_96": Case(64, 1, 1, width=96),
    "width_128": Case(64, 1, 1, width=128, causal=True),
}
TOKEN = {
    "one_position": Case(1, causal=True),
    "grouped_heads": Case(130, 2, 1, causal=True),
    "packed": Case(70, 1, 1, width=64, key_mask=True, segments=True, batch=2),
    "packed_causal": Case(130, 1, 1, causal=True, key_mask=True, segments=True),
    "every_key": Case(70, 1, 1, num_keys=70),
    "width_128": Case(64, 1, 1, width=128),
}
#: Sizes that differ from others in one number; a program of each takes half a minute to interpret.
SLOW = {
    "large_groups",
    "shared_packed",
    "two_warpgroups",
    "three_warpgroups",
    "width_80",
    "width_96",
    "packed",
}
#: One program of each kernel, for other versions of jax.
VERSIONS = {("tile", "one_group"), ("token", "one_position")}
CASES = [
    pytest.param(
        *case,
        marks=[pytest.mark.slow] * (case[1] in SLOW) + [pytest.mark.versions] * (case in VERSIONS),
    )
    for case in (*itertools.product(["tile"], TILE), *itertools.product(["token"], TOKEN))
]
HALF = [("tile", "grouped_heads"), ("token", "grouped_heads"), ("tile", "width_80")]


def run(case, granularity, implementation, dtype):
    """Output and gradients of q, k and v."""
    arrays, codes, masks = inputs(case)
    selection = select(case, codes, masks, granularity)

    @jax.jit
    def gradients(q, k, v, grad):
        def attention(q, k, v):
            return sparse_attention(
                q, k, v, selection, implementation=implementation, **options(case, masks)
            )

        out, pullback = jax.vjp(attention, q, k, v)
        return out, *pullback(grad)

    return gradients(*(a.astype(dtype) for a in arrays))


def check(actual, expected, case, dtype=jnp.bfloat16):
    """Gradients are sums over weights, rounded, that hang on outputs, rounded, which are sums."""
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == dtype
        assert_close(a, b, case.length, sums=1 if i == 0 else 2)


def compare(granularity, name, dtype):
    case = {"tile": TILE, "token": TOKEN}[granularity][name]
    expected = run(case, granularity, "reference", jnp.float32)
    with mosaic.running():
        actual = run(case, granularity, "mosaic", dtype)
    check(actual, expected, case, dtype)
    return case, actual


@pytest.mark.parametrize(("granularity", "name"), CASES)
def test_equals_the_reference(granularity, name):
    case, (out, dq, dk, dv) = compare(granularity, name, jnp.bfloat16)
    _, _, masks = inputs(case)
    valid = np.asarray(valid_keys(case.length, case.causal, *masks))
    valid = np.broadcast_to(valid, (case.batch, *valid.shape[1:]))
    blind, unseen = ~valid.any(2), ~valid.any(1)
    assert blind.any() == ("packed" in name)
    for a, empty in ((out, blind), (dq, blind), (dk, unseen), (dv, unseen)):
        np.testing.assert_array_equal(np.asarray(a)[empty], 0)


@pytest.mark.parametrize(("granularity", "name"), HALF)
def test_equals_the_reference_in_float16(granularity, name):
    compare(granularity, name, jnp.float16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("granularity", "case"),
    [
        ("tile", Case(70, 1, 1, num_keys=16, causal=True, batch=4)),
        ("token", Case(70, 1, 1, num_keys=16, batch=4)),
    ],
)
def test_under_vmap_checkpoint_and_scan(granularity, case):
    arrays, codes, masks = inputs(case)
    arrays = [a.astype(jnp.bfloat16) for a in arrays]

    def one(q, k, v, *codes_of_tokens):
        given = [a[None] for a in (q, k, v)], [a[None] for a in codes_of_tokens]
        given[1].extend(codes[2:])
        return attend(case, *given[0], given[1], masks, granularity, "mosaic")[0]

    def scanned(one, *a):
        steps = [x.reshape(2, 2, *x.shape[1:]) for x in a]
        out = jax.lax.scan(lambda _, x: (None, jax.vmap(one)(*x)), None, steps)[1]
        return out.reshape(4, *out.shape[2:])

    # The interpreter has effects, and jax.checkpoint takes none: there, traced but not run.
    rematerialised = jax.checkpoint(one)

    def gradients(one, q, k, v, grad):
        out, pullback = jax.vjp(lambda q, k, v: scanned(one, q, k, v, *codes[:2]), q, k, v)
        return out, *pullback(grad)

    expected = run(case, granularity, "reference", jnp.float32)
    run_here = rematerialised if mosaic.on_hopper() else one
    with mosaic.running():
        actual = jax.jit(gradients, static_argnums=0)(run_here, *arrays)
    check(actual, expected, case)
    traced = functools.partial(gradients, rematerialised)
    assert mosaic.launches(traced, *arrays) == BACKWARD | {"sparse_attention_forward": 2}


def test_under_shard_map():
    case = TILE["grouped_heads"]
    arrays, codes, masks = inputs(case)
    arrays = [a.astype(jnp.bfloat16) for a in arrays]
    selection = select(case, codes, masks, "tile")
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("batch", "heads"))
    heads = PartitionSpec("batch", None, "heads")
    lists = PartitionSpec("batch", "heads")

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=((heads,) * 4, (lists, lists)),
        out_specs=(heads,) * 4,
        check_vma=False,
    )
    def gradients(arrays, lists):
        q, k, v, grad = arrays
        local = dataclasses.replace(selection, groups=lists[0], counts=lists[1])
        attention = functools.partial(
            sparse_attention, selection=local, implementation="mosaic", **options(case, masks)
        )
        out, pullback = jax.vjp(attention, q, k, v)
        return out, *pullback(grad)

    with mosaic.running():
        actual = gradients(tuple(arrays), (selection.groups, selection.counts))
    check(actual, run(case, "tile", "reference", jnp.float32), case)


@pytest.mark.versions
@pytest.mark.parametrize("granularity", ["tile", "token"])
@pytest.mark.parametrize("implementation", ["mosaic", None])
def test_launches_the_kernels(granularity, implementation):
    case = TILE["grouped_heads"]
    arrays, codes, masks = inputs(case)
    arrays = [a.astype(jnp.bfloat16) for a in arrays[:3]]
    selection = select(case, codes, masks, granularity)

    def attention(q, k, v):
        return sparse_attention(
            q, k, v, selection, implementation=implementation, **options(case, masks)
        )

    def loss(*arrays):
        return attention(*arrays).astype(jnp.float32).sum()

    assert mosaic.launches(attention, *arrays) == FORWARD
    assert mosaic.launches(jax.grad(loss, (0, 1, 2)), *arrays) == BACKWARD


@pytest.mark.parametrize("group", [8, 64, 128])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_transposed_lists_hold_what_the_lists_hold(group, heads):
    rng = np.random.default_rng(0)
    length, block_q, listed = 500, 64, 5
    shape = 2, heads[0], -(-length // block_q)
    number = -(-length // group)
    groups = np.sort(np.argsort(rng.random((*shape, number)), -1)[..., :listed], -1)
    counts = rng.integers(0, min(listed, number) + 1, shape)
    selection = TileSelection(
        groups=jnp.asarray(groups, jnp.int32),
        counts=jnp.asarray(counts, jnp.int32),
        block_q=block_q,
        key_group=group,
    )
    q, k = (jnp.zeros((2, length, n, 32), jnp.bfloat16) for n in heads)
    problem = kernels._problem(q, k, selection, 1.0, False, False)
    lists = kernels._lists(problem, selection, None)
    transposed = jax.jit(functools.partial(kernels._transposed, problem))(lists)
    entries, counts = (np.asarray(a) for a in transposed)
    kept = np.zeros((2, heads[0], problem.padded, problem.padded), bool)
    for b, n, block in np.ndindex(*counts.shape):
        found = entries[b, n, block, : counts[b, n, block]]
        assert (np.diff(found >> kernels.BITS) > 0).all()
        for entry in found:
            head, tile = divmod(entry >> kernels.BITS, problem.tiles)
            for i in range(64 // problem.group):
                start = block * 64 + i * problem.group
                kept[
                    b,
                    n * problem.lists_per_key_head + head,
                    tile * block_q : (tile + 1) * block_q,
                    start : start + problem.group,
                ] = entry >> i & 1
    expected = np.asarray(kept_keys(selection, length))
    np.testing.assert_array_equal(kept[:, :, :length, :length], expected)


def test_what_does_not_fit_is_said():
    case = TILE["grouped_heads"]
    arrays, codes, masks = inputs(case)
    q, k, v = (a.astype(jnp.bfloat16) for a in arrays[:3])
    tile = select(case, codes, masks, "tile")

    def reason(*arrays, selection=tile):
        return kernels.unfit(*arrays, selection)

    assert reason(q, k, v) is None
    assert "float32" in reason(*arrays[:3])
    assert "bfloat16, float16" in reason(q, k, v.astype(jnp.float16))
    assert "got 48" in reason(*(jnp.tile(a[..., :16], 3) for a in (q, k, v)))
    assert "got 4" in reason(q, k, v, selection=dataclasses.replace(tile, key_group=4))
    assert "got 96" in reason(q, k, v, selection=dataclasses.replace(tile, block_q=96))
    wide = dataclasses.replace(
        select(case, codes, masks, "token"),
        query_codewords=jnp.zeros((1, 4, 256, 256), jnp.int8),
    )
    assert "shared memory" in reason(q, k, v, selection=wide)


def test_without_a_hopper_gpu_mosaic_raises():
    if mosaic.on_hopper():
        pytest.skip("this is a Hopper GPU")
    case = TILE["grouped_heads"]
    arrays, codes, masks = inputs(case)
    q, k, v = (a.astype(jnp.bfloat16) for a in arrays[:3])
    with pytest.raises(NotImplementedError, match="compute capability 9"):
        sparse_attention(q, k, v, select(case, codes, masks, "tile"), implementation="mosaic")
