"""What `adapt` measures on real activations: codebooks, blocks of hidden units, routers."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from spt_jax.config import RoutedFFNConfig, SparseAttentionConfig
from spt_jax.layers import FeedForward, SparseAttention
from spt_jax.layers.quantizer import kmeans

#: Tokens of the calibration batch, evenly spread, that codebooks, blocks and routers are fitted to.
CALIBRATION_TOKENS = 4096
KMEANS_STEPS = 20
CLUSTERING_STEPS = 15
#: Ridge penalty of the router fit, as a share of the mean variance of its inputs.
ROUTER_RIDGE = 0.01
#: Candidates for the scale and the shift of a router's logits.
ROUTER_SCALES = np.array([0.05, 0.1, 0.2, 0.4, 0.8], np.float32)
ROUTER_SHIFTS = np.linspace(-0.5, 0.5, 11, dtype=np.float32)


def spread[Rows: (jax.Array, np.ndarray)](rows: Rows, number: int = CALIBRATION_TOKENS) -> Rows:
    """At most `number` of the rows of an array, evenly spaced."""
    if len(rows) <= number:
        return rows
    return rows[np.linspace(0, len(rows) - 1, number).astype(np.int32)]


def fit_sparse_attention(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    *,
    config: SparseAttentionConfig,
    causal: bool,
    key: jax.Array,
) -> SparseAttention:
    """Codebooks by k-means on the queries and keys of one attention layer.

    Args:
        q: queries of valid tokens.
        k: keys of valid tokens.
        config: codeword width, number of codewords, rule.
        causal: whether the layer is causal.
        key: seeds k-means.

    Returns:
        The module that replaces dense attention.

    Raises:
        ValueError: the codeword width does not divide the head width, or there are fewer tokens
            than codewords.
    """
    width = q.shape[-1]
    if width % config.codeword_width:
        raise ValueError(
            f"codeword_width={config.codeword_width} does not divide the head width {width}"
        )
    if q.shape[0] < config.num_codewords:
        raise ValueError(
            f"the calibration batch has {q.shape[0]} tokens, fewer than "
            f"num_codewords={config.num_codewords}; give a larger batch"
        )
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    center = k.mean(0)
    num_kv_heads = k.shape[1]
    # query heads that share a key/value head share its query codebook
    grouped = q.reshape(q.shape[0], num_kv_heads, -1, width).swapaxes(1, 2)
    queries = spread(grouped.reshape(-1, num_kv_heads, width))
    options = {
        "num_codewords": config.num_codewords,
        "codeword_width": config.codeword_width,
        "steps": KMEANS_STEPS,
    }
    query_key, key_key = jax.random.split(key)
    if config.rule == "match_count":
        both = spread(jnp.concatenate([queries, k - center]))
        return SparseAttention(
            None, kmeans(both, key=key_key, **options), center, config=config, causal=causal
        )
    return SparseAttention(
        kmeans(queries, key=query_key, **options),
        kmeans(k - center, key=key_key, **options),
        center,
        config=config,
        causal=causal,
    )


class Routing(NamedTuple):
    """Blocks and router of one FFN."""

    permutation: Int[Array, "F"]
    router_kernel: Float[Array, "D G"]
    router_bias: Float[Array, "G"]
    absent_output: Float[Array, "G D"]


def fit_routing(x: Float[Array, "T D"], ffn: FeedForward, config: RoutedFFNConfig) -> Routing:
    """Blocks of hidden units that fire together, and a router that predicts each block's share.

    A hidden unit is described by the size of its contribution to the output on each token. Balanced
    k-means groups units whose contributions rise and fall together. A ridge regression predicts,
    from the FFN's input, the logarithm of a block's output norm over the mean of all blocks: the
    rank of a block. The router's logits are that prediction, scaled and shifted so that the active
    blocks times `2 sigmoid(logit)` come nearest to the dense output.

    Args:
        x: inputs of the FFN at valid tokens.
        ffn: the dense FFN, LoRA still at zero.
        config: number of blocks and of active ones.

    Returns:
        Permutation (block g is its g-th run of F / G entries), router kernel and bias, and the mean
        output of each block over the tokens that leave it out.
    """
    x = x.astype(jnp.float32)
    hidden = ffn.hidden(x.astype(ffn.up.dtype)).astype(jnp.float32)
    down = ffn.down.kernel[...].astype(jnp.float32)
    contribution = jnp.abs(hidden) * jnp.linalg.norm(down, axis=1)
    labels = balanced_kmeans(np.asarray(contribution.T), config.num_blocks)
    permutation = jnp.asarray(np.argsort(labels, kind="stable").astype(np.int32))
    blocks = permutation.reshape(config.num_blocks, -1)
    outputs = jnp.stack([hidden[:, units] @ down[units] for units in blocks], axis=1)
    norms = jnp.linalg.norm(outputs, axis=-1)
    kernel, bias = _ridge(x, jnp.log(norms + 1e-6) - jnp.log(norms.mean(-1, keepdims=True) + 1e-6))
    rank = x @ kernel + bias
    active = jax.nn.one_hot(jax.lax.top_k(rank, config.active_blocks)[1], config.num_blocks).sum(1)
    absent = 1 - active
    means = jnp.einsum("tg,tgd->gd", absent, outputs) / jnp.maximum(absent.sum(0), 1)[:, None]
    scale, shift = _fit_coefficients(rank, active, outputs, means)
    return Routing(permutation, scale * kernel, scale * bias + shift, means)


def random_routing(ffn: FeedForward, config: RoutedFFNConfig, *, key: jax.Array) -> Routing:
    """Blocks and a router drawn at random, as in the paper; an absent block adds nothing.

    Args:
        ffn: the dense FFN.
        config: number of blocks.
        key: seeds the permutation and the router's kernel, whose bias is zero.
    """
    width, blocks = ffn.up.in_features, config.num_blocks
    permutation_key, router_key = jax.random.split(key)
    return Routing(
        jax.random.permutation(permutation_key, jnp.arange(ffn.up.out_features, dtype=jnp.int32)),
        nnx.initializers.lecun_normal()(router_key, (width, blocks)),
        jnp.zeros(blocks),
        jnp.zeros((blocks, width)),
    )


@jax.jit
def _fit_coefficients(
    rank: Float[Array, "T G"],
    active: Float[Array, "T G"],
    outputs: Float[Array, "T G D"],
    means: Float[Array, "G D"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Scale and shift of the logits, from a grid, that come nearest to the dense output."""
    # what is missing of the dense output is sum_g (1 - c_g) outputs_g over the active blocks, plus
    # a part of the absent ones that does not depend on the coefficients
    absent = jnp.einsum("tg,tgd->td", 1 - active, outputs - means)
    gram = jnp.einsum("tgd,thd->tgh", outputs, outputs)
    cross = jnp.einsum("tgd,td->tg", outputs, absent)

    def squared_error(scale_shift: Float[Array, "2"]) -> Float[Array, ""]:
        scale, shift = scale_shift
        missing = active * (1 - 2 * jax.nn.sigmoid(scale * rank + shift))
        return jnp.einsum("tg,tgh,th->", missing, gram, missing) + 2 * (missing * cross).sum()

    grid = jnp.stack(jnp.meshgrid(ROUTER_SCALES, ROUTER_SHIFTS, indexing="ij"), -1).reshape(-1, 2)
    scale, shift = grid[jnp.argmin(jax.lax.map(squared_error, grid))]
    return scale, shift


