from __future__ import annotations

import json
import shutil
import time

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from spt_jax.training import (
    Document,
    encode_documents,
    eval_batches,
    pack,
    read_jsonl,
    read_text,
    read_tfds_text,
    strided_windows,
)

ARTICLES = [
    " = A = \n \n Of a . \n = 1 = \n \n = = Part = = \n \n More . \n ",
    " = B ( b = c ) = \n \n Of b . \n ",
]


REPLY = '{"role": "assistant", "content": "a"}'


@pytest.fixture(scope="module")
def tokenizer():
    words = ("<pad>", "<s>", "</s>", "<unk>", "a", "b", "c", "d")
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.enable_truncation(3)  # as some published files have it; must be ignored
    tokenizer.enable_padding(length=64)
    return tokenizer


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_text_is_split_at_level_one_headings(tmp_path):
    assert read_text(write(tmp_path / "a", " \n" + "\n".join(ARTICLES))) == ARTICLES
    assert read_text(write(tmp_path / "b", "No heading.\n\n= one\n")) == ["No heading.\n\n= one\n"]
    assert read_text(write(tmp_path / "c", "Before.\n\n" + ARTICLES[1])) == [
        "Before.\n",
        ARTICLES[1],
    ]


def test_blank_and_undecodable_text_is_refused(tmp_path):
    for read in (read_text, read_jsonl):
        with pytest.raises(ValueError, match=r"blank\.txt is empty"):
            read(write(tmp_path / "blank.txt", " \n\n"))
    (tmp_path / "latin").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(ValueError, match="latin is not UTF-8 at byte 2; convert it"):
        read_text(tmp_path / "latin")


def test_jsonl(tmp_path):
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    records = [{"text": "é", "id": 3}, {"messages": messages}]
    text = "\n\n".join(map(json.dumps, records)) + "\n"
    assert read_jsonl(write(tmp_path / "x", text)) == records


