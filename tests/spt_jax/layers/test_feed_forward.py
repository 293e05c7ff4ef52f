import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from spt_jax.config import LoRAConfig, RoutedFFNConfig
from spt_jax.layers import Embedding, FeedForward, Linear, LoRA, RoutedFFN, RouterParam
from spt_jax.layers.feed_forward import _load_balance_loss

D, F, G = 16, 48, 4


def _routed(*, gated=False, active=2, weight=0.0, bias=None, rank=0):
    ffn = FeedForward(D, F, gated=gated, activation="silu", rngs=nnx.Rngs(0))
    for linear in (ffn.up, ffn.gate, ffn.down):
        if linear is not None:
            shape = linear.kernel.shape
            linear.kernel[...] = jax.random.normal(jax.random.key(shape[0]), shape) * D**-0.5
            linear.lora = LoRA(*shape, config=LoRAConfig(rank=2), rngs=nnx.Rngs(1))
            linear.lora.b[...] = 0.3 * jax.random.normal(jax.random.key(2), (2, shape[1]))
    order = jax.random.permutation(jax.random.key(3), F)
    config = RoutedFFNConfig(
        num_blocks=G, active_blocks=active, load_balance_weight=weight, absent_rank=rank
    )
    keys = jax.random.split(jax.random.key(7))
    some = config.effective_absent_rank > 0
    routed = RoutedFFN(
        nnx.clone(ffn),
        permutation=order,
        router_kernel=jax.random.normal(jax.random.key(4), (D, G)),
        router_bias=jnp.zeros(G) if bias is None else bias,
        absent_output=jax.random.normal(jax.random.key(5), (G, D)),
        absent_a=jax.random.normal(keys[0], (D, G, rank)) if some else None,
        absent_b=jax.random.normal(keys[1], (G, rank, D)) if some else None,
        config=config,
    )
    return ffn, routed, order


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("active", [1, 2, 4])
@pytest.mark.parametrize("rank", [0, 3])
def test_output_is_the_sum_over_active_blocks_and_stand_ins_of_the_others(gated, active, rank):
    ffn, routed, order = _routed(gated=gated, active=active, rank=rank)
    x = jax.random.normal(jax.random.key(6), (3, 7, D))
    hidden = ffn.hidden(x)
    down = ffn.down.kernel[...] + ffn.down.lora.factors()[0] @ ffn.down.lora.factors()[1]
    outputs = jnp.stack([hidden[..., u] @ down[u] for u in order.reshape(G, -1)], axis=-2)
    p = routed.probabilities(x.reshape(-1, D)).reshape(3, 7, G)
    place = jnp.argsort(jnp.argsort(-p, axis=-1), axis=-1)
    chosen = (place < active)[..., None]
    absent = jnp.broadcast_to(routed.absent_output[...], outputs.shape)
    if active < G and rank:
        a, b = routed.absent_a[...], routed.absent_b[...]
        absent += jnp.stack([x @ a[:, g] @ b[g] for g in range(G)], axis=-2)
    found = routed.absent_outputs(x.reshape(-1, D))
    np.testing.assert_allclose(found, absent.reshape(-1, G, D), rtol=1e-5, atol=1e-4)
    expected = jnp.where(chosen, 2 * p[..., None] * outputs, absent).sum(-2) + ffn.down.bias[...]
    np.testing.assert_allclose(routed(x)[0], expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(routed.decode(x), expected, rtol=1e-5, atol=1e-4)


def test_gradients_pass_what_stands_for_left_out_blocks():
    _, routed, _ = _routed(rank=3)
    x = jax.random.normal(jax.random.key(6), (3, 7, D))
    step = jax.random.normal(jax.random.key(8), x.shape)

    def loss(x):
        # chosen as at x, so that a finite difference crosses no switch of blocks
        return (routed._absent(x.reshape(-1, D), index) ** 2).sum()

    index = routed.route(x.reshape(-1, D))[1]
    slope = (loss(x + 1e-2 * step) - loss(x - 1e-2 * step)) / 2e-2
    assert slope == pytest.approx(float((jax.grad(loss)(x) * step).sum()), rel=1e-3)


@pytest.mark.parametrize("ranks", [(None, None), (3, None), (None, 3), (2, 2)])
def test_factors_of_another_rank_are_refused(ranks):
    a, b = ranks
    with pytest.raises(ValueError, match=r"absent_[ab] has rank \d, and the configuration asks"):
        RoutedFFN(
            FeedForward(D, F, rngs=nnx.Rngs(0)),
            permutation=jnp.arange(F),
            router_kernel=jnp.zeros((D, G)),
            router_bias=jnp.zeros(G),
            absent_output=jnp.zeros((G, D)),
            absent_a=None if a is None else jnp.zeros((D, G, a)),
            absent_b=None if b is None else jnp.zeros((G, b, D)),
            config=RoutedFFNConfig(num_blocks=G, absent_rank=3),
        )


ROUTING = {
    "permutation": jnp.arange(F),
    "router_kernel": jnp.zeros((D, G)),
    "router_bias": jnp.zeros(G),
    "absent_output": jnp.zeros((G, D)),
}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"router_kernel": jnp.zeros((D, 7))}, r"router_kernel is float32\[16, 7\].*= \[16, 4\]"),
        ({"router_kernel": jnp.zeros((D + 1, G))}, r"router_kernel is float32\[17, 4\]"),
        ({"router_bias": jnp.zeros(7)}, r"router_bias is float32\[7\].*= \[4\]"),
        ({"absent_output": jnp.zeros((G, 1))}, r"absent_output is float32\[4, 1\].*= \[4, 16\]"),
        ({"permutation": jnp.arange(F - 4)}, r"permutation is int32\[44\].*= \[48\]"),
        ({"permutation": jnp.ones(F)}, r"permutation is float32\[48\]; expected int"),
        ({"permutation": jnp.arange(F).at[5].set(4)}, "each of 0 to 47 once, and lacks 5"),
        ({"permutation": jnp.arange(F) + 1}, "each of 0 to 47 once, and lacks 0"),
    ],
)
def test_routing_that_does_not_fit_is_named(wrong, message):
    def make(arrays):
        ffn = FeedForward(D, F, rngs=nnx.Rngs(0))
        config = RoutedFFNConfig(num_blocks=G, absent_rank=0)
        return nnx.state(RoutedFFN(ffn, **arrays, config=config))

    with pytest.raises(ValueError, match=f"^RoutedFFN: .*{message}"):
        make(ROUTING | wrong)
    jax.eval_shape(make, ROUTING)  # values are not looked at where there are none


