import json

import pytest

from spt_jax.models import load_tokenizer
from tests.spt_jax.models.builders import GOLDEN

EXPECTED = json.loads((GOLDEN / "minilm_tokens.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("index", range(len(EXPECTED["sentences"])))
def test_ids_equal_transformers(index):
    encoding = load_tokenizer("minilm").encode(EXPECTED["sentences"][index])
    assert encoding.ids == EXPECTED["input_ids"][index]


def test_pairs_equal_transformers():
    encoding = load_tokenizer("minilm").encode(*EXPECTED["pair"])
    assert encoding.ids == EXPECTED["pair_input_ids"]
    assert encoding.type_ids == EXPECTED["pair_token_type_ids"]


def test_padding_and_truncation_are_left_to_the_caller():
    tokenizer = load_tokenizer("minilm")
    assert tokenizer.padding is None
    assert tokenizer.truncation is None
    assert len(tokenizer.encode("a " * 300).ids) == 302
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    assert len(tokenizer.encode("a " * 300).ids) == 8
    assert load_tokenizer("minilm").truncation is None


def test_no_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} has no tokenizer.json; save one"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{", '{"version": "1.0"}', "\0"])
def test_corrupt_tokenizer_is_named(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"{path} is not a valid tokenizer"):
        load_tokenizer(tmp_path)
