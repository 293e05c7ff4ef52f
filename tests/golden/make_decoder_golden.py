"""Writes the golden files of decoders beside it, from transformers and peft, and checks exports.

They hold what transformers and peft compute here with tiny random models (float32; the models
themselves are committed as safetensors too):

    opt, opt_350m, llama, llama_biased, mistral (sharded), qwen2, qwen3
        golden.npz      input_ids, attention_mask (padded at the right), logits, hidden_states
                        (the base model's last hidden states)
        variants.json   other config.json fields for the same weights: null removes a field; the
                        spellings of a variant mean the same
        variants.npz    <batch>.input_ids, <batch>.attention_mask and <variant>.<batch>, every
                        logits_stride-th logit
        generate.npz    greedy generation: input_ids, attention_mask (padded at the left),
                        generated (without an eos), generated_eos (with eos_token_id, and then
                        pad_token_id)
        generate_dynamic.npz    the same with the variant dynamic, across its trained length, with
                        a cache and without one (generated_uncached)
    llama_backbone      the backbone of llama, saved alone
    opt_classify, llama_classify
        golden.npz      as above; logits [B, labels] of a sequence classifier
    adapters/*          PEFT adapters of llama, and of bert (classifier): golden.npz as above

Run by hand in an environment with torch, transformers and peft:

    python tests/golden/make_decoder_golden.py

The same script checks what spt_jax exported:

    python tests/golden/make_decoder_golden.py --check ORIGINAL OUT

ORIGINAL is the Hugging Face directory the model came from. OUT holds merged/ (save_pretrained),
adapter/ (save_adapter), or both, and expected.npz: input_ids, attention_mask, optionally
token_type_ids, and logits, [B, S, V] of a causal LM or [B, labels] of a sequence classifier.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.utils import logging

HERE = Path(__file__).parent

Config = dict[str, Any]
Arrays = dict[str, np.ndarray]

#: Awkward on purpose: odd length, padding of several lengths, a row without padding.
LENGTHS = (13, 5, 9)
#: Beyond max_position_embeddings of llama.
LONG_LENGTHS = (45, 37)
NUM_LABELS = 3
TOLERANCE = 1e-4

NEW_TOKENS = 12
PROMPT_LENGTHS = (6, 9, 3)
#: With NEW_TOKENS across max_position_embeddings of llama, each row at another step.
DYNAMIC_PROMPT_LENGTHS = (29, 24, 27)
#: Along a greedy path the best logit leads the second by more.
MARGIN = 1e-2

#: Of a variant's logits every so many are kept.
LOGITS_STRIDE = 7

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
OPT = SIZES | {"ffn_dim": 48}
GATED = SIZES | {"intermediate_size": 48}
GROUPED = GATED | {"num_key_value_heads": 2}
MODELS: dict[str, tuple[str, Config]] = {
    "opt": ("opt", OPT),
    "opt_350m": ("opt", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "llama": ("llama", GROUPED),
    "llama_biased": (
        "llama",
        GATED
        | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 12}
        | {"rms_norm_eps": 1e-2, "hidden_act": "gelu_pytorch_tanh"},
    ),
    "mistral": ("mistral", GROUPED | {"sliding_window": 4}),
    "qwen2": ("qwen2", GROUPED | {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", GROUPED | {"head_dim": 16, "tie_word_embeddings": True}),
}
CLASSIFIERS: dict[str, tuple[str, Config]] = {
    "opt_classify": ("opt", OPT | {"num_hidden_layers": 1, "word_embed_proj_dim": 16}),
    "llama_classify": ("llama", GROUPED | {"num_hidden_layers": 1, "pad_token_id": 0}),
}
GENERATORS = ("opt", "llama", "mistral", "qwen3")

ROPE_THETA = 100.0
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 24,
}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}
ROPES: dict[str, Config] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn_of_all_positions": {"rope_type": "yarn", "factor": 4.0},
    "yarn_given": YARN
    | {"attention_factor": 1.3, "beta_fast": 2.0, "beta_slow": 0.25, "truncate": False},
    "yarn_mscale": YARN | {"mscale": 0.8, "mscale_all_dim": 0.4},
}


def rope_spellings(rope: Config) -> list[Config]:
    """The fields of a config.json that ask for `rope`, today's first."""
    new = {"rope_parameters": rope | {"rope_theta": ROPE_THETA}}
    old = {"rope_parameters": None, "rope_theta": ROPE_THETA}
    if rope["rope_type"] == "default":
        return [new, old, old | {"rope_scaling": None}]
    older = {"type": rope["rope_type"]} | {k: v for k, v in rope.items() if k != "rope_type"}
    return [new, old | {"rope_scaling": rope}, old | {"rope_scaling": older}]


