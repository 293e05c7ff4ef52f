"""Queries and keys that overlap as those of text do.

    python -m experiments.text_like --model ID_OR_DIR --text-file FILE

Of random queries and keys each tile's best groups of keys lie anywhere, so that a kernel that works
on blocks of 64 keys takes many blocks for few keys. In text they lie together: near the query, and
where its topic was spoken of. `text_like` draws both; the command prints, for layers of a model and
for what is drawn, the share of attention that lies on the keys of the selected groups, and how many
blocks of 64 keys a tile's list touches for each that it would fill.

SmolLM2-135M-Instruct on the first 2,048 tokens of WikiText-2's test text, density 1/8, mean of
layers 1, 8, 15, 22 and 28: 1.64 blocks with groups of 16 keys and 1.31 with groups of 32, 0.87 of
attention. Drawn, 4 heads of 128: 1.77, 1.32 and 0.87. Of normal numbers: 2.31, 1.54 and 0.34.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from rich.table import Table

import spt_jax
from experiments.attention_capture import LayerActivations, attention_mass, record_layers
from pallas_kernels import (
    TileSelection,
    pq_encode,
    pq_select,
    score_unit,
    scoring_codewords,
)
from spt_jax import cli
from spt_jax.layers.quantizer import evenly_spaced
from spt_jax.training import read_text

#: Logits of a key at the query's own place, of one of its topic, and the deviation of the rest:
#: chosen so that a tile's list of key groups is as scattered as SmolLM2's (module docstring).
PLACE, TOPIC, OWN = 8.0, 4.0, 2.0
#: Tokens over which a topic fades, to 1/e.
TOPIC_TOKENS = 32.0
#: Rotary base, SmolLM2's.
BASE = 1e5
#: Keys of a block, as the kernels multiply them.
BLOCK = 64


@partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def text_like(
    key: jax.Array, batch: int, length: int, heads: int, width: int, dtype: Any
) -> tuple[Float[Array, "B S N H"], Float[Array, "B S N H"]]:
    """Draws queries and keys whose logits fall with distance and gather by topic.

    A token's query and key share a vector of its place, rotated as rotary embedding rotates, and
    one of its topic, which fades from token to token; the rest is their own. Logits are
    <q, k> / sqrt(H), and do not depend on H but for their spread.

    Args:
      key: Random key.
      batch: Sequences B.
      length: Their tokens S.
      heads: Heads N, drawn apart.
      width: H, even.
      dtype: Of the results; they are drawn in float32.

    Returns:
      Queries and keys.
    """
    phase_key, topic_key, *own_keys = jax.random.split(key, 4)
    size = (batch, length, heads, width)

    def unit(key: jax.Array) -> jax.Array:
        return width**-0.5 * jax.random.normal(key, size)

    frequency = BASE ** (-jnp.arange(width // 2) / (width // 2))
    phase = 2 * jnp.pi * jax.random.uniform(phase_key, (heads, width // 2))
    angle = jnp.arange(length)[:, None, None] * frequency + phase
    place = (2 / width) ** 0.5 * jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)

    # Noise, coloured: its spectrum is that of AR(1), around the sequence.
    fade = jnp.exp(-1 / TOPIC_TOKENS)
    turns = 2 * jnp.pi * jnp.arange(length // 2 + 1) / length
    colour = jnp.sqrt((1 - fade**2) / (1 - 2 * fade * jnp.cos(turns) + fade**2))
    spectrum = jnp.fft.rfft(unit(topic_key), axis=1) * colour[:, None, None]
    topic = jnp.fft.irfft(spectrum, n=length, axis=1)
    shared = PLACE**0.5 * place + TOPIC**0.5 * topic
    own = (OWN**0.5 * width**0.25 * unit(k) for k in own_keys)
    q, k = ((width**0.25 * (shared + part)).astype(dtype) for part in own)
    return q, k


def codebooks(
    q: Float[Array, "B S N H"], k: Float[Array, "B S N H"]
) -> tuple[Float[Array, "N H 16 1"], Float[Array, "N H 16 1"]]:
    """The library's default codebooks, fitted to the first sequence."""
    return evenly_spaced(q[0], num_codewords=16), evenly_spaced(k[0], num_codewords=16)


