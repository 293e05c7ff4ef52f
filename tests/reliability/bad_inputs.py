"""Every kind of bad input, and what comes of it, tried one after the other in a process.

Usage: python -m tests.reliability.bad_inputs FOLDER [PART_OF_A_KIND]; prints a JSON object a line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import spt_jax
from experiments import glue, mmlu, wikitext
from experiments.glue_tasks import TASKS, GlueTask
from pallas_kernels import (
    RoutedFFNWeights,
    pq_encode,
    pq_select,
    routed_ffn,
    scoring_codewords,
    sparse_attention,
)
from spt_jax import cli
from spt_jax.training import Examples, encode_documents, pack, read_jsonl, read_text, tokenize
from spt_jax.training.data import check_labels
from tests.experiments.tfds_directory import random_rows, write_task
from tests.reliability import runs
from tests.spt_jax.models.builders import GOLDEN, edited
from tests.spt_jax.models.gguf_files import write_golden

LIMIT_S = 10
LIMIT_BYTES = 2 << 30
WORDS_OF_10_MB = "many words " * (10_000_000 // 11)

Act = Callable[[Path], Any]


@dataclass(frozen=True)
class BadInput:
    """One kind.

    Attributes:
        area: of the table.
        kind: what is wrong.
        act: does it, in an empty folder.
        says: what the message must hold: the value, and the remedy.
    """

    area: str
    kind: str
    act: Act
    says: tuple[str, ...]


# Checkpoints


def load(directory: Path, **options: Any) -> None:
    spt_jax.load_pretrained(directory, **options)


def with_header(change: Callable[[dict[str, Any]], object]) -> Act:
    """Load BERT with another header before the same tensors."""

    def act(folder: Path) -> None:
        path = edited(folder / "model") / "model.safetensors"
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        changed = change(header)
        text = changed if isinstance(changed, bytes) else json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
        load(path.parent)

    return act


def with_bytes(change: Callable[[bytes], bytes]) -> Act:
    """Load BERT with other bytes."""

    def act(folder: Path) -> None:
        path = edited(folder / "model") / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))
        load(path.parent)

    return act


def with_index(change: Callable[[Path, dict[str, Any]], object]) -> Act:
    """Load RoBERTa, which is in shards, with another index."""

    def act(folder: Path) -> None:
        source = edited(folder / "model", "roberta")
        path = source / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        text = change(source, index)
        path.write_text(text if isinstance(text, str) else json.dumps(index))
        load(source)

    return act


def with_config(family: str = "bert", text: str | None = None, **changes: Any) -> Act:
    """Load a model with other fields in config.json; None takes one out."""

    def act(folder: Path) -> None:
        source = edited(folder / "model", family, config=lambda raw: raw.update(changes))
        path = source / "config.json"
        raw = {k: v for k, v in json.loads(path.read_text()).items() if v is not None}
        path.write_text(json.dumps(raw) if text is None else text)
        load(source)

    return act


def with_tensors(change: Callable[[dict[str, np.ndarray]], object], **options: Any) -> Act:
    """Load BERT with other tensors."""
    return lambda folder: load(edited(folder / "model", tensors=change), **options)


def with_gguf(change: Callable[[bytes], bytes] = bytes, **options: Any) -> Act:
    """Load a GGUF file of LLaMA, written with other metadata or tensors, with other bytes."""

    def act(folder: Path) -> None:
        path = write_golden(folder / "model.gguf", **options)
        path.write_bytes(change(path.read_bytes()))
        load(path)

    return act


def overwritten(after: bytes, skipped: int, number: int) -> Callable[[bytes], bytes]:
    """Put a number of 8 bytes so far after the first occurrence of a text."""

    def change(content: bytes) -> bytes:
        start = content.index(after) + len(after) + skipped
        return content[:start] + number.to_bytes(8, "little") + content[start + 8 :]

    return change


def renamed(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    return lambda content: content.replace(old, new, 1)


LAYER = "bert.encoder.layer.1.output.dense.weight"
EMBEDDING = "roberta.embeddings.word_embeddings.weight"


def pickles_only(folder: Path) -> None:
    source = edited(folder / "model")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    load(source)


def links_in_a_circle(source: Path, index: dict[str, Any]) -> None:
    one, other = source / "one.safetensors", source / "other.safetensors"
    one.symlink_to(other)
    other.symlink_to(one)
    index["weight_map"][EMBEDDING] = one.name


def in_map(name: object) -> Callable[[Path, dict[str, Any]], object]:
    return lambda _, index: index["weight_map"].update({EMBEDDING: name})


def entry(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda header: header[LAYER].update(fields)


def overlap(header: dict[str, Any]) -> None:
    first, second = (name for name in list(header)[:3] if name != "__metadata__")
    header[second]["data_offsets"] = header[first]["data_offsets"]


NESTED = "[" * 200_000
BROKEN = ("is truncated or corrupt", "save it again")
CHECKPOINTS = {
    "file of 4 bytes": (with_bytes(lambda b: b[:4]), BROKEN),
    "header cut short": (with_bytes(lambda b: b[:100]), BROKEN),
    "header said to be of 2^62 bytes": (
        with_bytes(lambda b: (1 << 62).to_bytes(8, "little") + b[8:]),
        BROKEN,
    ),
    "header of 150 MB": (with_header(lambda _: b"{" + b" " * 150_000_000 + b"}"), BROKEN),
    "header that is no JSON": (with_header(lambda _: b"not JSON"), BROKEN),
    "header nested 200,000 deep": (with_header(lambda _: NESTED.encode()), BROKEN),
    "tensors cut short": (with_bytes(lambda b: b[:-1]), BROKEN),
    "overlapping offsets": (with_header(overlap), BROKEN),
    "offsets beyond the file": (with_header(entry(data_offsets=[0, 1 << 50])), BROKEN),
    "negative offsets": (with_header(entry(data_offsets=[-4, 4])), BROKEN),
    "shape whose size overflows": (with_header(entry(shape=[1 << 40, 1 << 40])), BROKEN),
    "unknown dtype": (with_header(entry(dtype="F99")), ("F99", *BROKEN)),
    "integers for weights": (
        with_tensors(lambda t: t.update({LAYER: np.zeros((32, 48), np.int8)})),
        (LAYER, "I8", "supported: F64"),
    ),
    "transposed tensor": (
        with_tensors(lambda t: t.update({LAYER: np.zeros((48, 32), np.float32)})),
        (LAYER, "(48, 32)", "expected (32, 48)"),
    ),
    "tensor missing": (with_tensors(lambda t: t.pop(LAYER)), (LAYER[5:], "is missing")),
    "tensor unknown": (
        with_tensors(lambda t: t.update({"bert.new": np.zeros(3, np.float32)})),
        ("bert.new", "is unknown"),
    ),
    "model.safetensors is a folder": (
        lambda folder: (
            (source := edited(folder / "model"), (source / "model.safetensors").unlink()),
            (source / "model.safetensors").mkdir(),
            load(source),
        ),
        ("needs model.safetensors", "convert"),
    ),
    "pickles only": (pickles_only, ("pytorch_model.bin, which is a pickle", "convert")),
    "shards linked in a circle": (with_index(links_in_a_circle), ("one.safetensors", "not exist")),
    "index that names itself": (
        with_index(in_map("model.safetensors.index.json")),
        ("model.safetensors.index.json", "not a plain file name"),
    ),
    "shard in a folder above": (
        with_index(in_map("../model.safetensors")),
        ("../model.safetensors", "not a plain file name"),
    ),
    "shard by an absolute path": (
        with_index(in_map("/etc/passwd")),
        ("/etc/passwd", "not a plain file name"),
    ),
    "shard missing": (with_index(in_map("model-9.safetensors")), ("model-9", "does not exist")),
    "index nested 200,000 deep": (with_index(lambda *_: NESTED), ("is no index", "weight_map")),
    "gguf: empty": (with_gguf(lambda b: b""), ("is no GGUF file", "save it again")),
    "gguf: another format": (
        with_gguf(lambda b: b"PK\3\4" + b[4:]),
        ("is no GGUF file", r"PK\x03\x04", "save it again"),
    ),
    "gguf: version 1": (
        with_gguf(lambda b: b[:4] + b"\1\0\0\0" + b[8:]),
        ("GGUF version 1", "supported: 2, 3", "convert"),
    ),
    "gguf: big-endian": (
        with_gguf(lambda b: b[:4] + b"\0\0\0\3" + b[8:]),
        ("big-endian", "convert"),
    ),
    "gguf: header cut short": (with_gguf(lambda b: b[:500]), BROKEN),
    "gguf: tensors cut short": (with_gguf(lambda b: b[:-2000]), ("ends at byte", *BROKEN)),
    "gguf: 2^62 tensors": (
        with_gguf(lambda b: b[:8] + (1 << 62).to_bytes(8, "little") + b[16:]),
        BROKEN,
    ),
    "gguf: text of 2^62 bytes": (
        with_gguf(overwritten(b"tokenizer.ggml.model", 4, 1 << 62)),
        BROKEN,
    ),
    "gguf: array of 2^62 values": (
        with_gguf(overwritten(b"tokenizer.ggml.tokens", 8, 1 << 62)),
        (str(1 << 62), *BROKEN),
    ),
    "gguf: text that is not UTF-8": (with_gguf(renamed(b"gpt2", b"gp\xff2")), BROKEN),
    "gguf: name of two lines": (with_gguf(renamed(b"output_norm", b"output\nnorm")), BROKEN),
    "gguf: shape whose size overflows": (
        with_gguf(overwritten(b"token_embd.weight", 4, 1 << 62)),
        ("token_embd.weight", *BROKEN),
    ),
    "gguf: one tensor twice": (
        with_gguf(renamed(b"blk.1.attn_k.weight", b"blk.0.attn_k.weight")),
        ("blk.0.attn_k.weight twice", "save it again"),
    ),
    "gguf: one key twice": (
        with_gguf(renamed(b"ggml.eos_token_id", b"ggml.bos_token_id")),
        ("tokenizer.ggml.bos_token_id twice", "save it again"),
    ),
    "gguf: type that is not dequantized": (
        with_gguf(tensors={"output_norm.weight": np.ones(32, np.int32)}),
        ("output_norm.weight", "I32", "quantize the model otherwise"),
    ),
    "gguf: transposed tensor": (
        with_gguf(tensors={"blk.1.ffn_up.weight": np.ones((32, 48), np.float32)}),
        ("mlp.up_proj.weight", "(32, 48)", "expected (48, 32)"),
    ),
    "gguf: key missing": (
        with_gguf(changes={"llama.block_count": None}),
        ("needs llama.block_count",),
    ),
    "gguf: another architecture": (
        with_gguf(arch="mamba"),
        ("general.architecture 'mamba'", "supported: llama, qwen2, qwen3"),
    ),
    "gguf: experts": (
        with_gguf(changes={"llama.expert_count": 8}),
        ("llama.expert_count = 8", "not supported"),
    ),
    "gguf: one of several parts": (
        with_gguf(changes={"split.count": 3}),
        ("split.count is 3", "llama-gguf-split --merge"),
    ),
    "gguf: several in a folder": (
        lambda folder: (
            [write_golden(folder / name) for name in ("a.gguf", "b.gguf")],
            load(folder),
        ),
        ("several GGUF files: a.gguf, b.gguf", "give the path of one"),
    ),
    "gguf: no such file": (
        lambda folder: load(folder / "model.gguf"),
        ("model.gguf", "check the path"),
    ),
    "config.json missing": (
        lambda folder: (
            (edited(folder / "model") / "config.json").unlink(),
            load(folder / "model"),
        ),
        ("has no config.json", "give the directory"),
    ),
    "config.json that is no JSON": (with_config(text="{"), ("not valid JSON",)),
    "config.json nested 200,000 deep": (with_config(text=NESTED), ("not valid JSON",)),
    "config.json that is a list": (with_config(text="[]"), ("JSON list, not an object",)),
    "unknown model_type": (with_config(model_type="mamba"), ("'mamba'", "supported: bert")),
    "field missing": (with_config(hidden_size=None), ("needs hidden_size",)),
    "field of the wrong type": (
        with_config(num_hidden_layers="2"),
        ("num_hidden_layers must be a positive integer, got '2'",),
    ),
    "no heads": (with_config(num_attention_heads=0), ("num_attention_heads", "got 0")),
    "heads that do not divide the width": (
        with_config(num_attention_heads=5),
        ("hidden_size must be a multiple of num_attention_heads=5",),
    ),
    "10^9 layers": (with_config(num_hidden_layers=10**9), ("num_hidden_layers", "1000000000")),
    "10^9 layers of a decoder": (
        with_config("llama", num_hidden_layers=10**9),
        ("num_hidden_layers", "1000000000"),
    ),
    "5,000 layers": (with_config(num_hidden_layers=5000), ("num_hidden_layers", "5000")),
    "vocabulary of 10^12": (
        with_config(vocab_size=10**12),
        ("word_embeddings", "expected (1000000000000, 32)"),
    ),
    "vocabulary of 10^30": (with_config(vocab_size=10**30), ("word_embeddings", "1" + "0" * 30)),
    "width of 10^9": (with_config(hidden_size=10**9), ("does not fit", "1000000000")),
    "infinite epsilon": (
        with_config(layer_norm_eps=float("inf")),
        ("layer_norm_eps", "positive number, got inf"),
    ),
    "epsilon that is NaN": (
        with_config(layer_norm_eps=float("nan")),
        ("layer_norm_eps", "positive number, got nan"),
    ),
    "infinite rotary base": (
        with_config("llama", rope_theta=float("inf"), rope_parameters=None, rope_scaling=None),
        ("rope_theta", "got inf"),
    ),
    "adapter: pickle only": (
        lambda folder: (
            shutil.copytree(GOLDEN / "adapters" / "lora", folder / "a"),
            (folder / "a" / "adapter_model.safetensors").rename(folder / "a" / "adapter_model.bin"),
            spt_jax.load_adapter(spt_jax.load_pretrained(GOLDEN / "llama"), folder / "a"),
        ),
        ("adapter_model.bin, which is a pickle", "save_pretrained"),
    ),
    "adapter: config nested 200,000 deep": (
        lambda folder: (
            shutil.copytree(GOLDEN / "adapters" / "lora", folder / "a"),
            (folder / "a" / "adapter_config.json").write_text(NESTED),
            spt_jax.load_adapter(spt_jax.load_pretrained(GOLDEN / "llama"), folder / "a"),
        ),
        ("adapter_config.json is not valid JSON",),
    ),
    "adapter: of another model": (
        lambda _: spt_jax.load_adapter(
            spt_jax.load_pretrained(GOLDEN / "bert"), GOLDEN / "adapters" / "lora"
        ),
        ("cannot be added",),
    ),
    "no such model": (lambda folder: load(folder / "nowhere"), ("nowhere", "neither a directory")),
}


# Tokenizers


def tokenizer(content: bytes | Callable[[dict[str, Any]], object]) -> Act:
    """Load MiniLM's tokenizer after a change."""

    def act(folder: Path) -> None:
        path = folder / "tokenizer.json"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            raw = json.loads((MODEL / "tokenizer.json").read_text())
            content(raw)
            path.write_text(json.dumps(raw))
        spt_jax.load_tokenizer(folder)

    return act


