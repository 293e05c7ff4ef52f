"""What a run reached and what it cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


class NonFiniteLoss(FloatingPointError):
    """The loss or its gradient became NaN or infinite."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run reached and what it cost.

    Attributes:
        steps: optimizer steps taken.
        epochs: passes over the training examples.
        stopped_early: whether patience ran out.
        resumed_from: step of the checkpoint that the run went on from.
        metrics: evaluation of the parameters that the model ends with; empty without `eval_data`.
        metrics_step: the step they were taken at.
        best_step: step of the best evaluation.
        train_loss: mean over the last steps, 200 at most.
        step_ms: median time of a step over the last steps, without compilation and evaluation;
            with `group_by_length` these are steps of different lengths.
        tokens_per_s: tokens that are not padding, over the last steps.
        padded_tokens_per_s: all positions, padding included.
        compile_s: time to compile the step, with `group_by_length` for each length.
        wall_s: time of this call.
        peak_bytes: highest memory use of the device if this run set it, else the compiler's.
        peak_bytes_source: "device" or "compiler".
        compiled_peak_bytes: what the compiler plans for a step, the longest: arguments, outputs,
            temporaries.
        trainable_parameters: scalars that train.
        total_parameters: scalars of all parameters.
        adapt_s: time that adapting the model took, before this call; None where nothing sparse was
            fitted.
    """

    steps: int
    epochs: float
    stopped_early: bool
    resumed_from: int | None
    metrics: dict[str, float]
    metrics_step: int | None
    best_step: int | None
    train_loss: float
    step_ms: float
    tokens_per_s: float
    padded_tokens_per_s: float
    compile_s: float
    wall_s: float
    peak_bytes: int
    peak_bytes_source: str
    compiled_peak_bytes: int
    trainable_parameters: int
    total_parameters: int
    adapt_s: float | None = None

    def figures(self) -> dict[str, Any]:
        """All of it by plain names, the evaluation metrics beside the rest; JSON."""
        flat = asdict(self)
        return flat.pop("metrics") | flat
