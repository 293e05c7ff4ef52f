from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import spt_jax
from spt_jax import (
    LoRAConfig,
    RoutedFFNConfig,
    SparseAttentionConfig,
    SPTConfig,
    TrainConfig,
)
from spt_jax.calibration import (
    _fit_absent,
    balanced_kmeans,
    fit_routing,
    fit_sparse_attention,
    record_activations,
)
from spt_jax.layers import (
    ADAPTER,
    Attention,
    CalibrationStat,
    CodebookParam,
    Embedding,
    FeedForward,
    HeadParam,
    LoRAParam,
    RoutedFFN,
    RouterParam,
    SparseAttention,
)
from tests.spt_jax.models.builders import GOLDEN
from tests.spt_jax.toy import HEADS, HIDDEN, VOCABULARY, WIDTH, ToyModel, toy_batch

SPARSE = SparseAttentionConfig(min_keys=8, num_codewords=8, granularity="token")


def _adapted(config, **options):
    model = ToyModel(rngs=nnx.Rngs(0), **options)
    return spt_jax.adapt(model, config, calibration_batch=toy_batch(), rngs=nnx.Rngs(1))


@pytest.mark.parametrize("gated", [False, True])
def test_keeping_everything_is_the_dense_model(gated):
    batch = toy_batch()
    dense = ToyModel(rngs=nnx.Rngs(0), gated=gated)(**batch)
    config = SPTConfig(
        serve=None,
        attention=SparseAttentionConfig(density=1.0),
        ffn=RoutedFFNConfig(num_blocks=4, active_blocks=4),
    )
    model = _adapted(config, gated=gated)
    assert any(isinstance(module, RoutedFFN) for _, module in nnx.iter_modules(model))
    np.testing.assert_allclose(model(**batch), dense, atol=2e-5 * float(jnp.abs(dense).max()))


@pytest.mark.parametrize("targets", [("attention",), ("ffn",), ("attention", "ffn", "embeddings")])
def test_lora_alone_changes_nothing_before_training(targets):
    batch = toy_batch()
    dense = ToyModel(rngs=nnx.Rngs(0))(**batch)
    model = _adapted(SPTConfig(lora=LoRAConfig(targets=targets), attention=None, ffn=None))
    np.testing.assert_allclose(model(**batch), dense, atol=1e-5 * float(jnp.abs(dense).max()))


def test_the_permutation_is_one_and_regroups_the_same_units():
    dense = ToyModel(rngs=nnx.Rngs(0), gated=True)
    model = _adapted(SPTConfig(serve=None, attention=None), gated=True)
    for before, after in zip(dense.layers, model.layers, strict=True):
        order = after.ffn.permutation[...]
        assert sorted(order.tolist()) == list(range(HIDDEN))
        order = order.reshape(4, -1)
        for name in ("up", "gate"):
            np.testing.assert_array_equal(
                getattr(before.ffn, name).kernel[...][:, order],
                getattr(after.ffn, name).kernel[...],
            )
        np.testing.assert_array_equal(
            before.ffn.down.kernel[...][order], after.ffn.down.kernel[...]
        )


def _parts(model):
    return {
        "lora": bool(nnx.state(model, LoRAParam)),
        "attention": any(isinstance(m, SparseAttention) for _, m in nnx.iter_modules(model)),
        "ffn": bool(nnx.state(model, RouterParam)),
    }


@pytest.mark.parametrize("left_out", ["lora", "attention", "ffn"])
def test_each_part_is_optional(left_out):
    config = SPTConfig(serve=None, **({"attention": SPARSE} | {left_out: None}))
    model = _adapted(config)
    assert _parts(model) == {n: n != left_out for n in ("lora", "attention", "ffn")}
    assert np.isfinite(model(**toy_batch())).all()