def gguf_tokenizer(**changes: Any) -> Act:
    """Load the tokenizer of a GGUF file with other metadata."""
    values = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return lambda folder: spt_jax.load_tokenizer(
        write_golden(folder / "model.gguf", changes=values)
    )


BAD_TOKENIZER = ("tokenizer.json is not a valid tokenizer", "save")
TOKENIZERS = {
    "missing": (spt_jax.load_tokenizer, ("has no tokenizer.json", "save one")),
    "empty": (tokenizer(b""), BAD_TOKENIZER),
    "cut short": (
        lambda folder: tokenizer((MODEL / "tokenizer.json").read_bytes()[:50_000])(folder),
        BAD_TOKENIZER,
    ),
    "not UTF-8": (tokenizer(b'{"version": "\xff"}'), BAD_TOKENIZER),
    "nested 200,000 deep": (tokenizer(NESTED.encode()), BAD_TOKENIZER),
    "a folder": (
        lambda folder: ((folder / "tokenizer.json").mkdir(), spt_jax.load_tokenizer(folder)),
        ("has no tokenizer.json", "save one"),
    ),
    "unknown type of model": (
        tokenizer(lambda raw: raw["model"].update(type="Markov")),
        BAD_TOKENIZER,
    ),
    "vocabulary that is a list": (
        tokenizer(lambda raw: raw["model"].update(vocab=["a", "b"])),
        BAD_TOKENIZER,
    ),
    "negative token id": (
        tokenizer(lambda raw: raw["model"]["vocab"].update({"the": -1})),
        BAD_TOKENIZER,
    ),
    "gguf: another pre-tokenizer": (
        gguf_tokenizer(pre="tekken"),
        ("tokenizer.ggml.pre 'tekken'", "supported: default, gpt-2", "original tokenizer.json"),
    ),
    "gguf: unigrams": (
        gguf_tokenizer(model="t5"),
        ("tokenizer.ggml.model 't5'", "supported: 'gpt2'", "original tokenizer.json"),
    ),
    "gguf: SentencePiece without scores": (
        gguf_tokenizer(model="llama"),
        ("tokenizer.ggml.scores must be a list of 97 numbers", "original tokenizer.json"),
    ),
    "gguf: merges of unknown tokens": (
        gguf_tokenizer(merges=["no where"]),
        ("tokenizer.ggml.merges", "out of vocabulary", "original tokenizer.json"),
    ),
    "gguf: fewer types than tokens": (
        gguf_tokenizer(token_type=[1, 1]),
        ("tokenizer.ggml.token_type must be a list of 97 numbers", "original tokenizer.json"),
    ),
    "tokens that the model does not know": (
        lambda folder: command(
            glue, folder, model=shutil.copytree(GOLDEN / "bert", folder / "model"), tokenizer=True
        ),
        ("token id", "vocabulary of 97", "use the tokenizer that belongs to the model"),
    ),
}


