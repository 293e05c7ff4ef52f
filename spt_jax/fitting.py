"""Makes the sparse parts of a model's layers: all of them, or those that a budget allows."""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from spt_jax import budget, cache
from spt_jax.adaptation import AdaptationReport, LayerAdaptation
from spt_jax.budget import Option, of_share
from spt_jax.calibration import (
    Path,
    Routing,
    fit_routings,
    fit_sparse_attention,
    random_routing,
    record_activations,
    spread,
)
from spt_jax.config import RoutedFFNConfig, SPTConfig
from spt_jax.layers import Attention, FeedForward, RoutedFFN, SparseAttention
from spt_jax.processes import exchange, to_host
from spt_jax.targets import LoRAPlan

Fit = SparseAttention | tuple[Routing, RoutedFFNConfig]
"""What a layer's sparse part is made of."""

#: Shares of an FFN's blocks that a budget chooses from, where they are whole blocks.
FFN_SHARES = (3 / 4, 1 / 2, 1 / 4)
#: Tokens that rough fits take, and of those that are measured the one in so many that serves for
#: their costs.
ROUGH_TOKENS = 1024
ROUGH_EVERY = 4
#: Times the budget, up to which rough costs may add up of what is fitted well.
REACHES = (1.5, 4.0, 16.0)
#: In keys of cached fits: to be raised when what is fitted, or how, changes.
FIT_VERSION = 2

_log = logging.getLogger(__name__)


def install(model: nnx.Module, fits: Mapping[Path, Fit]) -> None:
    """Put sparse parts into a model, in place; LoRA comes first, since routing reorders it."""
    modules = dict(nnx.iter_modules(model))
    replaced = {}
    for path, fit in fits.items():
        layer: Any = modules[path]
        if isinstance(fit, SparseAttention):
            layer.sparse = fit
        else:
            routing, config = fit
            replaced[id(layer)] = RoutedFFN(layer, **routing._asdict(), config=config)
    for owner in modules.values():
        for name, child in list(nnx.iter_children(owner)):
            if id(child) in replaced:  # in all places of an FFN that several share
                setattr(owner, str(name), replaced[id(child)])


