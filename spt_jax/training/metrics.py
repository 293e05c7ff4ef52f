"""Evaluation metrics, and the files that hold results."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Num

#: By our names, those of scikit-learn and of SciPy; these take a second to import and wait for it.
_CLASSIFICATION = {
    "accuracy": "accuracy_score",
    "f1": "f1_score",
    "matthews": "matthews_corrcoef",
}
_MULTI_LABEL = ("f1_micro", "exact_match")
_REGRESSION = {"pearson": "pearsonr", "spearman": "spearmanr"}


def _classification(name: str, labels: np.ndarray, predictions: np.ndarray) -> float:
    from sklearn import metrics

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A single label was found", UserWarning)
        return float(getattr(metrics, _CLASSIFICATION[name])(labels, predictions))


def _multi_label(name: str, labels: np.ndarray, outputs: np.ndarray) -> float:
    predictions = outputs > 0  # a probability above one half
    if name == "exact_match":
        return float((predictions == (labels > 0)).all(-1).mean())
    from sklearn import metrics

    return float(metrics.f1_score(labels > 0, predictions, average="micro", zero_division=0))


def _correlation(name: str, labels: np.ndarray, predictions: np.ndarray) -> float:
    from scipy import stats

    if len(labels) < 2:
        return 0.0  # as of constant input
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        value = float(getattr(stats, _REGRESSION[name])(labels, predictions).statistic)
    # undefined for constant input, which shows no correlation
    return 0.0 if math.isnan(value) and np.isfinite(predictions).all() else value


def check_metrics(names: Sequence[str], columns: int | None) -> None:
    """Raise a ValueError unless these metrics can be taken of a model's outputs.

    Args:
        names: for `evaluation_metrics`.
        columns: of the outputs; None where there are none.
    """
    known = {*_CLASSIFICATION, *_MULTI_LABEL, *_REGRESSION}
    if unknown := sorted({*names} - known - {"perplexity"}):
        raise ValueError(f"unknown metrics {unknown}; choose from {sorted(known)} or perplexity")
    for name in names:
        if name == "perplexity":
            continue
        if columns is None:
            raise ValueError(f"{name} needs the outputs of the model")
        if name in _REGRESSION and columns != 1:
            raise ValueError(
                f"{name} compares scores, but the outputs have {columns} columns; load the model "
                "with num_labels=1"
            )
        if name in _CLASSIFICATION and columns == 1:
            raise ValueError(
                f"{name} compares classes, but the outputs have one column; load the model with "
                "num_labels of at least 2"
            )
        if name == "f1" and columns > 2:
            raise ValueError(
                f"f1 is that of class 1 of two, but there are {columns}; take accuracy or matthews"
            )


def glue_metrics(
    names: Sequence[str], outputs: Float[np.ndarray, "n C"], labels: Num[np.ndarray, "n *C"]
) -> dict[str, float]:
    """GLUE's official metrics, and those of several labels an example.

    Args:
        names: among accuracy, f1 (of class 1), matthews, pearson, spearman; for several labels
            an example f1_micro and exact_match, of the classes with logits above 0.
        outputs: class scores; one column of predictions for pearson and spearman.
        labels: classes or scores; of several labels 0 or 1 for each class, `[n, C]`.

    Returns:
        The metrics in the order of `names`, as fractions of 1. A correlation with a constant
        prediction, or of one example, is undefined and given as 0.

    Raises:
        ValueError: a metric is unknown or does not go with so many columns of outputs.

    Example:
        >>> glue_metrics(["accuracy"], np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([1, 1]))
        {'accuracy': 0.5}
    """
    check_metrics(names, outputs.shape[-1])
    values = {}
    for name in names:
        if name in _MULTI_LABEL:
            values[name] = _multi_label(name, labels, outputs)
        elif name in _CLASSIFICATION:
            values[name] = _classification(name, labels, outputs.argmax(-1))
        else:
            values[name] = _correlation(name, labels, outputs[:, 0])
    return values


def evaluation_metrics(
    names: Sequence[str], loss: float, outputs: np.ndarray | None, labels: np.ndarray
) -> dict[str, float]:
    """GLUE's metrics and `perplexity = exp(loss)`, in the order of `names`, then `eval_loss`.

    A perplexity that float64 cannot hold, of a loss above 709, is infinite.

    Args:
        names: what to compute.
        loss: mean loss; in nats a token for perplexity.
        outputs: of all examples; may be None for perplexity alone.
        labels: of all examples.
    """
    check_metrics(names, None if outputs is None else outputs.shape[-1])
    values = {}
    for name in names:
        if name == "perplexity":
            values[name] = _perplexity(loss)
        elif outputs is not None:
            values |= glue_metrics([name], outputs, labels)
    return values | {"eval_loss": loss}


def _perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def write_json_atomic(path: str | os.PathLike[str], obj: Any) -> None:
    """Write `obj` so that `path` holds either its former content or all of the new one.

    Raises:
        ValueError: `obj` holds a NaN or an infinity, which JSON cannot.
    """
    try:
        text = json.dumps(obj, indent=2, allow_nan=False) + "\n"
    except ValueError as error:
        names = ", ".join(_non_finite(obj, "")) or str(error)
        raise ValueError(f"cannot write {path}: not a finite number: {names}") from None
    write_text_atomic(path, text)


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` so that `path` holds either its former content or all of the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def finite(figures: Any) -> Any:
    """Figures with None for infinities, which JSON has not.

    Example:
        >>> finite({"perplexity": math.inf, "steps": 3})
        {'perplexity': None, 'steps': 3}
    """
    if isinstance(figures, Mapping):
        return {name: finite(figure) for name, figure in figures.items()}
    return None if isinstance(figures, float) and math.isinf(figures) else figures


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _non_finite(obj: Any, name: str) -> list[str]:
    if isinstance(obj, Mapping):
        return [n for key, value in obj.items() for n in _non_finite(value, f"{name}.{key}")]
    if isinstance(obj, list | tuple):
        return [n for i, value in enumerate(obj) for n in _non_finite(value, f"{name}[{i}]")]
    return (
        [f"{name.lstrip('.')} = {obj}"] if isinstance(obj, float) and not math.isfinite(obj) else []
    )


def environment() -> dict[str, Any]:
    """Versions and device, for the record of a result."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "cpu_model": _cpu_model(),
            "cpu_cores": os.cpu_count(),
            "machine": platform.machine(),
            "system": platform.system(),
        },
    }


def _cpu_model() -> str:
    """The processor's name, where Linux tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
