"""What `adapt` measures on real activations: codebooks, blocks of hidden units, routers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from flax import nnx
from jaxtyping import Array, Float, Int

from spt_jax import by_layer
from spt_jax.config import RoutedFFNConfig, SparseAttentionConfig
from spt_jax.layers import FeedForward, SparseAttention, recording
from spt_jax.layers.quantizer import evenly_spaced, kmeans
from spt_jax.models import Decoder, Encoder
from spt_jax.processes import to_host

Path = tuple[Any, ...]  # of a module in a model, as nnx.iter_modules gives it

#: Arguments of a model that are taken from a batch.
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "segment_ids")
#: What of a layer's activations its sparse part is fitted to.
FITTED = ("q", "k", "x")
#: Tokens of the calibration batch, evenly spread, that codebooks, blocks and routers are fitted to.
CALIBRATION_TOKENS = 4096
#: Tokens of a pass through the model that records, but for one sequence.
PASS_TOKENS = 4096
#: Memory that recorded activations of layers may take together, but for one layer.
RECORDED_BYTES = 1 << 30
KMEANS_STEPS = 20
CLUSTERING_STEPS = 15
#: Ridge penalty of the router fit, as a share of the mean variance of its inputs.
ROUTER_RIDGE = 0.01
#: Rounds in which the router and the constants of left-out blocks are fitted to each other.
ROUTER_STEPS = 3
#: Penalty of those constants, as a share of the mean number of tokens that leave a block out.
CONSTANTS_RIDGE = 1e-3
#: Penalty of their linear maps, as a share of the summed variance of an input over all tokens; the
#: rounds in which blocks are fitted to what the others leave, and the steps to a map of low rank.
ABSENT_RIDGE = 0.05
ABSENT_ROUNDS = 3
ABSENT_STEPS = 8
#: Rounds of exchanges of hidden units between blocks, the share of the units that are exchanged in
#: the first round, and the share below which rounds stop once they no longer help.
EXCHANGE_ROUNDS = 12
EXCHANGE_SHARE = 1 / 16
EXCHANGE_STOP = 1 / 512
#: Candidates for the scale and the shift of a router's logits.
ROUTER_SCALES = np.array([0.05, 0.1, 0.2, 0.4, 0.8], np.float32)
ROUTER_SHIFTS = np.linspace(-0.5, 0.5, 11, dtype=np.float32)


def spread[Rows: (jax.Array, np.ndarray)](rows: Rows, number: int = CALIBRATION_TOKENS) -> Rows:
    """At most `number` of the rows of an array, evenly spaced."""
    if len(rows) <= number:
        return rows
    return rows[np.linspace(0, len(rows) - 1, number).astype(np.int32)]


def record_activations(
    model: nnx.Module,
    batch: Mapping[str, jax.Array | np.ndarray],
    *,
    most: int | None = CALIBRATION_TOKENS,
    layers: Collection[Path] | None = None,
) -> Iterator[tuple[Path, dict[str, jax.Array]]]:
    """What each attention layer and FFN of a model reads at the valid tokens of a batch.

    Layers of which all that is recorded takes little memory are recorded together; then the model
    runs again, up to the next ones.

    Args:
        model: dense or adapted; not changed.
        batch: arguments of the model: `input_ids` int `[B, S]` and, optionally, `attention_mask`,
            `token_type_ids` and `segment_ids`; other columns are left out.
        most: tokens to keep, evenly spread; None for all.
        layers: paths of those that are recorded; None for all.

    Yields:
        Path of the module and `{name: [T, ...]}`, in the model's order: queries `q` `[T, N, H]`,
        keys `k` `[T, K, H]` of attention, inputs `x` `[T, D]` of an FFN; of all calls where the
        model calls a module several times.
    """
    inputs = inputs_of(batch)
    mask = inputs.get("attention_mask", jnp.ones_like(inputs["input_ids"]))
    tokens = np.flatnonzero(np.asarray(mask))
    if most is not None:
        tokens = spread(tokens, most)
    parts = row_parts(inputs, PASS_TOKENS)
    size = parts[0]["input_ids"].size
    of_parts = [tokens[tokens // size == n] % size for n in range(len(parts))]
    longest = max(map(len, of_parts))
    padded = [np.pad(own, (0, longest - len(own))) for own in of_parts]
    graphdef, state = nnx.split(model)
    paths = [path for path, _ in nnx.iter_modules(model)]
    every = tuple(n for n, path in enumerate(paths) if layers is None or path in layers)
    whole = partial(_recorded, graphdef, state)
    shapes = jax.eval_shape(partial(whole, numbers=every), parts[0], padded[0])

    def recorded(
        part: dict[str, jax.Array], own: np.ndarray, numbers: tuple[int, ...]
    ) -> dict[int, list[dict[str, jax.Array]]]:
        wanted = {paths[number]: number for number in numbers}
        if isinstance(model, Decoder | Encoder) and all(p[0] == "layers" for p in wanted):
            found = by_layer.recorded(model, part, jnp.asarray(own), wanted, FITTED)
            return {wanted[path]: calls for path, calls in found.items()}
        return whole(part, own, numbers=numbers)

    sizes = {
        number: len(parts) * sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(calls))
        for number, calls in shapes.items()
        if calls
    }
    for taken in grouped(sizes, RECORDED_BYTES):
        found = [
            recorded(part, own, numbers=tuple(taken))
            for part, own in zip(parts, padded, strict=True)
        ]
        for number in taken:
            yield paths[number], _joined([f.pop(number) for f in found], of_parts, most)


def row_parts(inputs: Mapping[str, jax.Array], tokens: float) -> list[dict[str, jax.Array]]:
    """Rows in parts of equal size, of at most so many tokens, but for one row."""
    rows, length = inputs["input_ids"].shape
    most = min(rows, max(1, int(tokens) // length))
    number = next(n for n in range(most, 0, -1) if rows % n == 0)
    return [
        {name: array[i : i + number] for name, array in inputs.items()}
        for i in range(0, rows, number)
    ]


def grouped[Key](sizes: Mapping[Key, int], most: int) -> Iterator[list[Key]]:
    """Keys in turn, in groups of at most `most` in size together, but for one alone."""
    group: list[Key] = []
    size = 0
    for key, own in sizes.items():
        if group and size + own > most:
            yield group
            group, size = [], 0
        group.append(key)
        size += own
    if group:
        yield group


def inputs_of(batch: Mapping[str, jax.Array | np.ndarray]) -> dict[str, jax.Array]:
    """The arguments of a model in a batch."""
    return {name: jnp.asarray(batch[name]) for name in INPUTS if batch.get(name) is not None}


@partial(jax.jit, static_argnames=("graphdef", "numbers"))
def _recorded(
    graphdef: nnx.GraphDef[nnx.Module],
    state: nnx.State,
    inputs: dict[str, jax.Array],
    tokens: Int[Array, "T"],
    *,
    numbers: tuple[int, ...],
) -> dict[int, list[dict[str, jax.Array]]]:
    """What some modules record at `tokens`, by their number in `nnx.iter_modules`, by call."""
    model: Any = nnx.merge(graphdef, state)
    with recording() as records:
        model(**inputs)
    return {
        number: [
            {
                name: x.reshape(-1, *x.shape[2:])[tokens]
                for name, x in call.items()
                if name in FITTED
            }
            for call in records.get(id(module), [])
        ]
        for number, (_, module) in enumerate(nnx.iter_modules(model))
        if number in numbers
    }


def _joined(
    parts: list[list[dict[str, jax.Array]]], tokens: list[np.ndarray], most: int | None
) -> dict[str, jax.Array]:
    """What parts of the rows have of a module, call after call; `most` rows, evenly spread."""
    rows = {
        name: jnp.concatenate(
            [
                part[call][name][: len(own)]
                for call in range(len(parts[0]))
                for part, own in zip(parts, tokens, strict=True)
            ]
        )
        for name in parts[0][0]
    }
    return {name: x if most is None else spread(x, most) for name, x in rows.items()}


def fit_sparse_attention(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    *,
    config: SparseAttentionConfig,
    causal: bool,
    key: jax.Array,
) -> SparseAttention:
    """Codebooks of the queries and keys of one attention layer.

    Codewords of width 1 are evenly spaced over each dimension; wider ones are fitted by k-means.

    Args:
        q: queries of valid tokens.
        k: keys of valid tokens.
        config: codeword width, number of codewords, rule.
        causal: whether the layer is causal.
        key: seeds k-means.

    Returns:
        The module that replaces dense attention.

    Raises:
        ValueError: the codeword width does not divide the head width, there are fewer tokens than
            codewords, or heads cannot share lists as they are to.
    """
    width = q.shape[-1]
    config.heads_of_list(q.shape[1], k.shape[1])
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
    grouped = grouped.reshape(-1, num_kv_heads, width)
    if config.codeword_width == 1 and config.rule == "inner_product":
        of_queries, of_keys = (
            evenly_spaced(x, num_codewords=config.num_codewords) for x in (grouped, k - center)
        )
        return SparseAttention(of_queries, of_keys, center, config=config, causal=causal)
    queries = spread(grouped)
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
    absent_a: Float[Array, "D G r"] | None = None
    absent_b: Float[Array, "G r D"] | None = None


def fit_routing(
    x: Float[Array, "T D"],
    ffn: FeedForward,
    config: RoutedFFNConfig,
    *,
    permutation: Int[Array, "F"] | None = None,
    exchange: bool = True,
) -> Routing:
    """Blocks of hidden units and a router that leave out little of the output.

    Balanced k-means groups the hidden units whose contributions to the output rise and fall
    together. From there pairs of units trade blocks, those first whose exchange lowers the squared
    error `||dense - routed||^2` most, as long as it falls. The blocks that a token leaves out are
    the router's choice throughout, so that blocks stay predictable.

    The router is a ridge regression that predicts, from the FFN's input, how far a block's output
    lies from the constant that stands for it where it is left out: the logarithm of that distance
    over the mean of all blocks. Its logits are the prediction, scaled and shifted so that the
    active blocks times `2 sigmoid(logit)` come nearest to the dense output; the constants are the
    least-squares solution. At last each block is fitted, by reduced-rank ridge regression on its
    input, to what is missing of the dense output where it is left out. With all blocks active
    every logit is 0 and the dense FFN is kept exactly.

    It computes in float32 and holds a few arrays `[T, F]` and `[T, G, D]`. Nothing is random.

    Args:
        x: inputs of the FFN at valid tokens, any floating type.
        ffn: the dense FFN, LoRA still at zero.
        config: number of blocks and of active ones.
        permutation: blocks to keep, of which only the router is fitted; None chooses them.
        exchange: whether blocks trade units; without, they are what k-means finds, at once.

    Returns:
        Permutation (block g is its g-th run of F / G entries), router kernel and bias, and what
        each block adds where it is left out: a constant and the factors of a linear map of x, which
        are None without a rank.

    Raises:
        ValueError: the hidden units do not split into that many blocks.

    References:
        Balanced clusters of co-activated units and a router on their score: Zhang et al.,
        "MoEfication", arXiv 2110.01786, sections 3.2 and 3.3. Reduced-rank ridge regression:
        Mukherjee and Zhu, Statistical Analysis and Data Mining 4 (2011), section 2. The error as
        objective, exchanges, and what stands for a block that is left out are this library's.
    """
    return fit_routings(x, ffn, [config], permutation=permutation, exchange=exchange)[0]


def fit_routings(
    x: Float[Array, "T D"],
    ffn: FeedForward,
    configs: Sequence[RoutedFFNConfig],
    *,
    permutation: Int[Array, "F"] | None = None,
    exchange: bool = True,
) -> list[Routing]:
    """`fit_routing` of several numbers of active blocks of one FFN.

    Args:
        x: inputs of the FFN at valid tokens, any floating type.
        ffn: the dense FFN, LoRA still at zero.
        configs: of the same number of blocks; the first one that leaves a block out chooses them.
        permutation: blocks to keep; None chooses them.
        exchange: whether blocks trade units.

    Raises:
        ValueError: the hidden units do not split into that many blocks.
    """
    blocks = configs[0].num_blocks
    hidden_size, width = ffn.down.in_features, ffn.down.out_features
    if hidden_size % blocks:
        raise ValueError(f"{hidden_size} hidden units do not split into num_blocks={blocks} blocks")
    x = x.astype(jnp.float32)
    hidden = outputs = ridge = None
    found = []
    for config in configs:
        active_blocks, rank = config.active_blocks, config.effective_absent_rank
        if blocks == active_blocks:
            order = jnp.arange(hidden_size, dtype=jnp.int32) if permutation is None else permutation
            zeros = partial(jnp.zeros, dtype=jnp.float32)
            none = zeros((x.shape[1], blocks)), zeros(blocks), zeros((blocks, width))
            found.append(Routing(order, *none))
            continue
        if hidden is None or ridge is None:
            hidden = ffn.hidden(x.astype(ffn.up.dtype)).astype(jnp.float32)
            ridge = _ridge(x)
        down = ffn.down.kernel[...].astype(jnp.float32)
        if permutation is None:
            contribution = jnp.abs(hidden) * jnp.linalg.norm(down, axis=1)
            labels = balanced_kmeans(to_host(contribution.T), blocks)
            if exchange:
                labels = _exchange(x, hidden, down, labels, ridge, config)
            permutation = jnp.asarray(np.argsort(labels, kind="stable").astype(np.int32))
        if outputs is None:
            outputs = _block_outputs(hidden, down, permutation.reshape(blocks, -1))
        router = _fit_router(x, outputs, None, ridge, active_blocks)
        scale, shift = _fit_coefficients(router.rank, router.active, outputs, router.absent_output)
        coefficients = 2 * jax.nn.sigmoid(scale * router.rank + shift)
        constants = _absent_output(outputs, router.active, coefficients)
        bias = scale * router.bias + shift
        routing = Routing(permutation, scale * router.kernel, bias, constants)
        if rank:
            missing = _missing(outputs, router.active * coefficients)
            a, b, constants = _fit_absent(x, missing, 1 - router.active, constants, rank)
            routing = routing._replace(absent_output=constants, absent_a=a, absent_b=b)
        found.append(routing)
    return found


class _Router(NamedTuple):
    """A router before its logits are scaled, and what it chooses on the calibration tokens."""

    kernel: Float[Array, "D G"]
    bias: Float[Array, "G"]
    rank: Float[Array, "T G"]
    active: Float[Array, "T G"]  # 1 for active blocks, else 0
    absent_output: Float[Array, "G D"]


_Ridge = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def _ridge(x: Float[Array, "T D"]) -> _Ridge:
    """Ridge regression on `x` with an unpenalised intercept, in float64.

    Returns:
        Function from targets `[T, G]` to kernel `[D, G]` and bias `[G]`, both float32.
    """
    inputs = to_host(x).astype(np.float64)
    mean_in = inputs.mean(0)
    centered = inputs - mean_in
    gram = centered.T @ centered
    penalty = ROUTER_RIDGE * np.trace(gram) / len(gram) + 1e-12
    factor = scipy.linalg.cho_factor(gram + penalty * np.eye(len(gram)))

    def solve(target: jax.Array) -> tuple[jax.Array, jax.Array]:
        outputs = to_host(target).astype(np.float64)
        mean_out = outputs.mean(0)
        kernel = scipy.linalg.cho_solve(factor, centered.T @ (outputs - mean_out))
        bias = mean_out - mean_in @ kernel
        return jnp.asarray(kernel, jnp.float32), jnp.asarray(bias, jnp.float32)

    return solve


@jax.jit
def _block_outputs(
    hidden: Float[Array, "T F"], down: Float[Array, "F D"], blocks: Int[Array, "G Fb"]
) -> Float[Array, "T G D"]:
    return jax.lax.map(lambda units: hidden[:, units] @ down[units], blocks).swapaxes(0, 1)


def _fit_router(
    x: Float[Array, "T D"],
    outputs: Float[Array, "T G D"],
    absent_output: Float[Array, "G D"] | None,
    ridge: _Ridge,
    active_blocks: int,
) -> _Router:
    """Router for given constants, and the constants that fit its choice; None fits both in turn."""
    steps = 1 if absent_output is not None else ROUTER_STEPS
    constants = outputs.mean(0) if absent_output is None else absent_output
    for _ in range(steps):
        kernel, bias = ridge(_log_distance(outputs, constants))
        rank = x @ kernel + bias
        chosen = jax.lax.top_k(rank, active_blocks)[1]
        active = jax.nn.one_hot(chosen, rank.shape[1], dtype=jnp.float32).sum(1)
        constants = _absent_output(outputs, active, active)
    return _Router(kernel, bias, rank, active, constants)


@jax.jit
def _log_distance(
    outputs: Float[Array, "T G D"], absent_output: Float[Array, "G D"]
) -> Float[Array, "T G"]:
    distance = jnp.linalg.norm(outputs - absent_output, axis=-1)
    return jnp.log(distance + 1e-6) - jnp.log(distance.mean(-1, keepdims=True) + 1e-6)


@jax.jit
def _absent_output(
    outputs: Float[Array, "T G D"],
    active: Float[Array, "T G"],
    coefficients: Float[Array, "T G"],
) -> Float[Array, "G D"]:
    """Constants of left-out blocks that come nearest to the dense output, by least squares."""
    absent = 1 - active
    gram = absent.T @ absent
    gram += CONSTANTS_RIDGE * jnp.trace(gram) / len(gram) * jnp.eye(len(gram), dtype=jnp.float32)
    return jnp.linalg.solve(gram, absent.T @ _missing(outputs, active * coefficients))


def _missing(outputs: Float[Array, "T G D"], shares: Float[Array, "T G"]) -> Float[Array, "T D"]:
    """What is missing of the dense output where a block counts by its share."""
    return jnp.einsum("tg,tgd->td", 1 - shares, outputs)


@partial(jax.jit, static_argnames="rank")
def _fit_absent(
    x: Float[Array, "T D"],
    missing: Float[Array, "T D"],
    absent: Float[Array, "T G"],
    constants: Float[Array, "G D"],
    rank: int,
) -> tuple[Float[Array, "D G r"], Float[Array, "G r D"], Float[Array, "G D"]]:
    """Factors and constants with which `sum over absent g of x a_g b_g + c_g` is near `missing`.

    Block after block is fitted to what the others leave, for some rounds. For one block that is a
    ridge regression of full rank, `W = K^-1 x' y`, whose predictions `x W` are projected onto their
    first `rank` principal directions; subspace iteration finds those without forming `W`.

    Returns:
        `a`, `b`, whose rows are orthonormal, and the constants.
    """
    tokens, width = x.shape
    blocks, inner = absent.shape[1], min(rank, width)
    ridge = ABSENT_RIDGE * tokens * x.var(0).mean() + 1e-12
    counts = jnp.maximum(absent.sum(0), 1)
    means = absent.T @ x / counts[:, None]

    def inverse(block: Int[Array, ""]) -> tuple[jax.Array, jax.Array]:
        inputs = absent[:, block, None] * (x - means[block])
        gram, identity = inputs.T @ inputs, jnp.eye(width, dtype=jnp.float32)
        return gram, jnp.linalg.inv(gram + ridge * identity)

    def fit(
        carry: tuple[jax.Array, ...], block: Int[Array, ""]
    ) -> tuple[tuple[jax.Array, ...], None]:
        a, b, constants, predicted = carry
        mask, mean_in = absent[:, block, None], means[block]
        predicted = predicted - mask * (x @ a[block] @ b[block] + constants[block])
        rest = missing - predicted
        mean_out = (mask * rest).sum(0) / counts[block]
        cross = (mask * (x - mean_in)).T @ (mask * (rest - mean_out))
        full = inverses[block] @ cross
        squares = full.T @ grams[block] @ full

        def improve(_: jax.Array, directions: jax.Array) -> jax.Array:
            return jnp.linalg.qr(squares @ directions)[0]

        slight = 1e-6 * jnp.eye(width, inner, dtype=jnp.float32)
        start = jnp.linalg.qr(cross.T[:, :inner] + slight)[0]
        directions = jax.lax.fori_loop(0, ABSENT_STEPS, improve, start)
        first, second = full @ directions, directions.T
        constant = mean_out - mean_in @ first @ second
        predicted = predicted + mask * (x @ first @ second + constant)
        a, b = a.at[block].set(first), b.at[block].set(second)
        return (a, b, constants.at[block].set(constant), predicted), None

    with jax.default_matmul_precision("float32"):
        grams, inverses = jax.lax.map(inverse, jnp.arange(blocks))
        carry: tuple[jax.Array, ...] = (
            jnp.zeros((blocks, width, inner), jnp.float32),
            jnp.zeros((blocks, inner, width), jnp.float32),
            constants,
            absent @ constants,
        )
        order = jnp.tile(jnp.arange(blocks), ABSENT_ROUNDS)
        (a, b, constants, _), _ = jax.lax.scan(fit, carry, order)
    padding = (0, rank - inner)
    a, b = jnp.pad(a, ((0, 0), (0, 0), padding)), jnp.pad(b, ((0, 0), padding, (0, 0)))
    return a.swapaxes(0, 1), b, constants


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
        nnx.initializers.lecun_normal()(router_key, (width, blocks), jnp.float32),
        jnp.zeros(blocks, jnp.float32),
        jnp.zeros((blocks, width), jnp.float32),
    )


@jax.jit
def _fit_coefficients(
    rank: Float[Array, "T G"],
    active: Float[Array, "T G"],
    outputs: Float[Array, "T G D"],
    absent_output: Float[Array, "G D"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Scale and shift of the logits, from a grid, that come nearest to the dense output."""
    # what is missing of the dense output is sum_g (1 - c_g) outputs_g over the active blocks, plus
    # a part of the absent ones that does not depend on the coefficients
    absent = _residual(outputs, active, absent_output)
    gram = jnp.einsum("tgd,thd->tgh", outputs, outputs)
    cross = jnp.einsum("tgd,td->tg", outputs, absent)

    def squared_error(scale_shift: Float[Array, "2"]) -> Float[Array, ""]:
        scale, shift = scale_shift
        missing = active * (1 - 2 * jax.nn.sigmoid(scale * rank + shift))
        return jnp.einsum("tg,tgh,th->", missing, gram, missing) + 2 * (missing * cross).sum()

    grid = jnp.stack(jnp.meshgrid(ROUTER_SCALES, ROUTER_SHIFTS, indexing="ij"), -1).reshape(-1, 2)
    scale, shift = grid[jnp.argmin(jax.lax.map(squared_error, grid))]
    return scale, shift