# Data


def task(**changes: Any) -> GlueTask:
    return dataclasses.replace(TASKS["rte"], **changes)


def rte(folder: Path, rows: Sequence[Mapping[str, Any]] | None = None, **changes: Any) -> Path:
    """A data directory with other rows to train on, or columns."""
    kind = task(**changes)
    splits = {"train": random_rows(kind, 20, 0), "validation": random_rows(kind, 8, 1)}
    write_task(folder / "data", kind, splits if rows is None else splits | {"train": rows})
    return folder / "data" / "glue" / "rte" / "2.0.0"


def row(**changes: Any) -> list[dict[str, Any]]:
    return [random_rows(task(), 1, 0)[0] | changes] * 20


def train(prepare: Callable[[Path], object], **options: Any) -> Act:
    """`experiments.glue` on a data directory."""

    def act(folder: Path) -> None:
        prepare(folder)
        command(glue, folder, task="rte", data_dir=folder / "data", **options)

    return act


def lines(content: str | bytes, read: Callable[[Path], Any], name: str = "lines.jsonl") -> Act:
    """Read a file."""

    def act(folder: Path) -> None:
        path = folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        read(path)

    return act


def cut_shard(folder: Path) -> None:
    (shard,) = rte(folder).glob("*train*")
    os.truncate(shard, shard.stat().st_size // 2)


def questions(content: str | bytes) -> Act:
    """`experiments.mmlu` on a CSV file."""
    return lines(content, mmlu.read_questions, "astronomy_test.csv")


def ids(**columns: Any) -> dict[str, np.ndarray]:
    shape = np.ones((4, 8), np.int32)
    return {"input_ids": shape, "attention_mask": shape, "label": shape[:, 0]} | columns


DATA = {
    "wrong columns": (
        train(lambda folder: rte(folder, columns=("premise", "other"))),
        ("no column 'sentence1'", "it has", "premise"),
    ),
    "label out of range": (
        train(lambda folder: rte(folder, row(label=7))),
        ("label 7 of example 0", "0..1"),
    ),
    "all labels hidden": (
        train(lambda folder: rte(folder, row(label=-1))),
        ("all labels are -1", "labelled split"),
    ),
    "label that is NaN": (
        lambda _: check_labels([0.5, float("nan")], name="stsb train", score_range=(0, 5)),
        ("label nan of example 1", "0..5"),
    ),
    "empty split": (train(lambda folder: rte(folder, [])), ("glue/rte train is empty",)),
    "text that is not UTF-8": (
        train(lambda folder: rte(folder, row(sentence2=b"caf\xe9"))),
        ("sentence2 of example 0", "not UTF-8", "convert"),
    ),
    "shard cut short": (train(cut_shard), ("glue/rte train", "prepare")),
    "shard missing": (
        train(lambda folder: [shard.unlink() for shard in rte(folder).glob("*train*")]),
        ("glue/rte train", "prepare"),
    ),
    "dataset_info.json that is no JSON": (
        train(lambda folder: (rte(folder) / "dataset_info.json").write_text("{")),
        ("dataset_info.json", "prepare"),
    ),
    "features.json missing": (
        train(lambda folder: (rte(folder) / "features.json").unlink()),
        ("glue/rte", "prepare"),
    ),
    "no such data directory": (
        train(lambda folder: None),
        ("glue/rte is not in the TFDS data directory", "cannot be downloaded"),
    ),
    "text file not UTF-8": (lines(b"caf\xe9", read_text), ("not UTF-8 at byte 3", "convert it")),
    "text file empty": (lines(" \n", read_text), ("is empty",)),
    "JSON lines: 10 MB that are no JSON": (
        lines("x" * 10_000_000, read_jsonl),
        ("line 1 is not JSON", "write one object a line"),
    ),
    "JSON lines: a list of 10 MB": (
        lines("[" + "1," * 5_000_000 + "1]", read_jsonl),
        ("record 1: an object is needed",),
    ),
    "JSON array for a text": (
        lines('[{"messages": []},\n{"messages": []}]', read_text),
        ("holds JSON records, not text", ".json"),
    ),
    "JSON lines: nested 200,000 deep": (lines(NESTED, read_jsonl), ("line 1 is not JSON",)),
    "JSON lines: neither text nor messages": (
        lines('{"tekst": "x"}', read_jsonl),
        ("line 1", "tekst", 'give either "text" or "messages"'),
    ),
    "JSON lines: no reply to learn": (
        lines('{"messages": [{"role": "user", "content": "x"}]}', read_jsonl),
        ("no message by the assistant", "add its reply"),
    ),
    "JSON lines: unknown role": (
        lines('{"messages": [{"role": "robot", "content": "x"}]}', read_jsonl),
        ("'robot'", "roles are system"),
    ),
    "CSV with one line of 10 MB": (
        questions("x" * 10_000_000 + ",a,b,c,d,A\n"),
        ("astronomy_test.csv", "field limit"),
    ),
    "CSV with a column too few": (questions("q,a,b,c,A\n"), ("5 columns; expected 6",)),
    "CSV with an answer E": (questions("q,a,b,c,d,E\n"), ("A, B, C or D, got 'E'",)),
    "CSV not UTF-8": (questions(b"caf\xe9,a,b,c,d,A\n"), ("astronomy_test.csv", "utf-8")),
    "columns of different lengths": (
        lambda _: Examples(ids(label=np.ones(3)), "train"),
        ("train: columns differ in their number of rows", "'label': 3"),
    ),
    "columns missing": (
        lambda _: Examples({"input_ids": np.ones((4, 8))}, "train"),
        ("no column 'attention_mask'", "it has input_ids"),
    ),
    "texts and labels that differ in number": (
        lambda _: tokenize([["a", "b"]], np.zeros(3), TOKENIZER(), name="train", max_length=16),
        ("train: texts and labels differ in number: [2, 3]",),
    ),
}


def rows_of(texts: list[str]) -> None:
    documents = encode_documents(texts, TOKENIZER(), name="text")
    if len(documents[0]) < 4:  # the words between [CLS] and [SEP]
        raise ValueError(f"text: document 0 has {len(documents[0])} tokens; at least 4 are needed")
    pack(documents, 128, pad_id=0, name="text")


# Options


def command(
    module: Any, folder: Path, model: Path | None = None, *, tokenizer: bool = False, **options: Any
) -> None:
    """Run an experiment with options; True stands for a flag."""
    if tokenizer:
        shutil.copy(MODEL / "tokenizer.json", folder / "model")
    defaults: dict[str, Any] = {"out": folder / "out", "model": model}
    if module is glue:
        small = {"method": "lora", "max_length": 16, "steps": 1, "batch_size": 4}
        defaults |= {"model": model or MODEL, **small}
    words = [
        word
        for name, value in (defaults | options).items()
        for word in ([f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)]))
        if value is not None
    ]
    argv, sys.argv = sys.argv, [module.__name__, *words]
    try:
        module.main()
    finally:
        sys.argv = argv


