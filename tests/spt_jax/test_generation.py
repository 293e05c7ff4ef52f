"""Generation: transformers' tokens, caches against whole sequences, sampling, ends and stops."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import spt_jax
from spt_jax import generation
from spt_jax.generation import Sampler, generate
from spt_jax.layers import Attention, Embedding, Linear, LoRA, RoutedFFN, SparseAttention
from spt_jax.layers.lora import cheaper_form
from spt_jax.models.config import parse_config
from spt_jax.models.decoder import Decoder

GOLDEN = Path(__file__).parents[1] / "golden"
VOCABULARY = 97
SAMPLED = {"temperature": 0.7, "top_k": 20, "top_p": 0.9}


@functools.cache
def golden_model(name):
    return spt_jax.load_pretrained(GOLDEN / name, task="causal-lm")


@functools.cache
def golden(name, file="generate.npz"):
    with np.load(GOLDEN / name / file) as arrays:
        return dict(arrays)


def prompts_of(arrays):
    pairs = zip(arrays["input_ids"], arrays["attention_mask"], strict=True)
    return [ids[mask == 1].tolist() for ids, mask in pairs]


def until(rows, end):
    """Rows up to and without a token."""
    return [row[: row.index(end)] if end in row else row for row in rows.tolist()]


@pytest.mark.versions
@pytest.mark.parametrize("name", ["opt", "llama", "mistral", "qwen3"])
def test_greedy_tokens_are_those_of_transformers(name):
    model, arrays = golden_model(name), golden(name)
    padded = {"attention_mask": arrays["attention_mask"], "max_new_tokens": 12}
    new = generate(model, arrays["input_ids"], eos_token_ids=(), **padded)
    assert new == arrays["generated"].tolist()
    end = int(arrays["eos_token_id"])
    ended = generate(model, arrays["input_ids"], eos_token_ids=[end], **padded)
    assert ended == until(arrays["generated"], end) == until(arrays["generated_eos"], end)


def test_keys_of_dynamic_rope_stay_rotated_as_they_were():
    arrays = golden("llama", "generate_dynamic.npz")
    variants = json.loads((GOLDEN / "llama" / "variants.json").read_text())["variants"]
    raw = json.loads((GOLDEN / "llama" / "config.json").read_text()) | variants["dynamic"][0]
    model = nnx.clone(golden_model("llama"))
    model.config = parse_config({k: v for k, v in raw.items() if v is not None})
    new = generate(model, prompts_of(arrays), max_new_tokens=12, eos_token_ids=())
    assert new == arrays["generated"].tolist()


def test_padding_is_left_right_or_none():
    model, arrays = golden_model("llama"), golden("llama")
    prompts = prompts_of(arrays)
    right = np.zeros_like(arrays["input_ids"])
    for row, prompt in zip(right, prompts, strict=True):
        row[: len(prompt)] = prompt
    options = {"max_new_tokens": 12, "eos_token_ids": ()}
    mask = jnp.asarray(arrays["attention_mask"][:, ::-1])
    expected = arrays["generated"].tolist()
    assert generate(model, jnp.asarray(right), attention_mask=mask, **options) == expected
    assert generate(model, prompts, **options) == expected


def test_equal_shapes_compile_once():
    model, arrays = golden_model("llama"), golden("llama")
    runs = [
        (prompts_of(arrays), {"max_new_tokens": 12}),
        ([[5, 6], [7], [8, 9, 10]], {"max_new_tokens": 20, "eos_token_ids": [3, 4]}),
        ([[5, 6], [7], [8, 9, 10]], {"max_new_tokens": 9, **SAMPLED}),
        (prompts_of(arrays), {"max_new_tokens": 7, "temperature": 2.0, "top_k": 20, "top_p": 0.1}),
    ]
    counts = []
    for prompts, options in runs:
        generate(model, prompts, **options)
        counts.append((generation._prefill._cache_size(), generation._decode._cache_size()))
    assert counts[0] == counts[1]
    assert counts[2] == counts[3]


@functools.cache
def spt_model(dtype=jnp.float32):
    """Gated, grouped heads, 16 of 64 keys, 2 of 4 blocks, LoRA with both factors at work."""
    raw = json.loads((GOLDEN / "llama" / "config.json").read_text())
    config = parse_config(raw | {"max_position_embeddings": 64, "num_hidden_layers": 1})
    model = Decoder(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    (layer,) = model.layers
    for _, linear in nnx.iter_modules(model):
        if isinstance(linear, Linear | Embedding):
            weight = linear.kernel if isinstance(linear, Linear) else linear.embedding
            weight[...] = weight[...] * 8
            lora = spt_jax.LoRAConfig(rank=2)
            linear.lora = LoRA(*weight.shape, config=lora, rngs=nnx.Rngs(0))
            linear.lora.b[...] = 0.02 * normal(*linear.lora.b.shape)
    layer.attention.sparse = SparseAttention(
        normal(2, 2, 8, 4),
        normal(2, 2, 8, 4),
        normal(2, 8) / 4,
        config=spt_jax.SparseAttentionConfig(
            min_keys=16, granularity="token", num_codewords=8, codeword_width=4
        ),
        causal=True,
    )
    layer.ffn = RoutedFFN(
        layer.ffn,
        permutation=jnp.arange(config.hidden),
        router_kernel=normal(config.width, 4),
        router_bias=normal(4),
        absent_output=normal(4, config.width) / 4,
        absent_a=normal(config.width, 4, 2) / 4,
        absent_b=normal(4, 2, config.width) / 4,
        config=spt_jax.RoutedFFNConfig(num_blocks=4, active_blocks=2, absent_rank=2),
    )
    return model


PROMPTS = [list(range(10, 30)), [40, 41, 42]]


def test_decoding_equals_a_whole_sequence_as_long_as_the_cache():
    model, new = spt_model(), 24
    tokens = generate(model, PROMPTS, max_new_tokens=new, eos_token_ids=())
    assert [len(row) for row in tokens] == [new, new]
    width, capacity = 32, 64  # the rounded ones
    ids, mask = np.zeros((2, 2, capacity), np.int32)
    for row in range(2):
        first, last = width - len(PROMPTS[row]), width + new
        ids[row, first:last] = PROMPTS[row] + tokens[row]
        mask[row, first:last] = 1
    graphdef, state = nnx.split(model)
    logits = jax.jit(lambda state, *a: nnx.merge(graphdef, state)(*a))(state, ids, mask)
    best = np.asarray(logits).argmax(-1)[:, width - 1 : width - 1 + new]
    assert best.tolist() == tokens


def test_the_cache_is_updated_in_place(monkeypatch):
    given = []
    decode = generation._decode

    def spied(**arguments):
        given.append(arguments["progress"].cache[0])
        return decode(**arguments)

    monkeypatch.setattr(generation, "_decode", spied)
    generate(spt_model(), PROMPTS, max_new_tokens=24, eos_token_ids=())
    assert len(given) == 2
    for cache in given:
        assert all(array.is_deleted() for array in (cache.keys, cache.values, cache.codes.codes))


def test_rows_do_not_depend_on_others():
    options = {"max_new_tokens": 24, "eos_token_ids": ()}
    both = generate(spt_model(), PROMPTS, **options)
    assert generate(spt_model(), [PROMPTS[0]] * 2, **options) == [both[0]] * 2


def test_draws_depend_on_seed_and_row():
    prompts = [[5, 6, 7], [8, 9], [8, 9]]
    options = {"max_new_tokens": 12, "eos_token_ids": (), **SAMPLED}
    first = generate(golden_model("llama"), prompts, **options)
    assert first[1] != first[2]
    assert generate(golden_model("llama"), prompts, **options) == first
    assert generate(golden_model("llama"), prompts, **options, seed=1) != first
    other = generate(golden_model("llama"), [prompts[0], [30] * 9, prompts[2]], **options)
    assert [other[0], other[2]] == [first[0], first[2]]


def test_bfloat16():
    new = generate(spt_model(jnp.bfloat16), [PROMPTS[1]], max_new_tokens=10, eos_token_ids=())
    assert len(new[0]) == 10
    assert all(0 <= token < VOCABULARY for token in new[0])


_draw = jax.jit(generation._draw, static_argnums=2)


def frequencies(logits, number=4000, **options):
    """How often each token is drawn."""
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (number, len(logits)))
    keys = jax.random.split(jax.random.key(0), number)
    top_k = options.pop("top_k", None)
    options = {name: jnp.float32(value) for name, value in options.items()}
    sampler = Sampler(options.get("temperature", jnp.float32(1)), options.get("top_p"), keys)
    tokens = _draw(rows, sampler, top_k, jnp.int32(5))
    return np.bincount(tokens, minlength=len(logits)) / number


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.3, 0.05, 0.5, 0.15]),
        ({"temperature": 0.5}, [0.09, 0.0025, 0.25, 0.0225]),
        ({"top_k": 3}, [0.3, 0, 0.5, 0.15]),
        ({"top_p": 0.6}, [0.3, 0, 0.5, 0]),  # 0.5 alone is below
        ({"top_p": 0.45}, [0, 0, 1, 0]),
        ({"top_p": 1e-6}, [0, 0, 1, 0]),
        ({"top_k": 3, "top_p": 0.84}, [0.3, 0, 0.5, 0]),  # of what top_k leaves: 0.53, 0.32, 0.16
        ({"temperature": 0.5, "top_p": 0.7}, [0.09, 0, 0.25, 0]),  # 0.68, 0.25, ...
    ],
)
def test_tokens_are_drawn_by_their_probability(options, expected):
    expected = np.array(expected) / np.sum(expected)
    found = frequencies(np.log([0.3, 0.05, 0.5, 0.15]), **options)
    np.testing.assert_allclose(found, expected, atol=0.03)
    assert (found[expected == 0] == 0).all()


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {"[UNK]": 0} | {f"w{i}": i for i in range(1, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("w", " w"), decoders.Fuse()])
    return tokenizer


def test_texts_give_texts(tokenizer):
    model, arrays = golden_model("llama"), golden("llama")
    prompts = [" ".join(f"w{i}" for i in ids) for ids in prompts_of(arrays)]
    end = int(arrays["eos_token_id"])
    options = {"tokenizer": tokenizer, "max_new_tokens": 12, "eos_token_ids": [end]}
    texts = generate(model, prompts, **options)
    expected = until(arrays["generated"], end)
    assert texts == ["".join(f" w{i}" for i in ids) for ids in expected]


def test_stops_cut_their_rows(tokenizer):
    model, arrays = golden_model("llama"), golden("llama")
    full = arrays["generated"].tolist()
    options = {"max_new_tokens": 12, "eos_token_ids": (), "tokenizer": tokenizer}
    prompts = prompts_of(arrays)
    ids = generate(model, prompts, stop=[full[0][4:6], full[0][5:6], full[1][2:5]], **options)
    assert ids == [full[0][:4], full[1][:2], full[2]]
    text = f"{full[0][3]} w{full[0][4]}"  # from within a word
    ids = generate(model, prompts, stop=[text, full[1][7:8]], **options)
    assert ids == [full[0][:3], full[1][: full[1].index(full[1][7])], full[2]]
    words = [" ".join(f"w{i}" for i in ids) for ids in prompts]
    texts = generate(model, words, stop=[text], **options)
    assert texts[0] == "".join(f" w{i}" for i in full[0][:3]) + " w"
    assert texts[2] == "".join(f" w{i}" for i in full[2])


def special(tokenizer, *, end, start):
    """The tokenizer with two of its words as special tokens, the second at every start."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.add_special_tokens([f"w{end}", f"w{start}"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"w{start} $A", special_tokens=[(f"w{start}", start)]
    )
    return tokenizer


