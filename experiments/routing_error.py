"""How much of an FFN's output routing loses: random, fitted and ideal routing, layer by layer.

Nothing here trains. A model's FFN inputs are recorded on two sets of rows (`ffn_inputs`); blocks
and routers are fitted to one set and measured on the other (`measure_layer`):

    calibration = ffn_inputs(model, {"input_ids": rows[:64]})
    held_out = ffn_inputs(model, {"input_ids": rows[64:128]})
    for path, ffn in dense_ffns(model).items():
        errors = measure_layer(ffn, calibration[path], held_out[path], RoutedFFNConfig())
        print(path, errors["fitted"].relative_error, errors["oracle"].relative_error)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from spt_jax.calibration import Routing, fit_routing, random_routing, record_activations, spread
from spt_jax.config import RoutedFFNConfig
from spt_jax.layers import FeedForward, RoutedFFN

Way = Literal["random", "random_blocks", "fitted", "oracle"]

#: Random routings that are averaged: where few tokens have large outputs, one draw says little.
RANDOM_DRAWS = 4
#: The oracle tries every subset of the blocks up to this many.
MOST_SUBSETS = 2**14
#: Tokens whose subsets are tried at once.
ORACLE_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class RoutingError:
    """Error of a routed FFN `r` against the dense FFN `y`, both with the output bias.

    Attributes:
        relative_error: `||r - y|| / ||y||` over all tokens, residual connection left out.
        centered_error: `||r - y|| / ||y - mean y||`, the mean over tokens.
        token_error: root mean square over tokens of `||r_t - y_t|| / ||y_t||`; few tokens with
            large outputs, such as the first of a row, do not decide it.
        load_balance: tokens of the busiest block over the mean of all blocks.
    """

    relative_error: float
    centered_error: float
    token_error: float
    load_balance: float


def mean_error(errors: Sequence[RoutingError]) -> RoutingError:
    """Mean of every figure, over layers for instance.

    Raises:
        ValueError: there are none.
    """
    if not errors:
        raise ValueError("there are no errors to average")
    names = [f.name for f in fields(RoutingError)]
    return RoutingError(**{n: float(np.mean([getattr(e, n) for e in errors])) for n in names})


def dense_ffns(model: nnx.Module) -> dict[str, FeedForward]:
    """The dense FFNs of a model by their dotted path, in its order."""
    return {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, FeedForward)
    }


def ffn_inputs(
    model: nnx.Module, batch: Mapping[str, jax.Array | np.ndarray]
) -> dict[str, Float[Array, "T D"]]:
    """What each dense FFN of a model reads at the valid tokens of a batch.

    Args:
        model: a model that is not adapted yet; not changed.
        batch: arguments of the model: `input_ids` int `[B, S]` and, optionally, `attention_mask`
            and others.

    Returns:
        Inputs by the path of `dense_ffns`, in the model's compute dtype; `B * S` tokens a layer are
        held at once.
    """
    found = record_activations(model, batch, most=None)
    modules = dict(nnx.iter_modules(model))
    return {
        ".".join(map(str, path)): arrays["x"]
        for path, arrays in found
        if isinstance(modules[path], FeedForward)
    }


def measure_layer(
    ffn: FeedForward,
    calibration: Float[Array, "Tc D"],
    held_out: Float[Array, "T D"],
    config: RoutedFFNConfig,
    *,
    seed: int = 0,
) -> dict[Way, RoutingError]:
    """Errors of one layer on held-out tokens.

    Args:
        ffn: the dense FFN, without LoRA or with LoRA at zero; not changed.
        calibration: its inputs that blocks and routers are fitted to; as in `adapt`, an evenly
            spread part of them where there are many.
        held_out: its inputs at other tokens.
        config: number of blocks and of active ones.
        seed: of the random blocks and of the random router.

    Returns:
        Errors of "random" (mean of `RANDOM_DRAWS` random blocks and routers, every coefficient at
        1), of "random_blocks" (random blocks with a fitted router, coefficients and constants), of
        "fitted" (what `adapt` does), and of the "oracle": on the fitted blocks, with the fitted
        coefficients and stand-ins of left-out blocks, the subset of active blocks of the least
        error for each token (see `oracle_index`).

    Raises:
        ValueError: the hidden units do not split into that many blocks.
    """
    tokens = spread(calibration)
    dense = ffn(held_out[None])[0][0]

    def measured(
        routing: Routing, config: RoutedFFNConfig = config
    ) -> tuple[RoutedFFN, RoutingError]:
        routed = RoutedFFN(nnx.clone(ffn), **routing._asdict(), config=config)
        index = jax.lax.top_k(routed.probabilities(held_out), config.active_blocks)[1]
        return routed, _error(routed(held_out[None])[0][0], dense, index, config.num_blocks)

    at_random = replace(config, calibration="random")
    keys = jax.random.split(jax.random.key(seed), RANDOM_DRAWS)
    draws = [random_routing(ffn, config, key=key) for key in keys]
    # the choice is that of the whole logits, and `2 p` is 1 up to rounding
    draws = [draw._replace(router_kernel=1e-5 * draw.router_kernel) for draw in draws]
    random_blocks = fit_routing(tokens, ffn, config, permutation=draws[0].permutation)
    routed, fitted = measured(fit_routing(tokens, ffn, config))
    index = oracle_index(ffn, routed, held_out)
    best = routed_output(ffn, routed, held_out, index)
    return {
        "random": mean_error([measured(draw, at_random)[1] for draw in draws]),
        "random_blocks": measured(random_blocks)[1],
        "fitted": fitted,
        "oracle": _error(best, dense, index, config.num_blocks),
    }


def _error(
    y: Float[Array, "T D"], dense: Float[Array, "T D"], index: Int[Array, "T A"], num_blocks: int
) -> RoutingError:
    y, dense = y.astype(jnp.float32), dense.astype(jnp.float32)
    missing, total = ((y - dense) ** 2).sum(-1), (dense**2).sum(-1)
    varying = ((dense - dense.mean(0)) ** 2).sum()
    loads = jnp.bincount(index.ravel(), length=num_blocks)
    return RoutingError(
        relative_error=math.sqrt(missing.sum() / total.sum()),
        centered_error=math.sqrt(missing.sum() / varying),
        token_error=math.sqrt((missing / total).mean()),
        load_balance=float(loads.max() / loads.mean()),
    )


def _block_outputs(
    ffn: FeedForward, routed: RoutedFFN, x: Float[Array, "T D"]
) -> Float[Array, "T G D"]:
    """What each block of `routed` contributes to the dense output, without the bias; float32."""
    blocks = routed.permutation[...].reshape(routed.config.num_blocks, -1)
    hidden = ffn.hidden(x)[:, blocks].astype(jnp.float32)
    return jnp.einsum("tgf,gfd->tgd", hidden, ffn.down.kernel[...][blocks].astype(jnp.float32))


def oracle_index(ffn: FeedForward, routed: RoutedFFN, x: Float[Array, "T D"]) -> Int[Array, "T A"]:
    """The active blocks of the least error for each token, at the router's coefficients.

    Every block g has the coefficient `2 p_g` of the router where it is active and adds what stands
    for it where it is not; only which blocks are active is free. All subsets are tried where there
    are at most `MOST_SUBSETS`. Where there are more, the router's choice is improved by exchanging
    one block for another as long as that helps, so that the true least error may be lower still.

    Args:
        ffn: the dense FFN, without LoRA or with LoRA at zero.
        routed: the routed FFN that was made from it.
        x: its inputs.

    Returns:
        Blocks of each token, in no order; int32.
    """
    active_blocks, blocks = routed.config.active_blocks, routed.config.num_blocks
    exhaustive = math.comb(blocks, active_blocks) <= MOST_SUBSETS
    subsets = np.zeros((0, active_blocks), np.int64)
    if exhaustive:
        subsets = np.array(list(itertools.combinations(range(blocks), active_blocks)))
    masks = jnp.zeros((len(subsets), blocks)).at[jnp.arange(len(subsets))[:, None], subsets].set(1)
    chosen = []
    for start in range(0, len(x), ORACLE_TOKENS):
        rows = x[start : start + ORACLE_TOKENS]
        outputs, probabilities = _block_outputs(ffn, routed, rows), routed.probabilities(rows)
        # the error is the norm of base + sum of change_g over the active blocks g
        absent = routed.absent_outputs(rows)
        change = absent - 2 * probabilities[:, :, None] * outputs
        base = (outputs - absent).sum(1)
        gram = jnp.einsum("tgd,thd->tgh", change, change)
        slope = jnp.einsum("tgd,td->tg", change, base)
        if exhaustive:
            index = _best_subset(gram, slope, masks, jnp.asarray(subsets))
        else:
            index = _improved(gram, slope, jax.lax.top_k(probabilities, active_blocks)[1])
        chosen.append(index.astype(jnp.int32))
    return jnp.concatenate(chosen)


@jax.jit
def _best_subset(
    gram: Float[Array, "T G G"],
    slope: Float[Array, "T G"],
    masks: Float[Array, "C G"],
    subsets: Int[Array, "C A"],
) -> Int[Array, "T A"]:
    pairs = (masks[:, :, None] * masks[:, None]).reshape(len(masks), -1)
    error = gram.reshape(len(gram), -1) @ pairs.T + 2 * slope @ masks.T
    return subsets[error.argmin(1)]


@jax.jit
def _improved(
    gram: Float[Array, "T G G"], slope: Float[Array, "T G"], index: Int[Array, "T A"]
) -> Int[Array, "T A"]:
    """Exchanges one active block a token for a left-out one, the best first, until none helps."""
    tokens, blocks = slope.shape
    diagonal = jnp.diagonal(gram, axis1=1, axis2=2)
    mask = jnp.zeros((tokens, blocks)).at[jnp.arange(tokens)[:, None], index].set(1)

    def gain(mask: Array) -> tuple[Array, Array]:
        gradient = 2 * (jnp.einsum("tgh,th->tg", gram, mask) + slope)
        out = jnp.where(mask > 0, diagonal - gradient, jnp.inf)
        into = jnp.where(mask > 0, jnp.inf, diagonal + gradient)
        change = (out[:, :, None] + into[:, None] - 2 * gram).reshape(tokens, -1)
        return change.min(1), change.argmin(1)

    def step(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        mask, change, pair = carry
        one, two = jnp.divmod(pair, blocks)
        moved = mask - jax.nn.one_hot(one, blocks) + jax.nn.one_hot(two, blocks)
        mask = jnp.where((change < -1e-6 * diagonal.sum(1))[:, None], moved, mask)
        return mask, *gain(mask)

    mask, *_ = jax.lax.while_loop(
        lambda carry: (carry[1] < -1e-6 * diagonal.sum(1)).any(), step, (mask, *gain(mask))
    )
    return jax.lax.top_k(mask, index.shape[1])[1]


def routed_output(
    ffn: FeedForward, routed: RoutedFFN, x: Float[Array, "T D"], index: Int[Array, "T A"]
) -> Float[Array, "T D"]:
    """What `routed`, made from `ffn`, would return if it activated the blocks `index`; float32."""
    chunks = []
    for start in range(0, len(x), ORACLE_TOKENS):
        rows, chosen = x[start : start + ORACLE_TOKENS], index[start : start + ORACLE_TOKENS]
        mask = jax.nn.one_hot(chosen, routed.config.num_blocks).sum(1)[:, :, None]
        active = 2 * routed.probabilities(rows)[:, :, None] * _block_outputs(ffn, routed, rows)
        chunks.append((mask * active + (1 - mask) * routed.absent_outputs(rows)).sum(1))
    y = jnp.concatenate(chunks)
    return y if ffn.down.bias is None else y + ffn.down.bias[...].astype(jnp.float32)
