"""The Hopper kernels of the routed FFN against the specification: output and every gradient."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels import routed_ffn
from pallas_kernels.routed_ffn import mosaic as kernels
from pallas_kernels.routed_ffn import plan as plans
from pallas_kernels.routed_ffn.types import activation_function
from tests.pallas_kernels import mosaic
from tests.pallas_kernels.test_routed_ffn import (
    ACTIVATIONS,
    Case,
    assert_trees_close,
    make,
)

pytestmark = pytest.mark.mosaic

UP, DOWN, BACKWARD, WEIGHT = (
    f"routed_ffn_{name}" for name in ("up", "down", "down_backward", "weight_gradient")
)

Case = functools.partial(Case, width=64, units=64)

CASES = {
    "all_in_one": Case(70, 3, 1, routing="one", biases=False, activation="relu"),
    "gated": Case(45, 3, 2, gated=True, activation="silu", lora=("gate",)),
    "gated_no_bias": Case(130, 2, 1, gated=True, biases=False, width=128, activation="gelu_tanh"),
    "everything": Case(150, 2, 2, biases=False, activation="identity", lora=("out",)),
}


@pytest.fixture
def by_combination(monkeypatch):
    monkeypatch.setattr(plans, "sorts_by_combination", lambda *_: True)


@pytest.fixture
def wide_tiles(monkeypatch):
    """Tiles that do not divide the columns, two stages, and several tiles a thread block."""
    chosen = kernels.configs_for

    def configs_for(block_m, row_tiles, columns, **kwargs):
        config = chosen(block_m, row_tiles, columns, **kwargs)[0]
        block_n = min(128, columns)
        return [dataclasses.replace(config, block_n=block_n, stages=2, panel=2, num_sms=2)]

    monkeypatch.setattr(kernels, "configs_for", configs_for)


def weighted_sum(y):
    """A sum whose slopes are exact in the half types, so that rounding them takes no part."""
    slopes = np.random.default_rng(1).integers(-8, 9, y.shape) / 8
    return (y.astype(jnp.float32) * slopes.astype(np.float32)).sum()


def evaluate(case, arguments, index, implementation, argnums):
    """Returns the output, and gradients of a weighted sum of it."""

    def loss(x, coefficients, weights, lora):
        y = routed_ffn(
            x,
            index,
            coefficients,
            weights,
            lora=lora,
            activation=case.activation,
            implementation=implementation,
        )
        return weighted_sum(y), y

    grads, y = jax.jit(jax.grad(loss, argnums, has_aux=True))(*arguments)
    return {"y": y, "grads": grads}


def check(case, dtype=jnp.bfloat16, argnums=(0, 1, 2, 3)):
    arguments, index = make(case, dtype)
    with mosaic.running():
        actual = jax.block_until_ready(evaluate(case, arguments, index, "mosaic", argnums))
    assert actual["y"].dtype == dtype
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), arguments)
    expected = evaluate(case, exact, index, "reference", argnums)
    reduction = max(case.tokens, case.width, case.blocks * case.units)
    assert_trees_close(actual, expected, reduction, dtype)


@pytest.mark.parametrize("name", mosaic.named(CASES, "everything"))
def test_matches_reference(name):
    check(CASES[name])


@pytest.mark.slow
@pytest.mark.usefixtures("by_combination", "wide_tiles")
def test_combinations_in_wide_tiles():
    lora = ("in", "gate", "out")
    case = Case(40, 3, 2, gated=True, biases=False, lora=lora, activation="silu", units=192)
    check(case, argnums=(0, 1, 3))


@pytest.mark.slow
@pytest.mark.usefixtures("wide_tiles")
def test_blocks_in_wide_tiles():
    check(Case(70, 3, 1, biases=False, activation="gelu", width=192, units=192))


def test_one_token_of_float16():
    check(Case(1, 2, 1, lora=("in",)), jnp.float16, argnums=(0, 1, 3))


@pytest.mark.slow
def test_under_vmap_checkpoint_and_scan():
    case = Case(20, 2, 1, biases=False)
    (x, c, w, lora), index = make(dataclasses.replace(case, tokens=40), jnp.bfloat16)
    batches = [a.reshape(1, 2, case.tokens, -1) for a in (x, c, index)]

    def one(implementation, w, lora, x, c, index):
        options = {"activation": "silu", "implementation": implementation}
        return weighted_sum(routed_ffn(x, index, c, w, lora=lora, **options))

    def gradients(function, w, lora, x, c):
        def scanned(w, lora, x, c):
            mapped = jax.vmap(function, (None, None, 0, 0, 0))

            def step(total, batch):
                return total + mapped(w, lora, *batch).sum(), None

            return jax.lax.scan(step, 0.0, (x, c, batches[2]))[0]

        return jax.jit(jax.grad(scanned, (0, 1, 2, 3)))(w, lora, x, c)

    arguments = (w, lora, *batches[:2])
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), arguments)
    expected = gradients(functools.partial(one, "reference"), *exact)
    plain = functools.partial(one, "mosaic")
    # The interpreter has effects, and jax.checkpoint takes none: there, traced but not run.
    rematerialised = jax.checkpoint(plain)
    run_here = rematerialised if mosaic.on_hopper() else plain
    with mosaic.running():
        actual = jax.block_until_ready(gradients(run_here, *arguments))
    assert_trees_close(actual, expected, case.units, jnp.bfloat16)
    traced = mosaic.launches(functools.partial(gradients, rematerialised), *arguments)
    # The output is not computed again.
    assert traced == {UP: 2, DOWN: 2, BACKWARD: 1, WEIGHT: 2}


def test_sharded():
    case = Case(20, 2, 1, biases=False)
    (x, c, w, _), index = make(case, jnp.bfloat16)
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("data",))
    spec = PartitionSpec("data")

    def run(x, index, c, w):
        return routed_ffn(x, index, c, w, implementation="mosaic")

    with mosaic.running():
        sharded = jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(spec, spec, spec, PartitionSpec()),
            out_specs=spec,
            check_vma=False,
        )
        actual = jax.block_until_ready(jax.jit(sharded)(x, index, c, w))
    assert_trees_close(actual, routed_ffn(x, index, c, w), case.width, jnp.bfloat16)


def launches(case, argnums):
    arguments, index = make(case, jnp.bfloat16)

    def run(*arguments):
        x, c, w, lora = arguments
        y = routed_ffn(x, index, c, w, lora=lora, implementation="mosaic")
        return y.astype("float32").sum()

    return mosaic.launches(run if argnums == () else jax.grad(run, argnums), *arguments)


@pytest.mark.versions
@pytest.mark.parametrize(
    ("case", "argnums", "expected"),
    [
        (Case(300), (), {UP: 1, DOWN: 1}),
        (Case(300), 1, {UP: 1, DOWN: 1, BACKWARD: 1}),
        (Case(300, gated=True, biases=False), 0, {UP: 1, DOWN: 2, BACKWARD: 1}),
        (Case(300, biases=False), (0, 2), {UP: 1, DOWN: 2, BACKWARD: 1, WEIGHT: 2}),
        (Case(300, gated=True, biases=False), 2, {UP: 1, DOWN: 1, BACKWARD: 1, WEIGHT: 3}),
        (Case(300, lora=("in", "out")), (), {UP: 1, DOWN: 2}),
        (Case(300, lora=("in", "out")), (0, 3), {UP: 1, DOWN: 4, BACKWARD: 1, WEIGHT: 2}),
    ],
)
def test_launches(case, argnums, expected):
    assert launches(case, argnums) == expected


@pytest.mark.parametrize("combinations", [False, True])
@pytest.mark.parametrize(
    ("tokens", "blocks", "active"), [(1, 1, 1), (300, 4, 2), (90, 5, 3), (700, 4, 4), (3, 6, 1)]
)
def test_plan(monkeypatch, tokens, blocks, active, combinations):
    monkeypatch.setattr(plans, "sorts_by_combination", lambda *_: combinations)
    _, index = make(Case(tokens, blocks, active))
    plan = jax.jit(plans.make_plan, static_argnums=1)(index, blocks)
    order, rank, position, of_tile = map(np.asarray, plan[:4])
    count, block_m = int(plan.tiles[0]), order.size // of_tile.shape[1]
    # Every token's rows are of its own, in tiles that hold rows, and compute its blocks.
    rows = rank.ravel()
    assert len(set(rows)) == rows.size
    np.testing.assert_array_equal(order[rows], np.arange(rows.size))
    assert (np.delete(order, rows) == rows.size).all()
    assert rows.max() // block_m < count <= of_tile.shape[1]
    found = of_tile[position, np.broadcast_to(rank, index.shape) // block_m]
    np.testing.assert_array_equal(found, index)
    lists, counts = map(np.asarray, plans.tiles_by_block(plan, blocks))
    for block in range(blocks):
        slots, tiles = np.nonzero(of_tile[:, :count] == block)
        entries = lists[block, : counts[block]]
        assert sorted(entries) == sorted(tiles * len(of_tile) + slots)


def test_combinations_unless_they_are_many():
    assert plans.sorts_by_combination(8192, 4, 2)
    assert plans.sorts_by_combination(1, 8, 1)
    assert plans.sorts_by_combination(1, 3, 3)
    assert not plans.sorts_by_combination(512, 4, 2)
    assert not plans.sorts_by_combination(8192, 64, 32)


def test_values_of_choices():
    _, index = make(Case(50, 5, 3))
    plan = plans.make_plan(index, 5)
    values = jnp.arange(150.0).reshape(50, 3)
    rows = plans.rows_of_choices(values, plan)
    np.testing.assert_array_equal(plans.choices_of_rows(rows, plan), values)
    assert rows.sum() == values.sum()


def test_tile_sizes():
    shapes = itertools.product((64, 128), (1, 66, 500), (64, 384, 2752, 4096), (1, 2), (2, 3, 5))
    for block_m, tiles, columns, products, buffers in shapes:
        configs = kernels.configs_for(block_m, tiles, columns, products=products, buffers=buffers)
        assert len(set(configs)) == len(configs)
        for config in configs:
            assert config.block_n <= min(columns, 256 // products)
            assert config.stages >= 3
    # Narrow tiles where wide ones would leave multiprocessors idle, or half a wave.
    assert kernels.configs_for(128, 64, 4096)[0].block_n == 256
    assert kernels.configs_for(128, 67, 2048)[0].block_n == 192
    assert kernels.configs_for(128, 4, 2048)[0].block_n == 64


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    h = jnp.linspace(-9, 9, 1000)
    value, slope = kernels._act_and_slope(name, h)
    act = activation_function(name)
    np.testing.assert_allclose(value, act(h), atol=5e-6)
    np.testing.assert_allclose(slope, jax.vmap(jax.grad(act))(h), atol=5e-6)


def test_unfit():
    def run(case, dtype=jnp.bfloat16):
        (x, c, w, _), index = make(case, dtype)
        return routed_ffn(x, index, c, w, implementation="mosaic")

    if not mosaic.on_hopper():
        with pytest.raises(NotImplementedError, match="compute capability 9"):
            run(Case(5))
    with kernels.mosaic.interpreted():  # nothing runs
        with pytest.raises(NotImplementedError, match=r"'mosaic' cannot run.*got float32"):
            run(Case(5), jnp.float32)
        with pytest.raises(NotImplementedError, match=r"multiples of 64.* got 96 and 64"):
            run(Case(5, width=96))
        (x, c, w, _), index = make(Case(5, width=96), jnp.bfloat16)
        assert "mosaic" not in str(jax.make_jaxpr(routed_ffn)(x, index, c, w))
        assert run(Case(0)).shape == (0, 64)
