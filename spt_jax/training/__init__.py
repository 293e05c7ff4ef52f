"""Training: data, one jitted step, the loop around it, checkpoints and metrics."""

from spt_jax.training.checkpoint import (
    CheckpointError,
    Checkpoints,
    differences_between,
    weights_fingerprint,
)
from spt_jax.training.data import Examples, check_labels, eval_batches, tokenize, train_batches
from spt_jax.training.evaluation import evaluate, evaluator, form_of
from spt_jax.training.loop import train
from spt_jax.training.losses import (
    binary_cross_entropy,
    cross_entropy,
    linear_cross_entropy,
    mean_squared_error,
)
from spt_jax.training.metrics import (
    environment,
    evaluation_metrics,
    finite,
    glue_metrics,
    write_json_atomic,
    write_text_atomic,
)
from spt_jax.training.objectives import Objective, Outcome, next_token, supervised
from spt_jax.training.optimizer import learning_rate_schedule, make_optimizer
from spt_jax.training.results import NonFiniteLoss, TrainResult
from spt_jax.training.signals import Interrupted
from spt_jax.training.step import TrainState, eval_step, partition, start, train_step, write_back
from spt_jax.training.text import (
    Document,
    cut_texts,
    encode_documents,
    pack,
    read_jsonl,
    read_text,
    read_tfds_text,
    strided_windows,
)

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "Document",
    "Examples",
    "Interrupted",
    "NonFiniteLoss",
    "Objective",
    "Outcome",
    "TrainResult",
    "TrainState",
    "binary_cross_entropy",
    "check_labels",
    "cross_entropy",
    "cut_texts",
    "differences_between",
    "encode_documents",
    "environment",
    "eval_batches",
    "eval_step",
    "evaluate",
    "evaluation_metrics",
    "evaluator",
    "finite",
    "form_of",
    "glue_metrics",
    "learning_rate_schedule",
    "linear_cross_entropy",
    "make_optimizer",
    "mean_squared_error",
    "next_token",
    "pack",
    "partition",
    "read_jsonl",
    "read_text",
    "read_tfds_text",
    "start",
    "strided_windows",
    "supervised",
    "tokenize",
    "train",
    "train_batches",
    "train_step",
    "weights_fingerprint",
    "write_back",
    "write_json_atomic",
    "write_text_atomic",
]
