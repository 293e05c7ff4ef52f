import pytest
from tokenizers import pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel, Digits

from spt_jax.chat import ChatTemplate
from spt_jax.models import load_tokenizer
from tests.spt_jax.models.gguf_files import write

BYTES = sorted(ByteLevel.alphabet())
MERGES = ["1 2", "3 4", "12 34", "l o", "lo w"]
SPECIAL = ["<unk>", "<s>", "</s>"]  # ids 0, 1 and 2
OWN = "<think>"
TOKENS = [*SPECIAL, *BYTES, *(merge.replace(" ", "") for merge in MERGES), "whole", OWN, "[PAD]"]
KINDS = [2, 3, 3, *[1] * (len(TOKENS) - 5), 4, 5]
TEXTS = (
    "It's 1999, she'LL say \"no\"...  twice\n\n\tand  more ",
    "Größe \uff12\uff13 中文字 é́ ½ Ⅻ\r\nx=3.14*r**2 # 🙂🙂",
    "   \n  \n a\u00a0b\u2003c",
    "",
)


def make(path, pre="smollm", **changes):
    values = {
        "model": "gpt2",
        "pre": pre,
        "tokens": TOKENS,
        "merges": MERGES,
        "token_type": KINDS,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    values = {f"tokenizer.ggml.{key}": value for key, value in (values | changes).items()}
    return write(path / "model.gguf", "llama", values, {})


def words(pre, text, path):
    to_text = {code: chr(byte) for byte, code in byte_codes().items()}
    cut = load_tokenizer(make(path, pre)).pre_tokenizer.pre_tokenize_str(text)
    return ["".join(to_text[code] for code in word) for word, _ in cut]


def byte_codes():
    pieces = {i: ByteLevel(add_prefix_space=False, use_regex=False) for i in range(128)}
    return {i: piece.pre_tokenize_str(chr(i))[0][0] for i, piece in pieces.items()}


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", "It|'|S| 1234| ok|\n\n| x"),
        ("smollm", "It|'|S| |1|2|3|4| ok|\n\n| x"),
        ("llama-bpe", "It|'S| |123|4| ok|\n\n| x"),
        ("qwen2", "It|'S| |1|2|3|4| ok|\n\n| x"),
        ("default", "It|'|S| |123|4| ok|\n\n| x"),
    ],
)
def test_words(pre, expected, tmp_path):
    assert words(pre, "It'S 1234 ok\n\n x", tmp_path) == expected.split("|")


@pytest.mark.parametrize(
    ("pre", "first"), [("gpt-2", ()), ("smollm", (Digits(individual_digits=True),))]
)
def test_words_as_tokenizers_has_them(pre, first, tmp_path):
    """GPT-2's and SmolLM's tokenizer.json name the library's own expressions."""
    whole = pre_tokenizers.Sequence([*first, ByteLevel(add_prefix_space=False)])
    found = load_tokenizer(make(tmp_path, pre)).pre_tokenizer
    for text in TEXTS:
        assert found.pre_tokenize_str(text) == whole.pre_tokenize_str(text)


def test_merges_and_bytes(tmp_path):
    tokenizer = load_tokenizer(make(tmp_path, "gpt-2"))
    assert tokenizer.encode("1234low").tokens == ["1234", "low"]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.padding is None
    assert tokenizer.truncation is None
    assert tokenizer.encode("whole").tokens == ["w", "h", "o", "l", "e"]
    assert load_tokenizer(make(tmp_path, "llama3")).encode("whole").tokens == ["<s>", "whole"]


def test_qwen2_composes_characters(tmp_path):
    tokenizer = load_tokenizer(make(tmp_path, "qwen2"))
    assert tokenizer.encode("e\u0301").ids == tokenizer.encode("\u00e9").ids


def test_tokens_of_every_type(tmp_path):
    tokenizer = load_tokenizer(make(tmp_path))
    encoding = tokenizer.encode(f"</s>{OWN}low<unk>")
    assert encoding.tokens == ["</s>", OWN, "low", "<unk>"]
    assert encoding.ids == [TOKENS.index(token) for token in encoding.tokens]
    assert tokenizer.decode(encoding.ids) == f"{OWN}low"
    assert tokenizer.get_vocab_size() == len(TOKENS)