VARIANTS: dict[str, dict[str, list[Config]]] = {
    "llama": {name: rope_spellings(rope) for name, rope in ROPES.items()},
    "mistral": {"no_window": [{"sliding_window": None}]},
    "qwen2": {
        "window_of_last_layer": [
            {
                "layer_types": None,
                "use_sliding_window": True,
                "sliding_window": 4,
                "max_window_layers": 1,
            },
            {
                "layer_types": ["full_attention", "sliding_attention"],
                "use_sliding_window": True,
                "sliding_window": 4,
            },
        ],
        "window_not_used": [
            {"layer_types": None, "use_sliding_window": False, "sliding_window": 4},
            {"layer_types": None, "use_sliding_window": None, "sliding_window": 4},
        ],
    },
}


def randomize(model: torch.nn.Module) -> None:
    """Weights and biases large enough that every one of them shows in the outputs."""
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if name.endswith("norm.weight") else 0.0, 0.2)


def batch(lengths: tuple[int, ...], *, pad: int, left: bool = False, seed: int = 0) -> Arrays:
    """Random token ids above the special ones, padded at the right or at the left."""
    columns = np.arange(max(lengths))
    valid = columns < np.array(lengths)[:, None]
    mask = (valid[:, ::-1] if left else valid).astype(np.int32)
    ids = np.random.default_rng(seed).integers(3, SIZES["vocab_size"], mask.shape)
    return {"input_ids": np.where(mask, ids, pad).astype(np.int32), "attention_mask": mask}


def tensors(arrays: Arrays) -> dict[str, torch.Tensor]:
    """What the models of transformers take."""
    return {name: torch.from_numpy(array).long() for name, array in arrays.items()}


@torch.no_grad()
def save_golden(directory: Path, model: PreTrainedModel, arrays: Arrays) -> None:
    """Save a batch with what a model with a head computes for it."""
    inputs = tensors(arrays)
    outputs = {"logits": model(**inputs).logits.numpy()}
    if not isinstance(model, peft.PeftModel):
        outputs["hidden_states"] = model.base_model(**inputs).last_hidden_state.numpy()
    np.savez_compressed(directory / "golden.npz", **arrays, **outputs)


def tiny(name: str) -> PreTrainedModel:
    """A tiny model with its head, saved whole or in shards, and what it computes."""
    family, fields = (MODELS | CLASSIFIERS)[name]
    torch.manual_seed(len(name))
    labels = {"num_labels": NUM_LABELS} if name in CLASSIFIERS else {}
    config = AutoConfig.for_model(family, **fields, **labels)
    auto = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager").eval()
    randomize(model)
    directory = HERE / name
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory, max_shard_size="40KB" if name == "mistral" else "1GB")
    save_golden(directory, model, batch(LENGTHS, pad=config.pad_token_id or 0))
    return model


def with_fields(name: str, fields: Config) -> PreTrainedModel:
    """A golden model as transformers loads it with other fields in its config.json."""
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(HERE / name, copy, dirs_exist_ok=True)
        path = Path(copy) / "config.json"
        raw = json.loads(path.read_text()) | fields
        raw = {key: value for key, value in raw.items() if value is not None}
        path.write_text(json.dumps(raw))
        model = AutoModelForCausalLM.from_pretrained(copy, attn_implementation="eager")
    return model.eval()


