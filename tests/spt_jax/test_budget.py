"""Sparse parts by measurement: costs, choices within a budget, reports, the cache on disk."""

import dataclasses
import itertools
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import spt_jax
from spt_jax import (
    AdaptationReport,
    LoRAConfig,
    RoutedFFNConfig,
    SparseAttentionConfig,
    SPTConfig,
    budget,
    cache,
    calibration,
)
from spt_jax.budget import Judge, Option, choose, within
from spt_jax.layers import Attention, FeedForward, RoutedFFN, SparseAttention
from spt_jax.models import Decoder
from spt_jax.models.config import parse_config
from spt_jax.targets import plan_lora
from tests.spt_jax.toy import ToyModel, toy_batch

ATTENTION = SparseAttentionConfig(granularity="tile", min_keys=8, block_q=8, key_group=8)
ROUTED = RoutedFFNConfig(absent_rank=4)
LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.ENVIRONMENT, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def paying(monkeypatch):
    """Every part saves in time what it saves in operations, whatever this machine says."""

    def timed(layers, shares, config, lora, shape, advance, *, use_cache):
        return {path: {1.0: 1.0} | {s: s for s in shares[path]} for path in layers}

    monkeypatch.setattr(budget, "timed", timed)


def llama(seed=0, scale=6.0):
    model = Decoder(parse_config(LLAMA), rngs=nnx.Rngs(seed))
    for _, module in nnx.iter_modules(model):
        if isinstance(module, spt_jax.layers.Linear):  # large enough for parts to matter
            module.kernel[...] = module.kernel[...] * scale
    return model


def llama_batch(rows=8, length=64, seed=1):
    ids = np.random.default_rng(seed).integers(0, 61, (rows, length)).astype(np.int32)
    return {"input_ids": ids}


def own_text(model, rows=8, length=64):
    """Rows that a model draws itself, so that whatever changes it makes them less likely."""
    starts = llama_batch(rows, 1)["input_ids"]
    ids = spt_jax.generate(
        model, starts, max_new_tokens=length - 1, temperature=1.0, eos_token_ids=()
    )
    return {"input_ids": np.concatenate([starts, np.array(ids, np.int32)], 1)}


def config(loss_budget, **parts):
    parts = {"attention": ATTENTION, "ffn": ROUTED} | parts
    return SPTConfig(loss_budget=loss_budget, **parts)


def active(model):
    return {line.path: line.active for line in model.adaptation.layers}


# --- choosing ---------------------------------------------------------------------------------


def _random_options(seed):
    draw = np.random.default_rng(seed)
    return {
        (layer,): [
            Option(1 - share, float(draw.uniform(0, 1)), float(share * draw.uniform(0.5, 1)))
            for share in (0.25, 0.5, 0.75)
        ]
        for layer in range(4)
    }


@pytest.mark.parametrize("seed", range(20))
def test_choices_keep_to_the_limit_and_come_near_the_best(seed):
    options = _random_options(seed)
    for limit in (0.0, 0.3, 1.0, 2.0, 10.0):
        chosen = choose(options, limit)
        cost = sum(option.cost for option in chosen.values())
        saved = sum(option.seconds for option in chosen.values())
        assert cost <= limit + 1e-9
        every = itertools.product(*([Option(1.0, 0.0, 0.0), *o] for o in options.values()))
        best = max(
            sum(o.seconds for o in some) for some in every if sum(o.cost for o in some) <= limit
        )
        largest = max(o.seconds for found in options.values() for o in found)
        assert saved >= best - largest  # greedy lacks one step at most
        if limit == 10.0:
            assert saved == pytest.approx(best)


def test_the_cheapest_saving_comes_first():
    options = {
        ("a",): [Option(0.5, 0.1, 1.0), Option(0.25, 0.5, 1.2)],
        ("b",): [Option(0.5, 0.2, 1.0)],
    }
    assert choose(options, 0.1) == {("a",): options["a",][0]}
    assert choose(options, 0.3) == {("a",): options["a",][0], ("b",): options["b",][0]}
    assert choose(options, 0.7) == {("a",): options["a",][1], ("b",): options["b",][0]}


