import json

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

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


@pytest.mark.parametrize("other", [None, "tokenizer.model", "vocab.txt"])
def test_no_tokenizer(tmp_path, other):
    if other is not None:
        (tmp_path / other).write_text("")
    with pytest.raises(ValueError, match=f"{tmp_path} has no tokenizer.json; save one"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{", '{"version": "1.0"}', "\0"])
def test_corrupt_tokenizer_is_named(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"{path} is not a valid tokenizer"):
        load_tokenizer(tmp_path)


WORDS = {
    word: i for i, word in enumerate(["[UNK]", "<s>", "</s>", "hello", "Hello", "\u0120hello"])
}


def saved(directory, *, normalizer=None, pre_tokenizer=None, **files):
    """A tokenizer of whole words, and JSON files beside it."""
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


PAD = {"content": "[PAD]", "lstrip": False, "rstrip": False, "normalized": False}
OWN, OTHER = {"6": {**PAD, "special": True}}, {"pad_token": "[OTHER]"}


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"pad_token": "[PAD]"}},
        {"tokenizer_config": {"added_tokens_decoder": OWN}, "special_tokens_map": OTHER},
        {"tokenizer_config": {}, "special_tokens_map": {"pad_token": PAD}},
        {"special_tokens_map": {"additional_special_tokens": ["[PAD]"]}},
        {"special_tokens_map": {"extra_special_tokens": {"pad_token": "[PAD]"}}},
        {"special_tokens_map": {"pad_token": "[PAD]"}, "added_tokens": {"[PAD]": 6, "<x>": 7}},
    ],
)
def test_tokens_that_the_files_beside_add(tmp_path, files):
    tokenizer = load_tokenizer(saved(tmp_path, **files))
    assert tokenizer.encode("hello[PAD]hello").ids == [3, 6, 3]
    assert tokenizer.decode([3, 6, 3]) == "hello hello"  # it is a special one
    assert tokenizer.token_to_id("[OTHER]") is None
    assert tokenizer.encode("hello<x>").ids == ([3, 7] if "added_tokens" in files else [0])


def test_what_a_config_beside_sets(tmp_path):
    bert = {"normalizer": normalizers.BertNormalizer(lowercase=True), "tokenizer_config": {}}
    assert load_tokenizer(saved(tmp_path, **bert)).encode("Hello").ids == [3]
    bert["tokenizer_config"] = {"do_lower_case": False}
    assert load_tokenizer(saved(tmp_path, **bert)).encode("Hello").ids == [4]
    bert["tokenizer_config"]["tokenizer_class"] = "PreTrainedTokenizerFast"
    assert load_tokenizer(saved(tmp_path, **bert)).encode("Hello").ids == [3]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for prefixed, ids in ((True, [5]), (False, [3])):
        config = {"add_prefix_space": prefixed, "add_bos_token": True, "bos_token": "<s>"}
        source = saved(tmp_path, pre_tokenizer=level, tokenizer_config=config)
        assert load_tokenizer(source).encode("hello").ids == ids


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"added_tokens": {"<x>": 9}}, "'<x>' is added with id 9, and tokenizer.json gives it 6"),
        ({"tokenizer_config": {"pad_token": {"id": 3}}}, "the token {'id': 3}, neither a text"),
        ({"tokenizer_config": {"additional_special_tokens": [3]}}, "has the token 3, neither"),
        ({"special_tokens_map": []}, "special_tokens_map.json holds a JSON list, not an object"),
    ],
)
def test_files_beside_that_do_not_fit(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        load_tokenizer(saved(tmp_path, **files))
