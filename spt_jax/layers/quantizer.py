"""Product-quantization codebooks: where they come from, and the loss that trains them."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, UInt8

from pallas_kernels.arguments import checked
from pallas_kernels.pq.api import check_codebooks


@checked()
def evenly_spaced(x: Float[Array, "n K H"], *, num_codewords: int) -> Float[Array, "K H E 1"]:
    """Codebooks of width 1: for each dimension codewords from its least value to its largest.

    k-means would spend its codewords on the many small values and cut the few large ones, such as
    those of the first token, to which a decoder's queries pay most of their attention.

    Args:
      x: Sample of activations.
      num_codewords: Codewords E of a dimension, at least 2.

    Raises:
      ValueError: There are no samples.
    """
    if not len(x):
        raise ValueError("evenly_spaced needs at least one sample, got none.")
    least, largest = (f(x.astype(jnp.float32), 0)[..., None] for f in (jnp.min, jnp.max))
    share = jnp.arange(num_codewords, dtype=jnp.float32) / (num_codewords - 1)
    return (least + (largest - least) * share)[..., None]


@checked()
@partial(jax.jit, static_argnames=("num_codewords", "codeword_width", "steps"))
def kmeans(
    x: Float[Array, "n K H"],
    *,
    num_codewords: int,
    codeword_width: int,
    steps: int = 20,
    key: PRNGKeyArray,
) -> Float[Array, "K M E C"]:
    """Codebooks by Lloyd's algorithm from k-means++ seeds, for each head and subspace apart.

    A cluster that loses all its points restarts at one of the points farthest from their codewords.
    Equal inputs and keys give equal codebooks. Accumulates in float32; memory grows with n E.

    Args:
      x: Sample of activations.
      num_codewords: Codewords E of a subspace.
      codeword_width: Width C of a codeword; divides H.
      steps: Lloyd iterations.
      key: Random key of the seeding.

    Returns:
      Codebooks, M = H / C.

    Raises:
      ValueError: C does not divide H, or there are no samples.

    References:
      Arthur and Vassilvitskii, "k-means++: The Advantages of Careful Seeding", SODA 2007.
    """
    number, heads, width = x.shape
    if width % codeword_width:
        raise ValueError(f"codeword_width {codeword_width} does not divide the head width {width}.")
    if number == 0:
        raise ValueError("kmeans needs at least one sample, got none.")
    spaces = width // codeword_width
    points = jnp.moveaxis(x.astype(jnp.float32).reshape(number, -1, codeword_width), 0, 1)
    keys = jax.random.split(key, heads * spaces)

    def book(given: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _kmeans(given[0], given[1], num_codewords, steps)

    books = jax.lax.map(book, (points, keys))
    return books.reshape(heads, spaces, num_codewords, codeword_width)


def _kmeans(
    x: Float[Array, "n C"], key: PRNGKeyArray, num_codewords: int, steps: int
) -> Float[Array, "E C"]:
    """k-means of one subspace."""

    def seed(distance: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        chosen = x[jax.random.categorical(key, jnp.log(distance + 1e-30))]
        return jnp.minimum(distance, jnp.sum((x - chosen) ** 2, -1)), chosen

    def step(book: jax.Array, _: None) -> tuple[jax.Array, None]:
        distances = _squared_distances(x, book)
        nearest = jnp.argmin(distances, -1)
        members = jax.nn.one_hot(nearest, num_codewords, dtype=jnp.float32)
        sizes = members.sum(0)
        means = (members.T @ x) / jnp.maximum(sizes, 1)[:, None]
        farthest = jax.lax.top_k(distances.min(-1), min(num_codewords, len(x)))[1]
        empty = sizes == 0
        restart = x[farthest[(jnp.cumsum(empty) - 1) % len(farthest)]]
        return jnp.where(empty[:, None], restart, means), None

    far = jnp.ones(len(x), jnp.float32)
    _, book = jax.lax.scan(seed, far, jax.random.split(key, num_codewords))
    return jax.lax.scan(step, book, length=steps)[0]


def _squared_distances(
    x: Float[Array, "*n C"], codewords: Float[Array, "*e E C"]
) -> Float[Array, "*n E"]:
    """Squared Euclidean distances, by the expanded square, without its negative roundings."""
    products = jnp.einsum("...c,...ec->...e", x, codewords, preferred_element_type=jnp.float32)
    norms = jnp.sum(jnp.square(x), -1, keepdims=True) + jnp.sum(jnp.square(codewords), -1)
    return jnp.maximum(norms - 2 * products, 0)


@checked()
def codebook_loss(
    x: Float[Array, "B S N H"],
    codebooks: Float[Array, "K M E C"],
    codes: UInt8[Array, "B S N M"],
    mask: Bool[Array, "B S"] | None = None,
) -> Float[Array, ""]:
    """Quantization loss of SPT, summed over valid tokens.

    For a vector x with nearest codeword c and soft assignment
    s = sum_e softmax_e(-|x - c_e|^2) c_e, a token's loss is MSE(s, c) + MSE(x, c), each the
    mean over heads and width. Gradients reach the codebooks alone. Computed in float32.

    Args:
      x: Vectors; head n uses codebook n // (N // K).
      codebooks: Codewords.
      codes: Nearest codewords, as `pq_encode` returns them.
      mask: False where a token is padding; None for none.

    Returns:
      The sum over valid tokens.

    Raises:
      ValueError: Shapes or types do not fit together.

    References:
      Gui et al., "SPT: Fine-Tuning Transformer-based Language Models Efficiently with
      Sparsification", arXiv 2312.10365, section 4.
    """
    batch, length, heads, width = x.shape
    check_codebooks("codebook_loss", codebooks, heads, width)
    kv_heads, spaces, _, codeword_width = codebooks.shape
    vectors = jax.lax.stop_gradient(x).astype(jnp.float32)
    vectors = vectors.reshape(batch, length, heads, spaces, codeword_width)
    books = jnp.repeat(codebooks.astype(jnp.float32), heads // kv_heads, axis=0)
    members = jax.nn.one_hot(codes, books.shape[2], dtype=jnp.float32)
    nearest = jnp.einsum("bsnme,nmec->bsnmc", members, books)
    soft = jnp.einsum(
        "bsnme,nmec->bsnmc", jax.nn.softmax(-_squared_distances(vectors, books)), books
    )
    errors = jnp.square(soft - nearest) + jnp.square(vectors - nearest)
    losses = errors.sum((2, 3, 4)) / (heads * width)
    return jnp.sum(losses if mask is None else jnp.where(mask, losses, 0))
