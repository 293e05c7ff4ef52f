"""What `pq_select` returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
from jaxtyping import Array, Int8, Int32, UInt8

from pallas_kernels.arguments import match

# Leaves of a PyTree node may be anything while JAX rebuilds it (axes, tangents, placeholders), so
# fields are not annotated with shapes; the attribute lists give them.
Leaf = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TokenSelection:
    """The keys that every query keeps for itself, as a rule in memory linear in S.

    With the score and the tie distance of `pq_select`, a query keeps a valid key if
    score > threshold, or score == threshold and tie distance <= tie_radius. The threshold is the
    lowest score kept; a query without a valid key has threshold 0 and radius -1, and keeps nothing.

    Attributes:
        query_codes: uint8 `[B, S, N, M]`.
        key_codes: uint8 `[B, S, K, M]`.
        query_codewords: int8 `[K, M, E, W]`.
        key_codewords: int8 `[K, M, E, W]`.
        threshold: int32 `[B, N, S]`, lowest score kept.
        tie_radius: int32 `[B, N, S]`, largest tie distance kept at that score.
        kept: bool, the same selection restricted to valid keys, as a mask in the layout of the
            implementation that made it; None unless that takes no more memory than the queries.
    """

    query_codes: Leaf
    key_codes: Leaf
    query_codewords: Leaf
    key_codewords: Leaf
    threshold: Leaf
    tie_radius: Leaf
    kept: Leaf = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TileSelection:
    """One list of key groups for each tile of consecutive queries.

    T is N / heads: N for a list for each query head, K where all those of a key head share one.

    Attributes:
        groups: int32 `[B, T, Q, P]`, ascending group indices; past the count the last one repeats
            (0 where the count is 0) and is to be ignored.
        counts: int32 `[B, T, Q]`, groups in each list.
        block_q: positions of a tile.
        key_group: consecutive keys of a group.
        heads: query heads that share a list.
    """

    groups: Leaf
    counts: Leaf
    block_q: int = field(metadata={"static": True})
    key_group: int = field(metadata={"static": True})
    heads: int = field(default=1, metadata={"static": True})


Selection = TokenSelection | TileSelection


def check_selection(op: str, selection: Selection, length: int, **sizes: int) -> None:
    """Holds a selection against the shapes and types of what it is used with.

    Args:
      op: For messages.
      selection: What `pq_select` returned.
      length: Positions S.
      sizes: Of those that the attribute lists name, the ones that are known.

    Raises:
      ValueError: It is no selection, or one for other arrays.
    """
    if isinstance(selection, TokenSelection):
        sizes |= {"S": length}
        kinds: dict[str, Any] = {
            "threshold": Int32[Array, "B N S"],
            "tie_radius": Int32[Array, "B N S"],
            "query_codes": UInt8[Array, "B S N M"],
            "key_codes": UInt8[Array, "B S K M"],
            "query_codewords": Int8[Array, "K M E W"],
            "key_codewords": Int8[Array, "K M E W"],
        }
    elif isinstance(selection, TileSelection):
        sizes |= {"Q": -(-length // selection.block_q)}
        if "N" in sizes:
            sizes["T"] = sizes["N"] // selection.heads
        kinds = {"counts": Int32[Array, "B T Q"], "groups": Int32[Array, "B T Q P"]}
    else:
        raise ValueError(
            f"{op}: selection is a {type(selection).__name__}; give what pq_select returns."
        )
    arrays = {f"selection.{name}": (getattr(selection, name), kinds[name]) for name in kinds}
    match(op, arrays, **sizes)