@pytest.mark.parametrize("name", ["dense", "routed"])
def test_inputs_that_do_not_fit_are_named(name):
    ffn = FeedForward(D, F, rngs=nnx.Rngs(0))
    layer = ffn if name == "dense" else _routed()[1]
    x, mask = jnp.zeros((2, 3, D)), jnp.ones((2, 3), bool)
    op = type(layer).__name__
    for arguments, message in [
        ({"x": x[..., 1:]}, rf"^{op}: x is float32\[2, 3, 15\]; expected float .*= \[B, S, 16\]"),
        ({"x": x[0]}, rf"^{op}: x is float32\[3, 16\]; expected float \[B, S, D\]"),
        ({"x": x, "mask": mask[:1]}, rf"^{op}: mask is bool\[1, 3\]; expected bool .*= \[2, 3\]"),
        ({"x": x, "mask": mask * 1}, rf"^{op}: mask is int32\[2, 3\]; expected bool"),
    ]:
        with pytest.raises(ValueError, match=message):
            layer(**arguments)
    with pytest.raises(ValueError, match=rf"^{op}.decode: x is float32\[3, 16\]"):
        layer.decode(x[0])


def test_sizes_and_names_that_make_no_layer_are_named():
    rngs = nnx.Rngs(0)
    for make, message in [
        (lambda: FeedForward(D, 0, rngs=rngs), "Linear: out_features must be at least 1, got 0"),
        (lambda: Embedding(-1, D, rngs=rngs), "Embedding: num_embeddings must be at least 1, got"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(
        ValueError, match=r"Linear: x is float32\[2, 3\]; expected float .*\[..., 4\]"
    ):
        Linear(4, 5, rngs=rngs)(jnp.ones((2, 3)))
    table = Embedding(4, D, rngs=rngs)
    with pytest.raises(ValueError, match=r"Embedding: ids is float32\[2\]; expected integer"):
        table(jnp.ones(2))
    assert table(jnp.ones(2, jnp.uint16)).shape == (2, D)


@pytest.mark.usefixtures("unhooked")
def test_unknown_activations_are_named():
    with pytest.raises(ValueError, match="unknown activation 'tanh'; choose one of relu, gelu"):
        FeedForward(D, F, activation="tanh", rngs=nnx.Rngs(0))


def test_the_load_balance_loss_is_one_a_token_when_balanced():
    index = jnp.arange(8)[:, None] % G
    even = jnp.full((8, G), 0.3)
    valid = jnp.ones(8, bool)
    np.testing.assert_allclose(_load_balance_loss(even, index, valid), 8, rtol=1e-6)
    skewed = jax.nn.one_hot(jnp.zeros(8, int), G) + 1e-3
    worst = _load_balance_loss(skewed, jnp.zeros((8, 1), int), valid)
    assert worst > 0.95 * 8 * G
    half = valid.at[4:].set(False)
    np.testing.assert_allclose(_load_balance_loss(even, index, half), 4, rtol=1e-6)


def test_the_load_balance_loss_moves_the_router_towards_balance():
    _, routed, _ = _routed(active=1, weight=1.0, bias=jnp.array([2.0, 0.0, 0.0, 0.0]))
    x = jax.random.normal(jax.random.key(7), (2, 50, D))
    graph, state = nnx.split(routed)

    def loss(state):
        return nnx.merge(graph, state)(x)[1]["load_balance_loss"]

    slope = jax.grad(loss, allow_int=True)(state)["router_bias"][...]
    assert slope[0] > 0  # descent lowers the overloaded block's bias
    assert slope[0] > slope[1:].max()


def test_training_with_the_load_balance_loss_bounds_the_busiest_block():
    _, routed, _ = _routed(active=1, weight=1.0, bias=jnp.array([6.0, 0.0, 0.0, 0.0]))
    x = jax.random.normal(jax.random.key(7), (4, 64, D))
    graph, router, rest = nnx.split(routed, RouterParam, ...)
    optimizer = optax.adam(0.1)

    @jax.jit
    def step(router, opt_state):
        def loss(router):
            return nnx.merge(graph, router, rest)(x)[1]["load_balance_loss"] / (4 * 64)

        updates, opt_state = optimizer.update(jax.grad(loss)(router), opt_state, router)
        return optax.apply_updates(router, updates), opt_state

    def imbalance():  # largest group over the mean
        chosen = routed.probabilities(x.reshape(-1, D)).argmax(-1)
        return float(jnp.bincount(chosen, length=G).max() / (4 * 64 / G))

    assert imbalance() > 2.5
    opt_state = optimizer.init(router)
    for _ in range(60):
        router, opt_state = step(router, opt_state)
    nnx.update(routed, router)
    assert imbalance() < 1.5


def test_blocks_must_divide_the_hidden_units():
    ffn = FeedForward(D, F, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="48 hidden units do not split into num_blocks=5 blocks"):
        RoutedFFN(
            ffn,
            permutation=jnp.arange(F),
            router_kernel=jnp.zeros((D, 5)),
            router_bias=jnp.zeros(5),
            absent_output=jnp.zeros((5, D)),
            config=RoutedFFNConfig(num_blocks=5),
        )