def option(module: Any = glue, **options: Any) -> Act:
    return lambda folder: command(module, folder, **options)


OPTIONS = {
    "unknown option": (option(epoch=3), ("--epoch", "--help")),
    "unknown choice": (option(task="snli"), ("'snli'", "'rte'", "--help")),
    "word for a number": (option(steps="many"), ("--steps", "'many'", "--help")),
    "option without a value": (option(batch_size=True), ("--batch-size", "--help")),
    "unknown method": (option(method="spt,dora"), ("'dora'", "choose from spt, lora")),
    "no steps": (option(steps=0), ("steps must be at least 1, got 0",)),
    "batch of 10^12": (option(batch_size=10**12), ("batch_size", "1000000000000", "at most")),
    "rank of 10^9": (option(rank=10**9), ("rank", "1000000000", "at most")),
    "10^18 steps": (option(steps=10**18), ("steps must be at most", "1000000000000000000")),
    "10^300 epochs": (option(steps=None, epochs=1e300), ("epochs must be at most", "1e+300")),
    "seed of 70 bits": (option(seed=2**70), ("seed", str(2**70), "at most")),
    "seed below 0": (option(seed=-1), ("seed must be at least 0, got -1",)),
    "density that is NaN": (option(density="nan"), ("density must lie in (0, 1], got nan",)),
    "infinite learning rate": (option(learning_rate="inf"), ("learning_rate", "above 0, got inf")),
    "microbatches that do not divide the batch": (
        option(accumulation=3),
        ("accumulation must divide batch_size", "4 examples", "3 equal"),
    ),
    "more active blocks than blocks": (
        option(active_blocks=5),
        ("active_blocks must lie in 1..num_blocks, got 5 of 4",),
    ),
    "blocks that do not divide the FFN": (
        option(num_blocks=7, method="spt"),
        ("48 hidden units do not split into num_blocks=7",),
    ),
    "length above the model's positions": (
        option(max_length=65),
        ("max_length 65", "64 positions", "choose at most 64"),
    ),
    "results in a file": (
        lambda folder: (
            (folder / "file").write_text(""),
            command(glue, folder, out=folder / "file"),
        ),
        ("/file", "is a file", "choose another directory"),
    ),
    "text from two places": (
        option(wikitext, text_file="a", dataset="b"),
        ("give --text-file or --dataset, not both",),
    ),
    "a run to resume and to overwrite": (
        option(resume=True, overwrite=True),
        ("--resume", "--overwrite", "not both"),
    ),
    "no such text file": (
        option(wikitext, text_file="nowhere.txt"),
        ("nowhere.txt does not exist", "check the path"),
    ),
    "encoder for a causal language model": (
        option(wikitext, model=GOLDEN / "bert"),
        ("bert encoder, not a causal language model",),
    ),
    "stride above the length": (
        option(wikitext, max_length=64, eval_stride=65),
        ("--eval-stride must lie in 1..64", "got 65"),
    ),
    "unknown subject": (
        lambda folder: (
            (folder / "test").mkdir(),
            (folder / "test" / "astronomy_test.csv").write_text("q,a,b,c,d,A\n"),
            command(mmlu, folder, model=GOLDEN / "llama", data_dir=folder, subjects="alchemy"),
        ),
        ("'alchemy'", "holds astronomy"),
    ),
    "required option missing": (option(mmlu, data_dir="x"), ("--model", "--help")),
}


