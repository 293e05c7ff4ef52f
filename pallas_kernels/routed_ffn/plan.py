"""Order in which the GPU kernels of the routed FFN compute rows.

Tokens are sorted into groups, and each group's rows are padded to whole row tiles, so that all rows
of a tile share their blocks. A group is a combination of active blocks, or, where there are too
many combinations for the tokens, a single block; then a token has a row for each of its blocks.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels.routed_ffn.types import Activation, activation_function

_MAX_ROWS = 128  # Of a tile.

# Rows of padding, as a share of all rows, that sorting by combination may cost more than sorting
# by block: what the latter costs in gathering and scattering a token once for each block.
_PADDING_SHARE = 1 / 8


class Plan(NamedTuple):
    """Rows of the kernels; R of them in M tiles, E a token, each computing S blocks.

    Attributes:
      order: Which of the `T * E` rows without padding each row is, `T * E` for padding.
      rank: The rows of each token.
      position: Slot of each chosen block within its row.
      blocks: Block of each slot, by tile.
      tiles: Number of tiles that hold rows.
    """

    order: Int32[Array, " R"]
    rank: Int32[Array, "T E"]
    position: Int32[Array, "T A"]
    blocks: Int32[Array, "S M"]
    tiles: Int32[Array, " 1"]


def _look_up(table: Array, *index: Array) -> Array:
    return table.at[index].get(mode="promise_in_bounds")


def sorts_by_combination(tokens: int, num_blocks: int, active: int) -> bool:
    """Whether rows are better sorted by combination of blocks than by block."""
    # Half a tile a group is padding.
    padding = _MAX_ROWS / 2 * (active * math.comb(num_blocks, active) - num_blocks)
    return padding <= _PADDING_SHARE * tokens * active


def make_plan(block_index: Int[Array, "T A"], num_blocks: int) -> Plan:
    """Sorts the rows of tokens into groups, in tiles of 128, or of 64 if most groups are small."""
    tokens, active = block_index.shape
    block_index = block_index.astype(jnp.int32)
    if sorts_by_combination(tokens, num_blocks, active):
        # Combinations in colexicographic order: the number of b_0 < b_1 < ... is
        # comb(b_0, 1) + comb(b_1, 2) + ...
        below = [[math.comb(b, i + 1) for i in range(active)] for b in range(num_blocks)]
        chosen = list(block_index.T)
        zero = jnp.zeros(tokens, jnp.int32)
        positions = [
            sum(((other < one).astype(jnp.int32) for other in chosen), zero) for one in chosen
        ]
        group = zero
        for one, position in zip(chosen, positions, strict=True):
            group += _look_up(jnp.asarray(below, jnp.int32), one, position)
        position = jnp.stack(positions, axis=1)
        combinations = itertools.combinations(range(num_blocks), active)
        blocks = np.asarray(sorted(combinations, key=lambda c: c[::-1]), np.int32)
    else:
        position = jnp.zeros_like(block_index)
        group = block_index.ravel()
        blocks = np.arange(num_blocks, dtype=np.int32)[:, None]
    rows, groups = group.size, len(blocks)
    block_m = _MAX_ROWS if rows > groups * (_MAX_ROWS // 2) else _MAX_ROWS // 2
    members = (group[:, None] == jnp.arange(groups)).astype(jnp.int32)
    running = jnp.cumsum(members, axis=0)
    tiles = (running[-1] + block_m - 1) // block_m
    stop = jnp.cumsum(tiles)
    start = _look_up((stop - tiles) * block_m, group)
    rank = start + _look_up(running, jnp.arange(rows), group) - 1
    most = (rows + min(groups, rows) * (block_m - 1)) // block_m
    order = jnp.full(most * block_m, rows, jnp.int32)
    order = order.at[rank].set(jnp.arange(rows, dtype=jnp.int32), unique_indices=True)
    tile_group = jnp.minimum((jnp.arange(most)[:, None] >= stop).sum(1), groups - 1)
    return Plan(
        order=order,
        rank=rank.reshape(tokens, -1),
        position=position,
        blocks=_look_up(jnp.asarray(blocks), tile_group).T,
        tiles=stop[-1:].astype(jnp.int32),
    )


def tiles_by_block(plan: Plan, num_blocks: int) -> tuple[Int32[Array, "G M"], Int32[Array, " G"]]:
    """For each block the tiles that compute it, as `tile * S + slot`, and how many they are."""
    slots, tiles = plan.blocks.shape
    number = jnp.arange(tiles, dtype=jnp.int32)
    found = plan.blocks == jnp.arange(num_blocks)[:, None, None]  # [G, S, M]
    found &= number < plan.tiles
    entry = number * slots + jnp.arange(slots, dtype=jnp.int32)[:, None]
    entry = jnp.where(found, entry, 0).sum(1, dtype=jnp.int32)
    found = found.any(1)
    running = jnp.cumsum(found, axis=1, dtype=jnp.int32)
    where = jnp.where(found, running - 1, tiles)
    lists = jnp.zeros((num_blocks, tiles), jnp.int32)
    lists = lists.at[jnp.arange(num_blocks)[:, None], where].set(entry, mode="drop")
    return lists, running[:, -1]


def rows_of_tokens(values: Array, plan: Plan) -> Array:
    """Gathers `[T, N]` into `[R, N]`; padding gets zeros."""
    token = plan.order // plan.rank.shape[1]
    return values.at[token].get(mode="fill", fill_value=0)


def tokens_of_rows(rows: Array, plan: Plan, plus: Array | None = None) -> Array:
    """Sums the rows `[R, N]` of each token, and a vector, in float32; `[T, N]`."""
    y = jnp.zeros((), jnp.float32) if plus is None else plus.astype(jnp.float32)
    for rank in plan.rank.T:
        y += _look_up(rows, rank).astype(jnp.float32)
    return y.astype(rows.dtype)


def rows_of_choices(values: Float[Array, "T A"], plan: Plan) -> Float[Array, "S R"]:
    """The values of the chosen blocks, float32, by slot and row; padding gets zeros."""
    slots, each = plan.blocks.shape[0], plan.rank.shape[1]
    values = values.astype(jnp.float32)
    if each == 1:
        chosen = plan.position[:, :, None] == jnp.arange(slots)
        values = jnp.where(chosen, values[:, :, None], 0).sum(1)
    return values.reshape(-1, slots).at[plan.order].get(mode="fill", fill_value=0).T


def choices_of_rows(rows: Float[Array, "S R"], plan: Plan) -> Float[Array, "T A"]:
    """The inverse of `rows_of_choices`."""
    rank = jnp.broadcast_to(plan.rank, plan.position.shape)
    return _look_up(rows, plan.position, rank)


def inner_of_rows(
    activation: Activation,
    hidden: Sequence[Array],
    coefficients: Float[Array, "S R"],
    part: int = 0,
    parts: int = 1,
) -> Float[Array, "R SFb"]:
    """What the hidden units pass on, from their saved products: linear ones first, then activated.

    Of every block's units a part can be taken alone.
    """
    slots, rows = coefficients.shape
    width = hidden[0].shape[1] // slots // parts
    columns = slice(part * width, (part + 1) * width)
    *linear, pre = (h.reshape(rows, slots, -1)[..., columns].astype(jnp.float32) for h in hidden)
    inner = activation_function(activation)(pre)
    for h in linear:
        inner *= h
    inner *= coefficients.T[:, :, None]
    return inner.reshape(rows, -1).astype(hidden[0].dtype)
