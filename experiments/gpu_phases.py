"""The phases of `experiments.gpu_run`: what each runs, answers and may take."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from experiments.peers.runner import PACKAGES
from spt_jax.models.hub import MODEL_PACKAGES, find_files

FORMS = "merged,factored,skinny,skinny_float32"
#: Tokens of a sequence in the phase of attention; what matters most comes first.
LENGTHS = (8192, 32768, 2048, 512)
#: Seconds that each method trains for at each length.
TRAINING_S = 10


class LeftOut(Exception):
    """A phase cannot run; the message is the reason, in one line."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What phases are made for.

    Attributes:
        rehearse: whether everything is tiny and on a CPU.
        model: language model to fine-tune.
        text_file: text to fine-tune it on, if any.
        missing: why sets of kernels, by name, do not run here; None if they do.
    """

    rehearse: bool = False
    model: str = "smollm2"
    text_file: Path | None = None
    missing: Mapping[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """A command of a phase: `python -m module arguments --out FOLDER`.

    Attributes:
        name: of its folder.
        module: what runs.
        arguments: its options, but for --out.
        table: the CSV file that it writes there.
    """

    name: str
    module: str
    arguments: Sequence[str]
    table: str


@dataclass(frozen=True)
class Column:
    """A column of a phase's table: its header, that of the CSV file, and how numbers are shown."""

    header: str
    name: str
    form: str = ""
    factor: float = 1

    def cell(self, row: Mapping[str, Any]) -> str:
        """What the table shows of a row."""
        value = row.get(self.name) or ""
        if not (self.form and value):
            return str(value)
        return format(self.factor * float(value), self.form)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of the run.

    Attributes:
        name: by which it is chosen.
        answers: the question that it answers.
        estimate_s: what it takes on an H200.
        limit_s: what it may take.
        jobs: its commands; raises `LeftOut` where it cannot run.
        columns: of its table.
    """

    name: str
    answers: str
    estimate_s: int
    limit_s: int
    jobs: Callable[[Setting], list[Job]]
    columns: tuple[Column, ...]


def _smoke(setting: Setting) -> list[Job]:
    return [Job("smoke", "experiments.smoke", ["--rehearse"] * setting.rehearse, "smoke.csv")]


def _kernels(setting: Setting, only: str, tiny: str, *more: str) -> list[Job]:
    words = ["--device", "gpu", "--rounds", "1" if setting.rehearse else "3", *more]
    words += ["--rehearse", "--only", tiny] if setting.rehearse else ["--only", only]
    return [Job("kernels", "experiments.kernels", words, "kernels.csv")]


def _attention(setting: Setting) -> list[Job]:
    names = [f"parts_s{length}_tile" for length in LENGTHS]
    return _kernels(setting, ",".join(names), "parts_s128_tile")


def _ffn(setting: Setting) -> list[Job]:
    return _kernels(setting, "routed_ffn,routed_ffn_frozen,routed_ffn_lora", "routed_ffn_frozen")


def _triton(setting: Setting) -> list[Job]:
    if (why := setting.missing.get("triton")) is not None:
        raise LeftOut(f"the Triton kernels do not run here: {why}")
    names = "routed_ffn_frozen,parts_s8192_tile"
    return _kernels(setting, names, "routed_ffn_frozen", "--triton")


#: Blocks with the sequences of a step, their tokens, and what is compared.
BLOCKS: tuple[tuple[str, int, int, tuple[str, ...]], ...] = (
    ("opt-2048", 16, 512, ("--method", "full,lora,spt")),
    ("llama-4096", 4, 2048, ("--method", "lora,spt")),
    ("llama-4096", 1, 32768, ("--method", "lora,spt", "--spt-ffn", "dense")),
)


def _block_words(setting: Setting, block: str, batch: int, length: int) -> list[str]:
    if setting.rehearse:
        block, batch, length = "tiny-llama", 1, 64
    steps = "2" if setting.rehearse else "12"
    words = ["--block", block, "--batch-size", str(batch), "--seq-len", str(length)]
    return [*words, "--module", "block", "--steps", steps]


def _blocks(setting: Setting) -> list[Job]:
    jobs = []
    for block, batch, length, methods in BLOCKS:
        words = [*_block_words(setting, block, batch, length), *methods, "--lora-form"]
        words.append("merged" if setting.rehearse else FORMS)
        jobs.append(Job(f"{block}-s{length}", "experiments.profile", words, "profile.csv"))
    return jobs[-1:] if setting.rehearse else jobs


def _peers(setting: Setting) -> list[Job]:
    lacking = [name for name in PACKAGES if find_spec(name) is None]
    if lacking:
        raise LeftOut(f"not installed: {', '.join(lacking)}")
    jobs = []
    for block, batch, length, methods in BLOCKS:
        method = "lora" if "full" not in methods[1] else "full,lora"
        words = [*_block_words(setting, block, batch, length), "--method", method]
        words += ["--compile", "no"] if setting.rehearse else []
        jobs.append(Job(f"{block}-s{length}", "experiments.peers", words, "peers.csv"))
    return jobs[-1:] if setting.rehearse else jobs


def _training(setting: Setting) -> list[Job]:
    if setting.model in MODEL_PACKAGES:
        if setting.rehearse:
            raise LeftOut(f"{setting.model} is no rehearsal's size; give --model, a small one")
        try:
            find_files(setting.model)
        except ValueError as error:  # the package is not installed
            raise LeftOut(f"{error}, or give --model") from None
        if find_spec("gguf") is None:
            raise LeftOut("the package gguf, which reads it, is not installed")
    words = ["--model", setting.model]
    words += [] if setting.text_file is None else ["--text-file", str(setting.text_file)]
    if setting.rehearse:
        words += ["--lengths", "64", "--step-tokens", "128", "--eval-tokens", "128"]
        words += ["--seconds", "0.5", "--calibration-tokens", "128", "--evaluations", "1"]
    else:
        words += ["--lengths", "2048,8192", "--seconds", str(TRAINING_S), "--dtype", "bfloat16"]
        words += [
            "--step-tokens",
            "16384",
            "--eval-tokens",
            "32768",
            "--evaluations",
            "3",
            "--warmup-steps",
            "10",
        ]
    words += ["--learning-rates", "1e-3", "--ffn", "dense"]  # to fit FFNs would take the time
    return [Job("training", "experiments.time_to_quality", words, "time_to_quality.csv")]


def _counters(setting: Setting) -> list[Job]:
    if shutil.which("ncu") is None:
        raise LeftOut("ncu, of NVIDIA Nsight Compute, is not on the PATH")
    if not setting.rehearse and (why := setting.missing.get("mosaic")) is not None:
        raise LeftOut(f"the Mosaic kernels do not run here: {why}")
    words = ["--rehearse"] * setting.rehearse
    return [Job("counters", "experiments.counters", words, "counters.csv")]


_MB = 1e-6
_COMPARED = (
    Column("comparison", "comparison"),
    Column("method", "method"),
    Column("forward ms", "forward_ms", ".3f"),
    Column("backward ms", "backward_ms", ".3f"),
    Column("step ms", "step_ms", ".3f"),
    Column("spread ms", "step_spread_ms", ".3f"),
    Column("peak MB", "peak_bytes", ".0f", _MB),
    Column("times the best dense", "speedup", ".2f"),
    Column("of the limit", "step_limit_share", ".0%"),
    Column("remark", "failure"),
)
_STEPS = (
    Column("block", "block"),
    Column("sequences", "batch_size"),
    Column("tokens", "seq_len"),
    Column("method", "method"),
    Column("LoRA form", "lora_form"),
    Column("ms", "ms", ".2f"),
    Column("spread ms", "spread_ms", ".2f"),
)
_DEVICE_MB = Column("device MB", "device_bytes", ".0f", _MB)
_REMARK = Column("remark", "failure")

PHASES: Mapping[str, Phase] = {
    phase.name: phase
    for phase in (
        Phase(
            name="smoke",
            answers="Do all kernels give what their references give, output and every gradient?",
            estimate_s=45,
            limit_s=120,
            jobs=_smoke,
            columns=(
                Column("kernels", "implementation"),
                Column("op", "op"),
                Column("type", "dtype"),
                Column("result", "result"),
                Column("error over allowed", "error_share", ".2f"),
                Column("remark", "failure"),
                Column("left out", "left_out"),
            ),
        ),
        Phase(
            name="attention",
            answers="What do encoding, selection, the forward pass and the two gradient kernels of "
            "attention take at 512 to 32,768 tokens, beside cuDNN; what do random keys overstate?",
            estimate_s=100,
            limit_s=150,
            jobs=_attention,
            columns=_COMPARED,
        ),
        Phase(
            name="blocks",
            answers="How fast, and in what memory, is SPT's training step of a block beside full "
            "fine-tuning's and every form of LoRA's?",
            estimate_s=90,
            limit_s=150,
            jobs=_blocks,
            columns=(
                *_STEPS,
                Column("peak MB", "planned_bytes", ".0f", _MB),
                _DEVICE_MB,
                Column("times full", "speedup_over_full", ".2f"),
                Column("times the best LoRA", "speedup_over_lora", ".2f"),
                Column("operations allow", "operations_lora", ".2f"),
                _REMARK,
            ),
        ),
        Phase(
            name="ffn",
            answers="How many times as fast as cuBLAS is the routed FFN, trained whole, frozen or "
            "with LoRA?",
            estimate_s=30,
            limit_s=60,
            jobs=_ffn,
            columns=_COMPARED,
        ),
        Phase(
            name="triton",
            answers="What do the Triton kernels take beside Mosaic's?",
            estimate_s=40,
            limit_s=75,
            jobs=_triton,
            columns=_COMPARED,
        ),
        Phase(
            name="training",
            answers="Trained for as long as LoRA, what loss does SPT reach: its adapter on the "
            "dense model, and the model as trained?",
            estimate_s=150,
            limit_s=190,
            jobs=_training,
            columns=(
                Column("tokens", "length"),
                Column("method", "method"),
                Column("steps", "steps"),
                Column("trained s", "trained_s", ".1f"),
                Column("ms a step", "step_ms", ".1f"),
                Column("calibrated s", "calibrated_s", ".1f"),
                Column("compiled s", "compiled_s", ".1f"),
                Column("loss before", "loss_before", ".4f"),
                Column("loss, dense", "loss_dense", ".4f"),
                Column("loss, sparse", "loss_sparse", ".4f"),
                Column("peak MB", "peak_bytes", ".0f", _MB),
                Column("remark", "failure"),
            ),
        ),
        Phase(
            name="peers",
            answers="What does the same step take in PyTorch with PEFT?",
            estimate_s=50,
            limit_s=90,
            jobs=_peers,
            columns=(*_STEPS, _DEVICE_MB, _REMARK),
        ),
        Phase(
            name="counters",
            answers="How busy do the three attention kernels keep the tensor cores, L2 and memory?",
            estimate_s=25,
            limit_s=45,
            jobs=_counters,
            columns=(
                Column("kernel", "kernel"),
                Column("ms", "ms", ".3f"),
                Column("tensor pipe %", "tensor_pipe_percent", ".1f"),
                Column("L2 %", "l2_percent", ".1f"),
                Column("L2 hits %", "l2_hit_percent", ".1f"),
                Column("memory %", "memory_percent", ".1f"),
            ),
        ),
    )
}