# Arguments of the interface


def adapted(**options: Any) -> Act:
    """Adapt a tiny BERT to a batch."""

    def act(_: Path) -> None:
        model = spt_jax.load_pretrained(GOLDEN / "bert")
        batch = options.pop("batch", {"input_ids": np.ones((4, 16), np.int32)})
        config = options.pop("config", None) or spt_jax.SPTConfig(serve=None, **options)
        spt_jax.adapt(model, config, calibration_batch=batch)

    return act


def generate(prompts: Any, **options: Any) -> Act:
    return lambda _: spt_jax.generate(
        spt_jax.load_pretrained(GOLDEN / "llama", task="causal-lm"),
        prompts,
        **{"max_new_tokens": 4} | options,
    )


X = jnp.ones((1, 8, 2, 4))
BOOKS = jnp.ones((2, 2, 3, 2))
CODES = jnp.zeros((1, 8, 2, 2), jnp.uint8)


def select(**changes: Any) -> Any:
    options = {"num_keys": 3, "granularity": "token"} | changes
    return pq_select(CODES, CODES, *scoring_codewords(BOOKS, BOOKS), **options)


def feed(index: Any = ((0,), (1,)), **changes: Any) -> Any:
    weights = RoutedFFNWeights(w_in=jnp.ones((2, 3, 4)), w_out=jnp.ones((2, 4, 3)))
    weights = dataclasses.replace(weights, **changes)
    return routed_ffn(jnp.ones((2, 3)), jnp.array(index), jnp.ones((2, 1)), weights)


