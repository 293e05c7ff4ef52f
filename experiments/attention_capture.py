"""How much of the true attention the kept keys hold, on activations of a real model.

A query's attention mass is its row of the softmax; what a selection captures is the sum over the
keys that it keeps. The keys that a rule keeps come from the library itself:
`fit_sparse_attention`, `pq_encode`, `scoring_codewords`, `pq_select`. The oracle keeps the keys, or
the groups of keys, that hold most mass, under the same budget and the same constraints.

Example:
    >>> layers = record_layers(model, input_ids)  # doctest: +SKIP
    >>> sparse = fit(record_layers(model, others)[0], Rule(), causal=True)  # doctest: +SKIP
    >>> mass = attention_mass(layers[0], causal=True)  # doctest: +SKIP
    >>> captured(mass, kept_keys(layers[0], sparse, num_keys=64))  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import kept_keys as keys_of_selection
from pallas_kernels import valid_keys
from pallas_kernels.pq import reference
from spt_jax.calibration import (
    CALIBRATION_TOKENS,
    fit_sparse_attention,
    record_activations,
    spread,
)
from spt_jax.config import SparseAttentionConfig
from spt_jax.layers import Attention, SparseAttention

Granularity = Literal["token", "tile"]


class LayerActivations(NamedTuple):
    """Queries and keys of one attention layer, as attention gets them.

    Attributes:
        q: `[B, S, N, H]`.
        k: `[B, S, K, H]`.
    """

    q: jax.Array
    k: jax.Array


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What decides which keys are kept.

    Attributes:
        kind: "pq", keys chosen from codes as the library does; "oracle", those of most mass;
            "window", the nearest keys (with causal attention the last ones), or, of tiles, the
            nearest groups.
        granularity: "token" or "tile".
        score: of "pq": how codes score a key.
        codeword_width: of "pq": C.
        num_codewords: of "pq": E.
        block_q: of "tile": queries of a tile.
        key_group: of "tile": keys of a group.
    """

    kind: Literal["pq", "oracle", "window"] = "pq"
    granularity: Granularity = "token"
    score: Literal["inner_product", "match_count"] = "inner_product"
    codeword_width: int = SparseAttentionConfig.codeword_width
    num_codewords: int = SparseAttentionConfig.num_codewords
    block_q: int = SparseAttentionConfig.block_q
    key_group: int = SparseAttentionConfig.key_group

    def config(self) -> SparseAttentionConfig:
        """The library's configuration of a "pq" rule."""
        return SparseAttentionConfig(
            granularity=self.granularity,
            rule=self.score,
            codeword_width=self.codeword_width,
            num_codewords=self.num_codewords,
            block_q=self.block_q,
            key_group=self.key_group,  # type: ignore[arg-type]
        )


@dataclass(frozen=True, kw_only=True)
class Capture:
    """What a rule captures at one budget.

    Attributes:
        rule: which keys are kept.
        causal: whether the future is masked.
        length: positions S.
        num_keys: keys that a query keeps at most.
        shares: mean captured mass, `[layers, N]`.
        kept: mean number of valid keys that a query keeps.
    """

    rule: Rule
    causal: bool
    length: int
    num_keys: int
    shares: np.ndarray
    kept: float

    @property
    def share(self) -> float:
        """Mean over layers and heads."""
        return float(self.shares.mean())


def record_layers(model: nnx.Module, input_ids: Int[np.ndarray, "B S"]) -> list[LayerActivations]:
    """Queries and keys of every attention layer, in the model's order.

    Args:
        model: a model of `load_pretrained`, adapted or not.
        input_ids: rows without padding.
    """
    layers = layer_tokens(model, {"input_ids": input_ids}, most=None)
    return [
        LayerActivations(*(x.reshape(*input_ids.shape, *x.shape[1:]) for x in layer))
        for layer in layers
    ]


def layer_tokens(
    model: nnx.Module,
    batch: Mapping[str, jax.Array | np.ndarray],
    *,
    most: int | None = CALIBRATION_TOKENS,
) -> list[LayerActivations]:
    """The same at the valid tokens of a batch, `[T, N, H]` and `[T, K, H]`.

    Args:
        model: a model of `load_pretrained`, adapted or not.
        batch: its arguments; see `record_activations`.
        most: tokens to keep, evenly spread; None for all.
    """
    modules = dict(nnx.iter_modules(model))
    return [
        LayerActivations(**arrays)
        for path, arrays in record_activations(model, batch, most=most)
        if isinstance(modules[path], Attention)
    ]