@dataclass(frozen=True)
class Fitting:
    """What sparse parts are fitted to.

    Attributes:
        model: the dense model; not changed.
        layers: attention layers and FFNs that may get a sparse part, by path.
        config: of the parts.
        inputs: arguments of the model: the calibration batch.
        keys: of layers whose fit draws at random.
        lora: what gets factors, or is trained whole, which takes time too.
        training_tokens: that training will read; None where that does not count.
    """

    model: nnx.Module
    layers: Mapping[Path, Attention | FeedForward]
    config: SPTConfig
    inputs: Mapping[str, jax.Array]
    keys: Mapping[Path, jax.Array]
    lora: LoRAPlan
    training_tokens: int | None = None

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.inputs["input_ids"].shape[1]

    def run(
        self, choices: AdaptationReport | None, *, use_cache: bool
    ) -> tuple[dict[Path, Fit], AdaptationReport]:
        """Sparse parts and what was chosen, from disk where an earlier run left them.

        Args:
            choices: what to choose in place of measuring.
            use_cache: whether to look on disk, and to leave there what was made.
        """
        key = cache.key_of(self._description(), self._arrays()) if use_cache else ""
        found = self._read(key) if use_cache else None
        if all(exchange(found is not None and (choices is None or choices == found[1]))):
            assert found is not None
            return found
        if choices is not None:
            made = self._chosen(choices), choices
        elif not self.config.has_budget:
            made = self._all()
        else:
            made = self._budgeted(use_cache)
        if use_cache and not made[1].too_short:
            self._write(key, *made)
        return made

    def _all(self) -> tuple[dict[Path, Fit], AdaptationReport]:
        """As configured, and what that costs a causal language model."""
        wanted = {path: self._configured(layer) for path, layer in self.layers.items()}
        fits: dict[Path, Fit] = {}
        with _progress("adapting", len(wanted)) as advance:
            for path, found in self._fits(self.inputs, {p: [s] for p, s in wanted.items()}):
                (fits[path],) = found.values()
                advance()
        shares = {path: self._effective(path, share) for path, share in wanted.items()}
        layers = tuple(self._line(path, Option(share, 0.0, 0.0)) for path, share in shares.items())
        report = AdaptationReport(layers=layers)
        if not budget.is_causal_lm(self.model) or all(share == 1 for share in shares.values()):
            return fits, report
        rows = budget.held_out(self.inputs)[1]
        judge = budget.judge_of(self.model, rows)
        sparse = judge.of(self._applied(fits))
        return fits, dataclasses.replace(report, dense=judge.dense, sparse=sparse)

    def _chosen(self, choices: AdaptationReport) -> dict[Path, Fit]:
        paths = {_dotted(path): path for path in self.layers}
        wanted = {paths[line.path]: [line.active] for line in choices.layers if line.active < 1}
        fits: dict[Path, Fit] = {}
        fitted = self.inputs if choices.budget is None else budget.held_out(self.inputs)[0]
        with _progress("adapting", len(wanted)) as advance:
            for path, found in self._fits(fitted, wanted):
                (fits[path],) = found.values()
                advance()
        return fits

    def _budgeted(self, use_cache: bool) -> tuple[dict[Path, Fit], AdaptationReport]:
        limit = self.config.budget(causal_lm=budget.is_causal_lm(self.model))
        assert limit is not None
        fitted, held = budget.held_out(self.inputs)
        if len(self.inputs["input_ids"]) < 2:
            _log.warning(
                "the calibration batch is a single row, so that the budget is measured on what "
                "parts are fitted to; give more rows to hold it on other text"
            )
        shape = (len(self.inputs["input_ids"]), self.length)
        shares = {path: found for path in self.layers if (found := self._shares(path))}
        timed = dict(self.layers) if shares else {}
        shares = {path: shares.get(path, []) for path in timed}
        with _progress("adapting: timing", len(timed)) as advance:
            seconds = budget.timed(
                timed, shares, self.config, self.lora, shape, advance, use_cache=use_cache
            )
        saved = {
            path: {s: seconds[path][1.0] - seconds[path][s] for s in found}
            for path, found in shares.items()
        }
        paying = {
            path: [s for s, t in found.items() if t >= budget.LEAST_SAVED * seconds[path][1.0]]
            for path, found in saved.items()
        }
        paying = {path: found for path, found in paying.items() if found}
        dense = Option(1.0, 0.0, 0.0)
        too_short = self.training_tokens is not None and not budget.earns_back(
            {path: self.layers[path] for path in paying}, saved, shape, self.training_tokens
        )
        if not paying or too_short:
            lines = [self._line(path, dense, None, seconds.get(path)) for path in self.layers]
            report = AdaptationReport(layers=tuple(lines), budget=limit, saved=0.0)
            return {}, dataclasses.replace(report, too_short=bool(paying))
        chosen: dict[Path, Option] = {}
        fits: dict[Path, dict[float, Fit]] = {path: {} for path in paying}
        if all(isinstance(self.layers[path], Attention) for path in paying):
            # Keys are selected in no time to speak of: all layers at once may keep to the budget.
            fits = dict(self._fits(fitted, paying))
            judge = budget.judge_of(self.model, held)
            chosen = {
                path: Option(share, math.nan, saved[path][share])
                for path, (share,) in paying.items()
            }
            sparse = judge.of(self._applied(_fits_of(fits, chosen)))
            if sparse - judge.dense > limit:
                chosen = {}
        if not chosen:
            chosen, sparse, judge = self._searched(paying, saved, fitted, held, limit, fits)
        total = sum(times[1.0] for times in seconds.values())
        report = AdaptationReport(
            layers=tuple(
                self._line(path, chosen.get(path, dense), judge, seconds[path])
                for path in self.layers
            ),
            budget=limit,
            measure=judge.measure,
            dense=judge.dense,
            sparse=sparse,
            saved=sum(option.seconds for option in chosen.values()) / total if total else 0.0,
        )
        return _fits_of(fits, chosen), report

    def _searched(
        self,
        paying: Mapping[Path, list[float]],
        saved: Mapping[Path, Mapping[float, float]],
        fitted: Mapping[str, jax.Array],
        held: Mapping[str, jax.Array],
        limit: float,
        fits: dict[Path, dict[float, Fit]],
    ) -> tuple[dict[Path, Option], float, budget.Judge]:
        """What is chosen among candidates by their costs, and its loss; fits go into `fits`."""
        observer = budget.Observer(self.model, held, paying, jax.random.key(0))
        judge = observer.judge
        options = {path: tuple[Option, ...]() for path in paying}
        chosen, sparse = dict[Path, Option](), judge.dense

        def applied(chosen: Mapping[Path, Option]) -> nnx.Module:
            return self._applied(_fits_of(fits, chosen))

        # Roughly for all first: to fit an FFN as well as can be takes long.
        rough = self._options(paying, fitted, observer, saved, rough=True)[0]
        for reach in REACHES:
            wanted = {
                path: [option.active]
                for path, option in budget.choose(rough, reach * limit**judge.exponent).items()
                if all(option.active != known.active for known in options[path])
            }
            if not wanted:
                continue
            more, made = self._options(wanted, fitted, observer, saved, rough=False)
            for path in wanted:
                options[path] += more[path]
                fits[path] |= made[path]
            found, loss = budget.within(options, limit, judge, applied)
            if budget.saving(found) >= budget.saving(chosen):  # more options may end with less
                chosen, sparse = found, loss
            near = max(sparse - judge.dense, 0.0) >= budget.NEAR * limit
            if near or not budget.takes_all(options, chosen):
                break
        return chosen, sparse, judge

    def _shares(self, path: Path) -> list[float]:
        """What of a layer may be active, beside all of it."""
        layer = self.layers[path]
        if isinstance(layer, Attention):
            share = self._effective(path, self._configured(layer))
            return [] if share == 1 else [share]
        config = self.config.ffn
        assert config is not None
        blocks = {round(share * config.num_blocks) for share in FFN_SHARES}
        return [
            a / config.num_blocks for a in sorted(blocks, reverse=True) if 0 < a < config.num_blocks
        ]

    def _configured(self, layer: Attention | FeedForward) -> float:
        """The share that the configuration has."""
        if isinstance(layer, FeedForward):
            assert self.config.ffn is not None
            return self.config.ffn.density
        assert self.config.attention is not None
        return self.config.attention.density

    def _effective(self, path: Path, share: float) -> float:
        """The share that is active in rows of this length."""
        layer, attention = self.layers[path], self.config.attention
        if isinstance(layer, FeedForward) or attention is None:
            return share
        window = layer.window is not None and self.length > layer.window
        if window or attention.granularity_at(self.length) == "dense":
            return 1.0
        return attention.num_keys(self.length) / self.length

    def _fits(
        self,
        inputs: Mapping[str, jax.Array],
        wanted: Mapping[Path, list[float]],
        *,
        rough: bool = False,
    ) -> Iterator[tuple[Path, dict[float, Fit]]]:
        """`(path, {share: fit})` of the layers wanted, in the model's order."""
        seen = set()
        for path, arrays in record_activations(self.model, inputs, layers=wanted.keys()):
            layer = self.layers[path]
            seen.add(path)
            if isinstance(layer, Attention):
                assert self.config.attention is not None
                sparse = fit_sparse_attention(
                    **arrays,
                    config=self.config.attention,
                    causal=layer.causal,
                    key=self.keys[path],
                )
                yield path, dict.fromkeys(wanted[path], sparse)
            else:
                yield path, self._routings(path, layer, arrays["x"], wanted[path], rough=rough)
        if missing := [path for path in wanted if path not in seen]:
            raise ValueError(
                f"{_dotted(missing[0])} read nothing of the calibration batch: the model does not "
                "call it, or calls a copy, as nnx.remat, nnx.jit and nnx.scan make; call the "
                "layer itself"
            )

    def _routings(
        self, path: Path, layer: FeedForward, x: jax.Array, shares: list[float], *, rough: bool
    ) -> dict[float, Fit]:
        """Of several shares, that nearest to a half chooses the blocks of all.

        Rough ones have blocks by k-means, and constants where a block is left out.
        """
        assert self.config.ffn is not None
        configs = {s: of_share(self.config.ffn, s) for s in sorted(shares, key=_from_half)}
        if self.config.ffn.calibration == "random":
            key = self.keys[path]
            return {s: (random_routing(layer, own, key=key), own) for s, own in configs.items()}
        if rough:
            x = spread(x, ROUGH_TOKENS)
            configs = {s: dataclasses.replace(c, absent_rank=0) for s, c in configs.items()}
        routings = fit_routings(x, layer, list(configs.values()), exchange=not rough)
        return {
            share: (routing, own)
            for (share, own), routing in zip(configs.items(), routings, strict=True)
        }

    def _options(
        self,
        wanted: Mapping[Path, list[float]],
        fitted: Mapping[str, jax.Array],
        observer: budget.Observer,
        saved: Mapping[Path, Mapping[float, float]],
        *,
        rough: bool,
    ) -> tuple[dict[Path, tuple[Option, ...]], dict[Path, dict[float, Fit]]]:
        """Costs of candidates; their fits too, but for rough ones."""
        options: dict[Path, tuple[Option, ...]] = {}
        fits: dict[Path, dict[float, Fit]] = {}
        every = ROUGH_EVERY if rough else 1
        name = f"adapting: {'measuring' if rough else 'fitting'}"
        with _progress(name, len(wanted)) as advance:
            for path, found in self._fits(fitted, wanted, rough=rough):
                layer = self.layers[path]
                options[path] = tuple(
                    Option(
                        share,
                        sum(
                            budget.cost(layer, candidate, calls, rows, every)
                            for rows, calls in observer.of(path)
                        )
                        / observer.judge.unit,
                        saved[path][share],
                    )
                    for share, candidate in ((s, _module(layer, fit)) for s, fit in found.items())
                )
                if not rough:
                    fits[path] = found
                advance()
        return options, fits

    def _applied(self, fits: Mapping[Path, Fit]) -> nnx.Module:
        """A model of the same arrays with sparse parts."""
        model: Any = nnx.clone(self.model)
        install(model, fits)
        return model

    def _line(
        self,
        path: Path,
        option: Option,
        judge: budget.Judge | None = None,
        seconds: Mapping[float, float] | None = None,
    ) -> LayerAdaptation:
        layer, share, left = self.layers[path], option.active, option.active
        if isinstance(layer, FeedForward) and share < 1:
            assert self.config.ffn is not None
            factors = 2 if layer.gate is None else 3
            config = of_share(self.config.ffn, share)
            maps = 2 * config.num_blocks * config.effective_absent_rank
            left += maps / (factors * layer.up.out_features)
        measured = judge is not None and not math.isnan(option.cost)
        added = option.cost ** (1 / judge.exponent) if judge and measured else None
        saved = None if seconds is None else 1 - seconds[share] / seconds[1.0]
        return LayerAdaptation(
            path=_dotted(path),
            part="attention" if isinstance(layer, Attention) else "ffn",
            active=share,
            added=added,
            operations=left,
            saved=saved,
        )

    def _description(self) -> dict[str, Any]:
        config = dataclasses.asdict(self.config)
        for part in ("attention", "ffn"):
            if config[part] is not None:
                del config[part]["implementation"]
        return {
            "version": FIT_VERSION,
            "jax": jax.__version__,
            "config": config,
            "model": [
                [_dotted(path), type(module).__name__, _settings(module)]
                for path, module in nnx.iter_modules(self.model)
            ],
            "of": repr(getattr(self.model, "config", None)),
            "budget": self.config.budget(causal_lm=budget.is_causal_lm(self.model)),
        }

    def _arrays(self) -> Any:
        """What fits depend on."""
        for path, leaf in nnx.to_flat_state(nnx.state(self.model)):
            yield _dotted(path), leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
        yield from sorted(self.inputs.items())
        for path, key in self.keys.items():
            yield f"key of {_dotted(path)}", key

    def _write(self, key: str, fits: Mapping[Path, Fit], report: AdaptationReport) -> None:
        arrays: dict[str, np.ndarray] = {}
        active: dict[str, int | None] = {}
        for path, fit in fits.items():
            if isinstance(fit, SparseAttention):
                values = {name: getattr(fit, name) for name in _CODEBOOKS}
                found = {n: None if v is None else v[...] for n, v in values.items()}
                active[_dotted(path)] = None
            else:
                found, active[_dotted(path)] = fit[0]._asdict(), fit[1].active_blocks
            arrays |= {
                f"{_dotted(path)}.{name}": to_host(array)
                for name, array in found.items()
                if array is not None
            }
        cache.write("fits", key, arrays, {"active": active, "report": report.to_json()})

    def _read(self, key: str) -> tuple[dict[Path, Fit], AdaptationReport] | None:
        entry = cache.read("fits", key)
        if entry is None:
            return None
        arrays, content = entry
        paths = {_dotted(path): path for path in self.layers}
        fits: dict[Path, Fit] = {}
        for name, active in content["active"].items():
            layer = self.layers[paths[name]]
            taken = partial(_taken, arrays, name)
            if isinstance(layer, Attention):
                assert self.config.attention is not None
                fits[paths[name]] = SparseAttention(
                    *(taken(field) for field in _CODEBOOKS),
                    config=self.config.attention,
                    causal=layer.causal,
                )
            else:
                assert self.config.ffn is not None
                config = dataclasses.replace(self.config.ffn, active_blocks=active)
                routing = Routing(**{field: taken(field) for field in Routing._fields})
                fits[paths[name]] = routing, config
        report = AdaptationReport.from_json(content["report"])
        return fits, dataclasses.replace(report, reused=True)