def touched_blocks(selection: TileSelection) -> float:
    """Blocks of 64 keys that the lists of tiles touch, over the fewest that hold as many groups.

    Tiles that keep all keys before them are left out where there are others: they waste nothing.
    """
    per_block = BLOCK // selection.key_group
    groups, counts = np.asarray(selection.groups), np.asarray(selection.counts)
    listed = np.arange(groups.shape[-1]) < counts[..., None]
    touched = (np.diff(groups // per_block, axis=-1, prepend=-1) != 0) & listed
    choosing = counts == counts.max()
    return float(touched.sum(-1)[choosing].sum() / (-(-counts[choosing] // per_block)).sum())


def selected(
    q: Float[Array, "B S N H"], k: Float[Array, "B S K H"], key_group: int
) -> TileSelection:
    """Key groups of an eighth of the keys for tiles of 64 queries, causally, by `codebooks`."""
    books = codebooks(q[:, :, :: q.shape[2] // k.shape[2]], k)
    query_codewords, key_codewords = scoring_codewords(*books)
    selection = pq_select(
        pq_encode(q, books[0], implementation="xla"),
        pq_encode(k, books[1], implementation="xla"),
        query_codewords,
        key_codewords,
        num_keys=q.shape[1] // 8,
        granularity="tile",
        block_q=BLOCK,
        key_group=key_group,
        score_unit=score_unit(*books),
        causal=True,
        implementation="xla",
    )
    assert isinstance(selection, TileSelection)
    return selection


def kept_mass(q: Float[Array, "B S N H"], k: Float[Array, "B S K H"], key_group: int) -> float:
    """Share of attention on the keys of `selected`, over the queries that cannot keep all."""
    selection = selected(q, k, key_group)
    length = q.shape[1]
    groups, counts = np.asarray(selection.groups), np.asarray(selection.counts)
    beyond = -(-length // key_group)
    listed = np.where(np.arange(groups.shape[-1]) < counts[..., None], groups, beyond)
    kept = np.zeros((*counts.shape, beyond + 1), bool)
    np.put_along_axis(kept, listed, True, -1)
    keys = kept[..., :beyond].repeat(key_group, -1).repeat(BLOCK, -2)[..., :length, :length]
    mass = np.asarray(attention_mass(LayerActivations(q, k), causal=True))
    return float((mass * keys).sum(-1)[..., length // 8 :].mean())


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the comparison."""

    model: str
    """Hugging Face directory or hub id of a causal language model."""
    text_file: Path
    """UTF-8 text."""
    length: int = 2048
    """Tokens of its beginning, a multiple of 64."""
    layers: str = "1,8,15,22,28"
    """Layers to look at, separated by commas."""
    heads: int = 4
    """Heads to draw."""
    head_width: int = 128
    """Their width."""


def main() -> None:
    """Print the comparison."""
    options = cli.parse(Options, "experiments.text_like", __doc__)
    if options.length < BLOCK or options.length % BLOCK:
        raise ValueError(f"--length must be a multiple of {BLOCK}, got {options.length}")
    model = spt_jax.load_pretrained(options.model, task="causal-lm")
    text = "\n".join(read_text(options.text_file))
    ids = spt_jax.load_tokenizer(options.model).encode(text[: 20 * options.length]).ids
    if len(ids) < options.length:
        raise ValueError(f"{options.text_file} has {len(ids)} tokens; --length {options.length}")
    found = record_layers(model, np.array(ids[: options.length])[None])
    known = cli.known_names(options.layers, map(str, range(len(found))), what="layer")
    pairs = {f"layer {name}": (found[int(name)].q, found[int(name)].k) for name in known}
    size = (1, options.length, options.heads, options.head_width)
    keys = jax.random.split(jax.random.key(0), 3)
    pairs["drawn"] = text_like(keys[0], *size, jnp.float32)
    pairs["normal"] = (jax.random.normal(keys[1], size), jax.random.normal(keys[2], size))
    table = Table(title=f"{options.length} tokens, density 1/8, tiles of 64 queries")
    for header in ("", "blocks, groups of 16", "blocks, groups of 32", "attention kept"):
        table.add_column(header, justify="right")
    for name, (q, k) in pairs.items():
        blocks = [f"{touched_blocks(selected(q, k, group)):.2f}" for group in (16, 32)]
        table.add_row(name, *blocks, f"{kept_mass(q, k, 16):.2f}")
    cli.console().print(table)


if __name__ == "__main__":
    cli.run(main)
