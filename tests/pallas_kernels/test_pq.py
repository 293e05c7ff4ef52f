"""Encoding and key selection: implementations against the specification, bit for bit."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    TokenSelection,
    pq_encode,
    pq_select,
    score_unit,
    scoring_codewords,
)
from pallas_kernels.pq import reference, xla


@dataclasses.dataclass(frozen=True)
class Case:
    length: int
    heads: int = 2
    kv_heads: int = 2
    num_keys: int = 5
    causal: bool = False
    key_mask: bool = False
    segments: bool = False
    rule: str = "inner_product"
    block_q: int = 8
    key_group: int = 4
    share_heads: bool = False
    batch: int = 2
    limit: int = xla.BLOCK_ELEMENTS


CASES = {
    "one_position": Case(1, causal=True),
    # two chunks of two key heads
    "grouped_heads": Case(17, heads=4, causal=True, key_mask=True, segments=True, limit=1200),
    "ties": Case(130, num_keys=16, key_mask=True, rule="match_count", block_q=64, key_group=16),
    "plain": Case(130, heads=3, kv_heads=1, num_keys=17, block_q=64, key_group=32),
    "groups_across_tiles": Case(70, num_keys=9, causal=True, block_q=24, key_group=16),
    "packed": Case(70, segments=True, block_q=16, key_group=1),
    # four stages of at most 80 queries, all but the first in two blocks
    "several_blocks": Case(
        300, 4, 2, 40, causal=True, key_mask=True, segments=True, batch=1, limit=24000
    ),
    "everything": Case(33, num_keys=40, key_mask=True),
    # four stages, two key heads with a list for three heads
    "shared_lists": Case(
        150, 6, 2, 9, True, True, block_q=12, key_group=8, share_heads=True, limit=4000
    ),
}
# Masks of one kind alone differ in what the tiles see.
TILE_ONLY = {"groups_across_tiles", "packed", "shared_lists"}
TOKEN_CASES = [name for name in CASES if name not in TILE_ONLY]


@functools.cache
def inputs(case, seed=0):
    """Random codes and codewords, and masks: positions at random and a sequence's tail hidden."""
    rng = np.random.default_rng(seed)
    shape = case.batch, case.length
    codes = [rng.integers(0, 6, (*shape, n, 3), np.uint8) for n in (case.heads, case.kv_heads)]
    books = rng.normal(size=(2, case.kv_heads, 3, 6, 2)).astype(np.float32)
    mask = segments = None
    if case.key_mask:
        mask = rng.random(shape) < 0.7
        mask[-1, case.length // 4 :] = False
    if case.segments:
        segments = np.sort(rng.integers(0, 3, shape, np.int32), -1)
    codewords = jax.jit(scoring_codewords, static_argnums=2)(*books, case.rule)
    arrays, mask, segments = jax.tree.map(jnp.asarray, ((*codes, *codewords), mask, segments))
    return arrays, {"causal": case.causal, "key_mask": mask, "segment_ids": segments}


@functools.cache
def selected(case, granularity, implementation, seed=0):
    """The selection, compiled, computed once."""
    arrays, masks = inputs(case, seed)

    @jax.jit
    def run(arrays, mask, segments):
        return pq_select(
            *arrays,
            num_keys=case.num_keys,
            granularity=granularity,
            causal=case.causal,
            key_mask=mask,
            segment_ids=segments,
            block_q=case.block_q,
            key_group=case.key_group,
            share_heads=case.share_heads,
            implementation=implementation,
        )

    block_shape = functools.partial(xla.block_shape, limit=case.limit)
    with mock.patch.object(xla, "block_shape", block_shape):
        return run(arrays, masks["key_mask"], masks["segment_ids"])


def valid_keys(case):
    """The keys that each query may see."""
    masks = {name: a if a is None else np.asarray(a) for name, a in inputs(case)[1].items()}
    position = np.arange(case.length)
    valid = np.ones((case.batch, case.length, case.length), bool)
    if case.causal:
        valid &= position <= position[:, None]
    if case.key_mask:
        valid &= masks["key_mask"][:, None]
    if case.segments:
        valid &= masks["segment_ids"][:, :, None] == masks["segment_ids"][:, None]
    return valid


kept_keys = jax.jit(reference.kept_keys, static_argnums=1)
score_keys = jax.jit(reference.scores)


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", TOKEN_CASES)
def test_token_keeps_exactly_the_best_keys(name):
    case = CASES[name]
    arrays, _ = inputs(case)
    selection = selected(case, "token", "xla")
    assert isinstance(selection, TokenSelection)
    valid = np.broadcast_to(
        valid_keys(case)[:, None], (case.batch, case.heads, case.length, case.length)
    )
    kept = np.asarray(kept_keys(selection, case.length)) & valid
    np.testing.assert_array_equal(kept.sum(-1), np.minimum(case.num_keys, valid.sum(-1)))
    scores = np.asarray(score_keys(*arrays))
    lowest_kept = np.where(kept, scores, np.iinfo(np.int32).max).min(-1)
    highest_dropped = np.where(valid & ~kept, scores, np.iinfo(np.int32).min).max(-1)
    assert (lowest_kept >= highest_dropped).all()

    assert (selection.kept is None) == (case.length > 4 * 3 * arrays[2].shape[-1])
    if selection.kept is not None:
        mask = jnp.moveaxis(selection.kept, 1, 3).reshape(kept.shape)
        np.testing.assert_array_equal(mask, kept)
    rule = dataclasses.replace(selection, kept=None)
    assert_equal(rule, selected(case, "token", "reference"))


@pytest.mark.parametrize("length", [1289, 1290])  # three counts in one sum, and one
def test_threshold_of_many_keys(length):
    rng = np.random.default_rng(0)
    score = rng.integers(-200, 200, (1, length, 1, 8)).astype(np.float32)
    score[rng.random(score.shape) < 0.1] = -np.inf
    distance = np.asarray(xla.tie_distance(jnp.arange(8) * 150, length))
    level, radius = jax.jit(xla.threshold, static_argnums=2)(score, distance, 100)
    for query in range(8):
        order = np.lexsort((distance[:, query], -score[0, :, 0, query]))
        last = order[99]
        assert level[0, 0, query] == score[0, last, 0, query]
        assert radius[0, 0, query] == distance[last, query]


def own_groups(case):
    """Key groups that a tile overlaps at most."""
    first = np.arange(0, case.length, case.block_q)
    last = np.minimum(first + case.block_q, case.length) - 1
    return (last // case.key_group - first // case.key_group).max() + 1


@pytest.mark.parametrize("name", CASES)
def test_tile_lists_are_ascending_and_valid_and_leave_no_query_alone(name):
    case = CASES[name]
    selection = selected(case, "tile", "xla")
    valid = valid_keys(case)
    groups, counts = np.asarray(selection.groups), np.asarray(selection.counts)
    assert counts.shape[1] == (case.kv_heads if case.share_heads else case.heads)
    for (b, n, t), count in np.ndenumerate(counts):
        first, last = t * case.block_q, min((t + 1) * case.block_q, case.length)
        seen = np.flatnonzero(valid[b, first:last].any(0)) // case.key_group
        own = {g for g in seen if g in np.arange(first, last) // case.key_group}
        listed = groups[b, n, t, :count]
        assert (np.diff(listed) > 0).all()
        assert set(listed) <= set(seen)
        assert own <= set(listed) or not (case.segments or case.causal)
        assert count == min(groups.shape[-1], len(set(seen)))
    budget = min(-(-case.num_keys // case.key_group), -(-case.length // case.key_group))
    if case.causal or case.segments:
        budget = min(budget + own_groups(case), -(-case.length // case.key_group))
    assert groups.shape[-1] == budget
    kept = np.asarray(kept_keys(selection, case.length)) & valid[:, None]
    some = np.broadcast_to(valid.any(-1)[:, None], kept.shape[:3])
    np.testing.assert_array_equal(kept.any(-1), some)
    assert_equal(selection, selected(case, "tile", "reference"))


@pytest.mark.parametrize("block_q", [24, 64])
@pytest.mark.parametrize("causal", [False, True])
def test_tiles_keep_the_groups_of_most_attention(causal, block_q):
    """Against float64 softmax, whose mass on the other groups than the tile's own is compared."""
    rng = np.random.default_rng(0)
    length, group, count = 256, 16, 5
    books = rng.normal(size=(2, 2, 4, 16, 2)).astype(np.float32)
    codes = rng.integers(0, 16, (2, 1, length, 2, 4), np.uint8)
    selection = pq_select(
        *map(jnp.asarray, codes), *scoring_codewords(*map(jnp.asarray, books)),
        num_keys=count * group, granularity="tile", score_unit=score_unit(*map(jnp.asarray, books)),
        causal=causal, block_q=block_q, key_group=group,
    )  # fmt: skip
    q, k = (
        book[np.arange(2)[:, None], np.arange(4), code].reshape(length, 2, 8).astype(np.float64)
        for book, code in zip(books, codes[:, 0], strict=True)
    )
    position = np.arange(length)
    for head in range(2):
        weights = np.exp(q[:, head] @ k[:, head].T / 8**0.5)
        if causal:
            weights *= position <= position[:, None]
        mass = weights / weights.sum(1, keepdims=True)
        mass = mass.reshape(length, -1, group).sum(2)
        for tile in range(-(-length // block_q)):
            of_tile = mass[tile * block_q : (tile + 1) * block_q].sum(0)
            number = selection.counts[0, head, tile]
            kept = set(np.asarray(selection.groups)[0, head, tile, :number].tolist())
            last = min((tile + 1) * block_q, length) - 1
            own = set(range(tile * block_q // group, last // group + 1)) if causal else set()
            assert own <= kept
            others = [g for g in range(len(of_tile)) if g not in own]
            best = np.sort(of_tile[others])[::-1][: number - len(own)].sum()
            assert of_tile[sorted(kept - own)].sum() >= 0.99 * best


def test_a_query_that_sees_nothing_has_no_share():
    weights = jnp.zeros((2, 3)).at[1, 2].set(2.0**-100)
    shares = np.asarray(reference.group_shares(weights, -1))
    assert shares[0].tolist() == [0, 0, 0]
    assert shares[1, :2].tolist() == [0, 0]
    assert abs(shares[1, 2] / 2**14 - 1) < 1 / 8


@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_shares_are_those_of_softmax_to_within_an_eighth(spread):
    rng = np.random.default_rng(0)
    weights = np.exp(np.clip(spread * rng.normal(size=(50, 40)), -60, 60)).astype(np.float32)
    shares = np.asarray(jax.jit(reference.group_shares, static_argnums=1)(weights, 1)) / 2**14
    exact = weights.astype(np.float64) / weights.sum(1, keepdims=True, dtype=np.float64)
    assert (np.abs(shares - exact) < exact / 8 + 2.0**-13).all()


def test_a_tile_of_one_query_knows_no_later_token():
    """While a tile of several does: its lists depend on all of its queries."""
    arrays, _ = inputs(Case(64, num_keys=8))
    changed = [a.at[:, -1].set((a[:, -1] + 1) % 6) for a in arrays[:2]]
    pick = functools.partial(pq_select, num_keys=8, granularity="tile", causal=True, key_group=4)
    for block_q in (1, 16):
        before, after = (
            np.asarray(kept_keys(pick(*codes, *arrays[2:], block_q=block_q), 64))[:, :, :-1]
            for codes in (arrays[:2], changed)
        )
        assert (before == after).all() == (block_q == 1)


def test_a_score_of_one_is_worth_its_unit():
    rng = np.random.default_rng(0)
    books = rng.normal(size=(2, 2, 8, 16, 4)).astype(np.float32)
    codes = rng.integers(0, 16, (2, 1, 64, 2, 8), np.uint8)
    on_device = [jnp.asarray(book) for book in books]
    scores = np.asarray(score_keys(*codes, *scoring_codewords(*on_device)))[0]
    q, k = (
        book[np.arange(2)[:, None], np.arange(8), code].reshape(64, 2, -1)
        for book, code in zip(books, codes[:, 0], strict=True)
    )
    logits = np.einsum("qnw,knw->nqk", q, k) / 32**0.5
    unit = np.asarray(score_unit(*on_device))
    for head in range(2):
        slope = np.polyfit(logits[head].ravel(), scores[head].ravel() * unit[head], 1)[0]
        assert abs(slope - 1) < 0.01
    assert score_unit(*on_device, "match_count").tolist() == [1, 1]


def test_ties_go_to_the_nearest_key_the_earlier_first():
    codes = jnp.zeros((1, 7, 1, 1), jnp.uint8)
    codewords = jnp.ones((1, 1, 2, 1), jnp.int8)
    for count, kept in ((2, [2, 3]), (4, [1, 2, 3, 4])):
        for implementation in ("reference", "xla"):
            run = functools.partial(
                pq_select, num_keys=count, granularity="token", implementation=implementation
            )
            selection = jax.jit(run)(codes, codes, codewords, codewords)
            row = np.asarray(kept_keys(selection, 7))[0, 0, 3]
            assert np.flatnonzero(row).tolist() == kept


@pytest.mark.parametrize("granularity", ["token", "tile"])
def test_selection_under_vmap_and_scan(granularity):
    case = CASES["groups_across_tiles"]
    seeds = 1, 2
    batches = [inputs(case, seed)[0] for seed in seeds]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *batches)
    run = functools.partial(
        pq_select, num_keys=9, granularity=granularity, causal=True, block_q=24, key_group=16
    )
    mapped = jax.jit(jax.vmap(lambda a: run(*a)))(stacked)
    scanned = jax.jit(lambda s: jax.lax.scan(lambda _, a: (None, run(*a)), None, s)[1])(stacked)
    for i, seed in enumerate(seeds):
        expected = selected(case, granularity, "reference", seed)
        for found in (mapped, scanned):
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
                np.testing.assert_array_equal(a[i], b)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "num_codewords", "dtype"),
    [(2, 2, 16, jnp.float32), (6, 3, 5, jnp.bfloat16), (2, 1, 40, jnp.float32)],
)
def test_encode_finds_the_nearest_and_lowest(heads, kv_heads, num_codewords, dtype):
    rng = np.random.default_rng(0)
    x = rng.integers(-4, 5, (2, 37, heads, 6)).astype(dtype)
    books = rng.integers(-4, 5, (kv_heads, 3, num_codewords, 2)).astype(dtype)
    parts = np.asarray(x, np.int64).reshape(2, 37, heads, 3, 1, 2)
    repeated = np.repeat(np.asarray(books, np.int64), heads // kv_heads, 0)
    expected = ((parts - repeated) ** 2).sum(-1).argmin(-1)
    for implementation in ("reference", "xla"):
        codes = jax.jit(functools.partial(pq_encode, implementation=implementation))(x, books)
        assert codes.dtype == jnp.uint8
        np.testing.assert_array_equal(codes, expected)


def test_encode_with_256_codewords():
    books = jnp.arange(256.0).reshape(1, 1, 256, 1)
    x = jnp.arange(255, -1, -1.0).reshape(1, 256, 1, 1)
    np.testing.assert_array_equal(pq_encode(x, books).ravel(), np.arange(255, -1, -1))


def test_scores_rank_as_the_codebooks_do_and_stay_in_range():
    rng = np.random.default_rng(0)
    books = rng.normal(size=(2, 2, 8, 16, 4)).astype(np.float32)
    books[1, :, 3, :, 1] *= 100  # an outlier channel, as real keys have
    codes = rng.integers(0, 16, (2, 1, 64, 2, 8), np.uint8)
    scores = np.asarray(score_keys(*codes, *jax.jit(scoring_codewords)(*books)))
    assert np.abs(scores).max() <= 8191
    exact = [
        book[np.arange(2)[:, None], np.arange(8), code].reshape(64, 2, -1)
        for book, code in zip(books, codes[:, 0], strict=True)
    ]
    exact = np.einsum("qnw,knw->nqk", *exact)
    for head in range(2):
        found = np.corrcoef(scores[0, head].ravel(), exact[head].ravel())[0, 1]
        assert found > 0.999


def test_match_count_counts_matches():
    codes = np.random.default_rng(1).integers(0, 3, (2, 1, 20, 1, 4), np.uint8)
    books = jnp.zeros((1, 4, 3, 2))
    scores = score_keys(*codes, *scoring_codewords(books, books, "match_count"))
    expected = (codes[0][0, :, None, 0] == codes[1][0, None, :, 0]).sum(-1)
    np.testing.assert_array_equal(scores[0, 0], expected)


def test_selection_is_not_differentiated():
    case = CASES["plain"]
    x = jnp.ones((1, 9, 3, 6))
    books = jax.random.normal(jax.random.key(0), (1, 3, 6, 2))

    def loss(x, books):
        codes = pq_encode(x, books)
        picked = pq_select(
            codes, codes[:, :, :1], *scoring_codewords(books, books),
            num_keys=case.num_keys, granularity="token",
        )  # fmt: skip
        return picked.threshold.sum().astype(jnp.float32) + x.sum() + books.sum()

    for gradient in jax.jit(jax.grad(loss, (0, 1)))(x, books):
        np.testing.assert_array_equal(gradient, 1)


@pytest.mark.usefixtures("unhooked")
def test_errors_name_the_value():
    case = CASES["plain"]
    arrays, _ = inputs(case)
    books = jnp.zeros((2, 3, 6, 2))
    pick = functools.partial(pq_select, *arrays, num_keys=4, granularity="token")
    with pytest.raises(ValueError, match="num_keys must be at least 1, got 0"):
        pick(num_keys=0)
    with pytest.raises(ValueError, match=r"block_q must be 1\.\.512, got 1024"):
        pick(granularity="tile", block_q=1024)
    with pytest.raises(ValueError, match="key_group must be at least 1, got 0"):
        pick(granularity="tile", key_group=0)
    codes = jnp.zeros((1, 2**16 + 1, 1, 3), jnp.uint8)
    with pytest.raises(ValueError, match="65537 keys are more than 65536 groups of key_group=1"):
        pq_select(codes, codes, *arrays[2:], num_keys=1, granularity="tile", key_group=1)
    with pytest.raises(ValueError, match=r"score_unit is float32\[2\]; expected .* = \[1\]"):
        pick(granularity="tile", score_unit=jnp.ones(2))
    with pytest.raises(ValueError, match="3 heads are not a multiple of the 2"):
        pq_encode(jnp.zeros((1, 4, 3, 6)), books)
    with pytest.raises(ValueError, match="do not cover the head width 8"):
        pq_encode(jnp.zeros((1, 4, 2, 8)), books)
    with pytest.raises(ValueError, match=r"E must be 1\.\.256, got 257"):
        pq_encode(jnp.zeros((1, 4, 1, 1)), jnp.zeros((1, 1, 257, 1)))
