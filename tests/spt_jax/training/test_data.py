from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from spt_jax.training import (
    Examples,
    check_labels,
    encode_documents,
    eval_batches,
    tokenize,
    train_batches,
)
from spt_jax.training.data import GROUPED_BATCHES, batch_lengths, cut_batch
from tests.spt_jax.training.toy import examples

WORDS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "b", "c", "d")


@pytest.fixture
def tokenizer():
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    tokenizer.enable_truncation(3)  # as some published files have it; must be ignored
    tokenizer.enable_padding(length=64)
    return tokenizer


def test_single_sentences(tokenizer):
    before = tokenizer.to_str()
    labels = np.array([0, 1], np.int32)
    found = tokenize([["a b", "c"]], labels, tokenizer, name="x", max_length=128)
    assert found.length == 16
    assert found.num_truncated == 0
    np.testing.assert_array_equal(
        found.columns["input_ids"][:, :5], [[1, 4, 5, 2, 0], [1, 6, 2, 0, 0]]
    )
    np.testing.assert_array_equal(found.columns["attention_mask"].sum(1), [4, 3])
    assert not found.columns["token_type_ids"].any()
    assert {x.dtype for x in found.columns.values()} == {np.dtype("int32")}
    assert tokenizer.to_str() == before


def test_pairs_have_types_and_the_longer_sentence_is_cut(tokenizer):
    texts = [["a a a a a a", "a"], ["b b", "b"]]
    found = tokenize(texts, np.zeros(2, np.int32), tokenizer, name="x", max_length=8)
    assert found.length == 8
    assert found.num_truncated == 1
    np.testing.assert_array_equal(found.columns["input_ids"][0], [1, 4, 4, 4, 2, 5, 5, 2])
    np.testing.assert_array_equal(found.columns["token_type_ids"][0], [0, 0, 0, 0, 0, 1, 1, 1])


@pytest.mark.parametrize(
    ("words", "options", "length"),
    [
        (14, {}, 16),
        (15, {}, 32),
        (15, {"multiple_of": 8}, 24),
        (90, {}, 40),
        (1, {"pad_to_max_length": True}, 40),
    ],
)
def test_length_is_the_smallest_that_holds_all(tokenizer, words, options, length):
    texts = [["a " * words, "b"]]
    found = tokenize(texts, np.zeros(2, np.int32), tokenizer, name="x", max_length=40, **options)
    assert found.length == length


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([["a"]], {"max_length": 600, "max_positions": 512}, "600 is above the 512 positions"),
        ([["a"]], {"max_length": 2}, "no room for text beside 2 special tokens"),
        ([["a"]], {"max_length": 0}, "at least 1"),
        ([["a", "b"]], {"max_length": 8}, r"x: texts and labels differ in number: \[2, 1\]"),
        ([["a"]] * 3, {"max_length": 8}, "one or two text columns, got 3"),
    ],
)
def test_tokenize_refuses(tokenizer, texts, options, message):
    with pytest.raises(ValueError, match=message):
        tokenize(texts, np.zeros(1, np.int32), tokenizer, name="x", **options)


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize(
    ("text", "label", "message"),
    [
        (None, 1, "x: text 1 is None, not a string; fill it in or remove it"),
        (float("nan"), 1, "x: text 1 is nan, not a string"),
        ("b", None, "x: label None of example 1 is no number; number the classes from 0"),
        ("b", "positive", "x: label 'positive' of example 1 is no number"),
        ("b", [0, 1], r"x: example 1 has the labels \[0, 1\]; several labels .* not supported"),
    ],
)
def test_texts_and_labels_that_are_none(tokenizer, text, label, message):
    with pytest.raises(ValueError, match=message):
        tokenize([["a", text]], [0, label], tokenizer, name="x", max_length=8)
    if text == "b":
        with pytest.raises(ValueError, match=message):
            check_labels([0, label], name="x", num_labels=2)
    else:
        with pytest.raises(ValueError, match=message):
            encode_documents(["a", text], tokenizer, name="x")


