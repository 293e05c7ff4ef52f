from __future__ import annotations

import math
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from tensorboardX.proto import event_pb2

import spt_jax
from spt_jax.config import (
    LearningRateMultipliers,
    LoRAConfig,
    RoutedFFNConfig,
    SPTConfig,
    TrainConfig,
)
from spt_jax.training import (
    CheckpointError,
    Examples,
    Interrupted,
    NonFiniteLoss,
    cross_entropy,
    evaluate,
    mean_squared_error,
    next_token,
    supervised,
    train,
    weights_fingerprint,
)
from tests.spt_jax.toy import ToyModel, toy_batch
from tests.spt_jax.training.toy import Toy, examples

GOLDEN = Path(__file__).parents[2] / "golden"
CONFIG = TrainConfig(
    steps=12,
    batch_size=16,
    learning_rate=0.1,
    learning_rate_multipliers=LearningRateMultipliers(router=1.0),
    eval_every=4,
    log_every=1,
)
OPTIONS = {"objective": supervised(cross_entropy), "metrics": ("matthews", "accuracy")}


def quiet(_: str) -> None:
    pass


def run(out, config=CONFIG, *, model=None, data=None, **options):
    model = model or Toy()
    options = {"log": quiet, "eval_data": examples(40, 1), **OPTIONS, **options}
    result = train(model, data or examples(100), config, out, **options)
    return result, model