@torch.no_grad()
def variants(name: str) -> None:
    """What the weights of a golden model compute under other configs."""
    batches = {"short": batch(LENGTHS, pad=0), "long": batch(LONG_LENGTHS, pad=0)}
    arrays = {f"{key}.{field}": a for key, inputs in batches.items() for field, a in inputs.items()}
    for variant, spellings in VARIANTS[name].items():
        for key, inputs in batches.items():
            valid = inputs["attention_mask"] == 1
            # A fresh model for each batch: dynamic RoPE remembers what it has seen.
            first, *others = (
                with_fields(name, fields)(**tensors(inputs)).logits.numpy() for fields in spellings
            )
            for other in others:
                np.testing.assert_array_equal(first[valid], other[valid])
            arrays[f"{variant}.{key}"] = first[:, :, ::LOGITS_STRIDE]
    golden = {"logits_stride": LOGITS_STRIDE, "variants": VARIANTS[name]}
    (HERE / name / "variants.json").write_text(json.dumps(golden, indent=1) + "\n")
    np.savez_compressed(HERE / name / "variants.npz", **arrays)


@torch.no_grad()
def greedy(model: PreTrainedModel, prompts: Arrays, **options: Any) -> tuple[np.ndarray, float]:
    """The new tokens of greedy generation, and the least lead of a best logit over the second."""
    out = model.generate(
        **tensors(prompts),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    best = torch.stack(out.logits).topk(2).values
    new = out.sequences[:, prompts["input_ids"].shape[1] :]
    return new.numpy().astype(np.int32), float((best[..., 0] - best[..., 1]).min())


def late_token(generated: np.ndarray) -> int | None:
    """A token that row 0 generates first after a few others, and that another row never does."""
    first, *others = generated.tolist()
    late = (token for token in first if first.index(token) >= NEW_TOKENS // 4)
    return next((t for t in late if not all(t in row for row in others)), None)


def generate(name: str) -> None:
    """Greedy generation without an end, and with a token of row 0 as the end."""
    model = with_fields(name, {})
    model.generation_config.eos_token_id = None
    for seed in range(100):
        prompts = batch(PROMPT_LENGTHS, pad=0, left=True, seed=seed)
        generated, margin = greedy(model, prompts)
        eos = late_token(generated)
        if margin > MARGIN and eos is not None:
            break
    else:
        raise RuntimeError(f"no prompts of {name} with a margin of {MARGIN}")
    ended, _ = greedy(model, prompts, eos_token_id=eos)
    np.savez_compressed(
        HERE / name / "generate.npz",
        **prompts,
        generated=generated,
        generated_eos=ended,
        eos_token_id=np.int32(eos),
        pad_token_id=np.int32(0),
    )


def generate_dynamic() -> None:
    """Greedy generation with dynamic RoPE across the trained length."""

    def fresh() -> PreTrainedModel:
        model = with_fields("llama", VARIANTS["llama"]["dynamic"][0])
        model.generation_config.eos_token_id = None
        return model

    for seed in range(100):
        prompts = batch(DYNAMIC_PROMPT_LENGTHS, pad=0, left=True, seed=seed)
        cached, margin = greedy(fresh(), prompts)
        uncached, uncached_margin = greedy(fresh(), prompts, use_cache=False)
        if min(margin, uncached_margin) > MARGIN and (cached != uncached).any():
            break
    else:
        raise RuntimeError(f"no prompts of dynamic RoPE with a margin of {MARGIN}")
    np.savez_compressed(
        HERE / "llama" / "generate_dynamic.npz",
        **prompts,
        generated=cached,
        generated_uncached=uncached,
    )


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "lora": ("llama", peft.LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION + MLP)),
    "rslora": (
        "llama",
        peft.LoraConfig(
            r=4,
            lora_alpha=8,
            use_rslora=True,
            target_modules=r".*\.(q_proj|v_proj|down_proj)",
            rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.down_proj": 6},
            alpha_pattern={"model.layers.0.self_attn.v_proj": 3, "down_proj": 5},
        ),
    ),
    "embedding": (
        "llama",
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=["embed_tokens", "v_proj"]),
    ),
    "bert_classify": (
        "bert",
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], task_type="SEQ_CLS"),
    ),
}