@pytest.mark.parametrize("codebook_loss_weight", [0.0, 0.01])
def test_only_lora_routers_head_and_codebooks_with_a_loss_train(codebook_loss_weight):
    sparse = replace(SPARSE, codebook_loss_weight=codebook_loss_weight)
    model = _adapted(
        SPTConfig(serve=None, attention=sparse, ffn=RoutedFFNConfig(load_balance_weight=0.01))
    )
    batch = toy_batch(seed=5)
    label = jnp.arange(len(batch["input_ids"])) % 2
    graph, params, frozen = nnx.split(model, ADAPTER, ...)
    optimizer = optax.adam(1e-2)
    before = jax.tree.map(np.asarray, nnx.state(model))

    @jax.jit
    def step(params, opt_state):
        def loss(params):
            logits, aux = nnx.merge(graph, params, frozen).forward(**batch)
            task = optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()
            return task + sum(aux.values()) / batch["attention_mask"].sum()

        gradients = jax.grad(loss)(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = optimizer.init(params)
    for _ in range(3):
        params, opt_state = step(params, opt_state)
    nnx.update(model, params)
    kinds = set()
    after = nnx.state(model)
    flat_before = dict(nnx.to_flat_state(before))
    for path, variable in nnx.to_flat_state(after):
        same = np.array_equal(np.asarray(flat_before[path][...]), np.asarray(variable[...]))
        trained = isinstance(variable, LoRAParam | RouterParam | CodebookParam | HeadParam)
        assert same != trained, path
        kinds.add(type(variable))
    assert {LoRAParam, RouterParam, HeadParam, nnx.Param, CalibrationStat} <= kinds
    assert (CodebookParam in kinds) == (codebook_loss_weight > 0)


IDS = np.ones((4, 8), np.int32)


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize(
    ("config", "batch", "message"),
    [
        (LoRAConfig(), {}, r"config is of the type LoRAConfig; give SPTConfig\(lora="),
        (
            SPTConfig(serve=None),
            IDS,
            "calibration_batch is of the type ndarray; give a mapping of arrays",
        ),
        (
            SPTConfig(serve=None),
            {"input_ids": [[1, 2], [3]]},
            "is no array of token ids; pad and truncate",
        ),
        (
            SPTConfig(serve=None),
            {"input_ids": IDS / 2},
            "calibration_batch holds float.*, not token ids",
        ),
    ],
)
def test_arguments_of_another_kind_are_named(config, batch, message):
    with pytest.raises(ValueError, match=message):
        spt_jax.adapt(ToyModel(rngs=nnx.Rngs(0)), config, calibration_batch=batch)


@pytest.mark.parametrize(
    ("sparse", "calibration"),
    [
        (SparseAttentionConfig(min_keys=8, granularity="tile"), "fitted"),
        (replace(SPARSE, codeword_width=2), "random"),
        (replace(SPARSE, rule="match_count", codeword_width=4), "fitted"),
    ],
)
def test_64_bit_types_switched_on_change_nothing(sparse, calibration):
    routed = RoutedFFNConfig(calibration=calibration, load_balance_weight=0.01)
    sparse = replace(sparse, codebook_loss_weight=0.01)
    config = SPTConfig(serve=None, lora=LoRAConfig(rank=2), attention=sparse, ffn=routed)
    columns = {name: np.asarray(x, np.int64) for name, x in toy_batch().items()}

    def found():
        batch = {name: jnp.asarray(x) for name, x in columns.items()}
        model = ToyModel(layers=1, gated=True, rngs=nnx.Rngs(0))
        spt_jax.adapt(model, config, calibration_batch=batch, rngs=nnx.Rngs(1))
        graph, params, rest = nnx.split(model, ADAPTER, ...)

        @jax.jit
        def loss(params):
            logits, aux = nnx.merge(graph, params, rest).forward(**batch)
            return jnp.square(logits).mean() + sum(aux.values())

        return nnx.state(model), jax.value_and_grad(loss)(params)

    expected = found()
    with jax.enable_x64(True):
        wide = found()
    assert jax.tree.map(lambda x: x.dtype, wide) == jax.tree.map(lambda x: x.dtype, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-2, 1e-3), wide[1], expected[1])


