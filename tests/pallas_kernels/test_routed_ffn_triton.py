"""The Triton kernels of the routed FFN against the specification: output and every gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import routed_ffn
from pallas_kernels import triton as kernels
from pallas_kernels.routed_ffn import plan as plans
from tests.pallas_kernels import triton
from tests.pallas_kernels.test_routed_ffn import ACTIVATIONS, Case, assert_trees_close, make
from tests.pallas_kernels.test_routed_ffn_mosaic import evaluate, weighted_sum

pytestmark = [pytest.mark.triton, triton.needs_triton]

UP, DOWN, BACKWARD, WEIGHT = (
    f"routed_ffn_{name}" for name in ("up", "down", "down_backward", "weight_gradient")
)

CASES = {
    "one_token": Case(1, biases=False),
    "odd": Case(129, gated=True, lora=("in", "gate", "out")),
    "all_active": Case(130, active=4, activation="gelu_tanh"),
    "rows_like_tokens": Case(128, 2, 1, biases=False, activation="identity"),
    "five_blocks": Case(150, blocks=5, active=3, gated=True, activation="silu", lora=("gate",)),
    "all_in_one": Case(300, active=1, routing="one", activation="relu", lora=("in", "out")),
    "empty_blocks": Case(200, blocks=6, active=2, routing="low", gated=True),
    "one_unit": Case(40, width=1, units=1, rank=1, lora=("in", "out")),
    "wide": Case(70, 2, 1, width=136, units=130, rank=17, lora=("in", "out")),
}


@pytest.fixture(autouse=True)
def exact_reference():
    """Else a GPU multiplies the reference's float32 in TF32."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def by_combination(monkeypatch):
    monkeypatch.setattr(plans, "sorts_by_combination", lambda *_: True)


def check(case, dtype, argnums=(0, 1, 2, 3)):
    arguments, index = make(case, dtype)
    actual = evaluate(case, arguments, index, "triton", argnums)
    assert actual["y"].dtype == dtype
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), arguments)
    expected = evaluate(case, exact, index, "reference", argnums)
    reduction = max(case.tokens, case.width, case.blocks * case.units)
    assert_trees_close(actual, expected, reduction, dtype)


@pytest.mark.parametrize("name", CASES)
def test_matches_reference(name):
    check(CASES[name], jnp.float32)


@pytest.mark.parametrize("name", ["odd", "five_blocks", "wide"])
def test_matches_reference_in_half_precision(name):
    check(CASES[name], triton.half())


@pytest.mark.usefixtures("by_combination")
def test_combinations():
    check(CASES["five_blocks"], jnp.float32)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    check(Case(70, 2, 1, activation=activation), jnp.float32, (0, 2))


def test_values_of_other_tokens_never_leak():
    case = Case(100, active=1)
    (x, c, w, _), _ = make(case)
    index = jnp.asarray(np.arange(100)[:, None] // 50, jnp.int32)
    x = x.at[50:].set(jnp.nan)

    def loss(x):
        return routed_ffn(x, index, c, w, implementation="triton")[:50].sum()

    y, dx = jax.value_and_grad(loss)(x)
    assert jnp.isfinite(y)
    assert jnp.isfinite(dx[:50]).all()


def test_results_repeat_exactly():
    case = CASES["odd"]
    arguments, index = make(case)
    first, second = (evaluate(case, arguments, index, "triton", (0, 1, 2, 3)) for _ in range(2))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


def test_under_vmap_checkpoint_and_scan():
    case = Case(20, 2, 1, biases=False)
    (x, c, w, lora), index = make(dataclasses.replace(case, tokens=80))
    batches = [a.reshape(2, 2, case.tokens, -1) for a in (x, c, index)]

    def one(implementation, w, lora, x, c, index):
        options = {"activation": "silu", "implementation": implementation}
        return weighted_sum(routed_ffn(x, index, c, w, lora=lora, **options))

    def gradients(implementation, w, lora, x, c):
        function = jax.checkpoint(functools.partial(one, implementation))

        def scanned(w, lora, x, c):
            mapped = jax.vmap(function, (None, None, 0, 0, 0))

            def step(total, batch):
                return total + mapped(w, lora, *batch).sum(), None

            return jax.lax.scan(step, 0.0, (x, c, batches[2]))[0]

        return jax.jit(jax.grad(scanned, (0, 1, 2, 3)))(w, lora, x, c)

    arguments = (w, lora, *batches[:2])
    actual, expected = (gradients(name, *arguments) for name in ("triton", "reference"))
    assert_trees_close(actual, expected, 80)


def launches(case, argnums):
    arguments, index = make(case, triton.half())

    def run(*arguments):
        x, c, w, lora = arguments
        y = routed_ffn(x, index, c, w, lora=lora, implementation="triton")
        return y.astype("float32").sum()

    return triton.launches(run if argnums == () else jax.grad(run, argnums), *arguments)


@pytest.mark.parametrize(
    ("case", "argnums", "expected"),
    [
        (Case(300), (), {UP: 1, DOWN: 1}),
        (Case(300), 1, {UP: 1, DOWN: 1, BACKWARD: 1}),
        (Case(300, gated=True, biases=False), 0, {UP: 1, DOWN: 2, BACKWARD: 1}),
        (Case(300, biases=False), (0, 2), {UP: 1, DOWN: 2, BACKWARD: 1, WEIGHT: 2}),
        (Case(300, gated=True, biases=False), 2, {UP: 1, DOWN: 1, BACKWARD: 1, WEIGHT: 3}),
        (Case(300, lora=("in", "out")), (0, 3), {UP: 1, DOWN: 4, BACKWARD: 1, WEIGHT: 2}),
    ],
)
def test_launches(case, argnums, expected):
    assert launches(case, argnums) == expected


@pytest.mark.parametrize(("asked", "found"), [("highest", "ieee"), ("tensorfloat32", "tf32")])
def test_float32_is_rounded_only_if_asked(asked, found):
    with jax.default_matmul_precision(asked):
        assert kernels.precision() == found
        exact = kernels.xla_precision("float32") is jax.lax.Precision.HIGHEST
        assert exact == (found == "ieee")
        assert kernels.xla_precision("bfloat16") is None


def test_unfit_types_are_named():
    (x, c, w, _), index = make(Case(5))
    with jax.enable_x64(True):
        x, w = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), (x, w))
        with pytest.raises(NotImplementedError, match=r"'triton' cannot run.*got float64"):
            routed_ffn(x, index, c, w, implementation="triton")
    (x, c, w, _), index = make(Case(5), jnp.bfloat16)
    if triton.interpreting():
        with pytest.raises(NotImplementedError, match="interpreter computes bfloat16 wrongly"):
            routed_ffn(x, index, c, w, implementation="triton")
