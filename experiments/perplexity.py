"""What each sparse part costs a pretrained decoder, in perplexity, before anything is trained.

The model is adapted on calibration rows, one part at a time, and predicts the tokens of other rows.
Every rule keeps all keys of the first positions, so long rows say more than short ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from rich.table import Table
from tqdm import tqdm

import spt_jax
from spt_jax.config import RoutedFFNConfig, SparseAttentionConfig, SPTConfig
from spt_jax.layers import Attention
from spt_jax.layers.attention import AuxLosses
from spt_jax.models import Decoder

SINKS = 16  # first keys that the window keeps


class WindowAttention(nnx.Module):
    """The first keys and the last, in the place of a layer's sparse attention.

    Args:
        num_keys: keys that a query keeps.
    """

    def __init__(self, num_keys: int) -> None:
        self.num_keys = num_keys

    def granularity_at(self, length: int) -> Literal["token", "dense"]:
        """Dense where the keys of a sequence are no more than those that a query keeps."""
        return "dense" if length <= self.num_keys else "token"

    def __call__(
        self,
        q: Float[Array, "B S N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        *,
        capacity: int,
        **masks: None,
    ) -> tuple[Float[Array, "B S N H"], AuxLosses]:
        """Attention output, and no auxiliary losses."""
        del capacity
        if any(mask is not None for mask in masks.values()):
            raise NotImplementedError("this baseline knows no masks but the causal one")
        query, key = jnp.arange(q.shape[1])[:, None], jnp.arange(q.shape[1])
        kept = (key < SINKS) | (key > query - (self.num_keys - SINKS))
        return jax.nn.dot_product_attention(q, k, v, mask=kept[None, None], is_causal=True), {}


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Of one part alone.

    Attributes:
        name: of the figure: `perplexity_` and this.
        part: for the table.
        keys: that a query keeps at most; None where that is not what is sparse.
        value: exp of the mean loss of a token.
    """

    name: str
    part: str
    keys: int | None
    value: float


def measure_perplexities(
    source: str,
    calibration: Int[np.ndarray, "R S"],
    rows: Int[np.ndarray, "R S"],
    *,
    density: float,
    seed: int,
    ffn: bool,
) -> list[Perplexity]:
    """Perplexity of the dense decoder, and with each part alone.

    Args:
        source: Hugging Face directory or hub id of a causal language model.
        calibration: rows that the parts are fitted to.
        rows: rows that are measured.
        density: share of the keys that sparse attention keeps.
        seed: of k-means and random routers.
        ffn: whether the routed FFN is measured too.
    """
    length = rows.shape[1]
    tile = SparseAttentionConfig(granularity="tile", density=density)
    keys = tile.num_keys(length)

    def dense() -> Decoder:
        model = spt_jax.load_pretrained(source, task="causal-lm", rngs=nnx.Rngs(seed))
        assert isinstance(model, Decoder)
        return model

    def adapted(**parts: Any) -> Decoder:
        config = SPTConfig(serve=None, **{"lora": None, "attention": None, "ffn": None} | parts)
        batch = {"input_ids": calibration}
        return spt_jax.adapt(dense(), config, calibration_batch=batch, rngs=nnx.Rngs(seed))

    def windowed(num_keys: int) -> Decoder:
        model = dense()
        for _, module in nnx.iter_modules(model):
            if isinstance(module, Attention):
                module.sparse = cast(Any, WindowAttention(num_keys))
        return model

    def strict() -> Decoder:
        model = adapted(attention=tile)
        model.set_attributes(strict=True)
        return model

    own = tile.block_q // 2  # keys of its own tile that a query sees, in the mean
    jobs: list[tuple[str, str, int | None, Callable[[], Decoder]]] = [
        ("dense", "dense", length, dense),
        ("attention_tile", "attention, by tile", keys + own, partial(adapted, attention=tile)),
        ("attention_strict", "attention, strictly causal (by token)", keys, strict),
        ("window", "first keys and a window", keys + own, partial(windowed, keys + own)),
    ]
    if ffn:
        routed = RoutedFFNConfig()
        part = f"routed FFN, {routed.active_blocks} of {routed.num_blocks} blocks"
        jobs.append(("ffn", part, None, partial(adapted, ffn=routed)))
    found = []
    for name, part, kept, make in tqdm(jobs, desc="perplexity", disable=not sys.stderr.isatty()):
        found.append(Perplexity(name=name, part=part, keys=kept, value=perplexity(make(), rows)))
        jax.clear_caches()
    return found


def perplexity(model: Decoder, rows: Int[np.ndarray, "R S"]) -> float:
    """Exp of the mean loss of the tokens of rows without padding, but for the first of each row."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def loss(state: nnx.State, row: jax.Array) -> jax.Array:
        logits = nnx.merge(graphdef, state)(row[None]).astype(jnp.float32)[0, :-1]
        chosen = jnp.take_along_axis(logits, row[1:, None], -1)[:, 0]
        return (jax.nn.logsumexp(logits, -1) - chosen).mean()

    return float(np.exp(np.mean([float(loss(state, jnp.asarray(row))) for row in rows])))


def perplexity_table(found: list[Perplexity]) -> Table:
    """Perplexities, and how far they lie above the dense one's."""
    table = Table(title="Perplexity right after adapt, nothing trained")
    for header in ("part", "keys of a query", "perplexity", "over dense"):
        table.add_column(header, justify="left" if header == "part" else "right")
    for one in found:
        keys = "" if one.keys is None else str(one.keys)
        table.add_row(one.part, keys, f"{one.value:.3f}", f"{one.value / found[0].value:.3f}")
    return table


def perplexity_figures(found: list[Perplexity]) -> dict[str, float]:
    """`perplexity_NAME` of each; the strict rule is the token rule, which has a name of its own."""
    figures = {f"perplexity_{one.name}": one.value for one in found}
    return figures | {"perplexity_attention_token": figures["perplexity_attention_strict"]}