def test_same_seed_same_model():
    config = SPTConfig(serve=None, attention=SPARSE)
    first, second = (nnx.state(_adapted(config)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("rule", ["inner_product", "match_count"])
@pytest.mark.parametrize("granularity", ["token", "tile"])
@pytest.mark.parametrize("causal", [False, True])
def test_forward_and_gradients_are_finite(rule, granularity, causal):
    config = SPTConfig(
        serve=None,
        attention=SparseAttentionConfig(
            min_keys=16,
            num_codewords=8,
            rule=rule,
            granularity=granularity,
            block_q=16,
            key_group=8,
            codebook_loss_weight=0.01,
        ),
    )
    model = _adapted(config, causal=causal)
    batch = toy_batch(seed=3)
    batch["attention_mask"] = batch["attention_mask"].at[0].set(0)  # a row with no valid token
    graph, params, frozen = nnx.split(model, ADAPTER, ...)

    def loss(params):
        logits, aux = nnx.merge(graph, params, frozen).forward(**batch)
        assert "codebook_loss" in aux
        return (logits**2).sum() + sum(aux.values())

    gradients = jax.tree.leaves(jax.jit(jax.grad(loss))(params))
    assert all(np.isfinite(g).all() for g in gradients)
    assert all(np.abs(g).max() > 0 for g in gradients if g.ndim == 4)  # codebooks


def test_dropout_needs_a_key_and_follows_it():
    config = SPTConfig(serve=None, lora=LoRAConfig(dropout=0.5), attention=SPARSE)
    model = _adapted(config)
    for _, module in nnx.iter_modules(model):
        if type(module).__name__ == "LoRA":
            module.b[...] = jnp.ones_like(module.b[...]) * 0.05
    batch = toy_batch()
    plain, again = model(**batch), model(**batch)
    first, same, other = (model(**batch, dropout_key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(plain, again)
    np.testing.assert_array_equal(first, same)
    assert not np.allclose(first, other)
    assert not np.allclose(first, plain)


def test_routing_follows_the_blocks_that_matter():
    """Blocks fitted to the activations leave less of the output out than random ones do."""
    model = ToyModel(rngs=nnx.Rngs(0), layers=1)
    ffn = model.layers[0].ffn
    x = jax.random.normal(jax.random.key(0), (1, 600, WIDTH))
    # units come in four kinds that fire on different directions of the input
    directions = jax.random.normal(jax.random.key(1), (WIDTH, 4))
    kinds = jnp.arange(HIDDEN) % 4
    ffn.up.kernel[...] = directions[:, kinds] + 0.1 * ffn.up.kernel[...]
    dense, _ = ffn(x)
    routing = fit_routing(x[0], ffn, RoutedFFNConfig())
    rng = np.random.default_rng(0)
    order = jnp.asarray(rng.permutation(HIDDEN))
    random_blocks = fit_routing(x[0], ffn, RoutedFFNConfig(), permutation=order)

    def error(routing):
        routed = RoutedFFN(nnx.clone(ffn), config=RoutedFFNConfig(), **routing._asdict())
        return float(jnp.linalg.norm(routed(x)[0] - dense) / jnp.linalg.norm(dense))

    noise = jnp.asarray(rng.normal(size=routing.router_kernel.shape), jnp.float32)
    random = routing._replace(permutation=order, router_kernel=0.01 * noise)
    assert error(routing) < 0.6 * error(random)
    assert error(routing) < 0.8 * error(random_blocks)


def test_linear_maps_of_left_out_blocks_lower_the_error():
    ffn = ToyModel(rngs=nnx.Rngs(0), layers=1).layers[0].ffn
    x = jax.random.normal(jax.random.key(0), (2, 600, WIDTH))
    dense, errors = ffn(x)[0][1], []
    for rank in (0, 2, 8, WIDTH + 1):
        config = RoutedFFNConfig(absent_rank=rank)
        routing = fit_routing(x[0], ffn, config)
        routed = RoutedFFN(nnx.clone(ffn), config=config, **routing._asdict())
        errors.append(float(jnp.linalg.norm(routed(x[1:])[0][0] - dense)))
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.9 * errors[0]


def test_linear_maps_of_left_out_blocks_are_found_where_there_are_some():
    blocks, rank, tokens = 4, 2, 2000
    keys = jax.random.split(jax.random.key(0), 5)
    x = 2 + jax.random.normal(keys[0], (tokens, WIDTH))
    order = jnp.argsort(jax.random.uniform(keys[1], (tokens, blocks - 1)))
    absent = jnp.pad((order < 2).astype(jnp.float32), ((0, 0), (0, 1)))  # the last is never so
    a = jax.random.normal(keys[2], (WIDTH, blocks, rank))
    b = jax.random.normal(keys[3], (blocks, rank, WIDTH))
    c = 5 * jax.random.normal(keys[4], (blocks, WIDTH))

    def output(a, b, c):
        return jnp.einsum("tg,tgd->td", absent, jnp.einsum("td,dgr,gre->tge", x, a, b) + c)

    missing = output(a, b, c)
    found = _fit_absent(x, missing, absent, jnp.zeros_like(c), rank + 1)
    assert [array.shape for array in found] == [(WIDTH, 4, 3), (4, 3, WIDTH), (4, WIDTH)]
    error = jnp.linalg.norm(output(*found) - missing) / jnp.linalg.norm(missing - missing.mean(0))
    assert error < 0.12  # of the ridge penalty
    for array in found:
        assert np.isfinite(np.asarray(array)).all()
    assert not np.asarray(found[0][:, 3]).any()
    assert not np.asarray(found[2][3]).any()


def test_random_routing_is_another_start_of_the_same_function():
    config = SPTConfig(
        serve=None,
        lora=None,
        attention=None,
        ffn=RoutedFFNConfig(num_blocks=4, active_blocks=4, calibration="random"),
    )
    routed, again = (_adapted(config).layers[0].ffn for _ in range(2))
    fitted = _adapted(replace(config, ffn=replace(config.ffn, calibration="fitted")))
    permutation = np.asarray(routed.permutation[...])
    np.testing.assert_array_equal(permutation, again.permutation[...])
    assert sorted(permutation.tolist()) == list(range(HIDDEN))
    assert not np.array_equal(permutation, np.asarray(fitted.layers[0].ffn.permutation[...]))
    assert not np.asarray(routed.absent_output[...]).any()
    assert np.asarray(routed.router_kernel[...]).std() == pytest.approx(WIDTH**-0.5, rel=0.3)
    dense = ToyModel(rngs=nnx.Rngs(0)).layers[0].ffn
    x = jax.random.normal(jax.random.key(2), (2, 8, WIDTH))
    routed.router_kernel[...] = jnp.zeros_like(routed.router_kernel[...])  # p = 1/2
    np.testing.assert_allclose(routed(x)[0], dense(x)[0], atol=1e-5)


def test_balanced_kmeans_is_balanced_and_finds_clusters():
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(4, 50))
    truth = np.repeat(np.arange(4), 8)[rng.permutation(32)]
    labels = balanced_kmeans(centers[truth] + 0.1 * rng.normal(size=(32, 50)), 4)
    assert np.bincount(labels).tolist() == [8] * 4
    assert len({(a, b) for a, b in zip(truth, labels, strict=True)}) == 4
    ones = balanced_kmeans(np.ones((12, 3)), 3)  # nothing to tell them apart
    assert np.bincount(ones).tolist() == [4] * 3


def test_mistakes_are_named_and_leave_the_model_alone():
    batch = toy_batch()
    model = ToyModel(rngs=nnx.Rngs(0))
    before = jax.tree.map(np.asarray, nnx.state(model))
    few = {"input_ids": batch["input_ids"][:1, :4]}
    for config, calibration, message in [
        (SPTConfig(serve=None), None, "give calibration_batch"),
        (
            SPTConfig(serve=None),
            {"tokens": batch["input_ids"]},
            "needs input_ids; it has .'tokens'.",
        ),
        (SPTConfig(serve=None), few, "4 tokens, fewer than num_codewords=16"),
        (
            SPTConfig(serve=None, ffn=RoutedFFNConfig(num_blocks=5)),
            batch,
            "64 hidden units .* num_blocks=5",
        ),
        (
            SPTConfig(serve=None, attention=SparseAttentionConfig(codeword_width=3)),
            batch,
            f"codeword_width=3 does not divide the head width {WIDTH // HEADS}",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            spt_jax.adapt(model, config, calibration_batch=calibration)
        jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))
    spt_jax.adapt(model, SPTConfig(serve=None), calibration_batch=batch)
    with pytest.raises(ValueError, match="adapted already"):
        spt_jax.adapt(model, SPTConfig(serve=None), calibration_batch=batch)
    with pytest.raises(ValueError, match="Linear has neither Attention nor FeedForward"):
        spt_jax.adapt(
            nnx.Linear(2, 2, rngs=nnx.Rngs(0)), SPTConfig(serve=None), calibration_batch=batch
        )


class Custom(nnx.Module):
    """A model of one's own, whose call of its layer is given."""

    def __init__(self, make, call):
        self.embedding = Embedding(VOCABULARY, WIDTH, rngs=nnx.Rngs(1))
        self.layer = make(nnx.Rngs(0))
        self.call = call

    def __call__(self, input_ids, attention_mask=None):
        return self.call(self.layer, self.embedding(input_ids))


def ffn(rngs):
    return FeedForward(WIDTH, HIDDEN, rngs=rngs)


FFN_ALONE = SPTConfig(serve=None, lora=None, attention=None)


@pytest.mark.parametrize("config", [SPTConfig(serve=None), SPTConfig(attention=None, ffn=None)])
def test_stacked_layers_are_refused_by_name(config):
    stack = nnx.split_rngs(splits=3)(nnx.vmap(ffn, in_axes=(0,), out_axes=0))
    scan = nnx.scan(lambda x, layer: layer(x)[0], in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    model = Custom(stack, lambda layer, x: scan(x, layer))
    assert model(**toy_batch()).shape == (6, 48, WIDTH)
    message = r"^layer is several layers, stacked by nnx.vmap or nnx.scan \(.*\[3, 32, 64\]\)"
    with pytest.raises(ValueError, match=message):
        spt_jax.adapt(model, config, calibration_batch=toy_batch())


@pytest.mark.parametrize(
    "call", [lambda layer, x: nnx.remat(lambda m, x: m(x)[0])(layer, x), lambda layer, x: x]
)
def test_layers_that_are_not_called_themselves_are_refused_by_name(call):
    with pytest.raises(ValueError, match=r"^layer read nothing of the calibration batch"):
        spt_jax.adapt(Custom(ffn, call), FFN_ALONE, calibration_batch=toy_batch())


def test_an_ffn_that_two_places_share_is_replaced_in_both():
    model = Custom(ffn, lambda layer, x: layer(x)[0])
    model.again = nnx.List([model.layer])
    spt_jax.adapt(model, FFN_ALONE, calibration_batch=toy_batch())
    assert isinstance(model.layer, RoutedFFN)
    assert model.again[0] is model.layer


def twice(layer, x):
    """A shared layer: first on ten times its input, then on the input itself."""
    return layer(10 * x)[0] + layer(x)[0]


def valid_rows(x, batch):
    return x[np.asarray(batch["attention_mask"]) > 0]


def test_an_ffn_that_is_called_twice_is_fitted_to_both_calls():
    model, batch = Custom(ffn, twice), toy_batch()
    x = valid_rows(model.embedding(batch["input_ids"]), batch)
    expected = fit_routing(jnp.concatenate([10 * x, x]), model.layer, RoutedFFNConfig())
    last = fit_routing(x, model.layer, RoutedFFNConfig())
    spt_jax.adapt(model, FFN_ALONE, calibration_batch=batch)
    found = model.layer.router_kernel[...]
    np.testing.assert_array_equal(model.layer.permutation[...], expected.permutation)
    np.testing.assert_allclose(found, expected.router_kernel, rtol=1e-3, atol=1e-4)
    assert np.abs(found - last.router_kernel).max() > 0.01


def test_attention_that_is_called_twice_has_codebooks_for_both_calls():
    model, batch = Custom(lambda rngs: Attention(WIDTH, HEADS, rngs=rngs), twice), toy_batch()
    x = valid_rows(model.embedding(batch["input_ids"]), batch)
    inputs = jnp.concatenate([10 * x, x])
    q, k = (
        project(inputs).reshape(-1, HEADS, WIDTH // HEADS)
        for project in (model.layer.q_proj, model.layer.k_proj)
    )
    config, key = SPTConfig(serve=None, lora=None, attention=SPARSE, ffn=None), jax.random.key(0)
    expected = fit_sparse_attention(q, k, config=SPARSE, causal=False, key=key)
    spt_jax.adapt(model, config, calibration_batch=batch)
    found = model.layer.sparse
    for one, other in zip(*(jax.tree.leaves(nnx.state(m)) for m in (found, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    codewords = found.key_codebooks[...][..., 0] + found.key_center[...][..., None]
    for call in np.split(np.asarray(k), 2):
        assert (codewords.min(-1) <= call.min(0) + 1e-4).all()
        assert (codewords.max(-1) >= call.max(0) - 1e-4).all()


@pytest.mark.parametrize(("most", "of_each"), [(10, 5), (None, 8)])
def test_recorded_tokens_are_spread_over_all_calls(most, of_each, monkeypatch):
    model = Custom(ffn, lambda layer, x: layer(x)[0] + layer(x + 1000)[0])
    batch = {"input_ids": np.arange(12).reshape(2, 6)}
    batch["attention_mask"] = (np.arange(6) < 4).astype(np.int32)[None].repeat(2, 0)
    ((path, arrays),) = record_activations(model, batch, most=most)
    assert path == ("layer",)
    x = np.asarray(arrays["x"])
    np.testing.assert_array_equal(x.mean(1) > 500, [False] * of_each + [True] * of_each)
    monkeypatch.setattr("spt_jax.calibration.PASS_TOKENS", 6)  # a row at a time
    ((_, again),) = record_activations(model, batch, most=most)
    np.testing.assert_array_equal(again["x"], x)


def test_a_model_that_is_a_layer_itself_is_refused():
    class Alone(FeedForward):
        def __call__(self, input_ids, attention_mask=None):
            return super().__call__(jax.nn.one_hot(input_ids, WIDTH))

    alone = Alone(WIDTH, HIDDEN, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="the model is a FeedForward itself; give the module that"):
        spt_jax.adapt(alone, FFN_ALONE, calibration_batch=toy_batch())


def test_heads_that_share_lists():
    def heads(number, kv_heads, **options):
        return SparseAttentionConfig(**options).heads_of_list(number, kv_heads)

    assert [heads(n, 8) for n in (8, 16, 24, 32, 40, 64, 128)] == [1, 1, 1, 4, 1, 8, 1]
    assert heads(32, 8, share_heads=False) == 1
    assert heads(9, 3, share_heads=True, block_q=63) == 3
    assert heads(28, 4, block_q=448) == 7


def test_heads_must_divide():
    with pytest.raises(ValueError, match="width 30 does not split into 4 heads"):
        Attention(30, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="4 query heads cannot be shared evenly by 3"):
        Attention(32, 4, num_kv_heads=3, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SparseAttentionConfig(density=0), r"density must lie in \(0, 1\], got 0"),
        (lambda: SparseAttentionConfig(min_keys=0), "min_keys must be at least 1, got 0"),
        (lambda: SparseAttentionConfig(dense_max_length=-1), "dense_max_length .* got -1"),
        (lambda: SparseAttentionConfig(num_codewords=257), "num_codewords .* got 257"),
        (lambda: SparseAttentionConfig(rule="cosine"), "got 'cosine'"),
        (lambda: SparseAttentionConfig(granularity="row"), "got 'row'"),
        (
            lambda: SparseAttentionConfig(share_heads=True).heads_of_list(9, 3),
            "multiple of the 3 query heads of a key head, got 64",
        ),
        (lambda: TrainConfig(evaluate_as="merged"), "evaluate_as .* got 'merged'"),
        (lambda: RoutedFFNConfig(num_blocks=4, active_blocks=5), "got 5 of 4"),
        (lambda: RoutedFFNConfig(calibration="none"), "got 'none'"),
    ],
)
def test_bad_configurations_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("name", "kind"), [("input_ids", "id 97"), ("token_type_ids", "type 2")])
def test_ids_outside_the_tables_are_named(name, kind):
    model = spt_jax.load_pretrained(GOLDEN / "bert")
    batch = {"input_ids": np.full((2, 6), 5), name: np.full((2, 6), 97 if "id " in kind else 2)}
    with pytest.raises(ValueError, match=f"calibration_batch: token {kind} is outside the model's"):
        spt_jax.adapt(model, SPTConfig(serve=None), calibration_batch=batch)
    good = {"input_ids": np.arange(3, 67).reshape(4, 16)}
    spt_jax.adapt(
        model, SPTConfig(serve=None, lora=None, ffn=None, attention=SPARSE), calibration_batch=good
    )
    with pytest.raises(ValueError, match=f"batch: token {kind} is outside the model's"):
        spt_jax.sparse_choices(model, batch)


def test_a_negative_id_is_named_whatever_the_model():
    batch = {**toy_batch(), "input_ids": -np.ones_like(toy_batch()["input_ids"])}
    with pytest.raises(ValueError, match="calibration_batch: token id -1 is outside"):
        spt_jax.adapt(
            ToyModel(rngs=nnx.Rngs(0)),
            SPTConfig(serve=None, attention=SPARSE),
            calibration_batch=batch,
        )