@pytest.mark.usefixtures("unhooked")
def test_one_string_is_no_column_of_texts(tokenizer):
    with pytest.raises(ValueError, match="x: one string was given where a list of texts"):
        tokenize(["a"], [0], tokenizer, name="x", max_length=8)
    with pytest.raises(ValueError, match="x: one string was given where a list of texts"):
        encode_documents("a b", tokenizer, name="x")


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": [[1, 2], [3]]}, "column 'input_ids' is a list; give a NumPy array, of rows"),
        ({"input_ids": np.ones((2, 3))}, r"input_ids must be integers .* got float64 \(2, 3\)"),
        ({"input_ids": np.ones(2, int)}, r"input_ids must be integers \[examples, sequence\]"),
        ({"label": np.array(["a", "b"])}, "column 'label' holds <U1, not numbers; labels are"),
        ({"label": np.array([0, None])}, "column 'label' holds object, not numbers"),
        ({"label": np.ones((2, 4), int)}, r"label has shape \(2, 4\); give one .* not supported"),
        ({"attention_mask": np.ones((2, 4))}, r"attention_mask has shape \(2, 4\), expected"),
        ({"weight": np.ones((2, 3))}, r"weight has shape \(2, 3\), expected \(2,\)"),
    ],
)
def test_columns_that_are_no_examples(changes, message):
    ids = np.ones((2, 3), np.int32)
    columns = {"input_ids": ids, "attention_mask": ids, "label": ids[:, 0]}
    with pytest.raises(ValueError, match=f"x: {message}"):
        Examples(columns | changes, "x")


def test_empty_split(tokenizer):
    with pytest.raises(ValueError, match="x is empty"):
        tokenize([[]], np.zeros(0, np.int32), tokenizer, name="x", max_length=8)


def test_examples_refuse_missing_and_ragged_columns():
    ids = np.zeros((2, 4), np.int32)
    with pytest.raises(ValueError, match="x: no column 'label'; it has input_ids, attention_mask"):
        Examples({"input_ids": ids, "attention_mask": ids}, "x")
    with pytest.raises(ValueError, match="differ in their number of rows"):
        Examples({"input_ids": ids, "attention_mask": ids, "label": np.zeros(3)}, "x")


def test_labels():
    assert check_labels([0, 1, 1], name="x", num_labels=2).dtype == np.int32
    scores = check_labels([0.5, 5.0], name="x", score_range=(0, 5))
    assert scores.dtype == np.float32


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([-1, -1], {"num_labels": 2}, "all labels are -1, that is, hidden"),
        ([-1.0, -1.0], {"score_range": (0, 5)}, "hidden"),
        ([0, 1, 2], {"num_labels": 2}, r"label 2 of example 2 is no class in 0\.\.1"),
        ([0, -1], {"num_labels": 2}, r"label -1 of example 1 is no class in 0\.\.1"),
        ([0.5], {"num_labels": 2}, r"label 0\.5 of example 0 is no class"),
        ([1.0, 5.5], {"score_range": (0, 5)}, r"label 5\.5 of example 1 is no score in 0\.\.5"),
        ([1.0, np.nan], {}, "label nan of example 1"),
        ([], {"num_labels": 2}, "x is empty"),
    ],
)
def test_labels_refused(labels, options, message):
    with pytest.raises(ValueError, match=message):
        check_labels(labels, name="x", **options)


def numbered(n):
    data = examples(n)
    return Examples({**data.columns, "label": np.arange(n, dtype=np.int32)}, "numbered")


@pytest.mark.parametrize(("n", "size"), [(1, 1), (1, 8), (3, 1), (3, 8), (10, 8), (32, 8)])
def test_every_example_is_seen_once_an_epoch_in_full_batches(n, size):
    batches = train_batches(numbered(n), size, seed=1)
    found = [next(batches) for _ in range(4 * n)]
    assert {batch["input_ids"].shape for batch in found} == {(size, 16)}
    assert all(batch["weight"].all() for batch in found)
    seen = np.concatenate([batch["label"] for batch in found])
    epochs = seen.reshape(-1, n)
    np.testing.assert_array_equal(np.sort(epochs, 1), np.tile(np.arange(n), (len(epochs), 1)))
    assert n == 1 or any((epochs[0] != epoch).any() for epoch in epochs[1:])


@pytest.mark.parametrize(("n", "size"), [(1, 1), (2, 1), (2, 4)])
def test_few_examples_are_batched_by_length_too(n, size):
    lengths = np.arange(1, n + 1) * 20
    batches = train_batches(of_lengths(lengths), size, seed=1, group_by_length=True)
    found = [next(batches) for _ in range(6)]
    assert {len(batch["label"]) for batch in found} == {size}
    assert {int(label) for batch in found for label in batch["label"]} == set(range(n))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_few_examples_are_evaluated_once(size):
    batches = list(eval_batches(numbered(2), size))
    assert {batch["label"].shape for batch in batches} == {(size,)}
    assert sum(batch["weight"].sum() for batch in batches) == 2


