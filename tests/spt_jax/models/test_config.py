import dataclasses
import json

import pytest

from spt_jax.models.config import parse_config, read_config
from spt_jax.models.encoder_config import EncoderConfig
from tests.spt_jax.models.builders import FAMILIES, GOLDEN, raw_config


def test_fields_of_each_family():
    bert, roberta, distilbert = (read_config(GOLDEN / family) for family in FAMILIES)
    sizes = {"vocab_size": 97, "width": 32, "num_layers": 2, "num_heads": 4, "hidden": 48}
    for config in (bert, roberta, distilbert):
        assert sizes.items() <= dataclasses.asdict(config).items()
        assert config.num_positions == 20
    assert (bert.num_token_types, roberta.num_token_types, distilbert.num_token_types) == (2, 1, 0)
    assert (bert.activation, roberta.activation) == ("gelu", "gelu_tanh")
    assert (bert.layer_norm_epsilon, roberta.layer_norm_epsilon) == (1e-12, 1e-5)
    assert (bert.max_length, roberta.max_length, distilbert.max_length) == (20, 18, 20)
    assert (bert.classifier_dropout, distilbert.classifier_dropout) == (0.1, 0.2)
    assert (bert.attention_output_dropout, distilbert.attention_output_dropout) == (0.1, 0.0)


def test_defaults_are_those_of_transformers():
    assert parse_config(raw_config("bert")) == EncoderConfig(
        model_type="bert",
        vocab_size=97,
        width=32,
        num_layers=2,
        num_heads=4,
        hidden=48,
        num_positions=40,
        num_token_types=2,
    )
    assert parse_config(raw_config("roberta")).pad_token_id == 1
    assert parse_config(raw_config("bert") | {"pad_token_id": None}).pad_token_id == 0


def test_classifier_dropout_follows_hidden_dropout_unless_given():
    raw = raw_config("bert", hidden_dropout=0.3)
    assert parse_config(raw).classifier_dropout == 0.3
    assert parse_config(raw | {"classifier_dropout": 0.0}).classifier_dropout == 0.0


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("gelu", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("relu", "relu"),
        ("silu", "silu"),
        ("swish", "silu"),
    ],
)
def test_activation_names(name, ours):
    assert parse_config(raw_config("bert", activation=name)).activation == ours


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not supported; supported: bert, roberta, distilbert"),
        ({"model_type": None}, "None is not supported"),
        ({"model_type": ["bert"]}, "is not supported"),
        ({"hidden_size": 0}, "hidden_size must be a positive integer, got 0"),
        ({"hidden_size": None}, "a config of the bert family needs hidden_size"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers must be a positive integer, got '2'"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a positive integer, got True"),
        ({"num_attention_heads": 5}, "hidden_size must be a multiple of num_attention_heads=5"),
        ({"type_vocab_size": -1}, "type_vocab_size must be a positive integer, got -1"),
        ({"hidden_act": "gelu_slow"}, "hidden_act must be one of gelu, .* got 'gelu_slow'"),
        ({"hidden_act": {}}, "hidden_act must be one of"),
        ({"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob must be a number in \[0, 1\)"),
        ({"classifier_dropout": "0"}, r"classifier_dropout must be a number in \[0, 1\)"),
        ({"layer_norm_eps": 0}, "layer_norm_eps must be a positive number, got 0"),
        ({"pad_token_id": 97}, "pad_token_id must be an id below vocab_size=97, got 97"),
        ({"position_embedding_type": "relative_key"}, "must be 'absolute', got 'relative_key'"),
        ({"is_decoder": True}, "is_decoder is set"),
        ({"add_cross_attention": True}, "add_cross_attention is set"),
    ],
)
def test_wrong_field_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        parse_config(raw_config("bert") | changes)


@pytest.mark.parametrize(("family", "name"), [("bert", "hidden_size"), ("distilbert", "dim")])
def test_missing_fields_are_named(family, name):
    raw = raw_config(family)
    del raw[name], raw["vocab_size"]
    with pytest.raises(
        ValueError, match=f"a config of the {family} family needs vocab_size, {name}"
    ):
        parse_config(raw)


def test_roberta_without_room_for_a_position():
    with pytest.raises(ValueError, match="max_position_embeddings=2 leaves no position"):
        parse_config(raw_config("roberta", num_positions=2))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[]", "holds a JSON list"),
        (b"{}", "config.json: model_type None"),
    ],
)
def test_bad_file_is_named(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


def test_no_config(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} has no config.json"):
        read_config(tmp_path)


def test_unknown_fields_are_ignored(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(raw_config("bert") | {"new_field": 1}))
    assert read_config(tmp_path).width == 32
