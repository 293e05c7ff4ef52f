import dataclasses
import json

import pytest

from spt_jax.layers.rotary import RotaryConfig
from spt_jax.models.config import parse_config, read_config
from spt_jax.models.decoder_config import DECODER_TYPES, DecoderConfig
from tests.spt_jax.models.builders import FAMILIES, GOLDEN, raw_config

OPT = {
    "model_type": "opt",
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 48,
    "max_position_embeddings": 40,
}
LLAMA = {name: value for name, value in OPT.items() if name != "ffn_dim"} | {
    "model_type": "llama",
    "intermediate_size": 48,
}
DECODERS = ("opt", "opt_350m", "llama", "llama_biased", "mistral", "qwen2", "qwen3")
LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}


def raw(family, **changes):
    """A config.json with nothing but what is required, and `changes`."""
    needed = {} if family == "opt" else {"num_key_value_heads": 2}
    return (OPT if family == "opt" else LLAMA) | needed | {"model_type": family} | changes


def golden_config(name):
    return json.loads((GOLDEN / name / "config.json").read_text())


def changed(config, fields):
    return {name: value for name, value in (config | fields).items() if value is not None}


VARIANTS = [
    pytest.param(golden_config(path.parent.name), spellings, id=f"{path.parent.name}-{name}")
    for path in sorted(GOLDEN.glob("*/variants.json"))
    for name, spellings in json.loads(path.read_text())["variants"].items()
]


def test_defaults_of_opt_are_those_of_transformers():
    assert parse_config(OPT) == DecoderConfig(
        model_type="opt",
        vocab_size=97,
        width=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_width=8,
        hidden=48,
        num_positions=40,
        embedding_width=32,
        activation="relu",
        norm_epsilon=1e-5,
        pre_norm=True,
        final_norm=True,
        qkv_bias=True,
        output_bias=True,
        ffn_bias=True,
        tie_embeddings=True,
        rotary=None,
        windows=(None, None),
        hidden_dropout=0.1,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_ids=(2,),
    )


def test_defaults_of_llama_are_those_of_transformers():
    llama = parse_config(LLAMA)
    assert llama == DecoderConfig(
        model_type="llama",
        vocab_size=97,
        width=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_width=8,
        hidden=48,
        num_positions=40,
        embedding_width=32,
        activation="silu",
        norm_epsilon=1e-6,
        pre_norm=True,
        final_norm=True,
        qkv_bias=False,
        output_bias=False,
        ffn_bias=False,
        tie_embeddings=False,
        rotary=RotaryConfig(theta=10000.0, original_length=40),
        windows=(None, None),
        hidden_dropout=0.0,
        pad_token_id=None,
        bos_token_id=1,
        eos_token_ids=(2,),
    )
    assert (llama.gated, llama.qk_norm, llama.position_offset, llama.max_length) == (
        *(True, False),
        *(0, 40),
    )


@pytest.mark.parametrize(
    ("family", "differences"),
    [
        ("mistral", {"num_kv_heads": 8, "head_width": 2, "windows": (4096, 4096)}),
        (
            "qwen2",
            {"num_kv_heads": 32, "head_width": 2, "qkv_bias": True}
            | {"bos_token_id": None, "eos_token_ids": ()},
        ),
        (
            "qwen3",
            {"num_kv_heads": 32, "head_width": 128, "bos_token_id": None, "eos_token_ids": ()},
        ),
    ],
)
def test_other_defaults_are_those_of_transformers(family, differences):
    sizes = {"hidden_size": 64, "num_attention_heads": 32}
    config = parse_config(LLAMA | sizes | {"model_type": family})
    expected = dataclasses.asdict(parse_config(LLAMA | sizes)) | {"model_type": family}
    assert dataclasses.asdict(config) == expected | differences
    assert config.qk_norm == (family == "qwen3")


def test_fields_of_the_golden_models():
    configs = {name: read_config(GOLDEN / name) for name in DECODERS}
    for config in configs.values():
        assert (config.vocab_size, config.width, config.hidden) == (97, 32, 48)
        assert (config.num_layers, config.num_heads, config.num_positions) == (2, 4, 32)
    heads = [(c.num_kv_heads, c.head_width) for c in configs.values()]
    assert heads == [(4, 8), (4, 8), (2, 8), (4, 12), (2, 8), (2, 8), (2, 16)]
    assert [c.tie_embeddings for c in configs.values()] == [1, 1, 0, 1, 0, 1, 1]
    assert [c.windows[1] for c in configs.values()] == [None] * 4 + [4, None, None]
    opt, small = configs["opt"], configs["opt_350m"]
    assert (opt.pre_norm, opt.final_norm, opt.embedding_width) == (True, True, 32)
    assert (small.pre_norm, small.final_norm, small.embedding_width) == (False, False, 16)
    biased, qwen2 = configs["llama_biased"], configs["qwen2"]
    assert (biased.qkv_bias, biased.output_bias, biased.ffn_bias) == (True, True, True)
    assert (qwen2.qkv_bias, qwen2.output_bias, qwen2.ffn_bias) == (True, False, False)
    assert (biased.norm_epsilon, biased.activation) == (0.01, "gelu_tanh")


