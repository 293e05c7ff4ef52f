"""What `adapt` chose for each layer, and what that costs and saves."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from spt_jax.models.hub import read_json

ADAPTATION_FILE = "adaptation.json"
"""A report's file, beside the checkpoints of a run and in the directory of an adapter."""

Part = Literal["attention", "ffn"]
Measure = Literal["loss", "relative change"]

#: Loss that a sparse form may add before a warning, in nats a token, and the like for encoders.
MOST_ADDED: Mapping[Measure, float] = {"loss": 0.1, "relative change": 0.5}


def _unlike(default: Any = None) -> Any:
    """A field in which equal choices may differ."""
    return field(default=default, compare=False)


@dataclass(frozen=True, kw_only=True)
class LayerAdaptation:
    """The choice for one layer.

    Attributes:
        path: of the layer in the model, such as "layers.0.ffn".
        part: "attention" or "ffn".
        active: share of the keys that a query keeps, or of the FFN's blocks that a token computes;
            1 where the layer stays dense.
        added: what the layer alone adds, estimated from the error of its output: nats a token, or
            the relative change of the final hidden states; None where it was not measured: without
            a budget, and where sparse attention of all layers together keeps to it.
        operations: share of the dense layer's matrix products that is left, selection and router
            left out.
        saved: share of the dense layer's time, forward and backward, that is saved; None where it
            was not measured.
    """

    path: str
    part: Part
    active: float
    added: float | None = _unlike()
    operations: float = _unlike(1.0)
    saved: float | None = _unlike()

    @property
    def choice(self) -> str:
        """In words."""
        if self.active == 1:
            return "dense"
        return f"{self.active:.3g} of the {'keys' if self.part == 'attention' else 'blocks'}"


@dataclass(frozen=True, kw_only=True)
class AdaptationReport:
    """What `adapt` chose and measured; `model.adaptation` of an adapted model.

    Two reports are equal where they choose alike, whatever was measured.

    Attributes:
        layers: a line for each layer that could be sparse, in the model's order.
        budget: `SPTConfig.loss_budget` or that of `SPTConfig.serve`; None where the configuration
            was taken as it is.
        measure: what the budget bounds: "loss", nats a token, of causal language models; of others
            "relative change" of the final hidden states, root mean square.
        dense: measured before: the dense model's loss; 0 where changes are measured.
        sparse: measured after, of the sparse form; None where nothing was measured.
        saved: share that is saved of the time that attention, its projections left out, and FFNs
            take in a training step; None where it was not measured.
        seconds: that adapting took.
        reused: whether fits and choices came from an earlier run by way of the cache.
        too_short: whether layers stay dense because what sparse parts save in the training run
            would not earn back the time to fit them.
    """

    layers: tuple[LayerAdaptation, ...]
    budget: float | None = None
    measure: Measure = "loss"
    dense: float | None = _unlike()
    sparse: float | None = _unlike()
    saved: float | None = _unlike()
    seconds: float = _unlike(0.0)
    reused: bool = _unlike(False)
    too_short: bool = _unlike(False)

    @property
    def added(self) -> float | None:
        """What the sparse form adds to the dense one's measure."""
        if self.dense is None or self.sparse is None:
            return None
        return self.sparse - self.dense

    @property
    def is_costly(self) -> bool:
        """Whether the sparse form is so much worse that the adapter should be served dense."""
        return self.added is not None and self.added > MOST_ADDED[self.measure]

    def counts(self) -> dict[str, int]:
        """Layers by part and choice, such as `{"attention, dense": 30, "ffn, dense": 28, ...}`."""
        found: dict[str, int] = {}
        for layer in self.layers:
            name = f"{layer.part}, {layer.choice}"
            found[name] = found.get(name, 0) + 1
        return found

    def summary(self) -> str:
        """One line on what was chosen, its cost and its gain."""
        parts = [
            ", ".join(f"{n} x {name}" for name, n in self.counts().items()) or "nothing sparse"
        ]
        if self.added is not None:
            unit = "nats a token" if self.measure == "loss" else "relative change"
            bound = "" if self.budget is None else f" of a budget of {self.budget:g}"
            parts.append(f"sparse form {self.added:+.3f} {unit}{bound}")
        if self.too_short:
            parts.append("the run is too short to earn back fitting sparse parts")
        elif self.saved is not None:
            names = {"attention": "attention's", "ffn": "the FFNs'"}
            found = dict.fromkeys(line.part for line in self.layers)
            whose = " and ".join(names[part] for part in found)
            parts.append(f"{self.saved:.0%} of {whose} time saved")
        parts.append(f"{self.seconds:.1f} s" + (", from the cache" if self.reused else ""))
        return "; ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> AdaptationReport:
        """The report that `to_json` gave.

        Raises:
            ValueError: it is none.
        """
        try:
            layers = tuple(LayerAdaptation(**layer) for layer in raw["layers"])
            report = cls(**{**raw, "layers": layers})
            shares = [layer.active for layer in layers]
            if not all(isinstance(a, int | float) and 0 < a <= 1 for a in shares):
                raise TypeError("a share is not in (0, 1]")
            return report
        except (TypeError, KeyError) as error:
            raise ValueError(f"no report of an adaptation: {error}") from None

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write it as JSON."""
        text = json.dumps(_plain(self.to_json()), indent=2, allow_nan=False)
        Path(file).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> AdaptationReport:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is missing or no report.
        """
        path = Path(file)
        try:
            return cls.from_json(read_json(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _plain(value: Any) -> Any:
    """With None for what is not finite, which JSON does not know."""
    match value:
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case float() if not math.isfinite(value):
            return None
    return value