ARGUMENTS = {
    "unknown task": (
        lambda _: load(GOLDEN / "bert", task="translation"),
        ("'translation'", "choose from backbone"),
    ),
    "unknown dtype": (lambda _: load(GOLDEN / "bert", dtype="int8"), ("one of float32", "'int8'")),
    "no labels": (lambda _: load(GOLDEN / "bert", num_labels=0), ("num_labels", "got 0")),
    "10^10 labels": (
        lambda folder: load(
            edited(folder / "m", tensors=lambda t: [t.pop(n) for n in list(t) if "classif" in n]),
            task="sequence-classification",
            num_labels=10**10,
        ),
        ("num_labels", "10000000000", "at most"),
    ),
    "adapted without a batch": (adapted(batch=None), ("give calibration_batch",)),
    "adapted to a batch without input_ids": (
        adapted(batch={"ids": np.ones((2, 4))}),
        ("needs input_ids; it has ['ids']",),
    ),
    "adapted to padding alone": (
        adapted(
            batch={"input_ids": np.ones((4, 16), np.int32), "attention_mask": np.zeros((4, 16))}
        ),
        ("calibration batch has 0 tokens", "give a larger batch"),
    ),
    "adapted to tokens out of the vocabulary": (
        adapted(batch={"input_ids": np.full((4, 16), 1000, np.int32)}),
        ("token id 1000", "vocabulary of 97"),
    ),
    "adapted to rows longer than the model's positions": (
        adapted(batch={"input_ids": np.ones((4, 21), np.int32)}),
        ("21 tokens", "positions serve 1 to 20; truncate or split it"),
    ),
    "adapted twice": (
        lambda _: [
            spt_jax.adapt(model, spt_jax.SPTConfig(attention=None, ffn=None))
            for model in [spt_jax.load_pretrained(GOLDEN / "bert")] * 2
        ],
        ("adapted already; load it again",),
    ),
    "unknown targets of LoRA": (
        lambda _: spt_jax.LoRAConfig(targets=("heads",)),
        ("['heads']", "choose from attention"),
    ),
    "exported over other files": (
        lambda folder: (
            (folder / "letter.txt").write_text(""),
            spt_jax.save_pretrained(spt_jax.load_pretrained(GOLDEN / "bert"), folder),
        ),
        ("is not empty; choose another directory",),
    ),
    "prompt that is one text": (generate("hello"), ("one text; give a list",)),
    "prompt out of the vocabulary": (generate([[1, 10**6]]), ("1000000", "vocabulary")),
    "prompt without tokens": (generate([[]]), ("prompt 0 has no tokens", "begin it with")),
    "more new tokens than positions": (
        generate([[1, 2]], max_new_tokens=10**9),
        ("max_new_tokens=1000000000", "positions serve"),
    ),
    "pq_encode: subspaces that miss the head": (
        lambda _: pq_encode(X[..., :3], BOOKS),
        ("do not cover the head width 3",),
    ),
    "pq_encode: 257 codewords": (
        lambda _: pq_encode(X, jnp.ones((2, 2, 257, 2))),
        ("E must be 1..256, got 257",),
    ),
    "pq_select: no keys": (lambda _: select(num_keys=0), ("at least 1, got 0",)),
    "pq_select: unknown granularity": (
        lambda _: select(granularity="row"),
        ("'row'", "choose one of token, tile"),
    ),
    "pq_select: a list for too many queries": (
        lambda _: pq_select(
            *(jnp.zeros((1, 8, n, 2), jnp.uint8) for n in (8, 2)),
            *scoring_codewords(BOOKS, BOOKS),
            num_keys=3,
            granularity="tile",
            block_q=200,
            share_heads=True,
        ),
        ("take block_q of at most 128, got 200",),
    ),
    "pq_select: unknown implementation": (
        lambda _: select(implementation="cuda"),
        ("'cuda'", "choose one of mosaic"),
    ),
    "pq_select: mosaic without a GPU": (
        lambda _: select(implementation="mosaic"),
        ("'mosaic' cannot run", "Take 'xla'"),
    ),
    "sparse_attention: another length": (
        lambda _: sparse_attention(X[:, :5], X[:, :5], X[:, :5], select()),
        ("selection.threshold is int32[1, 2, 8]", "[1, 2, 5]"),
    ),
    "sparse_attention: keys unlike values": (
        lambda _: sparse_attention(X, X, X[:, :5], select()),
        ("v is float32[1, 5, 2, 4]", "[1, 8, 2, 4]"),
    ),
    "routed_ffn: block that is not there": (lambda _: feed([[0], [2]]), ("0 to 2", "expected 0")),
    "routed_ffn: a block twice": (
        lambda _: routed_ffn(
            jnp.ones((1, 3)),
            jnp.array([[1, 1]]),
            jnp.ones((1, 2)),
            RoutedFFNWeights(w_in=jnp.ones((2, 3, 4)), w_out=jnp.ones((2, 4, 3))),
        ),
        ("[1, 1]", "must be distinct"),
    ),
    "routed_ffn: two dtypes": (
        lambda _: feed(w_out=jnp.ones((2, 4, 3), jnp.bfloat16)),
        ("w_out is bfloat16", "cast one"),
    ),
    "routed_ffn: two widths": (
        lambda _: feed(w_out=jnp.ones((2, 4, 5))),
        ("w_out is float32[2, 4, 5]; expected float [G, Fb, D] = [2, 4, 3]",),
    ),
}