def test_a_special_token_is_a_stop(tokenizer):
    model, arrays = golden_model("llama"), golden("llama")
    prompts, full = prompts_of(arrays), arrays["generated"].tolist()
    at = next(n for n in range(2, 12) if full[0][n] not in full[0][:n])
    skipped = next(t for t in full[0][:at] if t != full[0][at])
    tokenizer = special(tokenizer, end=full[0][at], start=skipped)
    options = {"max_new_tokens": 12, "eos_token_ids": (), "stop": [f"w{full[0][at]}"]}
    ids = generate(model, prompts[:1], tokenizer=tokenizer, **options)
    assert ids == [full[0][:at]]
    words = [" ".join(f"w{i}" for i in prompts[0][1:])]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"w{prompts[0][0]} $A", special_tokens=[(f"w{prompts[0][0]}", prompts[0][0])]
    )
    (text,) = generate(model, words, tokenizer=tokenizer, **options)
    assert text == "".join(f" w{i}" for i in full[0][:at] if i != skipped)


def test_a_start_that_a_prompt_has_is_not_added_again(tokenizer):
    tokenizer = special(tokenizer, end=50, start=3)
    tokenizer.enable_padding(direction="left", length=8)
    found = [generation._ids_of_prompt(0, text, tokenizer) for text in ("w5 w6", "w3 w5 w6", "w3")]
    assert found == [[3, 5, 6], [3, 5, 6], [3]]
    assert generation._ids_of_prompt(0, "w3 w3 w5", tokenizer) == [3, 3, 5]