@pytest.mark.parametrize("family", DECODER_TYPES)
def test_null_is_no_token(family):
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    config = parse_config(raw(family, **tokens))
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_ids) == (None, None, ())


def test_tokens():
    assert parse_config(raw("llama", eos_token_id=[5, 7])).eos_token_ids == (5, 7)
    assert parse_config(raw("llama", pad_token_id=-1)).pad_token_id is None
    assert parse_config(raw("llama", pad_token_id=0)).pad_token_id == 0


def test_null_key_value_heads_are_the_query_heads():
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        assert parse_config(raw(family, num_key_value_heads=None)).num_kv_heads == 4


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"use_sliding_window": True}, (None, None)),  # above 28 layers
        ({"use_sliding_window": True, "max_window_layers": 1}, (None, 4096)),
        ({"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 3}, (3, 3)),
        (
            {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": None},
            (None, None),
        ),
        ({"use_sliding_window": None, "max_window_layers": 0, "sliding_window": 3}, (None, None)),
        (
            {"use_sliding_window": True, "sliding_window": 3}
            | {"layer_types": ["sliding_attention", "full_attention"]},
            (3, None),
        ),
    ],
)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_windows_of_qwen(family, changes, windows):
    assert parse_config(raw(family, **changes)).windows == windows


@pytest.mark.parametrize(("config", "spellings"), VARIANTS)
def test_spellings_mean_the_same(config, spellings):
    first, *others = (parse_config(changed(config, fields)) for fields in spellings)
    assert all(first == other for other in others)


@pytest.mark.parametrize(("config", "spellings"), VARIANTS)
def test_variants_survive_being_written(config, spellings):
    parsed = parse_config(changed(config, spellings[0]))
    assert parse_config(json.loads(json.dumps(parsed.to_hugging_face()))) == parsed


@pytest.mark.parametrize(
    "config",
    [
        *map(golden_config, DECODERS),
        *(raw_config(family, hidden_dropout=0.3, activation="relu") for family in FAMILIES),
        *(raw(family) for family in DECODER_TYPES),
        *(raw(family, eos_token_id=[], bos_token_id=None) for family in DECODER_TYPES),
        raw("opt", enable_bias=False, _remove_final_layer_norm=True, dropout=0.0),
        raw("opt", do_layer_norm_before=False, tie_word_embeddings=False, eos_token_id=[5, 7]),
        raw("llama", rope_scaling=LLAMA3, rope_theta=5e5, pad_token_id=-1),
        raw("mistral", sliding_window=None),
        raw("qwen3", attention_bias=True, head_dim=6),
    ],
    ids=lambda config: config["model_type"],
)
def test_configs_survive_being_written(config):
    parsed = parse_config(config)
    written = parsed.to_hugging_face()
    assert written["model_type"] == config["model_type"]
    assert parse_config(json.loads(json.dumps(written))) == parsed


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        (None, 40),
        ({"rope_type": "default", "factor": 8.0}, 40),
        ({"rope_type": "linear", "factor": 2.5}, 100),
        ({"rope_type": "dynamic", "factor": 3.0}, 120),
        (LLAMA3 | {"original_max_position_embeddings": 10}, 80),
        (LLAMA3 | {"original_max_position_embeddings": 2}, 40),
        ({"rope_type": "yarn", "factor": 4.0}, 160),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10}, 40),
        ({"rope_type": "yarn", "original_max_position_embeddings": 10}, 40),
    ],
)
def test_longest_sequence(rope, longest):
    assert parse_config(raw("llama", rope_scaling=rope)).max_length == longest


def test_factor_of_yarn_follows_from_the_lengths():
    rope = {"rope_type": "yarn", "original_max_position_embeddings": 16}
    rotary = parse_config(raw("llama", rope_scaling=rope)).rotary
    assert (rotary.factor, rotary.original_length) == (2.5, 16)
    beside = parse_config(
        raw("llama", rope_scaling={"type": "yarn"}, original_max_position_embeddings=16)
    )
    assert beside.rotary == rotary


def test_theta_may_lie_beside_or_inside():
    inside = raw("llama", rope_parameters={"rope_type": "default", "rope_theta": 500})
    assert parse_config(inside).rotary.theta == 500.0
    assert parse_config(inside | {"rope_theta": 100}).rotary.theta == 500.0
    assert parse_config(raw("llama", rope_theta=100)).rotary.theta == 100.0