CASES = [
    BadInput(area, kind, act, says)
    for area, table in {
        "checkpoint": CHECKPOINTS,
        "tokenizer": TOKENIZERS,
        "data": DATA,
        "option": OPTIONS,
        "argument": ARGUMENTS,
    }.items()
    for kind, (act, says) in table.items()
]


# The process

MODEL = Path()


def TOKENIZER() -> Any:
    return spt_jax.load_tokenizer(MODEL)


def peak_bytes() -> int:
    """The most memory that this process held since `clear_peak`."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.partition("VmHWM:")[2].split()[0])


def clear_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Memory that runs out, and an alarm, so that no kind takes the machine with it."""
    text = Path("/proc/self/status").read_text()
    mapped = 1024 * int(text.partition("VmSize:")[2].split()[0])

    def ring(*_: object) -> None:
        raise TimeoutError(f"over {12 * LIMIT_S} s")

    before = resource.getrlimit(resource.RLIMIT_AS)
    signal.signal(signal.SIGALRM, ring)
    signal.alarm(12 * LIMIT_S)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + LIMIT_BYTES, before[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, before)


def attempt(case: BadInput, folder: Path) -> dict[str, Any]:
    """What comes of one kind: exit code, standard error, seconds, peak bytes."""
    errors = io.StringIO()
    folder.mkdir(parents=True)
    clear_peak()
    began, cpu_began = time.monotonic(), time.process_time()
    code = 0
    with limits(), contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            cli.run(lambda: case.act(folder))
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException as error:
            errors.write(f"Traceback: {type(error).__name__}: {error}")
            code = 1
    found = {
        "code": code,
        "errors": errors.getvalue(),
        "s": time.monotonic() - began,
        "cpu_s": time.process_time() - cpu_began,
        "bytes": peak_bytes(),
        "folder": str(folder.parent),
    }
    shutil.rmtree(folder, ignore_errors=True)
    return {"area": case.area, "kind": case.kind} | found


def main(folder: Path, part: str = "") -> None:
    global MODEL
    MODEL = runs.make(folder / "made").model
    for number, case in enumerate(CASES):
        if part in f"{case.area}: {case.kind}":
            print(json.dumps(attempt(case, folder / str(number))), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