def fit(layer: LayerActivations, rule: Rule, *, causal: bool, seed: int = 0) -> SparseAttention:
    """Codebooks of a "pq" rule, from as many tokens as `spt_jax.adapt` takes.

    Args:
        layer: activations to calibrate on; others than those to be measured.
        rule: codeword width and number, score.
        causal: whether the layer masks the future.
        seed: of k-means.
    """
    q, k = (spread(a.reshape(-1, *a.shape[2:])) for a in layer)
    return fit_sparse_attention(q, k, config=rule.config(), causal=causal, key=jax.random.key(seed))


@partial(jax.jit, static_argnames="causal")
def attention_mass(layer: LayerActivations, *, causal: bool) -> Float[Array, "B N S S"]:
    """Softmax of <q, k> / sqrt(H) over all keys that a query may see, float32."""
    q, k = layer
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    logits = q.shape[-1] ** -0.5 * jnp.einsum(
        "bqnh,bknh->bnqk", q, k, preferred_element_type=jnp.float32
    )
    if causal:
        logits = jnp.where(jnp.tri(q.shape[1], dtype=bool), logits, -jnp.inf)
    return jax.nn.softmax(logits)


def kept_keys(
    layer: LayerActivations, sparse: SparseAttention, *, num_keys: int
) -> Bool[Array, "B N S S"]:
    """The valid keys that the library keeps.

    Args:
        layer: activations to select on.
        sparse: a layer's `SparseAttention`, which knows its codebooks, rule and granularity.
        num_keys: L.
    """
    graphdef, state = nnx.split(sparse)
    return _kept_keys(graphdef, state, layer, num_keys)


@partial(jax.jit, static_argnames=("graphdef", "num_keys"))
def _kept_keys(
    graphdef: nnx.GraphDef[SparseAttention],
    state: nnx.State,
    layer: LayerActivations,
    num_keys: int,
) -> Bool[Array, "B N S S"]:
    sparse, length = nnx.merge(graphdef, state), layer.q.shape[1]
    granularity = sparse.config.granularity
    assert granularity in ("token", "tile")
    selection = sparse.select(layer.q, layer.k, num_keys=num_keys, granularity=granularity)
    return keys_of_selection(selection, length) & valid_keys(length, sparse.causal)


