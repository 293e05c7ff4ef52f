"""The routed FFN against its specification: the output and every gradient."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from pallas_kernels import RoutedFFNLoRA, RoutedFFNWeights, routed_ffn
from tests.tolerance import assert_close, tolerance

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "identity")


@dataclasses.dataclass(frozen=True)
class Case:
    tokens: int
    blocks: int = 4
    active: int = 2
    gated: bool = False
    biases: bool = True
    lora: tuple[str, ...] = ()
    activation: str = "gelu"
    routing: str = "random"
    width: int = 24
    units: int = 20
    rank: int = 3


CASES = {
    "one_token": Case(1, biases=False),
    "odd": Case(129, gated=True, lora=("in", "gate", "out")),
    "two_sizes_of_tile": Case(1100, width=8, units=8, lora=("in", "out")),
    "all_active": Case(130, active=4, activation="gelu_tanh"),
    "one_block": Case(7, blocks=1, active=1, activation="identity"),
    "five_blocks": Case(150, blocks=5, active=3, gated=True, activation="silu", lora=("gate",)),
    "many_blocks": Case(90, blocks=13, active=6, biases=False, lora=("out",)),
    "all_in_one": Case(300, active=1, routing="one", activation="relu", lora=("in", "out")),
    "empty_blocks": Case(200, blocks=6, active=2, routing="low", gated=True),
    "gated_no_bias": Case(70, gated=True, biases=False, lora=("in", "gate", "out")),
    "one_unit": Case(40, width=1, units=1, rank=1, lora=("in", "out")),
}


def make(case: Case, dtype=jnp.float32, seed=0):
    """Returns the differentiable arguments (x, coefficients, weights, lora) and block_index."""
    rng = np.random.default_rng(seed)
    g, d, f, r = case.blocks, case.width, case.units, case.rank

    def normal(*shape, scale=1.0):
        return jnp.asarray(scale * rng.standard_normal(shape), dtype)

    gate = case.gated
    weights = RoutedFFNWeights(
        w_in=normal(g, d, f, scale=d**-0.5),
        b_in=normal(g, f) if case.biases else None,
        w_gate=normal(g, d, f, scale=d**-0.5) if gate else None,
        b_gate=normal(g, f) if gate and case.biases else None,
        w_out=normal(g, f, d, scale=f**-0.5),
        b_out=normal(d) if case.biases else None,
    )
    factors = {}
    for name in case.lora:
        first, second = ((g, f, r), (r, d)) if name == "out" else ((d, r), (g, r, f))
        factors[f"a_{name}"] = normal(*first, scale=first[-2] ** -0.5)
        factors[f"b_{name}"] = normal(*second, scale=r**-0.5)
    lora = RoutedFFNLoRA(**factors) if factors else None
    if case.routing == "one":
        index = np.full((case.tokens, 1), 2)
    else:
        choices = 3 if case.routing == "low" else g
        index = rng.permuted(np.tile(np.arange(choices), (case.tokens, 1)), axis=1)
    index = jnp.asarray(index[:, : case.active], jnp.int32)
    coefficients = jnp.asarray(
        rng.uniform(0.2, 2, index.shape), jnp.promote_types(dtype, "float32")
    )
    return (normal(case.tokens, d), coefficients, weights, lora), index


def evaluate(case, arguments, index, implementation):
    """Returns the output, and the gradients of a weighted sum of it."""

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
        slopes = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return (y.astype(slopes.dtype) * slopes).sum(), y

    grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
    grads, y = grad(*arguments)
    return {"y": y, "grads": grads}


def assert_trees_close(actual, expected, reduction, dtype=None):
    paths, treedef = jax.tree.flatten_with_path(actual)
    assert treedef == jax.tree.structure(expected)
    for (path, a), e in zip(paths, jax.tree.leaves(expected), strict=True):
        try:
            assert_close(a, e, reduction, dtype=dtype)
        except AssertionError as error:
            raise AssertionError(f"{jax.tree_util.keystr(path)}: {error}") from None


@pytest.mark.parametrize("name", CASES)
def test_matches_reference(name):
    case = CASES[name]
    arguments, index = make(case)
    actual = evaluate(case, arguments, index, "xla")
    expected = evaluate(case, arguments, index, "reference")
    assert_trees_close(actual, expected, max(case.tokens, case.width, case.blocks * case.units))


def test_bfloat16():
    case = Case(129, gated=True, lora=("in", "gate", "out"), activation="silu")
    arguments, index = make(case, jnp.bfloat16)
    actual = evaluate(case, arguments, index, "xla")
    assert actual["y"].dtype == jnp.bfloat16
    assert {leaf.dtype.name for leaf in jax.tree.leaves(actual["grads"])} == {"bfloat16", "float32"}
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), arguments)
    expected = evaluate(case, exact, index, "reference")
    assert_trees_close(actual, expected, case.tokens, jnp.bfloat16)


def test_accumulates_in_float32():
    # 4096 ones and a carry that bfloat16 would lose: its sums stall at 256.
    d = 4096
    weights = RoutedFFNWeights(
        w_in=jnp.ones((1, d, 1), jnp.bfloat16), w_out=jnp.ones((1, 1, d), jnp.bfloat16)
    )
    x, index = jnp.ones((3, d), jnp.bfloat16), jnp.zeros((3, 1), jnp.int32)
    y = routed_ffn(x, index, jnp.ones((3, 1)), weights, activation="identity")
    np.testing.assert_array_equal(np.asarray(y, np.float32), 4096)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_reference_against_finite_differences(activation, gated):
    lora = ("in", "gate", "out") if gated else ("in", "out")
    case = Case(5, 3, 2, gated, lora=lora, activation=activation, width=4, units=3, rank=2)
    with jax.enable_x64(True):
        arguments, index = make(case, jnp.float64)
        assert arguments[0].dtype == jnp.float64

        def run(*arguments):
            x, coefficients, weights, lora = jax.tree.map(jnp.asarray, arguments)
            return routed_ffn(
                x,
                index,
                coefficients,
                weights,
                lora=lora,
                activation=activation,
                implementation="reference",
            )

        check_grads(run, arguments, order=1, modes=("rev",), atol=1e-7, rtol=1e-7, eps=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_follows_the_formula(activation):
    case = Case(6, 5, 2, True, lora=("in", "gate", "out"), activation=activation)
    (x, c, w, lora), index = make(case)
    act = {
        "relu": jax.nn.relu,
        "gelu": lambda h: h * jax.scipy.stats.norm.cdf(h),
        "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
        "silu": lambda h: h / (1 + jnp.exp(-h)),
        "identity": lambda h: h,
    }[activation]
    rows = []
    for t in range(case.tokens):
        y = w.b_out
        for a, g in enumerate(np.asarray(index[t])):
            gate = x[t] @ (w.w_gate[g] + lora.a_gate @ lora.b_gate[g]) + w.b_gate[g]
            up = x[t] @ (w.w_in[g] + lora.a_in @ lora.b_in[g]) + w.b_in[g]
            y += c[t, a] * (act(gate) * up) @ (w.w_out[g] + lora.a_out[g] @ lora.b_out)
        rows.append(y)
    actual = routed_ffn(
        x, index, c, w, lora=lora, activation=activation, implementation="reference"
    )
    assert_close(actual, jnp.stack(rows), case.width * case.units)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("gated", [False, True])
def test_everything_active_is_dense(implementation, gated):
    case = Case(77, active=4, gated=gated)
    (x, _, w, _), index = make(case)
    w_in, w_gate = (
        None if k is None else k.swapaxes(0, 1).reshape(case.width, -1) for k in (w.w_in, w.w_gate)
    )
    hidden = x @ w_in + w.b_in.ravel()
    if gated:
        hidden *= jax.nn.gelu(x @ w_gate + w.b_gate.ravel(), approximate=False)
    else:
        hidden = jax.nn.gelu(hidden, approximate=False)
    dense = hidden @ w.w_out.reshape(-1, case.width) + w.b_out
    y = routed_ffn(x, index, jnp.ones(index.shape), w, implementation=implementation)
    assert_close(y, dense, case.blocks * case.units)


def test_order_of_blocks_does_not_matter():
    case = Case(90, active=3)
    (x, c, w, _), index = make(case)
    y = routed_ffn(x, index, c, w)
    assert_close(routed_ffn(x, index[:, ::-1], c[:, ::-1], w), y, case.active)


def test_tokens_do_not_depend_on_each_other():
    case = Case(200, active=1)
    (x, c, w, _), index = make(case)
    alone = routed_ffn(x[5:6], index[5:6], c[5:6], w)
    assert_close(alone[0], routed_ffn(x, index, c, w)[5], case.width + case.units)


def test_values_of_other_tokens_never_leak():
    # A block's last tile reads rows of the next block: those hold NaN here.
    case = Case(100, active=1)
    (x, c, w, _), _ = make(case)
    index = jnp.asarray(np.arange(100)[:, None] // 50, jnp.int32)
    x = x.at[50:].set(jnp.nan)
    y, dx = jax.value_and_grad(lambda x: routed_ffn(x, index, c, w)[:50].sum())(x)
    assert jnp.isfinite(y)
    assert jnp.isfinite(dx[:50]).all()


def test_transformations():
    case = Case(40, lora=("in", "out"), width=8, units=8)
    stacked, index = make(dataclasses.replace(case, tokens=3 * case.tokens))
    (x, c, w, lora_weights), shape = stacked, (3, case.tokens, -1)
    x, c, index = x.reshape(shape), c.reshape(shape), index.reshape(shape)

    def loss(x, c, w, lora, index):
        return jnp.sum(routed_ffn(x, index, c, w, lora=lora, activation="silu") ** 2)

    every = (0, 1, 2, 3)
    grad = jax.jit(jax.grad(loss, every))
    looped = [grad(x[i], c[i], w, lora_weights, index[i]) for i in range(3)]
    looped = jax.tree.map(lambda *leaves: jnp.stack(leaves), *looped)
    mapped = jax.jit(jax.vmap(jax.grad(loss, every), (0, 0, None, None, 0)))(
        x, c, w, lora_weights, index
    )
    assert_trees_close(mapped, looped, case.tokens)
    saved = jax.jit(jax.grad(jax.checkpoint(loss), every))(x[0], c[0], w, lora_weights, index[0])
    assert_trees_close(saved, jax.tree.map(lambda leaf: leaf[0], looped), case.tokens)

    def scanned(x, c, w, lora, index):
        def step(total, item):
            x, c, index = item
            return total + loss(x, c, w, lora, index), None

        return jax.lax.scan(step, 0.0, (x, c, index))[0]

    grads = jax.jit(jax.grad(scanned, (2, 3)))(x, c, w, lora_weights, index)
    expected = jax.tree.map(lambda leaf: leaf.sum(axis=0), looped[2:])
    assert_trees_close(grads, expected, 3 * case.tokens)


def products(case, argnums):
    """Shapes of the results of the matrix products that a gradient runs, by block."""
    (x, c, w, lora), index = make(case)

    def loss(x, c, w, lora):
        return routed_ffn(x, index, c, w, lora=lora).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums))(x, c, w, lora)
    shapes = re.findall(r":f32\[([\d,]+)\] = dot_general", str(jaxpr))
    return [tuple(map(int, shape.split(","))) for shape in shapes]


def test_frozen_weights_cost_no_product():
    case = Case(2048, width=24, units=40, rank=3, lora=("in", "out"))
    weights = {(case.width, case.units), (case.units, case.width)}
    frozen, trained = products(case, (0, 1, 3)), products(case, (0, 1, 2, 3))
    assert not weights & set(frozen)
    # A product for each of two weights, in the loops over full and over leftover tiles.
    assert sum(shape in weights for shape in trained) == 4
    assert products(dataclasses.replace(case, lora=()), 1) == [
        shape for shape in products(dataclasses.replace(case, lora=()), 1) if shape not in weights
    ]


def test_only_what_is_wanted_is_computed():
    case = Case(2048, width=24, units=40)
    # Forward: two products in each of two loops. Backward of the coefficients: one in each.
    assert len(products(case, 1)) == 4 + 2
    assert len(products(case, 0)) == 4 + 4
    assert len(products(case, (0, 1))) == 4 + 4
    assert len(products(case, (0, 1, 2))) == 4 + 8


def test_work_follows_active_blocks():
    case = Case(1024, blocks=8, active=1, routing="one", width=8, units=8)
    (x, c, w, _), index = make(case)
    w = dataclasses.replace(w, w_in=w.w_in.at[np.arange(8) != 2].set(jnp.nan))

    def loss(x, w):
        return routed_ffn(x, index, c, w).sum()

    # Blocks that no token chose are never multiplied, so their NaN weights reach nothing.
    for grads in jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1)))(x, w)):
        assert jnp.isfinite(grads).all()


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_no_tokens(implementation):
    (x, c, w, _), index = make(Case(1))
    y = routed_ffn(x[:0], index[:0], c[:0], w, implementation=implementation)
    assert y.shape == (0, x.shape[1])


def wrong(**changes):
    (x, c, w, lora), index = make(Case(6, lora=("in", "out")))
    call = {"x": x, "block_index": index, "coefficients": c, "weights": w, "lora": lora}
    for name, change in changes.items():
        call[name] = change(call.get(name)) if callable(change) else change
    return call


def replaced(**fields):
    return lambda node: dataclasses.replace(node, **fields)


ERRORS = {
    "activation": (wrong(activation="tanh"), r"activation 'tanh'; choose one of relu, gelu"),
    "x rank": (wrong(x=lambda x: x[None]), r"x is float32\[1, 6, 24\]; expected float \[T, D\]"),
    "x type": (wrong(x=lambda x: x.astype(int)), r"x is int32\[6, 24\]"),
    "tokens": (
        wrong(block_index=lambda i: i[:5]),
        r"block_index is int32\[5, 2\].* = \[6, A\]",
    ),
    "index type": (wrong(block_index=lambda i: i * 1.0), r"block_index is float32\[6, 2\]"),
    "too many": (
        wrong(block_index=jnp.zeros((6, 5), int), coefficients=jnp.ones((6, 5))),
        r"chooses 5 blocks.*1 to 4",
    ),
    "range": (wrong(block_index=lambda i: i % 2 * 2 + 2), r"from 2 to 4; expected 0 to 3"),
    "repeated": (wrong(block_index=lambda i: i * 0), r"token 0 chooses blocks \[0, 0\]"),
    "coefficients": (wrong(coefficients=lambda c: c[:, :1]), r"coefficients is float32\[6, 1\]"),
    "coefficient type": (wrong(coefficients=lambda c: c.astype(int)), r"coefficients is int32"),
    "w_out": (
        wrong(weights=replaced(w_out=jnp.ones((4, 24, 20)))),
        r"w_out is float32\[4, 24, 2",
    ),
    "w_in": (wrong(weights=replaced(w_in=jnp.ones((24, 80)))), r"w_in is float32\[24, 80\]"),
    "b_gate": (wrong(weights=replaced(b_gate=jnp.ones((4, 20)))), r"b_gate is given without"),
    "type": (wrong(x=lambda x: x.astype(jnp.bfloat16)), r"w_in is float32 and x is bfloat16"),
    "half a pair": (wrong(lora=replaced(b_in=None)), r"only one of a_in and b_in"),
    "rank": (
        wrong(lora=replaced(a_in=jnp.ones((24, 5)))),
        r"lora.b_in is .* = \[4, 5, 20\]",
    ),
    "gate": (
        wrong(lora=replaced(a_gate=jnp.ones((24, 3)), b_gate=jnp.ones((4, 3, 20)))),
        r"lora has a_gate",
    ),
    "implementation": (wrong(implementation="fast"), r"unknown implementation 'fast'"),
}


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        routed_ffn(**call)


def test_tolerance_grows_with_the_reduction():
    assert tolerance("float32", 100) == 10 * tolerance("float32")
    with pytest.raises(AssertionError, match="apart"):
        assert_close(np.float32([1, 1.001]), np.float32([1, 1]))