def _from_half(share: float) -> float:
    return abs(share - 0.5)


def _fits_of(
    fits: Mapping[Path, Mapping[float, Fit]], chosen: Mapping[Path, Option]
) -> dict[Path, Fit]:
    """The fits of options."""
    return {path: fits[path][option.active] for path, option in chosen.items()}


_CODEBOOKS = ("query_codebooks", "key_codebooks", "key_center")


def _taken(arrays: Mapping[str, np.ndarray], path: str, field: str) -> Any:
    array = arrays.get(f"{path}.{field}")
    return None if array is None else jnp.asarray(array)


def _settings(module: nnx.Module) -> dict[str, Any]:
    """A module's attributes that are plain data."""
    plain = int | float | str | None
    return {name: value for name, value in vars(module).items() if isinstance(value, plain)}


def _module(layer: Attention | FeedForward, fit: Fit) -> nnx.Module:
    """The sparse module of a fit; the layer itself is not changed."""
    if isinstance(fit, SparseAttention):
        return fit
    dense: Any = nnx.clone(layer)
    return RoutedFFN(dense, **fit[0]._asdict(), config=fit[1])


@contextmanager
def _progress(name: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on a terminal; gives what advances it."""
    quiet = total == 0 or not sys.stderr.isatty()
    with tqdm(desc=name, total=total, unit="layer", disable=quiet, leave=False) as bar:
        yield lambda: bar.update() and None


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))