def _exchange(
    x: Float[Array, "T D"],
    hidden: Float[Array, "T F"],
    down: Float[Array, "F D"],
    labels: np.ndarray,
    ridge: _Ridge,
    config: RoutedFFNConfig,
) -> np.ndarray:
    """Blocks of the units, int `[F]`, after exchanges between blocks that lower the error.

    Many exchanges are made at once, each chosen as if it were the only one. Where the error did not
    fall, the round is undone and the next one makes half as many.
    """

    def fit(labels: np.ndarray, absent_output: jax.Array | None) -> tuple[_Router, jax.Array]:
        units = jnp.asarray(np.argsort(labels, kind="stable").reshape(config.num_blocks, -1))
        outputs = _block_outputs(hidden, down, units)
        router = _fit_router(x, outputs, absent_output, ridge, config.active_blocks)
        return router, _residual(outputs, router.active, router.absent_output)

    number = max(1, round(len(labels) * EXCHANGE_SHARE))
    least = max(1, round(len(labels) * EXCHANGE_STOP))
    router, residual = fit(labels, None)
    error = float((residual**2).sum())
    for _ in range(EXCHANGE_ROUNDS):
        changes = _error_changes(hidden, down, jnp.asarray(labels), router.active, residual)
        trial = _exchanged(to_host(changes), labels, number)
        if np.array_equal(trial, labels):
            break
        new_router, new_residual = fit(trial, router.absent_output)
        new_error = float((new_residual**2).sum())
        if new_error < error:
            labels, router, residual, error = trial, new_router, new_residual, new_error
        elif number > least:
            number = max(least, number // 2)
        else:
            break
    return labels


@jax.jit
def _residual(
    outputs: Float[Array, "T G D"],
    active: Float[Array, "T G"],
    absent_output: Float[Array, "G D"],
) -> Float[Array, "T D"]:
    """Dense output minus the routed one, active blocks at a coefficient of 1."""
    return jnp.einsum("tg,tgd->td", 1 - active, outputs - absent_output)


@jax.jit
def _error_changes(
    hidden: Float[Array, "T F"],
    down: Float[Array, "F D"],
    labels: Int[Array, "F"],
    active: Float[Array, "T G"],
    residual: Float[Array, "T D"],
) -> Float[Array, "F G"]:
    """By how much the squared error would change if a unit alone moved to another block.

    Moving unit u from block b to g adds `(absent_g - absent_b) hidden_u down_u` to the residual. A
    unit counts without its mean, which the constants take up.
    """
    absent, (num_blocks,) = 1 - active, active.shape[1:]
    varying = hidden - hidden.mean(0)
    first = 2 * (varying * (residual @ down.T)).T @ absent
    first -= jnp.take_along_axis(first, labels[:, None], 1)
    pairs = (absent[:, :, None] * absent[:, None]).reshape(len(absent), -1)
    both = ((varying**2).T @ pairs).reshape(-1, num_blocks, num_blocks)
    alone = jnp.diagonal(both, axis1=1, axis2=2)
    second = alone + jnp.take_along_axis(alone, labels[:, None], 1)
    second -= 2 * jnp.take_along_axis(both, labels[:, None, None], 1)[:, 0]
    return first + (down**2).sum(1)[:, None] * second


def _exchanged(changes: np.ndarray, labels: np.ndarray, number: int) -> np.ndarray:
    """Labels after the best exchanges, at most `number`, a unit taking part in one at most."""
    num_blocks = changes.shape[1]
    members = [np.flatnonzero(labels == g) for g in range(num_blocks)]
    candidates = []
    for g in range(num_blocks):
        for h in range(g + 1, num_blocks):
            # the best unit to leave g with the best to leave h, the second with the second, ...
            one = members[g][np.argsort(changes[members[g], h], kind="stable")[:number]]
            two = members[h][np.argsort(changes[members[h], g], kind="stable")[:number]]
            candidates.append((changes[one, h] + changes[two, g], one, two))
    change, one, two = (np.concatenate(parts) for parts in zip(*candidates, strict=True))
    labels, used = labels.copy(), np.zeros(len(labels), bool)
    for i in np.argsort(change, kind="stable"):
        if number == 0 or change[i] >= 0:
            break
        u, v = one[i], two[i]
        if not used[u] and not used[v]:
            used[[u, v]] = True
            labels[u], labels[v] = labels[v], labels[u]
            number -= 1
    return labels


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