YARN = {"rope_type": "yarn", "factor": 2.0}


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "longrope"}, "rope_type must be one of default, linear, .* got 'longrope'"),
        ({"type": ["linear"]}, r"rope_type must be one of .* got \['linear'\]"),
        ("linear", "rope_scaling must be an object or null, got 'linear'"),
        ({"rope_type": "linear"}, "rope_scaling of type linear needs factor"),
        ({"rope_type": "dynamic"}, "rope_scaling of type dynamic needs factor"),
        ({"rope_type": "llama3"}, "needs factor, low_freq_factor, high_freq_factor"),
        (LLAMA3 | {"high_freq_factor": None}, "type llama3 needs high_freq_factor"),
        (LLAMA3 | {"high_freq_factor": 1}, "high_freq_factor must be above low_freq_factor=1.0"),
        ({"rope_type": "linear", "factor": 0.5}, "factor must be at least 1, got 0.5"),
        ({"rope_type": "linear", "factor": "2"}, "factor must be a positive number, got '2'"),
        ({"rope_type": "linear", "factor": float("nan")}, "factor must be a positive number"),
        ({"rope_theta": 0}, "rope_theta must be a positive number, got 0"),
        ({"rope_theta": "1e6"}, "rope_theta must be a positive number, got '1e6'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported"),
        (YARN | {"beta_fast": 0}, "beta_fast must be a positive number, got 0"),
        (YARN | {"truncate": "no"}, "truncate must be true or false, got 'no'"),
        (YARN | {"mscale": "1"}, "mscale must be a positive number, got '1'"),
        (YARN | {"attention_factor": -1}, "attention_factor must be a positive number, got -1"),
        (
            YARN | {"original_max_position_embeddings": "16"},
            "original_max_position_embeddings must be a positive integer, got '16'",
        ),
        (YARN | {"factor": None}, "rope_scaling of type yarn needs factor"),
    ],
)
def test_wrong_rotary_embedding_is_named(rope, message):
    with pytest.raises(ValueError, match=message):
        parse_config(raw("llama", rope_scaling=rope))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        *(
            (family, {name: value}, f"{name} must be a positive integer, got {value}")
            for family in DECODER_TYPES
            for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
            for value in (0, True)
        ),
        ("opt", {"max_position_embeddings": -1}, "max_position_embeddings must be a positive"),
        ("opt", {"ffn_dim": "48"}, "ffn_dim must be a positive integer, got '48'"),
        ("opt", {"ffn_dim": None}, "a config of the opt family needs ffn_dim"),
        ("opt", {"word_embed_proj_dim": 0}, "word_embed_proj_dim must be a positive integer"),
        ("opt", {"dropout": 1}, r"dropout must be a number in \[0, 1\), got 1"),
        ("opt", {"do_layer_norm_before": 1}, "do_layer_norm_before must be true or false, got 1"),
        ("opt", {"enable_bias": "yes"}, "enable_bias must be true or false, got 'yes'"),
        ("opt", {"_remove_final_layer_norm": 0}, "_remove_final_layer_norm must be true or false"),
        ("opt", {"layer_norm_elementwise_affine": False}, "affine=false is not supported"),
        (
            "opt",
            {"activation_function": "tanh"},
            "activation_function must be one of gelu, .*'tanh'",
        ),
        (
            "opt",
            {"num_attention_heads": 5},
            "hidden_size must be a multiple of num_attention_heads=5",
        ),
        ("llama", {"intermediate_size": 1.5}, "intermediate_size must be a positive integer"),
        (
            "llama",
            {"hidden_act": None, "rms_norm_eps": 0},
            "rms_norm_eps must be a positive number",
        ),
        ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
        ("llama", {"attention_bias": 1}, "attention_bias must be true or false, got 1"),
        ("llama", {"mlp_bias": 1}, "mlp_bias must be true or false, got 1"),
        ("llama", {"num_key_value_heads": 3}, "num_attention_heads=4 .* num_key_value_heads=3"),
        ("llama", {"num_key_value_heads": 0}, "num_key_value_heads must be a positive integer"),
        ("llama", {"head_dim": 7}, "head_dim must be even, for rotary embeddings, got 7"),
        ("llama", {"head_dim": "8"}, "head_dim must be a positive integer, got '8'"),
        ("llama", {"eos_token_id": "</s>"}, "eos_token_id must be an id, a list .* got '</s>'"),
        ("llama", {"bos_token_id": [1]}, r"bos_token_id must be an id or null, got \[1\]"),
        ("llama", {"pad_token_id": True}, "pad_token_id must be an id or null, got True"),
        ("mistral", {"sliding_window": 0}, "sliding_window must be a positive integer or null"),
        ("qwen2", {"use_sliding_window": "yes"}, "use_sliding_window must be true or false"),
        (
            "qwen2",
            {"use_sliding_window": True, "max_window_layers": "1"},
            "max_window_layers must be an integer, got '1'",
        ),
        *(
            (
                "qwen3",
                {"use_sliding_window": True, "layer_types": types},
                "layer_types must be a list of 2, each one of full_attention, sliding_attention",
            )
            for types in (["full_attention"], ["full_attention", "chunked"], [[], []], "full")
        ),
    ],
)
def test_wrong_field_is_named(family, changes, message):
    with pytest.raises(ValueError, match=message):
        parse_config(raw(family, **changes))


@pytest.mark.parametrize("family", DECODER_TYPES)
def test_missing_fields_are_named(family):
    config = raw(family)
    del config["hidden_size"], config["num_hidden_layers"]
    with pytest.raises(
        ValueError, match=f"a config of the {family} family needs hidden_size, num_hidden_layers"
    ):
        parse_config(config)