def outcome(result, model):
    """All that must be the same whatever interrupted the run."""
    params = weights_fingerprint(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    exact = (result.metrics, result.metrics_step, result.best_step, result.train_loss)
    return params, exact, result.steps, result.epochs, result.stopped_early


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    out = tmp_path_factory.mktemp("straight")
    messages = []
    result, model = run(out, log=messages.append)
    return out, result, model, messages


def test_learns_and_reports(straight):
    _, result, _, messages = straight
    assert result.metrics["matthews"] > 0.5
    names = ["matthews", "accuracy", "eval_loss"]
    assert list(result.metrics) == [*names, *(f"{name}_dense" for name in names)]
    assert result.metrics["matthews_dense"] == result.metrics["matthews"]
    assert (result.steps, result.metrics_step, result.stopped_early) == (12, 12, False)
    assert result.epochs == pytest.approx(12 * 16 / 100)
    assert (result.trainable_parameters, result.total_parameters) == (482, 1122)
    assert result.step_ms > 0
    assert result.compile_s > 0
    assert 0 < result.tokens_per_s < result.padded_tokens_per_s
    assert result.peak_bytes > 4 * result.total_parameters
    assert result.peak_bytes_source == ("compiler" if jax.default_backend() == "cpu" else "device")
    flat = result.figures()
    assert flat["matthews"] == result.metrics["matthews"]
    assert "metrics" not in flat
    assert sum(message.startswith("step ") for message in messages) == 12
    assert sum(message.startswith("evaluation at step ") for message in messages) == 3


def test_tensorboard_holds_every_step(straight):
    out, result, *_ = straight
    (path,) = (out / "tensorboard").iterdir()
    blob, found = path.read_bytes(), {}
    while blob:
        size = int.from_bytes(blob[:8], "little")
        for value in event_pb2.Event.FromString(blob[12 : 12 + size]).summary.value:
            found.setdefault(value.tag, []).append(value.simple_value)
        blob = blob[16 + size :]
    assert len(found["train/loss"]) == len(found["train/codebook"]) == 12
    assert found["train/learning_rate"][0] == pytest.approx(0.1)
    assert found["evaluation/matthews"][-1] == pytest.approx(result.metrics["matthews"])


def test_same_seed_same_numbers_and_another_seed_others(straight, tmp_path):
    _, result, model, _ = straight
    assert outcome(*run(tmp_path / "same")) == outcome(result, model)
    other = TrainConfig(**{**vars(CONFIG), "seed": 1})
    assert run(tmp_path / "other", other)[0].train_loss != result.train_loss


def test_64_bit_types_switched_on_change_nothing(tmp_path):
    config, model = replace(CONFIG, dropout=False, steps=4), Toy()
    expected, _ = run(tmp_path / "narrow", config)
    with jax.enable_x64(True):
        result, _ = run(tmp_path / "wide", config, model=model)
    assert result.train_loss == pytest.approx(expected.train_loss, rel=1e-3)
    assert {v.dtype for _, v in nnx.to_flat_state(nnx.state(model))} == {np.dtype("float32")}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_stops_and_the_resumed_run_ends_alike(straight, tmp_path, number):
    def strike(message: str) -> None:
        if message.startswith("step 6/"):
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    model = Toy()
    with pytest.raises(Interrupted, match=rf"{number.name} at step \d+ of 12.*--resume") as caught:
        run(tmp_path, model=model, log=strike)
    assert caught.value.signal == number
    assert signal.getsignal(number) is before
    assert outcome(straight[1], model)[0] == outcome(straight[1], Toy())[0]  # still as it was
    messages = []
    result, model = run(tmp_path, resume=True, log=messages.append)
    assert result.resumed_from in (6, 7)
    assert messages[0].startswith(f"going on from checkpoint {tmp_path}")
    assert outcome(result, model) == outcome(straight[1], straight[2])
    again, model = run(tmp_path, resume=True)  # a finished run has nothing left to do
    assert again.resumed_from == 12
    assert outcome(again, model) == outcome(straight[1], straight[2])


def test_signal_during_evaluation(straight, tmp_path, monkeypatch):
    from spt_jax.training import evaluation

    whole = evaluation.eval_batches

    def struck(*arguments):
        for i, batch in enumerate(whole(*arguments)):
            if i == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(evaluation, "eval_batches", struck)
    with pytest.raises(Interrupted, match="at step 4 of 12"):
        run(tmp_path)
    monkeypatch.undo()
    assert outcome(*run(tmp_path, resume=True)) == outcome(straight[1], straight[2])


def test_runs_outside_the_main_thread(straight, tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(run(tmp_path)))
    thread.start()
    thread.join()
    assert outcome(*found[0]) == outcome(straight[1], straight[2])


def test_non_finite_loss_stops_with_step_and_checkpoint(tmp_path):
    def explodes(outputs, labels, weights):
        loss, weight = cross_entropy(outputs, labels, weights)
        return loss / (loss > 0.45 * weight), weight

    model = Toy()
    start = outcome_params(model)
    with pytest.raises(NonFiniteLoss) as caught:
        run(
            tmp_path,
            TrainConfig(**{**vars(CONFIG), "eval_every": 2}),
            model=model,
            objective=supervised(explodes),
        )
    message = str(caught.value)
    step = int(message.split("at step ")[1].split(";")[0])
    assert "loss is inf" in message
    assert 2 < step <= 12
    last = (step - 1) // 2 * 2
    assert f"The last good checkpoint is {tmp_path}/checkpoints/{last}." in message
    assert outcome_params(model) == start


def test_a_loss_too_large_for_its_perplexity_is_evaluated_and_saved(tmp_path):
    def large(outputs, labels, weights):
        loss, weight = cross_entropy(outputs, labels, weights)
        return 2000 * loss, weight

    options = {"objective": supervised(large), "metrics": ("perplexity",)}
    config = replace(CONFIG, steps=2, eval_every=1, learning_rate=1e-4)
    result, model = run(tmp_path, config, **options)
    assert result.metrics["perplexity"] == math.inf
    assert 709 < result.metrics["eval_loss"] < math.inf
    assert outcome(*run(tmp_path, config, resume=True, **options)) == outcome(result, model)


def outcome_params(model):
    return weights_fingerprint(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def test_early_stopping_and_the_best_parameters(tmp_path):
    config = TrainConfig(
        steps=60,
        batch_size=16,
        learning_rate=0.5,  # far too high, so that the best comes early
        schedule="constant",
        warmup=0,
        eval_every=2,
        monitor="eval_loss",
        patience=3,
        result="best",
    )
    result, model = run(tmp_path, config)
    assert result.stopped_early
    assert result.steps == result.best_step + 3 * 2
    assert result.metrics_step == result.best_step
    kept = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert kept == {str(s) for s in (result.best_step, result.steps - 2, result.steps)}
    # the model really holds the parameters of that step
    data = examples(40, 1)
    logits = model.forward(data.columns["input_ids"], data.columns["attention_mask"])[0]
    labels = data.columns["label"]
    loss, weight = cross_entropy(logits, jax.numpy.array(labels), jax.numpy.ones(40))
    assert float(loss / weight) == pytest.approx(result.metrics["eval_loss"], rel=1e-5)
    resumed, again = run(tmp_path, config, resume=True)
    assert outcome(resumed, again) == outcome(result, model)


@pytest.mark.parametrize("judged", ["dense", "sparse"])
def test_both_forms_are_evaluated_and_one_is_judged(tmp_path, judged):
    model, batch = ToyModel(rngs=nnx.Rngs(0)), toy_batch(64)
    routed = SPTConfig(serve=None, lora=LoRAConfig(rank=2), attention=None, ffn=RoutedFFNConfig())
    model = spt_jax.adapt(model, routed, calibration_batch=batch)
    data = Examples(
        {k: np.asarray(v) for k, v in batch.items()} | {"label": np.arange(64) % 2}, "toy"
    )
    config = replace(CONFIG, steps=3, eval_every=1, evaluate_as=judged, result="best")
    messages = []
    result, model = run(
        tmp_path, config, model=model, data=data, eval_data=data, log=messages.append
    )
    (other,) = {"dense", "sparse"} - {judged}
    for name in ("matthews", "accuracy", "eval_loss"):
        assert result.metrics[name] == result.metrics[f"{name}_{judged}"]
    assert result.metrics["eval_loss_dense"] != result.metrics["eval_loss_sparse"]
    shown = [m for m in messages if m.startswith("evaluation at")]
    assert all(f"({other} form " in m for m in shown)
    for form in ("sparse", "dense"):
        spt_jax.set_form(model, form)
        found = evaluate(model, data, **OPTIONS)
        assert found["eval_loss"] == pytest.approx(result.metrics[f"eval_loss_{form}"], rel=1e-5)


def test_regression_with_two_splits_and_accumulation(tmp_path):
    config = TrainConfig(epochs=2, batch_size=16, accumulation=4, learning_rate=0.03, remat=True)
    messages = []
    result, model = run(
        tmp_path,
        config,
        model=Toy(classes=1),
        data=examples(50, scores=True),
        eval_data={n: examples(20, i, scores=True) for i, n in enumerate(("near", "far"))},
        objective=supervised(mean_squared_error),
        metrics=("pearson", "spearman"),
        log=messages.append,
    )
    names = ("pearson", "spearman", "eval_loss")
    names = [f"{n}_{split}" for split in ("near", "far") for n in names]
    assert list(result.metrics) == [*names, *(f"{name}_dense" for name in names)]
    assert result.steps == math.ceil(2 * 50 / 16)
    # by default once an epoch: after step 4 all 50 were seen, after step 7 all of them twice
    evaluations = [message.split(":")[0] for message in messages if "evaluation" in message]
    assert evaluations == ["evaluation at step 4", "evaluation at step 7"]
    assert model.remat is False


def test_remat_changes_the_program_but_not_the_result(straight, tmp_path):
    config = TrainConfig(**{**vars(CONFIG), "remat": True})
    result, _ = run(tmp_path, config)
    assert result.train_loss == pytest.approx(straight[1].train_loss, rel=1e-4)
    with pytest.raises(ValueError, match="Linear has no option remat"):
        run(tmp_path / "none", config, model=nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


@pytest.mark.usefixtures("compiled_anew")
def test_batches_by_length(tmp_path):
    data = examples(100)
    columns = {name: np.repeat(x, 4, 1) if x.ndim > 1 else x for name, x in data.columns.items()}
    config = replace(CONFIG, group_by_length=True, steps=36, eval_every=12)
    long = replace(data, columns=columns)
    assert long.length == 64
    straight, model = run(tmp_path / "straight", config, data=long)
    dense, _ = run(tmp_path / "dense", replace(config, group_by_length=False), data=long)
    assert straight.metrics["matthews"] > 0.5
    assert straight.padded_tokens_per_s / straight.tokens_per_s < (
        0.9 * dense.padded_tokens_per_s / dense.tokens_per_s
    )
    assert straight.compiled_peak_bytes == dense.compiled_peak_bytes  # the longest length

    def stop(message):
        if message.startswith("step 17/"):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        run(tmp_path / "stopped", config, data=long, log=stop)
    resumed, other = run(tmp_path / "stopped", config, data=long, resume=True)
    assert outcome(resumed, other) == outcome(straight, model)


def test_training_split_smaller_than_a_batch(tmp_path):
    result, _ = run(tmp_path, TrainConfig(epochs=16, batch_size=16), data=examples(3))
    assert result.steps == 3
    assert np.isfinite(result.train_loss)


def with_columns(**columns):
    return Examples(examples(12).columns | columns, "x")


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (with_columns(label=np.full(12, 7)), {}, r"x: label 7 of example 0 is no class in 0\.\.1"),
        (with_columns(label=np.full(12, -100)), {}, "label -100 of .* weight 0 to leave it out"),
        (with_columns(label=-(np.arange(12) // 11)), {}, "x: label -1 of example 11 is no class"),
        (with_columns(label=np.zeros(12, bool)), {}, "labels are bool"),
        (with_columns(label=np.zeros(12)), {}, "labels are float.* mean_squared_error takes"),
        (with_columns(weight=np.zeros(12)), {}, "all weights are 0"),
        (examples(12), {"metrics": ("pearson",)}, "compares scores, but the outputs have 2 col"),
        (examples(12), {"metrics": ("bleu",)}, r"unknown metrics \['bleu'\]"),
        (examples(12), {"metrics": ("f1",), "model": Toy(classes=3)}, "f1 is that of class 1 of"),
        (examples(12), {"metrics": ("f1",), "model": Toy(classes=1)}, "the outputs have one col"),
        (
            examples(12, scores=True),
            {"objective": supervised(mean_squared_error), "metrics": ()},
            r"outputs are \(1, 2\) .* load the model with num_labels=1",
        ),
        (
            with_columns(label=np.full(12, np.nan)),
            {
                "objective": supervised(mean_squared_error),
                "metrics": (),
                "model": Toy(classes=1),
            },
            "x: label nan of example 0 is no number",
        ),
    ],
)
def test_labels_that_do_not_go_with_the_model_are_named_before_any_step(
    data, options, message, tmp_path, unhooked
):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "train", data=data, eval_data=data, **options)
    model = options.pop("model", None) or Toy()
    with pytest.raises(ValueError, match=message):
        evaluate(model, data, **OPTIONS | options)
    assert not (tmp_path / "train").exists()


def test_labels_of_weight_zero_may_be_anything(tmp_path):
    odd = np.arange(12) % 3 == 0
    data = with_columns(label=np.where(odd, -100, examples(12).columns["label"]), weight=1.0 - odd)
    assert np.isfinite(run(tmp_path, replace(CONFIG, steps=1), data=data)[0].train_loss)


def test_tokens_out_of_the_vocabulary_are_no_labels(tmp_path, unhooked):
    model = spt_jax.load_pretrained(GOLDEN / "llama", task="causal-lm")
    ids = np.ones((2, 8), np.int32)
    data = Examples({"input_ids": ids, "attention_mask": ids, "label": 97 * ids}, "x")
    with pytest.raises(ValueError, match=r"label 97 of example 0 is no class in 0\.\.96"):
        evaluate(model, data, objective=next_token)


def test_data_that_is_no_examples_is_refused(tmp_path, unhooked):
    for data in (dict(examples(12).columns), [1, 2]):
        with pytest.raises(ValueError, match=f"take Examples, not {type(data).__name__}"):
            run(tmp_path, data=data)
        with pytest.raises(ValueError, match="take Examples, not"):
            run(tmp_path, eval_data=data)


@pytest.mark.parametrize(("rows", "batch_size"), [(1, 1), (1, 2), (3, 1), (3, 2), (3, 16)])
@pytest.mark.parametrize("group_by_length", [False, True])
def test_any_batch_size_and_number_of_rows(rows, batch_size, group_by_length, tmp_path):
    config = replace(CONFIG, steps=3, batch_size=batch_size, group_by_length=group_by_length)
    data = examples(rows, scores=True)
    options = {"objective": supervised(mean_squared_error), "metrics": ("pearson", "spearman")}
    result, _ = run(tmp_path, config, model=Toy(classes=1), data=data, eval_data=data, **options)
    assert result.steps == 3
    assert np.isfinite([result.train_loss, *result.metrics.values()]).all()


def test_an_earlier_run_is_not_overwritten_unasked(straight, tmp_path):
    short = TrainConfig(steps=2, batch_size=16)
    run(tmp_path, short)
    with pytest.raises(CheckpointError, match=r"earlier run \(2\).*--resume.*--overwrite"):
        run(tmp_path, TrainConfig(steps=2, batch_size=8))
    with pytest.raises(CheckpointError, match=r"config\.batch_size was 16, now 8"):
        run(tmp_path, TrainConfig(steps=2, batch_size=8), resume=True)
    with pytest.raises(CheckpointError, match="base_weights was"):
        run(tmp_path, short, model=Toy(seed=1), resume=True)
    with pytest.raises(CheckpointError, match=r"data\.train was"):
        run(tmp_path, short, data=examples(100, 7), resume=True)
    with pytest.raises(CheckpointError, match="method was None, now 'spt'"):
        run(tmp_path, short, identity={"method": "spt"}, resume=True)
    result, _ = run(tmp_path, TrainConfig(steps=2, batch_size=8), overwrite=True)
    assert result.resumed_from is None


def test_more_steps_extend_a_run(tmp_path):
    config = replace(CONFIG, schedule="constant", warmup=2)
    short, _ = run(tmp_path / "short", replace(config, steps=8))
    messages = []
    longer, model = run(tmp_path / "short", config, resume=True, log=messages.append)
    assert longer.resumed_from == short.steps == 8
    assert "12 steps instead of 8: from step 8 on the learning rate follows" in messages[1]
    assert outcome(longer, model) == outcome(*run(tmp_path / "straight", config))
    epochs, _ = run(tmp_path / "short", replace(config, steps=None, epochs=2), resume=True)
    assert (epochs.resumed_from, epochs.steps) == (12, 13)
    with pytest.raises(CheckpointError, match="at step 13, beyond the 12 steps asked for"):
        run(tmp_path / "short", config, resume=True)


def test_resume_of_nothing_starts_with_a_message(tmp_path):
    messages = []
    result, _ = run(tmp_path, TrainConfig(steps=1), resume=True, log=messages.append)
    assert "no checkpoint to go on from" in messages[0]
    assert result.resumed_from is None


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (TrainConfig(monitor="f1"), {}, r"'f1' is not evaluated; choose from \['matthews'"),
        (TrainConfig(patience=1), {"eval_data": None}, "need evaluation examples"),
    ],
)
def test_refuses(tmp_path, config, options, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, config, **options)


@pytest.mark.parametrize(("name", "kind"), [("input_ids", "id 97"), ("token_type_ids", "type 2")])
def test_ids_outside_the_tables_are_named(name, kind, tmp_path):
    model = spt_jax.load_pretrained(GOLDEN / "bert", task="sequence-classification", num_labels=3)
    ids, outside = np.full((2, 6), 5), np.full((2, 6), 97 if name == "input_ids" else 2)
    columns = {"input_ids": ids, "attention_mask": ids > 0, "label": np.zeros(2, np.int32)}
    good, bad = Examples(columns, "good"), Examples(columns | {name: outside}, "bad")
    objective = supervised(cross_entropy)
    for data in ({"data": bad, "eval": good}, {"data": good, "eval": bad}):
        with pytest.raises(ValueError, match=f"bad: token {kind} is outside the model's"):
            train(
                model,
                data["data"],
                CONFIG,
                tmp_path,
                objective=objective,
                eval_data=data["eval"],
                log=quiet,
            )
    with pytest.raises(ValueError, match=f"bad: token {kind} is outside the model's"):
        evaluate(model, bad, objective=objective)