@pytest.mark.parametrize("size", [1, 4])
def test_iterator_state_is_json_and_continues_the_stream(size):
    def labels(batches, count):
        return [next(batches)["label"].tolist() for _ in range(count)]

    batches = train_batches(numbered(10), size, seed=3)
    labels(batches, 7)
    state = json.loads(json.dumps(batches.get_state()))
    again = train_batches(numbered(10), size, seed=3)
    again.set_state(state)
    assert labels(batches, 9) == labels(again, 9)
    assert labels(train_batches(numbered(10), 4, seed=4), 3) != labels(
        train_batches(numbered(10), 4, seed=3), 3
    )


def of_lengths(lengths, full=64):
    """Examples whose only label is their number."""
    mask = (np.arange(full) < np.asarray(lengths)[:, None]).astype(np.int32)
    label = np.arange(len(lengths), dtype=np.int32)
    return Examples({"input_ids": mask * 7, "attention_mask": mask, "label": label}, "lengths")


def test_batches_by_length_hold_like_examples_and_are_cut_to_them():
    lengths = np.random.default_rng(0).integers(1, 65, 4 * GROUPED_BATCHES)
    batches = train_batches(of_lengths(lengths), 4, seed=1, group_by_length=True)
    found = [next(batches) for _ in range(2 * GROUPED_BATCHES)]
    for batch in found:
        valid = batch["attention_mask"].sum(1)
        np.testing.assert_array_equal(valid, lengths[batch["label"]])
        length = batch["input_ids"].shape[1]
        assert batch["attention_mask"].shape == (4, length)
        assert length - 16 < valid.max() <= length
        assert length in (16, 32, 48, 64)
        assert valid.max() - valid.min() < 16
    for epoch in found[:GROUPED_BATCHES], found[GROUPED_BATCHES:]:
        seen = np.concatenate([batch["label"] for batch in epoch])
        np.testing.assert_array_equal(np.sort(seen), np.arange(len(lengths)))
    mean = [batch["attention_mask"].sum(1).mean() for batch in found[:GROUPED_BATCHES]]
    assert (np.diff(mean) < 0).any()  # not from the shortest to the longest


def test_batches_by_length_go_on_from_their_state():
    data = of_lengths(np.random.default_rng(0).integers(1, 65, 50))
    batches = train_batches(data, 4, seed=3, group_by_length=True)
    for _ in range(21):
        next(batches)
    again = train_batches(data, 4, seed=3, group_by_length=True)
    again.set_state(json.loads(json.dumps(batches.get_state())))
    for _ in range(30):
        expected, found = next(batches), next(again)
        assert expected.keys() == found.keys()
        for name, column in expected.items():
            np.testing.assert_array_equal(found[name], column)


@pytest.mark.parametrize(
    ("full", "expected"),
    [
        (8, (8,)),
        (16, (16,)),
        (48, (16, 32, 48)),
        (64, (16, 32, 48, 64)),
        (100, (32, 64, 96, 100)),
        (512, (128, 256, 384, 512)),
    ],
)
def test_lengths_of_batches(full, expected):
    assert batch_lengths(of_lengths([full], full)) == expected


def test_cutting_leaves_columns_without_positions():
    full = {"attention_mask": np.ones((2, 8)), "label": np.zeros(2), "weight": np.ones((2, 8))}
    cut = cut_batch(full, 3)
    assert {name: x.shape for name, x in cut.items()} == {
        "attention_mask": (2, 3),
        "label": (2,),
        "weight": (2, 3),
    }


def test_eval_batches_are_in_order_and_filled_with_weight_zero():
    batches = list(eval_batches(numbered(10), 4))
    assert [batch["label"].tolist() for batch in batches] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 9, 9],
    ]
    assert [batch["weight"].sum() for batch in batches] == [4, 4, 2]


def test_weights_of_tokens_pass_through():
    data = examples(5)
    weight = data.columns["attention_mask"].astype(np.float32)
    label = data.columns["input_ids"]
    batches = list(
        eval_batches(Examples({**data.columns, "label": label, "weight": weight}, "lm"), 4)
    )
    assert batches[1]["weight"].shape == (4, 16)
    assert sum(batch["weight"].sum() for batch in batches) == weight.sum()
