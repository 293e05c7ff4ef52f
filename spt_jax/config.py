"""What to adapt and how: one frozen dataclass a concern.

Example:
    >>> config = SPTConfig(lora=LoRAConfig(rank=16), attention=None, ffn=RoutedFFNConfig())
    >>> config.ffn.density
    0.5
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from pallas_kernels import Implementation
from spt_jax.training.config import TrainConfig

__all__ = [
    "LoRAConfig",
    "LoRATarget",
    "RoutedFFNConfig",
    "SPTConfig",
    "SparseAttentionConfig",
    "TrainConfig",
]

LoRATarget = Literal["attention", "ffn", "embeddings"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adaptation (Hu et al., arXiv 2106.09685).

    Attributes:
        rank: inner width r of the factors.
        alpha: numerator of the scaling.
        use_rslora: scale by alpha / sqrt(r) (Kalajdzievski, arXiv 2312.03732), not alpha / r.
        dropout: probability with which an input feature of a factor is dropped. One mask a
            training step serves all tokens (Lin et al., arXiv 2404.09610), so that the factors can
            still be merged into the weight.
        targets: module types that get factors.
    """

    rank: int = 16
    alpha: float = 32.0
    use_rslora: bool = False
    dropout: float = 0.0
    targets: tuple[LoRATarget, ...] = ("attention", "ffn")

    def __post_init__(self) -> None:
        _require(self.rank >= 1, f"LoRA rank must be at least 1, got {self.rank}")
        _require(0 <= self.dropout < 1, f"LoRA dropout must lie in [0, 1), got {self.dropout}")
        unknown = set(self.targets) - {"attention", "ffn", "embeddings"}
        _require(
            not unknown,
            f"unknown LoRA targets {sorted(unknown)}; choose from attention, ffn, embeddings",
        )

    @property
    def scaling(self) -> float:
        """Factor on the product of the two factors."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


@dataclass(frozen=True, kw_only=True)
class SparseAttentionConfig:
    """Sparse attention with product-quantized key selection.

    Attributes:
        density: share of the keys that a query keeps, in (0, 1].
        min_keys: a query keeps at least this many keys, so that short sequences stay whole.
        granularity: "token" (every query its own keys), "tile" (one list for `block_q` queries),
            or "auto": token up to `token_max_length` positions, tile above.
        token_max_length: longest sequence for which "auto" takes the token rule.
        block_q: queries in a tile.
        key_group: consecutive keys that a tile keeps or drops together.
        rule: how codes score a key; "inner_product" or the paper's "match_count".
        codeword_width: width C of a codeword; divides the head width.
        num_codewords: codewords E in a subspace, at most 256.
        codebook_loss_weight: weight of the codebook loss in the training loss.
        codebook_loss_tokens: tokens of a batch, evenly spread, on which that loss is taken.
        implementation: kernels to use; None picks the best for the device.
    """

    density: float = 1 / 8
    min_keys: int = 16
    granularity: Literal["auto", "token", "tile"] = "auto"
    token_max_length: int = 1024
    block_q: int = 64
    key_group: Literal[1, 8, 16, 32, 64] = 16
    rule: Literal["inner_product", "match_count"] = "inner_product"
    codeword_width: int = 4
    num_codewords: int = 16
    codebook_loss_weight: float = 0.01
    codebook_loss_tokens: int = 256
    implementation: Implementation | None = None

    def __post_init__(self) -> None:
        _require(0 < self.density <= 1, f"attention density must lie in (0, 1], got {self.density}")
        _require(self.min_keys >= 1, f"min_keys must be at least 1, got {self.min_keys}")
        _require(
            2 <= self.num_codewords <= 256,
            f"num_codewords must lie in 2..256 (codes are uint8), got {self.num_codewords}",
        )
        _require(
            self.granularity in ("auto", "token", "tile"),
            f"granularity must be auto, token or tile, got {self.granularity!r}",
        )
        _require(
            self.rule in ("inner_product", "match_count"),
            f"rule must be inner_product or match_count, got {self.rule!r}",
        )

    def num_keys(self, length: int) -> int:
        """Keys that a query keeps in a sequence of `length` positions."""
        return min(length, max(self.min_keys, math.ceil(self.density * length)))

    def granularity_at(self, length: int) -> Literal["token", "tile"]:
        """The rule for a sequence of `length` positions."""
        if self.granularity == "auto":
            return "token" if length <= self.token_max_length else "tile"
        return self.granularity


@dataclass(frozen=True, kw_only=True)
class RoutedFFNConfig:
    """Routed FFN: hidden units in blocks, of which a token activates some.

    Attributes:
        num_blocks: blocks G; divides the hidden size.
        active_blocks: blocks A that a token activates.
        load_balance_weight: weight of the load-balancing loss; 0 leaves it out.
        implementation: kernels to use; None picks the best for the device.
    """

    num_blocks: int = 4
    active_blocks: int = 2
    load_balance_weight: float = 0.0
    implementation: Implementation | None = None

    def __post_init__(self) -> None:
        _require(
            1 <= self.active_blocks <= self.num_blocks,
            f"active_blocks must lie in 1..num_blocks, got {self.active_blocks} of "
            f"{self.num_blocks}",
        )

    @property
    def density(self) -> float:
        """Share of the hidden units that a token computes."""
        return self.active_blocks / self.num_blocks


@dataclass(frozen=True, kw_only=True)
class SPTConfig:
    """The three parts of SPT; any of them may be None to leave that part dense."""

    lora: LoRAConfig | None = field(default_factory=LoRAConfig)
    attention: SparseAttentionConfig | None = field(default_factory=SparseAttentionConfig)
    ffn: RoutedFFNConfig | None = field(default_factory=RoutedFFNConfig)