@pytest.mark.parametrize("factor", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("exponent", [1, 2])
def test_what_is_measured_keeps_to_the_budget(factor, exponent):
    """Estimates are wrong by a factor, and costs do not quite add up."""
    options = {(n,): [Option(0.5, 0.01 * (1 + n), 1.0)] for n in range(20)}

    def applied(chosen):
        cost = factor * sum(o.cost for o in chosen.values()) ** 1.1
        return nnx.Dict(measured=cost ** (1 / exponent))

    judge = Judge("loss", 0.0, lambda model: float(model["measured"]), exponent, 1.0)
    limit = 0.3 ** (1 / exponent)
    chosen, measured = within(options, limit, judge, applied)
    assert 0.6 * 0.3 <= measured**exponent <= 0.3
    assert measured == float(applied(chosen)["measured"])


# --- costs ------------------------------------------------------------------------------------


def test_the_estimate_of_a_small_change_is_that_of_the_model():
    """The mean over random projections of the squared change of the outputs, in linear terms."""
    model = ToyModel(layers=1, rngs=nnx.Rngs(0))
    batch = {name: jnp.asarray(a) for name, a in toy_batch().items()}
    ffn = model.layers[0].ffn
    changed = nnx.clone(ffn)
    changed.down.kernel[...] = changed.down.kernel[...] * 1.001
    path = ("layers", 0, "ffn")
    costs = []
    for number in range(200):
        ((rows, seen),), _ = budget.observe(model, batch, jax.random.key(number), [path])
        costs.append(budget.cost(ffn, changed, seen[path], rows))
    before = model(**batch)
    other = nnx.clone(model)
    other.layers[0].ffn = changed
    # a head reads the first token alone, so tokens are independent
    exact = 0.5 * float(((other(**batch) - before) ** 2).sum())
    np.testing.assert_allclose(np.mean(costs), exact, rtol=0.35)


def test_the_estimate_of_a_language_model_is_near_its_divergence():
    model, batch = llama(scale=2.0), {"input_ids": jnp.asarray(llama_batch(16)["input_ids"])}
    path = "layers", 2, "ffn"
    ffn = model.layers[2].ffn
    changed = nnx.clone(ffn)
    changed.down.kernel[...] = changed.down.kernel[...] * 1.05
    costs = []
    for number in range(30):
        ((rows, seen),), judge = budget.observe(model, batch, jax.random.key(number), [path])
        costs.append(budget.cost(ffn, changed, seen[path], rows))
    assert judge.dense == pytest.approx(budget.judge_of(model, batch).dense)
    other = nnx.clone(model)
    other.layers[2].ffn = changed
    logs = [jax.nn.log_softmax(m(batch["input_ids"])[:, :-1]) for m in (model, other)]
    divergence = float((jnp.exp(logs[0]) * (logs[0] - logs[1])).sum())
    np.testing.assert_allclose(np.mean(costs), divergence, rtol=0.2)


def test_observations_by_group_are_those_of_all_at_once(monkeypatch):
    model, batch = llama(), {"input_ids": jnp.asarray(llama_batch(8)["input_ids"])}
    layers = [p for p, m in nnx.iter_modules(model) if isinstance(m, Attention | FeedForward)]
    sizes = budget.observed_bytes(model, batch)
    assert list(sizes) == layers
    ((_, every),), judge = budget.observe(model, batch, jax.random.key(0), layers)
    for path, calls in every.items():
        assert sizes[path] == sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(calls))
    monkeypatch.setattr(budget, "OBSERVED_BYTES", 2 * max(sizes.values()))
    observer = budget.Observer(model, batch, layers[1:], jax.random.key(0))
    assert observer.judge.dense == pytest.approx(judge.dense)
    for path in layers[1:]:
        ((rows, calls),) = observer.of(path)
        assert len(rows["input_ids"]) == 8
        assert len(observer._parts[0][1]) < len(layers) - 1
        for one, other in zip(jax.tree.leaves(calls), jax.tree.leaves(every[path]), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    # of large models a backward pass takes fewer rows
    monkeypatch.setattr(budget, "CHUNK_BYTES", sum(sizes.values()) / 4)
    observer = budget.Observer(model, batch, layers, jax.random.key(0))
    parts = observer.of(layers[0])
    assert [len(rows["input_ids"]) for rows, _ in parts] == [2, 2, 2, 2]
    assert observer.judge.dense == pytest.approx(judge.dense)


# --- adapting ---------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.usefixtures("paying")
def test_more_budget_makes_more_sparse(causal):
    saved = []
    for limit in (0.0, 0.05, 0.3, 100.0):
        model = ToyModel(layers=2, causal=causal, rngs=nnx.Rngs(0))
        spt_jax.adapt(model, config(limit), calibration_batch=toy_batch())
        report = model.adaptation
        assert report.measure == "relative change"
        assert report.budget == limit
        assert report.added <= limit + 1e-6
        saved.append(report.saved)
    assert saved == sorted(saved)
    assert saved[0] < saved[-1]
    assert all(share < 1 for path, share in active(model).items())


@pytest.mark.usefixtures("paying")
def test_the_report_is_what_the_model_does():
    model = llama()
    spt_jax.adapt(model, config(0.02), calibration_batch=llama_batch())
    report = model.adaptation
    assert report.measure == "loss"
    assert 0 < report.saved < 1
    held = budget.held_out({"input_ids": jnp.asarray(llama_batch()["input_ids"])})[1]
    assert budget._loss(llama(), held) == pytest.approx(report.dense)
    assert budget._loss(model, held) == pytest.approx(report.sparse, abs=1e-5)
    found = {}
    for path, module in nnx.iter_modules(model):
        name = ".".join(map(str, path))
        if isinstance(module, RoutedFFN):
            found[name] = module.config.density
        elif isinstance(module, SparseAttention):
            found[name.removesuffix(".sparse")] = ATTENTION.num_keys(64) / 64
    assert found == {path: share for path, share in active(model).items() if share < 1}
    assert found
    assert len(report.layers) == 6


@pytest.mark.usefixtures("paying")
def test_layers_of_several_sizes_are_kept_by_files(tmp_path):
    def sizes(model):
        return {p: m.config for p, m in nnx.iter_modules(model) if isinstance(m, RoutedFFN)}

    ids, batch = llama_batch(seed=7)["input_ids"], own_text(llama())
    for limit in (0.01, 0.015, 0.02, 0.025, 0.03):
        model = llama()
        spt_jax.adapt(model, config(limit, attention=None), calibration_batch=batch)
        if len({c.active_blocks for c in sizes(model).values()}) > 1:
            break
    else:
        pytest.fail("no budget gave layers of several sizes")
    spt_jax.save_adapter(model, tmp_path / "adapter")
    again = spt_jax.load_adapter(llama(), tmp_path / "adapter")
    assert sizes(again) == sizes(model)
    assert again.adaptation == model.adaptation
    assert again.adaptation.sparse == model.adaptation.sparse
    np.testing.assert_array_equal(again(ids), model(ids))
    choices = spt_jax.sparse_choices(model, {"input_ids": ids[:2]})
    for path, module in sizes(model).items():
        name = ".".join(map(str, path))
        assert (choices.ffn[name].active.sum(-1) == module.active_blocks).all()
    (tokens,) = spt_jax.generate(model, ids[:1, :5], max_new_tokens=4, eos_token_ids=())
    assert len(tokens) == 4
    spt_jax.save_pretrained(model, tmp_path / "merged")
    dense = spt_jax.load_pretrained(tmp_path / "merged", task="causal-lm")
    spt_jax.set_form(model, "dense")
    np.testing.assert_allclose(model(ids), dense(ids), atol=2e-4)


def test_what_saves_no_time_stays_dense():
    """So small layers are slower sparse, on any machine."""
    model, batch = llama(), llama_batch()
    spt_jax.adapt(model, config(100.0), calibration_batch=batch)
    dense = llama()
    times = budget.timed(
        {("layers", 0, "ffn"): dense.layers[0].ffn},
        {("layers", 0, "ffn"): [0.5]},
        config(100.0),
        plan_lora(dense, config(100.0).lora),
        (8, 64),
        lambda: None,
    )["layers", 0, "ffn"]
    assert times.keys() == {0.5, 1.0}
    for line in model.adaptation.layers:
        assert line.active == 1 or line.saved >= budget.LEAST_SAVED


def test_an_ffn_is_timed_with_what_trains_in_it():
    model = llama()
    lora = LoRAConfig(
        target_modules=("q_proj", "up_proj"),
        rank_pattern={"up_proj": 2},
        modules_to_save=("layers.1.mlp.down_proj",),
    )
    plan = plan_lora(model, lora)
    first, second = (budget._trained(layer.ffn, plan) for layer in model.layers[:2])
    assert {name: factors["rank"] for name, factors in first["factors"].items()} == {"up": 2}
    assert (first["whole"], second["whole"]) == ([], ["down"])
    steps = budget._ffn_steps(
        model.layers[1].ffn, [0.5], config(100.0), plan, (2, 8), jax.random.key(0)
    )
    for step in steps.values():
        trained = [path for path, _ in nnx.to_flat_state(step()[1])]
        assert [path for path in trained if path[-1] in ("a", "b")] == [
            ("up", "lora", "a"),
            ("up", "lora", "b"),
        ]
        assert ("down", "kernel") in trained


@pytest.mark.usefixtures("paying")
def test_fits_and_choices_are_kept(own_cache, monkeypatch):
    def adapted(model, batch, limit=0.05, **options):
        spt_jax.adapt(model, config(limit), calibration_batch=batch, **options)
        return model

    batch = llama_batch()
    first = adapted(llama(), batch)
    assert not first.adaptation.reused
    again = adapted(llama(), batch)
    assert again.adaptation.reused
    assert again.adaptation == first.adaptation
    np.testing.assert_array_equal(again(batch["input_ids"]), first(batch["input_ids"]))
    for name, leaf in nnx.to_flat_state(nnx.state(first)):
        other = dict(nnx.to_flat_state(nnx.state(again)))[name]
        np.testing.assert_array_equal(leaf[...], other[...], err_msg=str(name))
    assert not adapted(llama(1), batch).adaptation.reused
    assert not adapted(llama(), llama_batch(seed=2)).adaptation.reused
    assert not adapted(llama(), batch, 0.06).adaptation.reused
    assert not adapted(llama(), batch, use_cache=False).adaptation.reused

    # what differs in settings alone is another model
    toys = [ToyModel(causal=causal, rngs=nnx.Rngs(0)) for causal in (False, True)]
    assert not any(adapted(toy, toy_batch()).adaptation.reused for toy in toys)


@pytest.mark.usefixtures("paying")
def test_a_broken_entry_is_made_again(own_cache, caplog):
    batch = llama_batch()
    model = spt_jax.adapt(llama(), config(0.05), calibration_batch=batch)
    for entry in own_cache.glob("fits/*"):
        entry.write_bytes(entry.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        again = spt_jax.adapt(llama(), config(0.05), calibration_batch=batch)
    assert "cannot be read and is made again" in caplog.text
    assert not again.adaptation.reused
    assert again.adaptation == model.adaptation


def test_a_disk_that_takes_nothing_costs_nothing_but_time(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.ENVIRONMENT, str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        model = spt_jax.adapt(llama(), SPTConfig(serve=None), calibration_batch=llama_batch())
    assert "is not kept for a next time" in caplog.text
    assert model.layers[0].ffn.config.active_blocks == 2


def test_old_entries_go(own_cache, monkeypatch):
    monkeypatch.setattr(cache, "MOST_ENTRIES", 3)
    for number in range(5):
        cache.write("kind", f"{number}", {"x": np.arange(number)}, {"number": number})
    assert len(list((own_cache / "kind").iterdir())) == 3
    arrays, content = cache.read("kind", "4")
    assert content == {"number": 4}
    np.testing.assert_array_equal(arrays["x"], np.arange(4))
    assert cache.read("kind", "0") is None


@pytest.mark.usefixtures("paying")
def test_choices_of_an_earlier_run_are_made_again(tmp_path, monkeypatch):
    batch = llama_batch()
    model = spt_jax.adapt(llama(), config(0.05), calibration_batch=batch)
    model.adaptation.save(tmp_path / "adaptation.json")
    choices = AdaptationReport.load(tmp_path / "adaptation.json")
    assert choices == model.adaptation
    monkeypatch.setattr(budget, "timed", None)  # nothing is measured
    again = llama()
    spt_jax.adapt(again, config(0.05), calibration_batch=batch, choices=choices, use_cache=False)
    assert again.adaptation == choices
    np.testing.assert_allclose(again(batch["input_ids"]), model(batch["input_ids"]), atol=1e-5)


def test_choices_of_another_model_are_refused():
    line = spt_jax.LayerAdaptation(path="layers.7.ffn", part="ffn", active=0.5)
    batch = llama_batch()
    with pytest.raises(ValueError, match=r"layers\.7\.ffn is no layer of this model"):
        spt_jax.adapt(
            llama(), config(0.1), calibration_batch=batch,
            choices=AdaptationReport(layers=(line,)),
        )  # fmt: skip
    line = dataclasses.replace(line, path="layers.0.ffn", active=0.3)
    with pytest.raises(ValueError, match=r"0\.3 of 4 blocks of layers\.0\.ffn"):
        spt_jax.adapt(
            llama(), config(0.1), calibration_batch=batch,
            choices=AdaptationReport(layers=(line,)),
        )  # fmt: skip
    with pytest.raises(ValueError, match="choices are for a configuration with a budget"):
        spt_jax.adapt(
            llama(),
            SPTConfig(serve=None),
            calibration_batch=batch,
            choices=AdaptationReport(layers=()),
        )


@pytest.mark.parametrize("text", ["[]", '{"layers": 3}', '{"layers": [{"path": "x"}]}', "{"])
def test_a_file_that_is_no_report_is_named(tmp_path, text):
    (tmp_path / "adaptation.json").write_text(text)
    with pytest.raises(ValueError, match=r"adaptation\.json"):
        AdaptationReport.load(tmp_path / "adaptation.json")


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "0.1", True])
def test_bad_budgets_are_named(value):
    with pytest.raises(ValueError, match="loss_budget must be a number from 0 on, or None"):
        SPTConfig(loss_budget=value)


def test_other_bad_arguments_are_named():
    with pytest.raises(ValueError, match="serve must be dense, sparse or None, got 'dance'"):
        SPTConfig(serve="dance")


@pytest.mark.usefixtures("paying")
def test_a_single_row_is_told(caplog):
    model, batch = llama(), llama_batch(rows=1)
    with caplog.at_level(logging.WARNING):
        spt_jax.adapt(model, config(0.2), calibration_batch=batch)
    assert "a single row" in caplog.text
    assert model.adaptation.saved > 0
    assert model.adaptation.added <= 0.2


def test_a_model_that_was_made_much_worse_is_told(caplog):
    model = llama(scale=12.0)
    batch = own_text(model)
    with caplog.at_level(logging.WARNING):
        spt_jax.adapt(
            model, SPTConfig(serve=None, attention=None, ffn=ROUTED), calibration_batch=batch
        )
    added = model.adaptation.added
    assert model.adaptation.is_costly == (added > 0.1)
    assert ("serve this adapter dense" in caplog.text) == (added > 0.1)
    assert added > 0.1, "the case tells nothing"
    assert model.adaptation.budget is None
    assert json.loads(json.dumps(model.adaptation.to_json()))["sparse"] == model.adaptation.sparse


def test_the_same_model_is_compiled_once_whatever_its_report_says():
    reports = [
        AdaptationReport(layers=(), seconds=seconds, saved=saved)
        for seconds, saved in ((1.0, 0.1), (2.0, 0.2))
    ]
    assert reports[0] == reports[1]
    assert hash(reports[0]) == hash(reports[1])


@pytest.mark.usefixtures("compiled_anew")
def test_eight_billion_parameters_need_little_memory_beside_the_weights():
    """Compiled for a LLaMA-3-8B that is described, of few layers, and counted on to all 32."""
    described = LLAMA | {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
    }
    key, length = jax.eval_shape(lambda: jax.random.key(0)), 512

    # q and x twice, with their gradients, and k and v
    token_bytes = 32 * 4 * (2 * 4096 + 2 * 1024 + 2 * 4096)
    chunk = int(min(budget.CHUNK_TOKENS, budget.CHUNK_BYTES / token_bytes))

    def ids(tokens):
        return {"input_ids": jax.ShapeDtypeStruct((max(1, tokens // length), length), jnp.int32)}

    def needed(layers):
        raw = described | {"num_hidden_layers": layers}
        model = nnx.eval_shape(lambda: Decoder(parse_config(raw), rngs=nnx.Rngs(0)))
        graphdef, state = nnx.split(model)
        found = [
            number
            for number, (_, module) in enumerate(nnx.iter_modules(model))
            if isinstance(module, Attention | FeedForward)
        ]
        tokens = jax.ShapeDtypeStruct((calibration.PASS_TOKENS // 8,), jnp.int32)
        recorded = calibration._recorded.lower(
            graphdef, state, ids(calibration.PASS_TOKENS), tokens, numbers=tuple(found[-2:])
        )
        seen = budget._observed.lower(graphdef, state, ids(chunk), key, tuple(found), True)
        sizes = [lowered.compile().memory_analysis() for lowered in (recorded, seen)]
        return np.array([size.temp_size_in_bytes + size.output_size_in_bytes for size in sizes])

    few, more = needed(2), needed(4)
    recorded, observed = more + (more - few) / 2 * (32 - 4)
    assert 1e9 < recorded + calibration.RECORDED_BYTES < 8e9
    assert 1e9 < observed + budget.OBSERVED_BYTES < 8e9

    arrays = [
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in ((4096, 4096), (4096, 4096), (4096, 4), (4, 4096))
    ]
    fit = calibration._fit_absent.lower(*arrays, rank=32).compile().memory_analysis()
    hidden, outputs = 4096 * 14336 * 4, 4096 * 4 * 4096 * 4  # [T, F] and [T, G, D]
    assert fit.temp_size_in_bytes + fit.argument_size_in_bytes + 3 * hidden + outputs < 5e9


@pytest.mark.usefixtures("paying")
def test_a_run_too_short_to_earn_fits_back_stays_dense(tmp_path, own_cache):
    """Each of six layers saves half a second or more on 512 tokens, and takes 1 or 4 to fit."""
    batch = llama_batch()
    model = llama()
    spt_jax.adapt(model, config(100.0), calibration_batch=batch, training_tokens=512)
    report = model.adaptation
    assert report.too_short
    assert {line.choice for line in report.layers} == {"dense"}
    assert "too short" in report.summary()
    assert not list((own_cache / "fits").glob("*"))
    spt_jax.save_adapter(model, tmp_path / "adapter")  # the report goes with it
    again = spt_jax.load_adapter(llama(), tmp_path / "adapter")
    assert again.adaptation == report
    assert again.adaptation.too_short
    long = llama()
    spt_jax.adapt(long, config(100.0), calibration_batch=batch, training_tokens=512 * 100)
    assert not long.adaptation.too_short
    assert any(line.active < 1 for line in long.adaptation.layers)


def test_no_tokens_to_train_on_are_named():
    with pytest.raises(ValueError, match="training_tokens must be at least 1, got 0"):
        spt_jax.adapt(llama(), config(1.0), calibration_batch=llama_batch(), training_tokens=0)