def settle(directory: Path, base: str) -> None:
    """Make an adapter_config.json independent of this machine and of the order of a set."""
    path = directory / "adapter_config.json"
    raw = json.loads(path.read_text()) | {"base_model_name_or_path": base}
    if isinstance(raw["target_modules"], list):
        raw["target_modules"].sort()
    path.write_text(json.dumps(raw, indent=2))


def adapter(name: str) -> None:
    """An adapter with random weights, and what the adapted model computes."""
    base, config = ADAPTERS[name]
    torch.manual_seed(len(name))
    if base == "bert":
        auto = AutoModelForSequenceClassification
        with np.load(HERE / base / "golden.npz") as golden:
            inputs = {k: golden[k] for k in ("input_ids", "attention_mask", "token_type_ids")}
    else:
        auto = AutoModelForCausalLM
        inputs = batch(LENGTHS, pad=0)
    model = peft.get_peft_model(auto.from_pretrained(HERE / base), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    directory = HERE / "adapters" / name
    model.save_pretrained(directory)
    (directory / "README.md").unlink()
    settle(directory, base)
    save_golden(directory, model, inputs)


def dora_config() -> None:
    """The config alone of a DoRA adapter."""
    directory = HERE / "adapters" / "dora"
    peft.LoraConfig(r=4, target_modules=ATTENTION, use_dora=True).save_pretrained(directory)
    settle(directory, "llama")


@torch.no_grad()
def check_export(original: Path, out: Path) -> None:
    """Check that transformers and peft compute what spt_jax computed before it exported.

    Raises:
        AssertionError: The logits or the names of the tensors differ.
        FileNotFoundError: `out` holds neither merged/ nor adapter/.
    """
    with np.load(out / "expected.npz") as file:
        arrays = dict(file)
    expected = arrays.pop("logits")
    options: Config = {"attn_implementation": "eager", "dtype": torch.float32}
    auto = AutoModelForCausalLM
    if expected.ndim == 2:
        auto = AutoModelForSequenceClassification
        options["num_labels"] = expected.shape[1]
    rows = ... if expected.ndim == 2 else arrays["attention_mask"] == 1

    def compare(model: torch.nn.Module, directory: Path) -> None:
        logits = model.eval()(**tensors(arrays)).logits.numpy()
        np.testing.assert_allclose(logits[rows], expected[rows], atol=TOLERANCE, rtol=0)
        error = np.abs(logits[rows] - expected[rows]).max()
        print(f"{directory}: logits agree, largest difference {error:.1e}")

    merged, adapter = out / "merged", out / "adapter"
    if not merged.is_dir() and not adapter.is_dir():
        raise FileNotFoundError(f"{out} holds neither merged/ nor adapter/")
    if merged.is_dir():
        model, report = auto.from_pretrained(merged, output_loading_info=True, **options)
        assert not any(report.values()), f"{merged}: {report}"
        compare(model, merged)
    if adapter.is_dir():
        base = auto.from_pretrained(original, **options)
        model = peft.PeftModel.from_pretrained(base, adapter)
        names = set(load_file(adapter / "adapter_model.safetensors"))
        wanted = set(peft.get_peft_model_state_dict(model))
        # peft adds a copy of an adapted embedding, which the adapter does not need.
        wrong = {name for name in names ^ wanted if ".base_layer." not in name}
        assert not wrong, f"{adapter}: names differ: {sorted(wrong)}"
        compare(model, adapter)


def write() -> None:
    """Write every golden file."""
    for name in MODELS | CLASSIFIERS:
        model = tiny(name)
        if name == "llama":
            model.base_model.save_pretrained(HERE / "llama_backbone")
    for name in VARIANTS:
        variants(name)
    for name in GENERATORS:
        generate(name)
    generate_dynamic()
    shutil.rmtree(HERE / "adapters", ignore_errors=True)
    for name in ADAPTERS:
        adapter(name)
    dora_config()


if __name__ == "__main__":
    logging.disable_progress_bar()
    if not sys.argv[1:]:
        write()
    elif sys.argv[1] == "--check" and len(sys.argv) == 4:
        check_export(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        sys.exit(__doc__)