def test_records_are_lines_or_an_array_and_null_is_absent(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    chat = {"messages": [{"role": "user", "content": "Q"}, call], "tools": [{"name": "f"}]}
    rows = [{"text": "a", "messages": None}, {"text": None} | chat]
    lines = write(tmp_path / "x.jsonl", "\n".join(map(json.dumps, rows)))
    array = write(tmp_path / "x.json", json.dumps(rows, indent=1))
    assert read_jsonl(lines) == read_jsonl(array) == [{"text": "a"}, chat]
    with pytest.raises(ValueError, match=r"x\.json, record 2: give either"):
        read_jsonl(write(tmp_path / "x.json", '[{"text": "a"}, {}]'))
    array = write(tmp_path / "x.json", json.dumps(rows))
    for path in (lines, array, write(tmp_path / "x.txt", '{\n"data": []}')):
        with pytest.raises(
            ValueError, match=r"holds JSON records, not text: read_jsonl reads them"
        ):
            read_text(path)


def test_brackets_do_not_make_records(tmp_path):
    for text in ("[1] A note.\n", "[1]\nA note.", "{x} in R", "[]", '["a"]'):
        assert read_text(write(tmp_path / "x", text)) == [text]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "is not JSON: Expecting ',' delimiter at column 13; write one object"),
        ("[1]", r"an object is needed, got \[1\]"),
        ('{"title": "a"}', 'give either "text" or "messages"; it has neither, but title'),
        ("{}", "it has neither, but nothing"),
        ('{"text": "a", "messages": []}', "it has both"),
        ('{"text": " "}', '"text" must be a string that is not blank'),
        ('{"text": 1}', '"text" must be a string'),
        ('{"messages": []}', '"messages" must be a list that is not empty'),
        ('{"messages": [{"role": "user"}]}', "message 0 must be an object with strings"),
        (f'{{"messages": [{REPLY}], "tools": "f"}}', '"tools" must be a list'),
        (f'{{"messages": [{REPLY}], "chat_template_kwargs": []}}', "must be an object"),
        ('{"messages": [{"role": "human", "content": "a"}]}', "unknown role 'human'; roles are"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no message by the assistant"),
    ],
)
def test_jsonl_refuses(tmp_path, line, message):
    path = write(tmp_path / "data.jsonl", f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(ValueError, match=rf"data\.jsonl, line 2\W.*{message}"):
        read_jsonl(path)


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    import tensorflow_datasets as tfds

    lines = "\n".join(ARTICLES).split("\n")

    class Rows(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = (tfds.core.BuilderConfig(name="raw"),)
        texts: tuple[str, ...]

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"test": ((i, {"text": text}) for i, text in enumerate(self.texts))}

        def _generate_examples(self):
            raise NotImplementedError

    class Wikitext(Rows, skip_registration=True):
        name = "wikitext"
        texts = tuple(f"{line}\n" for line in lines)

    class Pages(Rows, skip_registration=True):
        name = "pages"
        texts = ("One.", "", "Two.\nLines.")

    root = tmp_path_factory.mktemp("tfds")
    for builder in (Wikitext, Pages):
        builder(data_dir=root, file_format="array_record").download_and_prepare()
    return root


def test_tfds_rows_are_documents_or_lines_of_them(tfds_dir):
    assert read_tfds_text("wikitext/raw", "test", tfds_dir) == ARTICLES
    assert read_tfds_text("wikitext/raw/1.0.0", "test", tfds_dir) == ARTICLES
    assert read_tfds_text("pages/raw", "test", tfds_dir) == ["One.", "Two.\nLines."]
    assert read_tfds_text("pages/raw", "test[:1]", tfds_dir) == ["One."]


def test_tfds_refuses(tfds_dir):
    with pytest.raises(OSError, match=r"wiki is not in .*\(it has pages/raw/1\.0\.0, wikitext/"):
        read_tfds_text("wiki", "test", tfds_dir)
    with pytest.raises(ValueError, match=r"cannot read pages/raw train.*splits are test"):
        read_tfds_text("pages/raw", "train", tfds_dir)
    with pytest.raises(ValueError, match="no feature 'body'; it has text"):
        read_tfds_text("pages/raw", "test", tfds_dir, feature="body")
    with pytest.raises(ValueError, match="is empty"):
        read_tfds_text("pages/raw", "test[1:2]", tfds_dir)


def test_tfds_format_without_random_access_is_refused(tfds_dir, tmp_path):
    shutil.copytree(tfds_dir / "pages", tmp_path / "pages")
    info = tmp_path / "pages/raw/1.0.0/dataset_info.json"
    write(info, info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(OSError, match="without random access; convert it with tfds"):
        read_tfds_text("pages/raw", "test", tmp_path)


def test_documents_are_encoded_whole_with_special_tokens(tokenizer):
    before = tokenizer.to_str()
    found = encode_documents(["a b c d", "a </s>"], tokenizer, name="x", eos_id=2)
    assert [d.ids.tolist() for d in found[:1]] == [[1, 4, 5, 6, 7, 2]]
    assert found[0].ids.dtype == np.int32
    assert all(d.predicted.all() and len(d.predicted) == len(d) for d in found)
    assert [d.ids.tolist() for d in encode_documents(["a b"], tokenizer, name="x")] == [[1, 4, 5]]
    assert tokenizer.to_str() == before


def test_an_end_of_text_that_is_there_is_not_doubled(tokenizer):
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    (found,) = encode_documents(["a"], tokenizer, name="x", eos_id=2)
    assert found.ids.tolist() == [1, 4, 2]


def test_a_start_that_is_there_is_not_doubled(tokenizer):
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.add_special_tokens(["<s>"])
    (found,) = encode_documents(["<s> a b"], tokenizer, name="x", eos_id=2)
    assert found.ids.tolist() == [1, 4, 5, 2]


def test_short_and_missing_documents_are_refused(tokenizer):
    with pytest.raises(ValueError, match="x: document 1 has 1 tokens; at least 2 are needed"):
        encode_documents(["a", ""], tokenizer, name="x")
    with pytest.raises(ValueError, match="x is empty"):
        encode_documents([], tokenizer, name="x")


def documents(lengths, seed=0):
    """Token `10 k + p` is token p of document k, so that every token tells where it is from."""
    rng = np.random.default_rng(seed)
    return [
        Document(
            np.arange(n, dtype=np.int32) + 1000 * k,
            (rng.uniform(size=n) < 0.8) | (np.arange(n) == 1),
        )
        for k, n in enumerate(lengths)
    ]


LENGTHS = (2, 3, 9, 10, 11, 17, 18, 19, 40, 5, 2, 7)


def targets(examples):
    """Labels that count, sorted."""
    return np.sort(examples.columns["label"][examples.columns["weight"] > 0])


@pytest.mark.parametrize(("length", "stride"), [(9, 9), (9, 4), (9, 1), (2, 1), (64, 32)])
def test_every_predicted_token_but_the_first_counts_once(length, stride):
    data = documents(LENGTHS)
    found = strided_windows(data, length, stride, pad_id=7, name="x")
    expected = np.concatenate([d.ids[1:][d.predicted[1:]] for d in data])
    np.testing.assert_array_equal(targets(found), expected)

    c = found.columns
    assert {name: array.dtype.name for name, array in c.items()} == {
        "input_ids": "int32",
        "label": "int32",
        "attention_mask": "int32",
        "segment_ids": "int32",
        "weight": "float32",
    }
    assert {array.shape for array in c.values()} == {(len(found), length)}
    real = c["segment_ids"] > 0
    np.testing.assert_array_equal(c["attention_mask"], real)
    np.testing.assert_array_equal(c["label"][real], c["input_ids"][real] + 1)
    assert (c["input_ids"][~real] == 7).all()
    assert not c["weight"][~real].any()
    # within a row, a segment goes on from token to token, and the next segment has the next number
    step = np.diff(c["segment_ids"], axis=1)
    inside = real[:, 1:]
    assert (c["segment_ids"][:, 0] == 1).all()
    assert set(step[inside]) <= {0, 1}
    same = inside & (step == 0)
    np.testing.assert_array_equal(np.diff(c["input_ids"], axis=1)[same], 1)
    # what counts has its context, where the document has it
    position = np.zeros(c["input_ids"].shape, int)
    for p in range(1, length):
        position[:, p] = np.where(same[:, p - 1], position[:, p - 1] + 1, 0)
    wanted = np.minimum(c["input_ids"] % 1000, length - stride)
    assert (position >= wanted)[c["weight"] > 0].all()


def test_packing_is_the_windows_without_overlap():
    data = documents(LENGTHS)
    packed = pack(data, 9, pad_id=0, name="x")
    windows = strided_windows(data, 9, 9, pad_id=0, name="x")
    again = pack(data, 9, pad_id=0, name="x")
    for name, array in packed.columns.items():
        np.testing.assert_array_equal(array, windows.columns[name])
        np.testing.assert_array_equal(array, again.columns[name])


def test_pieces_without_predicted_tokens_are_left_out():
    ids = np.arange(20, dtype=np.int32)
    found = pack([Document(ids, ids == 15)], 5, pad_id=0, name="x")
    np.testing.assert_array_equal(found.columns["input_ids"], [[10, 11, 12, 13, 14]])
    np.testing.assert_array_equal(found.columns["weight"], [[0, 0, 0, 0, 1]])


def test_documents_longer_than_a_row_are_counted():
    assert LENGTHS[3] == 10  # 9 positions
    for stride in (9, 4):
        found = strided_windows(documents(LENGTHS), 9, stride, pad_id=0, name="x")
        assert found.num_truncated == sum(n > 10 for n in LENGTHS)


def test_rows_go_through_batches():
    found = pack(documents(LENGTHS), 9, pad_id=0, name="x")
    weight = sum(batch["weight"].sum() for batch in eval_batches(found, 4))
    assert weight == found.columns["weight"].sum()


def test_many_documents_are_packed_fast_and_tightly():
    rng = np.random.default_rng(0)
    data = [
        Document(np.zeros(n, np.int32), np.ones(n, bool))
        for n in np.clip(rng.lognormal(4, 1, 20_000), 2, 5000).astype(int)
    ]
    began = time.perf_counter()
    found = pack(data, 512, pad_id=0, name="x")
    assert time.perf_counter() - began < 10
    assert found.columns["attention_mask"].mean() > 0.99


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([], {}, "x is empty"),
        (documents([5, 1]), {}, "x: document 1 has 1 tokens"),
        (documents([5]), {"length": 1}, "length must be at least 2 tokens, got 1"),
        (documents([5]), {"stride": 9}, r"stride 9 is not in 1\.\.8"),
        (documents([5]), {"stride": 0}, r"stride 0 is not in 1\.\.8"),
        (documents([5]), {"vocab_size": 4}, "token id 4 is outside the model's vocabulary of 4"),
        ([Document(np.arange(-1, 3, dtype=np.int32), np.ones(4, bool))], {}, "token id -1"),
        (
            [Document(np.arange(3, dtype=np.int32), np.array([True, False, False]))],
            {},
            "no token is predicted",
        ),
    ],
)
def test_windows_refuse(data, options, message):
    options = {"length": 8, "stride": 4, "pad_id": 0, "name": "x"} | options
    with pytest.raises(ValueError, match=message):
        strided_windows(data, **options)