def _ridge(
    x: Float[Array, "T D"], target: Float[Array, "T G"]
) -> tuple[Float[Array, "D G"], Float[Array, "G"]]:
    """Ridge regression with an unpenalised intercept, in float64."""
    inputs, outputs = np.asarray(x, np.float64), np.asarray(target, np.float64)
    mean_in, mean_out = inputs.mean(0), outputs.mean(0)
    centered = inputs - mean_in
    gram = centered.T @ centered
    penalty = ROUTER_RIDGE * np.trace(gram) / len(gram) + 1e-12
    kernel = np.linalg.solve(gram + penalty * np.eye(len(gram)), centered.T @ (outputs - mean_out))
    return jnp.asarray(kernel, jnp.float32), jnp.asarray(mean_out - mean_in @ kernel, jnp.float32)


def balanced_kmeans(features: np.ndarray, num_clusters: int) -> np.ndarray:
    """k-means by cosine similarity with clusters of equal size.

    Rows are assigned in the order of what they would lose by their second choice, each to its best
    cluster with room left (the greedy form of the assignment problem).

    Args:
        features: float `[F, n]`, one row an item; F is a multiple of `num_clusters`.
        num_clusters: clusters G.

    Returns:
        Cluster of each row, int `[F]`, each cluster F / G times.

    Raises:
        ValueError: F is no multiple of `num_clusters`.
    """
    items = len(features)
    if items % num_clusters:
        raise ValueError(f"{items} hidden units do not split into num_blocks={num_clusters} blocks")
    if num_clusters == 1:
        return np.zeros(items, np.int64)
    features = features - features.mean(1, keepdims=True)
    features = features / (np.linalg.norm(features, axis=1, keepdims=True) + 1e-12)
    centers = _spread_seeds(features, num_clusters)
    labels = np.full(items, -1)
    for _ in range(CLUSTERING_STEPS):
        previous, labels = labels, _balanced_assignment(features @ centers.T)
        if np.array_equal(previous, labels):
            break
        centers = np.stack([features[labels == g].mean(0) for g in range(num_clusters)])
        centers /= np.linalg.norm(centers, axis=1, keepdims=True) + 1e-12
    return labels


def _spread_seeds(features: np.ndarray, number: int) -> np.ndarray:
    """The row nearest the overall mean, then repeatedly the row least similar to all chosen."""
    seeds = [int(np.argmax(features @ features.mean(0)))]
    while len(seeds) < number:
        seeds.append(int(np.argmin((features @ features[seeds].T).max(1))))
    return features[seeds]


def _balanced_assignment(similarity: np.ndarray) -> np.ndarray:
    items, clusters = similarity.shape
    room = np.full(clusters, items // clusters)
    labels = np.full(items, -1)
    waiting = np.arange(items)
    while len(waiting):
        open_clusters = np.flatnonzero(room)
        scores = similarity[np.ix_(waiting, open_clusters)]
        best = scores.argmax(1)
        if len(open_clusters) == 1:
            regret = scores[:, 0]
        else:
            two = np.partition(scores, -2, axis=1)[:, -2:]
            regret = two[:, 1] - two[:, 0]
        order = np.argsort(-regret, kind="stable")
        for i, cluster in enumerate(open_clusters):
            # those whose first choice this is, up to its room; the rest choose again
            taken = waiting[order[best[order] == i][: room[cluster]]]
            labels[taken] = cluster
            room[cluster] -= len(taken)
        waiting = np.flatnonzero(labels < 0)
    return labels