@partial(jax.jit, static_argnames=("rule", "num_keys", "causal"))
def oracle_keys(
    mass: Float[Array, "B N S S"], rule: Rule, *, num_keys: int, causal: bool
) -> Bool[Array, "B N S S"]:
    """The valid keys that hold most mass, under the budget and constraints of `pq_select`.

    Args:
        mass: of `attention_mass`.
        rule: granularity, `block_q` and `key_group`.
        num_keys: L.
        causal: whether the future is masked.
    """
    length = mass.shape[-1]
    if rule.granularity == "token":
        return _valid(_top(mass, min(num_keys, length)), causal)
    tiles, groups = -(-length // rule.block_q), -(-length // rule.key_group)
    pad = (0, tiles * rule.block_q - length), (0, groups * rule.key_group - length)
    mass = jnp.pad(mass, ((0, 0), (0, 0), *pad))
    mass = mass.reshape(*mass.shape[:2], tiles, rule.block_q, groups, rule.key_group)
    return _valid(
        _keys_of(_top_groups(mass.sum((3, 5)), rule, length, num_keys, causal), rule, length),
        causal,
    )


@partial(jax.jit, static_argnames=("length", "rule", "num_keys", "causal"))
def window_keys(length: int, rule: Rule, *, num_keys: int, causal: bool) -> Bool[Array, "1 1 S S"]:
    """The nearest valid keys, of equals the earlier ones, under the budget of `pq_select`.

    Args:
        length: positions S.
        rule: granularity, `block_q` and `key_group`.
        num_keys: L.
        causal: whether the future is masked.
    """
    if rule.granularity == "token":
        near = -reference.tie_distance(length).astype(jnp.float32)
        if causal:
            near = jnp.where(jnp.tri(length, dtype=bool), near, -2 * length)
        return _valid(_top(near, min(num_keys, length))[None, None], causal)
    own, away = reference.tile_groups(length, rule.block_q, rule.key_group)
    near = jnp.where(own, 1, -away).astype(jnp.float32)
    kept = _top_groups(near, rule, length, num_keys, causal)
    return _valid(_keys_of(kept, rule, length)[None, None], causal)


def captured(mass: Float[Array, "B N S S"], kept: Bool[Array, "#B #N S S"]) -> Float[Array, "N"]:
    """Mass that the kept keys hold, the mean over queries and sequences."""
    return jnp.where(kept, mass, 0).sum(-1).mean((0, 2))


def measure(
    layers: Sequence[LayerActivations],
    rule: Rule,
    *,
    num_keys: int,
    causal: bool,
    calibration: Sequence[LayerActivations] | None = None,
    sparse: Sequence[SparseAttention] | None = None,
) -> Capture:
    """What a rule captures on all layers.

    Args:
        layers: activations to measure on.
        rule: which keys are kept.
        num_keys: L.
        causal: whether the future is masked.
        calibration: of "pq": activations of other sequences, to fit the rule to.
        sparse: of "pq": rules fitted before, for instance with a trained model, instead.

    Returns:
        Captured shares; their ratio to those of the oracle of the same granularity, budget and
        mask is the quality of the rule.

    Raises:
        ValueError: a "pq" rule has neither `calibration` nor `sparse`.
    """
    if rule.kind == "pq" and sparse is None:
        if calibration is None:
            raise ValueError('a rule of kind "pq" needs calibration, or sparse')
        sparse = [fit(layer, rule, causal=causal, seed=i) for i, layer in enumerate(calibration)]
    length = layers[0].q.shape[1]
    options = {"num_keys": num_keys, "causal": causal}
    shares, numbers = [], []
    for i, layer in enumerate(layers):
        mass = attention_mass(layer, causal=causal)
        if rule.kind == "pq":
            assert sparse is not None
            kept = kept_keys(layer, sparse[i], num_keys=num_keys)
        elif rule.kind == "oracle":
            kept = oracle_keys(mass, rule, **options)
        else:
            kept = window_keys(length, rule, **options)
        shares.append(np.asarray(captured(mass, kept)))
        numbers.append(float(kept.sum(-1).mean()))
    return Capture(
        rule=rule,
        causal=causal,
        length=length,
        num_keys=num_keys,
        shares=np.stack(shares),
        kept=float(np.mean(numbers)),
    )


def _top(score: Float[Array, "*n m"], count: int) -> Bool[Array, "*n m"]:
    """The `count` highest of each row, of equals the first."""
    chosen = jax.lax.top_k(score, count)[1]
    return jnp.put_along_axis(jnp.zeros(score.shape, bool), chosen, True, -1, inplace=False)


def _top_groups(
    score: Float[Array, "*n Q G"], rule: Rule, length: int, num_keys: int, causal: bool
) -> Bool[Array, "*n Q G"]:
    """The groups of highest score that a tile sees, with `causal` its own before all others."""
    if causal:
        tiles, groups = (np.arange(n) for n in score.shape[-2:])
        seen = groups * rule.key_group < (tiles[:, None] + 1) * rule.block_q
        own, _ = reference.tile_groups(length, rule.block_q, rule.key_group)
        score = jnp.where(seen, jnp.where(own, jnp.inf, score), -jnp.inf)
    count = reference.tile_list_length(
        length,
        num_keys,
        block_q=rule.block_q,
        key_group=rule.key_group,
        causal=causal,
        segments=False,
    )
    return _top(score, count)


def _keys_of(kept: Bool[Array, "*n Q G"], rule: Rule, length: int) -> Bool[Array, "*n S S"]:
    """Kept groups of tiles as kept keys of queries."""
    kept = jnp.repeat(jnp.repeat(kept, rule.block_q, -2), rule.key_group, -1)
    return kept[..., :length, :length]


def _valid(kept: Bool[Array, "*n S S"], causal: bool) -> Bool[Array, "*n S S"]:
    return kept & jnp.tri(kept.shape[-1], dtype=bool) if causal else kept
