"""Where sparsity pays: what sparse parts of each layer cost in loss, and what they save in time.

Costs are estimated for all layers at once. One backward pass gives, at the output of each layer,
the gradient of a random scalar whose variance is what the budget bounds: of causal language models
the log-likelihood of tokens that the model itself draws, half of whose squared change is the
Kullback-Leibler divergence; of others a random projection of the final hidden states. What a
candidate changes of a layer's output, times that gradient, squared and summed over tokens, is its
cost. The estimate takes tokens and layers to be independent, so a choice of them is measured as a
whole, and the estimates are scaled until it fits the budget.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import platform
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from spt_jax import cache
from spt_jax.adaptation import Measure
from spt_jax.by_layer import by_layer
from spt_jax.calibration import (
    Path,
    Routing,
    fit_sparse_attention,
    grouped,
    random_routing,
    row_parts,
)
from spt_jax.config import RoutedFFNConfig, SPTConfig
from spt_jax.layers import (
    ADAPTER,
    Attention,
    FeedForward,
    LoRA,
    RoutedFFN,
    SparseAttention,
    dense_attention,
    probing,
    recording,
)
from spt_jax.models import Decoder, Encoder
from spt_jax.processes import exchange
from spt_jax.targets import LoRAPlan, train_whole
from spt_jax.training.losses import linear_cross_entropy

#: Tokens on which costs are measured, at most, but for one sequence.
MEASURED_TOKENS = 4096
#: Tokens of one backward pass, and memory of what is observed of them in all layers, of which such
#: a pass takes some three times as much; but for one sequence.
CHUNK_TOKENS = 2048
CHUNK_BYTES = 700 << 20
#: Memory that observations of layers may take together, but for one layer.
OBSERVED_BYTES = 2 << 30
#: Tokens on which a layer is timed, on CPUs and on other devices.
TIMED_TOKENS = {"cpu": 2048}
TIMED_TOKENS_ELSEWHERE = 16384
#: A part must save this share of its dense layer's time.
LEAST_SAVED = 0.05
#: Choices that are measured, at most, and how near to the budget is near enough.
MOST_TRIALS = 5
NEAR = 0.85
#: Seconds that finding out what a layer's sparse part costs takes, its fits among them, on two CPU
#: cores: of SmolLM2 and MiniLM, rounded up. Devices that compute faster compile as slowly.
SEARCH_SECONDS = {Attention: 1.0, FeedForward: 4.0}
#: Turns of timing at most, and the time after which there is no other turn.
MOST_TURNS = 7
SECONDS_A_KIND = 3.0

Inputs = Mapping[str, jax.Array]


class Judge(NamedTuple):
    """What a budget bounds.

    Attributes:
        measure: its name.
        dense: the dense model's loss; 0 where changes are measured.
        of: the same of an adapted model.
        exponent: costs of layers add up in this power of the measure.
        unit: what `cost` is divided by to be in that power of the measure.
    """

    measure: Measure
    dense: float
    of: Callable[[nnx.Module], float]
    exponent: int
    unit: float


def held_out(batch: Inputs) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Rows to fit to, and rows to measure on: every fourth one, at least one; of one row both."""
    rows, length = batch["input_ids"].shape
    if rows < 2:
        return dict(batch), dict(batch)
    held = np.arange(rows)[3::4] if rows > 3 else np.arange(rows)[-1:]
    fitted = np.setdiff1d(np.arange(rows), held)
    most = max(1, MEASURED_TOKENS // length)
    held = held[np.linspace(0, len(held) - 1, min(most, len(held))).astype(int)]
    return (
        {name: array[fitted] for name, array in batch.items()},
        {name: array[held] for name, array in batch.items()},
    )


def is_causal_lm(model: nnx.Module) -> bool:
    """Whether a model's loss is that of the next token."""
    return isinstance(model, Decoder) and model.task == "causal-lm" and model.score is None


def judge_of(model: nnx.Module, inputs: Inputs) -> Judge:
    """What a model's budget bounds, measured on `inputs`."""
    if is_causal_lm(model):
        return _loss_judge(_loss(model, inputs), inputs)
    return _change_judge(_states(model, inputs), inputs)


def _loss_judge(dense: float, inputs: Inputs) -> Judge:
    tokens = max(float(_predicted(inputs).sum()), 1.0)
    return Judge("loss", dense, partial(_loss, inputs=inputs), 1, tokens)


def _change_judge(before: jax.Array, inputs: Inputs) -> Judge:
    counted = _counted(before, inputs)
    size = (counted * before**2).sum()

    def change(adapted: nnx.Module) -> float:
        difference = counted * (_states(adapted, inputs) - before)
        return float(jnp.sqrt((difference**2).sum() / size))

    return Judge("relative change", 0.0, change, 2, float(size) / 2)


def _mask(inputs: Inputs) -> jax.Array:
    mask = inputs.get("attention_mask")
    return jnp.ones(inputs["input_ids"].shape, bool) if mask is None else mask != 0


def _counted(states: jax.Array, inputs: Inputs) -> jax.Array:
    """1 for states of valid tokens, else 0; 1 for all of outputs that are not one a token."""
    mask = _mask(inputs)
    if states.ndim != 3 or states.shape[:2] != mask.shape:
        return jnp.ones_like(states)
    return mask[..., None].astype(states.dtype)


def _predicted(inputs: Inputs) -> jax.Array:
    """Where the next token is of the same sequence, float `[B, S - 1]`."""
    mask = _mask(inputs)
    found = mask[:, :-1] & mask[:, 1:]
    if (segments := inputs.get("segment_ids")) is not None:
        found &= segments[:, :-1] == segments[:, 1:]
    return found.astype(jnp.float32)


def _states(model: Any, inputs: Inputs) -> jax.Array:
    """Final hidden states, or the outputs of a model that is none of this library's."""
    if isinstance(model, Decoder | Encoder):
        return by_layer(model).hidden_states(**inputs)[0].astype(jnp.float32)
    return _outputs(*nnx.split(model), dict(inputs))


@partial(jax.jit, static_argnames="graphdef")
def _outputs(graphdef: Any, state: Any, inputs: dict[str, jax.Array]) -> jax.Array:
    model: Any = nnx.merge(graphdef, state)
    return jnp.asarray(model(**inputs), jnp.float32)


def _loss(model: Any, inputs: Inputs) -> float:
    """Nats a token of a causal language model, a row at a time."""
    own, kernel = by_layer(model), model.output_kernel()
    total = weight = 0.0
    for i in range(len(inputs["input_ids"])):
        row = {name: array[i : i + 1] for name, array in inputs.items()}
        predicted = _predicted(row)
        found, counted = _row_loss(
            own.hidden_states(**row)[0][:, :-1], kernel, row["input_ids"][:, 1:], predicted
        )
        total, weight = total + float(found), weight + float(counted)
    return total / max(weight, 1)


@jax.jit
def _row_loss(
    hidden: Float[Array, "1 S D"],
    kernel: Float[Array, "D V"],
    labels: Int[Array, "1 S"],
    weight: Float[Array, "1 S"],
) -> tuple[jax.Array, jax.Array]:
    return linear_cross_entropy(hidden, kernel.astype(hidden.dtype), labels, weight)


class Observation(NamedTuple):
    """What a layer reads in a call, and the gradient of the random scalar at its output.

    Attributes:
        inputs: `q`, `k` and `v` of attention, `x` of an FFN.
        gradient: of the heads' outputs `[B, S, N, H]`, or of the FFN's `[B, S, D]`.
    """

    inputs: dict[str, jax.Array]
    gradient: jax.Array


Observed = tuple[Inputs, dict[Path, list[Observation]]]  # on some rows, of each layer, by call


class Observer:
    """Observations of layers of a dense model, of so many at once as take little memory.

    Attributes:
        judge: what a budget bounds, on the rows observed.
    """

    def __init__(
        self, model: nnx.Module, inputs: Inputs, layers: Collection[Path], key: jax.Array
    ) -> None:
        """Observe the first of `layers` on `inputs`; `key` draws the random scalar."""
        sizes = observed_bytes(model, inputs)
        token_bytes = sum(sizes.values()) / inputs["input_ids"].size
        tokens = min(CHUNK_TOKENS, CHUNK_BYTES / max(token_bytes, 1.0))
        wanted = {path: size for path, size in sizes.items() if path in layers}
        self._groups = list(grouped(wanted, OBSERVED_BYTES))
        self._observe = partial(observe, model, inputs, key, tokens=tokens)
        self._group = self._groups[0] if self._groups else []
        self._parts, self.judge = self._observe(self._group)

    def of(self, path: Path) -> list[tuple[Inputs, list[Observation]]]:
        """A layer's observations, with the rows that they are of; best asked for in order."""
        if path not in self._group:
            self._parts = []  # before others take memory
            self._group = next(group for group in self._groups if path in group)
            self._parts, _ = self._observe(self._group)
        return [(rows, seen[path]) for rows, seen in self._parts]


def observed_bytes(model: nnx.Module, inputs: Inputs) -> dict[Path, int]:
    """Memory of the observations of each attention layer and FFN that a model calls."""
    graphdef, state = nnx.split(model)

    def read(state: Any, inputs: dict[str, jax.Array]) -> dict[int, Any]:
        own: Any = nnx.merge(graphdef, state)
        with recording() as records:
            own(**inputs)
        modules = enumerate(nnx.iter_modules(own))
        return {n: records[id(module)] for n, (_, module) in modules if id(module) in records}

    paths = [path for path, _ in nnx.iter_modules(model)]
    shapes = jax.eval_shape(read, state, dict(inputs))
    return {
        paths[number]: sum(
            array.size * array.dtype.itemsize * (2 if name in ("q", "x") else 1)
            for call in calls
            for name, array in call.items()
        )
        for number, calls in shapes.items()
    }


def observe(
    model: nnx.Module,
    inputs: Inputs,
    key: jax.Array,
    layers: Collection[Path],
    *,
    tokens: float = CHUNK_TOKENS,
) -> tuple[list[Observed], Judge]:
    """Observations of attention layers and FFNs of a dense model, by part of the rows.

    Args:
        model: not changed.
        inputs: its arguments.
        key: draws the random scalar.
        layers: paths of those that are observed.
        tokens: of one backward pass, but for one sequence.

    Returns:
        Parts of `inputs`, each with observations by the layer's path, one a call; and what a budget
        bounds on all of them.
    """
    graphdef, state = nnx.split(model)
    paths = [path for path, _ in nnx.iter_modules(model)]
    wanted = tuple(number for number, path in enumerate(paths) if path in layers)
    parts: list[Observed] = []
    outcomes = []
    for number, rows in enumerate(row_parts(inputs, tokens)):
        own = jax.random.fold_in(key, number)
        found, outcome = _observed(graphdef, state, rows, own, wanted, is_causal_lm(model))
        seen = {
            paths[layer]: [Observation(*call) for call in calls] for layer, calls in found.items()
        }
        parts.append((rows, seen))
        outcomes.append(outcome)
    if not is_causal_lm(model):
        return parts, _change_judge(jnp.concatenate(outcomes), inputs)
    total, weight = np.sum([[float(x) for x in pair] for pair in outcomes], axis=0)
    return parts, _loss_judge(float(total / max(weight, 1)), inputs)


@partial(jax.jit, static_argnames=("graphdef", "wanted", "causal_lm"))
def _observed(
    graphdef: Any,
    state: Any,
    inputs: dict[str, jax.Array],
    key: jax.Array,
    wanted: tuple[int, ...],
    causal_lm: bool,
) -> tuple[dict[int, list[tuple[dict[str, jax.Array], jax.Array]]], Any]:
    model: Any = nnx.merge(graphdef, state)
    layers = {
        number: module
        for number, (_, module) in enumerate(nnx.iter_modules(model))
        if number in wanted
    }

    def outputs() -> jax.Array:
        if isinstance(model, Decoder | Encoder):
            return model.hidden_states(**inputs)[0]
        return jnp.asarray(model(**inputs))

    def scalar(probes: dict[int, list[jax.Array]]) -> tuple[jax.Array, Any]:
        probed = {id(layers[number]): probe for number, probe in probes.items()}
        with recording() as records, probing(probed):
            states = outputs()
        read = {number: records[id(layers[number])] for number in probes}
        if causal_lm:
            hidden, weight = states[:, :-1], _predicted(inputs)
            kernel = model.output_kernel().astype(hidden.dtype)
            labels = inputs["input_ids"][:, 1:]
            still = jax.lax.stop_gradient(hidden)
            outcome = linear_cross_entropy(still, kernel, labels, weight)
            return _likelihood(hidden, kernel, weight, key), (read, outcome)
        directions = jax.random.normal(key, states.shape, jnp.float32)
        total = (_counted(states, inputs) * states * directions).sum()
        return total, (read, states.astype(jnp.float32))

    with recording() as records:
        jax.eval_shape(outputs)
    shapes = {n: records[id(layer)] for n, layer in layers.items() if id(layer) in records}
    probes = {
        number: [jnp.zeros_like(read["q" if "q" in read else "x"]) for read in calls]
        for number, calls in shapes.items()
    }
    gradients, (read, outcome) = jax.grad(scalar, has_aux=True)(probes)
    found = {number: [*zip(read[number], gradients[number], strict=True)] for number in probes}
    return found, outcome


def _likelihood(
    hidden: Float[Array, "B S D"],
    kernel: Float[Array, "D V"],
    weight: Float[Array, "B S"],
    key: jax.Array,
) -> jax.Array:
    """Log-likelihood of tokens drawn from the model's predictions."""
    rows = jax.lax.stop_gradient(hidden.reshape(-1, hidden.shape[-1]))

    def draw(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        row, own = pair
        return jax.random.categorical(own, jnp.dot(row, kernel).astype(jnp.float32))

    keys = jax.random.split(key, len(rows))
    drawn = jax.lax.map(draw, (rows, keys), batch_size=128)
    labels = jax.lax.stop_gradient(drawn).reshape(hidden.shape[:2])
    return -linear_cross_entropy(hidden, kernel, labels, weight)[0]


def cost(
    layer: nnx.Module,
    candidate: nnx.Module,
    calls: Sequence[Observation],
    inputs: Inputs,
    every: int = 1,
) -> float:
    """What a candidate in a layer's place costs on rows that were observed, summed over tokens.

    Half the squared change of the log-likelihood of causal language models; the squared change of
    the final states of others is twice that. Of an FFN one in `every` tokens stands for all.
    """
    if isinstance(layer, Attention):
        assert isinstance(candidate, SparseAttention)
        masks = {"key_mask": _key_mask(inputs), "segment_ids": inputs.get("segment_ids")}
        own = nnx.split(candidate)
        return sum(float(_attention_cost(*own, *seen, masks, layer.window)) for seen in calls)
    dense, sparse = nnx.split(layer), nnx.split(candidate)
    total = 0.0
    for seen in calls:
        x, gradient = seen.inputs["x"][:, ::every], seen.gradient[:, ::every]
        share = x.shape[1] / seen.gradient.shape[1]
        total += float(_ffn_cost(*dense, *sparse, x, gradient)) / share
    return total


def _key_mask(inputs: Inputs) -> jax.Array | None:
    mask = inputs.get("attention_mask")
    return None if mask is None else mask != 0


@partial(jax.jit, static_argnames=("graphdef", "window"))
def _attention_cost(
    graphdef: Any,
    state: Any,
    read: dict[str, jax.Array],
    gradient: jax.Array,
    masks: dict[str, Any],
    window: int | None,
) -> jax.Array:
    sparse: Any = nnx.merge(graphdef, state)
    qkv = read["q"], read["k"], read["v"]
    dense = dense_attention(*qkv, causal=sparse.causal, window=window, **masks)
    difference = sparse(*qkv, **masks)[0] - dense
    changes = jnp.einsum("bsnh,bsnh->bs", gradient, difference, preferred_element_type=jnp.float32)
    return 0.5 * (changes**2).sum()


@partial(jax.jit, static_argnames=("dense", "sparse"))
def _ffn_cost(
    dense: Any, dense_state: Any, sparse: Any, sparse_state: Any, x: jax.Array, gradient: jax.Array
) -> jax.Array:
    before: Any = nnx.merge(dense, dense_state)
    after: Any = nnx.merge(sparse, sparse_state)
    difference = after(x)[0] - before(x)[0]
    changes = jnp.einsum("bsd,bsd->bs", gradient, difference, preferred_element_type=jnp.float32)
    return 0.5 * (changes**2).sum()


@dataclass(frozen=True)
class Option:
    """A candidate for a layer.

    Attributes:
        active: share that is active.
        cost: in the power of the measure in which costs add up.
        seconds: that it saves of a training step.
    """

    active: float
    cost: float
    seconds: float


def choose(options: Mapping[Path, Sequence[Option]], limit: float) -> dict[Path, Option]:
    """The options that save most time while their costs do not exceed a limit together.

    Greedy: of the steps from one option of a layer to its next dearer one, along the convex hull
    of time saved over cost, those first that save most a unit of cost.
    """
    steps = [
        (step.seconds / max(step.cost, 1e-12), str(path), path, option, step.cost)
        for path, found in options.items()
        for option, step in _hull(found)
    ]
    chosen: dict[Path, Option] = {}
    spent, full = 0.0, set[Path]()
    for _, _, path, option, added in sorted(steps, key=lambda s: (-s[0], s[1])):
        if path in full:
            continue
        if spent + added > limit * (1 + 1e-9):
            full.add(path)
            continue
        chosen[path] = option
        spent += added
    return chosen


def _hull(options: Sequence[Option]) -> list[tuple[Option, Option]]:
    """Options on the convex hull, each with what it costs and saves beyond the one before."""
    kept = [Option(1.0, 0.0, 0.0)]
    left = sorted(options, key=lambda o: (o.cost, -o.seconds))
    while left:
        last = kept[-1]
        left = [o for o in left if o.seconds > last.seconds]
        if left:
            slopes = [(o.seconds - last.seconds) / max(o.cost - last.cost, 1e-12) for o in left]
            kept.append(left[int(np.argmax(slopes))])
    return [
        (b, Option(b.active, b.cost - a.cost, b.seconds - a.seconds))
        for a, b in itertools.pairwise(kept)
    ]


def within(
    options: Mapping[Path, Sequence[Option]],
    budget: float,
    judge: Judge,
    applied: Callable[[Mapping[Path, Option]], nnx.Module],
) -> tuple[dict[Path, Option], float]:
    """Options that save most time with the measured loss within the budget, and that loss.

    Args:
        options: of each layer.
        budget: in the unit of the measure.
        judge: measures it.
        applied: the model with options chosen.
    """
    best: tuple[dict[Path, Option], float] = {}, judge.dense
    limit, scale, tried = budget**judge.exponent, 1.0, list[dict[Path, Option]]()
    while len(tried) < MOST_TRIALS:
        chosen = choose(options, limit / scale)
        if chosen in tried:  # estimates were too high: look further
            scale *= 0.7
            if scale < 1e-4:
                break
            continue
        if not chosen:
            break
        tried.append(chosen)
        measured = judge.of(applied(chosen))
        actual = max(measured - judge.dense, 0.0) ** judge.exponent
        estimate = sum(option.cost for option in chosen.values())
        if actual <= limit:
            if saving(chosen) >= saving(best[0]):
                best = chosen, measured
            if actual >= NEAR * limit or takes_all(options, chosen):
                break
        found = actual / max(estimate, 1e-12)
        scale = min(found, scale) if actual <= limit else max(1.02 * found, 1.1 * scale)
        scale = max(scale, 0.1)
    return best


def takes_all(options: Mapping[Path, Sequence[Option]], chosen: Mapping[Path, Option]) -> bool:
    """Whether nothing that saves more is left among the options."""
    return saving(chosen) >= saving(choose(options, math.inf))


def saving(chosen: Mapping[Path, Option]) -> float:
    """Seconds that options save together."""
    return sum(option.seconds for option in chosen.values())


def timed_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """Rows and tokens of a row that layers are timed on, of the calibration batch's."""
    rows, length = shape
    most = TIMED_TOKENS.get(jax.devices()[0].platform, TIMED_TOKENS_ELSEWHERE)
    return max(1, min(rows, most // length)), length


def earns_back(
    layers: Mapping[Path, Attention | FeedForward],
    saved: Mapping[Path, Mapping[float, float]],
    shape: tuple[int, int],
    training_tokens: int,
) -> bool:
    """Whether a training run can save as much time as finding out where sparsity pays takes.

    Args:
        layers: those in which sparsity saves time.
        saved: seconds that a layer's candidates save on rows of `timed_shape(shape)`.
        shape: rows and tokens of a row of the calibration batch.
        training_tokens: that training reads.
    """
    most = sum(max(saved[path].values()) for path in layers)
    most *= training_tokens / math.prod(timed_shape(shape))
    search = sum(
        next(seconds for kind, seconds in SEARCH_SECONDS.items() if isinstance(layer, kind))
        for layer in layers.values()
    )
    return most > search


def timed(
    layers: Mapping[Path, Attention | FeedForward],
    shares: Mapping[Path, Sequence[float]],
    config: SPTConfig,
    lora: LoRAPlan,
    shape: tuple[int, int],
    advance: Callable[[], None],
    *,
    use_cache: bool = True,
) -> dict[Path, dict[float, float]]:
    """Seconds of a layer's forward and backward pass by the share that is active, 1 for dense.

    Layers of one kind and size are timed once, and never again on this machine: the times are kept
    on disk.

    Args:
        layers: dense ones.
        shares: of each, those to time beside 1.
        config: of the sparse parts.
        lora: what gets factors, or is trained whole.
        shape: rows and tokens of a row of the calibration batch.
        advance: called after each layer.
        use_cache: whether times of before are taken.
    """
    shape = timed_shape(shape)
    known: dict[str, dict[float, float]] = {}
    found = {}
    for path, layer in layers.items():
        description = _description(layer, config, lora, shape, sorted(shares[path]))
        key = cache.key_of(description)
        if key not in known:
            entry = cache.read("times", key) if use_cache else None
            if entry is None:
                seconds = _times(layer, shares[path], config, lora, shape)
                dense = seconds[1.0]  # no part saves more than it leaves out
                seconds = {share: max(t, share * dense) for share, t in seconds.items()}
                seconds = exchange(seconds)[0]
                content = {str(share): t for share, t in seconds.items()}
                if use_cache:
                    cache.write("times", key, {}, {"of": description, "seconds": content})
            else:
                seconds = {float(s): float(t) for s, t in entry[1]["seconds"].items()}
            known[key] = seconds
        found[path] = known[key]
        advance()
    return found


def _description(
    layer: Attention | FeedForward,
    config: SPTConfig,
    lora: LoRAPlan,
    shape: tuple[int, int],
    shares: Sequence[float],
) -> dict[str, Any]:
    device = jax.devices()[0]
    part = config.attention if isinstance(layer, Attention) else config.ffn
    sizes = [f"{leaf.shape} {leaf.dtype}" for leaf in jax.tree.leaves(nnx.state(layer))]
    own = (
        [layer.num_heads, layer.num_kv_heads, layer.head_width, layer.causal, layer.window]
        if isinstance(layer, Attention)
        else [layer.activation, str(layer.up.dtype)]
    )
    return {
        "jax": jax.__version__,
        "device": [device.platform, device.device_kind, platform.machine(), os.cpu_count()],
        "layer": [type(layer).__name__, *own, *sizes],
        "part": None if part is None else dataclasses.asdict(part),
        "lora": {} if isinstance(layer, Attention) else _trained(layer, lora),
        "shape": list(shape),
        "shares": list(shares),
    }


_FFN_MAPS = ("up", "gate", "down")


def _trained(layer: FeedForward, lora: LoRAPlan) -> dict[str, Any]:
    """What is trained of an FFN, as plain data."""
    maps = {name: getattr(layer, name) for name in _FFN_MAPS if getattr(layer, name) is not None}
    factors = {name: lora.factors_of(linear) for name, linear in maps.items()}
    return {
        "factors": {n: dataclasses.asdict(c) for n, c in factors.items() if c is not None},
        "whole": [name for name, linear in maps.items() if lora.trains_whole(linear)],
    }


def _times(
    layer: Attention | FeedForward,
    shares: Sequence[float],
    config: SPTConfig,
    lora: LoRAPlan,
    shape: tuple[int, int],
) -> dict[float, float]:
    key = jax.random.key(0)
    if isinstance(layer, Attention):
        steps = _attention_steps(layer, shares, config, shape, key)
    else:
        steps = _ffn_steps(layer, shares, config, lora, shape, key)
    for step in steps.values():
        jax.block_until_ready(step())  # compiles
    seconds = dict.fromkeys(steps, math.inf)
    begun = time.perf_counter()
    for turn in range(MOST_TURNS):
        for share, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step())
            seconds[share] = min(seconds[share], time.perf_counter() - start)
        if turn >= 2 and time.perf_counter() - begun > SECONDS_A_KIND:
            break
    return seconds


def _attention_steps(
    layer: Attention,
    shares: Sequence[float],
    config: SPTConfig,
    shape: tuple[int, int],
    key: jax.Array,
) -> dict[float, Callable[[], Any]]:
    def draw(heads: int, number: int) -> jax.Array:
        own = jax.random.fold_in(key, number)
        return jax.random.normal(own, (*shape, heads, layer.head_width), layer.q_proj.dtype)

    q, k, v = draw(layer.num_heads, 0), draw(layer.num_kv_heads, 1), draw(layer.num_kv_heads, 2)
    steps: dict[float, Callable[[], Any]] = {}
    dense = partial(
        dense_attention, causal=layer.causal, window=layer.window,
        implementation=layer.dense_implementation,
    )  # fmt: skip
    steps[1.0] = partial(_gradients(dense), q, k, v)
    for share in shares:
        assert config.attention is not None
        sparse = fit_sparse_attention(
            q.reshape(-1, *q.shape[2:]), k.reshape(-1, *k.shape[2:]),
            config=config.attention, causal=layer.causal, key=key,
        )  # fmt: skip
        steps[share] = partial(_gradients(lambda *a, of=sparse: of(*a)[0]), q, k, v)
    return steps


def _ffn_steps(
    layer: FeedForward,
    shares: Sequence[float],
    config: SPTConfig,
    lora: LoRAPlan,
    shape: tuple[int, int],
    key: jax.Array,
) -> dict[float, Callable[[], Any]]:
    x = jax.random.normal(key, (*shape, layer.up.in_features), layer.up.dtype)
    steps: dict[float, Callable[[], Any]] = {}
    for share in (1.0, *shares):
        ffn: Any = nnx.clone(layer)
        for name in _FFN_MAPS:
            own, dense = getattr(ffn, name), getattr(layer, name)
            if dense is not None and (factors := lora.factors_of(dense)) is not None:
                own.lora = LoRA(*own.kernel.shape, config=factors, rngs=nnx.Rngs(0))
            elif dense is not None and lora.trains_whole(dense):
                train_whole(own)
        if share < 1:
            assert config.ffn is not None
            routed = of_share(config.ffn, share)
            ffn = RoutedFFN(ffn, **_drawn_routing(ffn, routed, key)._asdict(), config=routed)
        parts: Any = nnx.split(ffn, ADAPTER, ...)
        graphdef, params, frozen = parts

        def apply(x: jax.Array, params: Any, frozen: Any, graphdef: Any = graphdef) -> jax.Array:
            merged: Any = nnx.merge(graphdef, params, jax.lax.stop_gradient(frozen))
            return merged(x)[0]

        steps[share] = partial(_gradients(apply, (0, 1)), x, params, frozen)
    return steps


def _drawn_routing(ffn: FeedForward, config: RoutedFFNConfig, key: jax.Array) -> Routing:
    routing = random_routing(ffn, config, key=key)
    if (rank := config.effective_absent_rank) == 0:
        return routing
    width, blocks = ffn.up.in_features, config.num_blocks
    return routing._replace(
        absent_a=jnp.zeros((width, blocks, rank)), absent_b=jnp.zeros((blocks, rank, width))
    )


def _gradients(apply: Callable[..., jax.Array], arguments: Any = (0, 1, 2)) -> Callable[..., Any]:
    def total(*arrays: Any) -> jax.Array:
        return (apply(*arrays).astype(jnp.float32) ** 2).sum()

    return jax.jit(jax.grad(total, arguments))


def of_share(config: RoutedFFNConfig, share: float) -> RoutedFFNConfig:
    """The configuration with a share of the blocks active."""
    return dataclasses.replace(config, active_blocks=round(share * config.num_blocks))
