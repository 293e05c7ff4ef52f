"""One training of one model by one method: loaded, adapted, trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
from flax import nnx

from spt_jax.adapt import adapt
from spt_jax.adaptation import ADAPTATION_FILE, AdaptationReport
from spt_jax.config import SPTConfig, TrainConfig
from spt_jax.finetune.config import Task
from spt_jax.models import Decoder, load_pretrained
from spt_jax.models.encoder import Encoder
from spt_jax.training import (
    Examples,
    Objective,
    TrainResult,
    binary_cross_entropy,
    cross_entropy,
    mean_squared_error,
    next_token,
    supervised,
    train,
)

#: Rows to calibrate on, and tokens where rows are of a language model.
CALIBRATION_ROWS = 64
CALIBRATION_TOKENS = 8192

OBJECTIVES: Mapping[Task, Objective] = MappingProxyType(
    {
        "classification": supervised(cross_entropy),
        "multi-label": supervised(binary_cross_entropy),
        "regression": supervised(mean_squared_error),
        "language": next_token,
    }
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to train, and how.

    Attributes:
        source: directory, file or id of the base model.
        task: what is learnt.
        num_labels: outputs of the head, of other tasks than language.
        spt: what is added; None for nothing.
        train: how it is trained.
        dtype: compute dtype, and that of frozen weights.
        out: folder of the run.
        resume: go on with the run that is there.
        overwrite: delete it.
    """

    source: str | Path
    task: Task
    num_labels: int = 1
    spt: SPTConfig | None
    train: TrainConfig
    dtype: Literal["float32", "bfloat16"] = "float32"
    out: Path
    resume: bool = False
    overwrite: bool = False

    def load(self, rngs: nnx.Rngs) -> Encoder | Decoder:
        """The base model.

        Args:
            rngs: of a head that it does not bring.
        """
        return load_pretrained(
            self.source,
            task="causal-lm" if self.task == "language" else "sequence-classification",
            num_labels=self.num_labels,
            dtype=self.dtype,
            param_dtype="float32" if self.train.trainable == "all" else self.dtype,
            rngs=rngs,
        )

    def adapt(
        self,
        model: Encoder | Decoder,
        data: Examples,
        *,
        rngs: nnx.Rngs,
        training_tokens: int | None = None,
    ) -> None:
        """Add to a model what is asked for; a run that goes on makes the choices of its beginning.

        Args:
            model: dense; changed in place.
            data: to train on, of which some is calibrated on.
            rngs: of LoRA's factors and random fits.
            training_tokens: see `spt_jax.adapt`.
        """
        if self.spt is None or not any((self.spt.lora, self.spt.attention, self.spt.ffn)):
            return
        record, choices = self.out / ADAPTATION_FILE, None
        if self.resume and self.spt.has_budget and record.is_file():
            choices = AdaptationReport.load(record)
        adapt(
            model,
            self.spt,
            calibration_batch=self.calibration(data).columns,
            rngs=rngs,
            choices=choices,
            training_tokens=training_tokens,
        )

    def calibration(self, data: Examples) -> Examples:
        """Random rows to calibrate on."""
        number = CALIBRATION_ROWS
        if self.task == "language":
            number = max(2, CALIBRATION_TOKENS // data.length)
        order = np.random.default_rng(self.train.seed).permutation(len(data))
        return data.take(order[:number])

    def fit(
        self,
        model: Encoder | Decoder,
        data: Examples,
        evaluation: Examples | Mapping[str, Examples] | None,
        metrics: Sequence[str],
        record: Callable[[Mapping[str, float], int], None] | None = None,
    ) -> TrainResult:
        """Train the adapted model; see `spt_jax.training.train`."""
        return train(
            model,
            data,
            self.train,
            self.out,
            objective=OBJECTIVES[self.task],
            eval_data=evaluation,
            metrics=metrics,
            identity={"spt": None if self.spt is None else asdict(self.spt)},
            resume=self.resume,
            overwrite=self.overwrite,
            record=record,
        )