@pytest.mark.parametrize(
    ("flags", "single", "pair"),
    [
        ({}, "low", "low 12"),
        ({"add_bos_token": True}, "<s> low", "<s> low <s> 12"),
        ({"add_eos_token": True}, "low </s>", "low </s> 12 </s>"),
        (
            {"add_bos_token": True, "add_eos_token": True},
            "<s> low </s>",
            "<s> low </s> <s> 12 </s>",
        ),
        ({"pre": "llama-bpe"}, "<s> low", "<s> low <s> 12"),
        ({"pre": "llama-bpe", "add_bos_token": False}, "low", "low 12"),
    ],
)
def test_first_and_last_tokens(flags, single, pair, tmp_path):
    tokenizer = load_tokenizer(make(tmp_path, **({"pre": "gpt-2"} | flags)))
    assert tokenizer.encode("low").tokens == single.split()
    assert tokenizer.encode("low", "12").tokens == pair.split()
    assert tokenizer.encode("low", add_special_tokens=False).tokens == ["low"]


def test_tokenizer_json_comes_before_the_file(tmp_path):
    file = make(tmp_path)
    load_tokenizer(make(tmp_path / "other", add_bos_token=True)).save(f"{tmp_path}/tokenizer.json")
    assert load_tokenizer(tmp_path).encode("low").tokens == ["<s>", "low"]
    assert load_tokenizer(file).encode("low").tokens == ["low"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "t5"}, "tokenizer.ggml.model 't5' is not supported; supported: 'gpt2'"),
        ({"model": "llama"}, f"scores must be a list of {len(TOKENS)} numbers, one a token"),
        ({"model": None}, "tokenizer.ggml.model None is not supported"),
        ({"pre": "tekken"}, "tokenizer.ggml.pre 'tekken' is not supported; supported: default"),
        ({"pre": None}, "tokenizer.ggml.pre None is not supported"),
        ({"tokens": None}, "tokenizer.ggml.tokens must be a list of texts, and is absent"),
        ({"tokens": [1, 2]}, "tokenizer.ggml.tokens must be a list of texts, and is a list"),
        ({"tokens": [*TOKENS[:-1], "low"]}, "tokenizer.ggml.tokens holds 'low' twice"),
        ({"merges": ["1 2", "low"]}, "tokenizer.ggml.merges holds 'low', not two tokens"),
        ({"merges": ["lo st"]}, "tokenizer.ggml.merges: .*`st` out of vocabulary"),
        ({"token_type": [1, 2]}, f"token_type must be a list of {len(TOKENS)} numbers"),
        ({"bos_token_id": 10**6}, f"bos_token_id must be an id below {len(TOKENS)}, got 1000000"),
        ({"add_bos_token": 1}, "add_bos_token must be true or false, got 1"),
        ({"add_bos_token": True, "bos_token_id": None}, "add_bos_token asks for a token that"),
    ],
)
def test_what_is_wrong_is_named(changes, message, tmp_path):
    file = make(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(file)
    assert str(error.value).startswith(f"{file}: ")
    assert str(error.value).endswith("; give the directory of its original tokenizer.json")
    assert "\n" not in str(error.value)


PIECES = {  # scores in the order in which they were learnt, as SentencePiece's BPE has them
    "▁a": -1.0, "▁t": -2.0, "lo": -3.0, "ow": -4.0, "▁lo": -5.0, "▁low": -6.0, "aa": -7.0,
    **{piece: -8.0 - i for i, piece in enumerate("▁alowt")},
}  # fmt: skip


def sentence_pieces(path, **changes):
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    values = {
        "model": "llama",
        "tokens": [*SPECIAL, *byte_tokens, *PIECES, "  "],
        "merges": None,
        "scores": [0.0] * 3 + [0.0] * 256 + [*PIECES.values(), -1000.0],
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(PIECES) + [4],
    }
    return make(path, **(values | changes))


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("low", "<s> ▁low"),
        ("a low", "<s> ▁a ▁low"),
        ("ow tow", "<s> ▁ ow ▁t ow"),
        ("aaa", "<s> ▁a aa"),
        ("é", "<s> ▁ <0xC3> <0xA9>"),
        ("a</s>low", "<s> ▁a </s> ▁low"),
    ],
)
def test_sentence_pieces(text, pieces, tmp_path):
    tokenizer = load_tokenizer(sentence_pieces(tmp_path))
    encoding = tokenizer.encode(text)
    assert encoding.tokens == pieces.split()
    if "</s>" not in text:
        assert tokenizer.decode(encoding.ids) == text


def test_sentence_pieces_without_a_first_space(tmp_path):
    """As Gemma has them: runs of spaces are tokens of their own."""
    tokenizer = load_tokenizer(
        sentence_pieces(tmp_path, add_space_prefix=False, add_bos_token=False)
    )
    encoding = tokenizer.encode("low low  aa")
    assert encoding.tokens == ["lo", "w", "▁low", "  ", "aa"]
    assert tokenizer.decode(encoding.ids) == "low low  aa"


def test_a_base_model_has_no_template(tmp_path):
    with pytest.raises(ValueError, match=r"GGUF file's metadata\): it holds a base model"):
        ChatTemplate.load(make(tmp_path))
