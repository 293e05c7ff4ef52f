from collections import Counter

import pytest

from experiments import acceptability


def test_every_sentence_appears_as_it_is_and_scrambled():
    rows = acceptability.examples("train")
    assert len(rows) > 1500
    for natural, scrambled in zip(rows[::2], rows[1::2], strict=True):
        assert (natural["label"], scrambled["label"]) == (1, 0)
        assert natural["sentence"] != scrambled["sentence"]
        words = [Counter(str(row["sentence"]).rstrip(".").split()) for row in (natural, scrambled)]
        assert words[0] == words[1]
        assert acceptability.MIN_WORDS <= words[0].total() <= acceptability.MAX_WORDS


def test_the_split_is_fixed_and_disjoint():
    train, validation = (acceptability.examples(split) for split in ("train", "validation"))
    assert train == acceptability.examples("train")
    assert 0.15 < len(validation) / (len(train) + len(validation)) < 0.25
    texts = [{row["sentence"] for row in rows if row["label"]} for rows in (train, validation)]
    assert not texts[0] & texts[1]


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="train and validation, not 'test'"):
        acceptability.examples("test")