def test_64_bit_types_switched_on_change_no_token():
    options = {"max_new_tokens": 8, "eos_token_ids": ()}
    expected = [generate(spt_model(), PROMPTS, **options, **sampled) for sampled in ({}, SAMPLED)]
    with jax.enable_x64(True):
        wide = [generate(spt_model(), PROMPTS, **options, **sampled) for sampled in ({}, SAMPLED)]
    assert wide == expected


def test_one_new_token():
    arrays = golden("llama")
    new = generate(golden_model("llama"), prompts_of(arrays), max_new_tokens=1, eos_token_ids=())
    assert new == arrays["generated"][:, :1].tolist()


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"temperature": float("nan")}, "temperature must be at least 0"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, "top_p must lie in"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"prompts": []}, "there are no prompts"),
        ({"prompts": [[3], []]}, "prompt 1 has no tokens"),
        ({"prompts": [[3], [4, 97]]}, "prompt 1 has token ids from 4 to 97"),
        ({"prompts": [[-1]]}, "prompt 0 has token ids from -1"),
        ({"prompts": "text"}, "prompts is one text"),
        ({"prompts": ["text"]}, "give the model's tokenizer"),
        ({"prompts": [[3]], "attention_mask": [[1]]}, "attention_mask goes with an array"),
        ({"prompts": np.ones(3, np.int32)}, r"prompts must be \[batch, sequence\]"),
        ({"prompts": np.ones((1, 3))}, "prompts must be token ids, got float64"),
        ({"prompts": [[3] * 30]}, "the longest prompt has 30 tokens, with max_new_tokens=4 34"),
        ({"prompts": [[3], None]}, "prompt 1 is None; give a text or a list of token ids"),
        ({"prompts": [3, 4]}, "prompt 0 is 3; give"),
        ({"prompts": [[1.5]]}, r"prompt 0 is \[1.5\]; give"),
        ({"prompts": [[{"role": "user", "content": "a"}]]}, r"ChatTemplate\.render makes a text"),
        ({"eos_token_ids": 2}, "eos_token_ids is 2; give a list"),
        ({"stop": "abc"}, "stop must be a list"),
        ({"stop": [5]}, "stop must be a list"),
        ({"stop": [[]]}, "a stop is empty"),
        ({"stop": ["end"]}, "stop holds texts: give the model's tokenizer"),
    ],
)
def test_what_is_wrong_is_named(changes, message):
    arguments = {"prompts": [[3, 4]], "max_new_tokens": 4} | changes
    with pytest.raises(ValueError, match=message):
        generate(golden_model("llama"), **arguments)


def test_only_causal_language_models_generate():
    backbone = spt_jax.load_pretrained(GOLDEN / "llama", task="backbone")
    for model in (backbone, nnx.Linear(2, 2, rngs=nnx.Rngs(0))):
        with pytest.raises(ValueError, match="generation needs a causal language model"):
            generate(model, [[3]], max_new_tokens=1)


def test_a_window_shorter_than_the_cache_refuses_sparse_attention():
    model = nnx.clone(spt_model())
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Attention):
            module.window = 40
    with pytest.raises(NotImplementedError, match="window of 40 keys"):
        generate(model, [[3]], max_new_tokens=4)


def test_lora_stays_factored_for_one_token():
    assert cheaper_form(1, 1024, 4096) == "factored"
