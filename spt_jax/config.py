"""What to adapt, and how to train: one frozen dataclass a concern.

Example:
    >>> config = SPTConfig(lora=LoRAConfig(rank=16), attention=None, ffn=RoutedFFNConfig())
    >>> config.ffn.density
    0.5
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any, Literal

from pallas_kernels import Implementation
from spt_jax.names import explains_names

__all__ = [
    "Form",
    "FrozenDict",
    "LearningRateMultipliers",
    "LoRAConfig",
    "LoRATarget",
    "MeshConfig",
    "RoutedFFNConfig",
    "SPTConfig",
    "Schedule",
    "SparseAttentionConfig",
    "TargetModules",
    "TrainConfig",
    "Trainable",
]

LoRATarget = Literal["attention", "ffn", "embeddings"]
TargetModules = str | tuple[str, ...] | None
Schedule = Literal["linear", "cosine", "constant"]
Trainable = Literal["adapter", "all"]
Form = Literal["sparse", "dense"]


LEAST_HEADS_THAT_SHARE = 4  # query heads of a key head that share lists by default
LEAST_POSITIONS = 8  # of their tiles, of which that is a multiple

#: Bounds that no use comes near, so that a slip of the keyboard is named and not allocated.
MOST_RANK = 65_536
MOST_EXAMPLES_A_STEP = 2**20
MOST_STEPS = 2**31 - 1  # an int32 counts them
MOST_EPOCHS = 1e6
MOST_SEED = 2**32 - 1  # what shuffles examples takes 32 bits


#: Budgets of `SPTConfig.serve`: nats a token of causal language models, the relative change of the
#: final hidden states of others (`python -m experiments.frontier`).
LOSS_BUDGETS: Mapping[Form, float] = {"dense": 0.05, "sparse": 0.02}
CHANGE_BUDGETS: Mapping[Form, float] = {"dense": 0.5, "sparse": 0.1}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


class FrozenDict[Value](dict[str, Value]):
    """A dictionary that cannot change, so that a configuration that holds one has a hash."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError("a configuration cannot change; make another by dataclasses.replace")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse


def _checked_rank(name: str, rank: Any) -> None:
    whole = isinstance(rank, Integral) and not isinstance(rank, bool)
    _require(whole, f"{name} must be a whole number, got {rank!r}")
    _require(rank >= 1, f"{name} must be at least 1, got {rank}")
    _require(rank <= MOST_RANK, f"{name} must be at most {MOST_RANK}, got {rank}")


def _checked_alpha(name: str, alpha: Any) -> None:
    number = isinstance(alpha, Real) and not isinstance(alpha, bool)
    _require(
        number and math.isfinite(alpha) and alpha > 0,
        f"{name} must be a number above 0, got {alpha!r}",
    )


def _check_regex(name: str, pattern: Any) -> None:
    _require(isinstance(pattern, str), f"{name} takes patterns as text, got {pattern!r}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{name} has the pattern {pattern!r}, which is no regular expression: {error}"
        ) from None


def _names(name: str, value: Any) -> tuple[str, ...]:
    """Names of modules, from a sequence of them."""
    _require(
        isinstance(value, Sequence) and not isinstance(value, str),
        f"{name} must be a tuple of names of modules, got {value!r}",
    )
    for one in value:
        _require(
            isinstance(one, str) and bool(one), f"{name} must hold names of modules, got {one!r}"
        )
    return tuple(value)


@explains_names
@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adaptation (Hu et al., arXiv 2106.09685).

    Modules are named as in transformers, with its prefix: `model.layers.0.self_attn.q_proj`. Those
    of a model of one's own have their dotted paths for names: `layers.0.attention.q_proj`.

    Attributes:
        rank: inner width r of the factors.
        alpha: numerator of the scaling.
        use_rslora: scale by alpha / sqrt(r) (Kalajdzievski, arXiv 2312.03732), not alpha / r.
        dropout: probability with which an input feature of a factor is dropped. One mask a
            training step serves all tokens (Lin et al., arXiv 2404.09610), so that the factors can
            still be merged into the weight. Factors of a decoder's output matrix and of OPT's
            projections beside its layers have none.
        targets: module types that get factors; unused where `target_modules` is given.
        target_modules: modules that get factors, as PEFT takes them. A tuple has names or their
            last parts, as `("q_proj", "v_proj")`; a text is "all-linear", every linear map but
            heads and the output matrix, or a regular expression that a whole name must match. On a
            command line one word of letters, digits, "_" and "." is a name. A task's head is
            trained whole, and gets no factors.
        modules_to_save: names or last parts of modules, or of what holds them, that are trained
            whole beside the factors and saved in the adapter: embeddings, norms, linear maps. Their
            learning rate is that of heads. A task's head is trained and saved without being named.
            An embedding that is tied to the output matrix stays tied.
        rank_pattern: other ranks for some targets, `{pattern: rank}`. A pattern is a regular
            expression that a name, or its last parts, must match; the first that does counts.
        alpha_pattern: likewise other numerators.
    """

    rank: int = 16
    alpha: float = 32.0
    use_rslora: bool = False
    dropout: float = 0.0
    targets: tuple[LoRATarget, ...] = ("attention", "ffn")
    target_modules: TargetModules = None
    modules_to_save: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = FrozenDict()
    alpha_pattern: Mapping[str, float] = FrozenDict()

    def __post_init__(self) -> None:
        _checked_rank("LoRA rank", self.rank)
        _checked_alpha("LoRA alpha", self.alpha)
        _require(0 <= self.dropout < 1, f"LoRA dropout must lie in [0, 1), got {self.dropout}")
        unknown = set(self.targets) - {"attention", "ffn", "embeddings"}
        _require(
            not unknown,
            f"unknown LoRA targets {sorted(unknown)}; choose from attention, ffn, embeddings, or "
            "name modules in target_modules",
        )
        object.__setattr__(self, "target_modules", self._target_modules())
        saved = _names("modules_to_save", self.modules_to_save)
        object.__setattr__(self, "modules_to_save", saved)
        _require(
            not saved or bool(self.targets) or self.target_modules is not None,
            "modules_to_save are trained beside LoRA factors; name targets or target_modules too",
        )
        for name, check in (("rank_pattern", _checked_rank), ("alpha_pattern", _checked_alpha)):
            patterns = getattr(self, name)
            _require(
                isinstance(patterns, Mapping),
                f"{name} must be a mapping from patterns to numbers, got {patterns!r}",
            )
            for pattern, value in patterns.items():
                _check_regex(name, pattern)
                check(f"{name} of {pattern!r}", value)
            object.__setattr__(self, name, FrozenDict(patterns))

    def _target_modules(self) -> TargetModules:
        given = self.target_modules
        if given is None:
            return None
        _require(
            self.targets == type(self).targets,
            f"targets={self.targets} and target_modules={given!r} both say what gets factors; "
            "give one of them",
        )
        if isinstance(given, str):
            _check_regex("target_modules", given)
            return given
        names = _names("target_modules", given)
        _require(bool(names), "target_modules is empty; name modules, or set lora=None for no LoRA")
        return names

    @property
    def scaling(self) -> float:
        """Factor on the product of the two factors."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def of_module(self, name: str) -> LoRAConfig:
        """What a module's factors are made by: its rank and alpha, and nothing of other modules.

        Example:
            >>> config = LoRAConfig(rank_pattern={"q_proj": 8})
            >>> config.of_module("layers.0.self_attn.q_proj").rank
            8
        """
        rank = first_match(self.rank_pattern, name)
        alpha = first_match(self.alpha_pattern, name)
        return LoRAConfig(
            rank=self.rank if rank is None else self.rank_pattern[rank],
            alpha=self.alpha if alpha is None else self.alpha_pattern[alpha],
            use_rslora=self.use_rslora,
            dropout=self.dropout,
        )


def first_match(patterns: Iterable[str], name: str) -> str | None:
    """The first pattern that a module's name, or its last parts, match, as PEFT has it."""
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", name)), None)


@dataclass(frozen=True, kw_only=True)
class SparseAttentionConfig:
    """Sparse attention with product-quantized key selection.

    Attributes:
        density: share of the keys that a query keeps, in (0, 1].
        min_keys: a query keeps at least this many keys; where the sequence is short, dropping keys
            saves little and costs accuracy.
        granularity: "tile" (one list of key groups for `block_q` queries), "token" (every query its
            own keys, in more time than dense attention takes), "dense" (all keys), or "auto": dense
            up to `dense_max_length` positions, tile above.
        dense_max_length: longest sequence for which "auto" keeps all keys. In a shorter one a tile
            has few groups to choose from: by tile SmolLM2's perplexity rises by 6% at 1,024 tokens,
            by 1% at 2,048 and 4,096 (`python -m experiments.capture`).
        strict: whether causal attention takes "token" in place of "tile", so that nothing of a
            query depends on a later token. By tile a token reads no later one, but which earlier
            keys its tile keeps depends on all of the tile's queries. Evaluation is always strict
            (`model.set_attributes(strict=True)`, as `spt_jax.training.evaluate` does by itself).
        block_q: queries that share a list of keys: of one head, or of all heads of a key head.
        share_heads: whether all N / K query heads of a key head share lists, so that a tile is
            `block_q` / (N / K) positions long, which must be a whole number. None shares them where
            N / K is at least 4 and a tile gets a multiple of 8 positions: what SmolLM2 loses at
            2,048 tokens is the same (1%) for 64 queries of one head and for 63 of three.
        key_group: consecutive keys that a tile keeps or drops together.
        rule: how codes score a key; "inner_product" or the paper's "match_count".
        codeword_width: width C of a codeword; divides the head width. Where it is 1, codewords are
            evenly spaced between the least and the largest value of calibration, so that the few
            keys of large magnitude that a decoder attends to most are not cut; else they are the
            means of k-means. "match_count" wants wider ones, such as 8.
        num_codewords: codewords E in a subspace, at most 256; 16 of width 1 are 4 bits a dimension.
        codebook_loss_weight: weight of the paper's codebook loss in the training loss; the paper
            takes 0.01. With 0 codebooks stay as they were fitted, which over 1,000 steps keeps as
            much of the attention and costs nothing (`python -m experiments.codebook_upkeep`).
        codebook_loss_tokens: tokens of a batch, evenly spread, on which that loss is taken.
        implementation: kernels to use; None picks the best for the device.
    """

    density: float = 1 / 8
    min_keys: int = 32
    granularity: Literal["auto", "token", "tile", "dense"] = "auto"
    dense_max_length: int = 1024
    strict: bool = False
    block_q: int = 64
    share_heads: bool | None = None
    key_group: Literal[1, 8, 16, 32, 64, 128] = 16
    rule: Literal["inner_product", "match_count"] = "inner_product"
    codeword_width: int = 1
    num_codewords: int = 16
    codebook_loss_weight: float = 0.0
    codebook_loss_tokens: int = 256
    implementation: Implementation | None = None

    def __post_init__(self) -> None:
        _require(0 < self.density <= 1, f"attention density must lie in (0, 1], got {self.density}")
        _require(
            self.dense_max_length >= 0,
            f"dense_max_length must be at least 0, got {self.dense_max_length}",
        )
        _require(self.min_keys >= 1, f"min_keys must be at least 1, got {self.min_keys}")
        _require(
            2 <= self.num_codewords <= 256,
            f"num_codewords must lie in 2..256 (codes are uint8), got {self.num_codewords}",
        )
        _require(
            math.isfinite(self.codebook_loss_weight) and self.codebook_loss_weight >= 0,
            f"codebook_loss_weight must be at least 0, got {self.codebook_loss_weight}",
        )
        _require(
            self.codebook_loss_tokens >= 1,
            f"codebook_loss_tokens must be at least 1, got {self.codebook_loss_tokens}",
        )
        _require(
            self.granularity in ("auto", "token", "tile", "dense"),
            f"granularity must be auto, token, tile or dense, got {self.granularity!r}",
        )
        _require(
            self.rule in ("inner_product", "match_count"),
            f"rule must be inner_product or match_count, got {self.rule!r}",
        )

    def heads_of_list(self, num_heads: int, num_kv_heads: int) -> int:
        """Query heads of a layer that share a list by tile.

        Raises:
            ValueError: heads are to share lists whose queries they do not divide.
        """
        heads = num_heads // num_kv_heads
        if self.share_heads is None:
            fits = self.block_q % (LEAST_POSITIONS * heads) == 0
            return heads if heads >= LEAST_HEADS_THAT_SHARE and fits else 1
        if not self.share_heads:
            return 1
        _require(
            self.block_q % heads == 0,
            f"share_heads needs block_q to be a multiple of the {heads} query heads of a key head, "
            f"got {self.block_q}",
        )
        return heads

    def num_keys(self, length: int) -> int:
        """Keys that a query keeps in a sequence of `length` positions."""
        return min(length, max(self.min_keys, math.ceil(self.density * length)))

    def granularity_at(
        self, length: int, *, strict: bool = False
    ) -> Literal["token", "tile", "dense"]:
        """The rule for a sequence of `length` positions.

        Args:
            length: positions S.
            strict: whether no token may have an influence on an earlier one; see `strict`.
        """
        granularity = self.granularity
        if granularity == "auto":
            granularity = "dense" if length <= self.dense_max_length else "tile"
        if self.num_keys(length) >= length:
            return "dense"
        return "token" if granularity == "tile" and strict else granularity


@dataclass(frozen=True, kw_only=True)
class RoutedFFNConfig:
    """Routed FFN: hidden units in blocks, of which a token activates some.

    Attributes:
        num_blocks: blocks G; divides the hidden size.
        active_blocks: blocks A that a token activates.
        load_balance_weight: weight of the load-balancing loss; 0 leaves it out.
        absent_rank: rank r of the linear map of its input that a fitted block adds where it is
            left out, beside a constant. Forward and backward, the maps cost two products of width
            `num_blocks * absent_rank`; 0 leaves the constants.
        calibration: where blocks and router come from when a model is adapted; "fitted" to the
            activations of the calibration batch, or "random", the paper's start, in which a block
            that is left out adds nothing.
        implementation: kernels to use; None picks the best for the device.
    """

    num_blocks: int = 4
    active_blocks: int = 2
    load_balance_weight: float = 0.0
    absent_rank: int = 16
    calibration: Literal["fitted", "random"] = "fitted"
    implementation: Implementation | None = None

    def __post_init__(self) -> None:
        _require(
            self.calibration in ("fitted", "random"),
            f"calibration must be fitted or random, got {self.calibration!r}",
        )
        _require(
            1 <= self.active_blocks <= self.num_blocks,
            f"active_blocks must lie in 1..num_blocks, got {self.active_blocks} of "
            f"{self.num_blocks}",
        )
        _require(self.absent_rank >= 0, f"absent_rank must be at least 0, got {self.absent_rank}")

    @property
    def effective_absent_rank(self) -> int:
        """`absent_rank`, or 0 where blocks are random or none is left out."""
        fitted = self.calibration == "fitted" and self.active_blocks < self.num_blocks
        return self.absent_rank if fitted else 0

    @property
    def density(self) -> float:
        """Share of the hidden units that a token computes."""
        return self.active_blocks / self.num_blocks


@explains_names
@dataclass(frozen=True, kw_only=True)
class SPTConfig:
    """The three parts of SPT, and how much their sparse form may cost.

    Attributes:
        lora: LoRA's factors; None for none.
        attention: sparse attention; None leaves it dense.
        ffn: routed FFN; None leaves it dense.
        serve: the form in which the trained model will be used, which stands for a budget. "dense":
            the adapter goes onto the dense model, and the sparse form is for training alone;
            "sparse": it is kept, so that its loss counts. None: without a `loss_budget` every layer
            gets the parts exactly as they are configured, whatever that costs.
        loss_budget: what the sparse form may lose when a model is adapted, in place of the budget
            of `serve`. Of causal language models nats a token, of others the relative change of the
            final hidden states. `adapt` chooses, layer by layer, what saves time within it.
    """

    lora: LoRAConfig | None = field(default_factory=LoRAConfig)
    attention: SparseAttentionConfig | None = field(default_factory=SparseAttentionConfig)
    ffn: RoutedFFNConfig | None = field(default_factory=RoutedFFNConfig)
    serve: Form | None = "dense"
    loss_budget: float | None = None

    def __post_init__(self) -> None:
        _require(
            self.serve in (None, "dense", "sparse"),
            f"serve must be dense, sparse or None, got {self.serve!r}",
        )
        budget = self.loss_budget
        number = isinstance(budget, int | float) and not isinstance(budget, bool)
        _require(
            budget is None or (number and math.isfinite(budget) and budget >= 0),
            f"loss_budget must be a number from 0 on, or None for none, got {budget!r}",
        )

    @property
    def has_budget(self) -> bool:
        """Whether layers get sparse parts by measurement."""
        return self.serve is not None or self.loss_budget is not None

    def budget(self, *, causal_lm: bool) -> float | None:
        """What the sparse form may lose; None where all layers get their parts."""
        if self.loss_budget is not None or self.serve is None:
            return self.loss_budget
        return (LOSS_BUDGETS if causal_lm else CHANGE_BUDGETS)[self.serve]


@dataclass(frozen=True, kw_only=True)
class LearningRateMultipliers:
    """Factors on the learning rate, by the variable type of a parameter.

    Attributes:
        lora: LoRA factors.
        router: FFN routers; low, since a small step of Adam reorders the blocks of many tokens.
        codebook: codewords of product quantizers with a codebook loss.
        head: the task head, and modules that are trained whole (`LoRAConfig.modules_to_save`).
        base: everything else; trained only with `trainable="all"`.
    """

    lora: float = 1.0
    router: float = 0.01
    codebook: float = 1.0
    head: float = 1.0
    base: float = 1.0

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            _require(
                math.isfinite(value) and value >= 0,
                f"the {name} learning-rate multiplier must be at least 0, got {value}",
            )


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices as a mesh; one of the sizes may be -1, which stands for the devices that remain.

    Attributes:
        data: devices that share a batch, and hold all weights each.
        fsdp: devices that share a batch and keep a piece of each weight, gathered when it is used.
        tensor: devices that share the heads and the hidden units of every FFN block.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, size in sizes.items():
            _require(
                size >= 1 or size == -1, f"mesh axis {name} must be at least 1, or -1, got {size}"
            )
        _require(
            list(sizes.values()).count(-1) <= 1,
            f"only one mesh axis can take the devices that remain, got -1 for {sizes}",
        )


@explains_names
@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimizer, length and bookkeeping of one training run.

    Attributes:
        trainable: "adapter" trains LoRA factors, `LoRAConfig.modules_to_save`, routers, head, and
            codebooks that have a loss; "all" everything.
        epochs: passes over the training examples; unused where `steps` is given.
        steps: optimizer steps.
        batch_size: examples an optimizer step.
        accumulation: microbatches into which a batch is cut; divides `batch_size`. The step is
            the same as that of the whole batch and holds the activations of one microbatch.
        group_by_length: put examples of like length into a batch, and pad it to one of at most
            four lengths, not to the longest example: faster where lengths differ. A sparse
            attention keeps a share of the padded length.
        learning_rate: its peak.
        learning_rate_multipliers: factors on it by kind of parameter.
        warmup: linear warm-up from 0; a share of the steps below 1, a number of steps from 1 on.
        schedule: decay after the warm-up, to 0 at the last step; "constant" for none.
        b1: AdamW's decay of the first moment.
        b2: AdamW's decay of the second moment.
        eps: AdamW's denominator offset.
        weight_decay: decoupled weight decay of matrices; vectors and codebooks have none.
        clip_norm: global norm to which gradients are clipped; None for no clipping.
        dropout: whether the model's dropout layers are on in training.
        remat: recompute activations in the backward pass instead of keeping them. The keys that SPT
            chose by tile, and the FFN blocks, are kept.
        eval_every: steps between evaluations; None evaluates at the end of each epoch. The last
            step is always evaluated.
        eval_batch_size: examples an evaluation step; None takes `batch_size`.
        evaluate_as: form of the model that evaluation judges: "dense", what is exported to other
            tools, or "sparse", as it trains. Each metric is given by its name in that form, and
            as `NAME_dense` and `NAME_sparse` beside it.
        monitor: evaluation metric that ranks checkpoints, higher is better except for losses and
            perplexity; None takes the first that the task reports.
        patience: evaluations without improvement after which training stops; None never stops.
        result: which parameters the model and the reported metrics end with.
        checkpoint_every: steps between checkpoints beside those that follow each evaluation.
        log_every: steps between log lines off a terminal; None spreads ten over the run.
        seed: order of the examples and dropout.
        mesh: devices to train on together; None for one. It changes results by rounding alone, and
            a checkpoint may be resumed on another.
    """

    trainable: Trainable = "adapter"
    epochs: float = 3.0
    steps: int | None = None
    batch_size: int = 32
    accumulation: int = 1
    group_by_length: bool = False
    learning_rate: float = 5e-4
    learning_rate_multipliers: LearningRateMultipliers = field(
        default_factory=LearningRateMultipliers
    )
    warmup: float = 0.06
    schedule: Schedule = "linear"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float | None = 1.0
    dropout: bool = True
    remat: bool = False
    eval_every: int | None = None
    eval_batch_size: int | None = None
    evaluate_as: Form = "dense"
    monitor: str | None = None
    patience: int | None = None
    result: Literal["last", "best"] = "last"
    checkpoint_every: int | None = None
    log_every: int | None = None
    seed: int = 0
    mesh: MeshConfig | None = None

    def __post_init__(self) -> None:
        _require(
            self.trainable in ("adapter", "all"),
            f"trainable must be adapter or all, got {self.trainable!r}",
        )
        _require(
            self.schedule in ("linear", "cosine", "constant"),
            f"schedule must be linear, cosine or constant, got {self.schedule!r}",
        )
        _require(
            self.result in ("last", "best"), f"result must be last or best, got {self.result!r}"
        )
        _require(
            self.evaluate_as in ("sparse", "dense"),
            f"evaluate_as must be sparse or dense, got {self.evaluate_as!r}",
        )
        for name in ("batch_size", "accumulation"):
            value = getattr(self, name)
            _require(value >= 1, f"{name} must be at least 1, got {value}")
        for name in (
            "steps",
            "eval_every",
            "eval_batch_size",
            "patience",
            "checkpoint_every",
            "log_every",
        ):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name} must be at least 1, got {value}")
        for name, value, most in (
            ("batch_size", self.batch_size, MOST_EXAMPLES_A_STEP),
            ("eval_batch_size", self.eval_batch_size, MOST_EXAMPLES_A_STEP),
            ("steps", self.steps, MOST_STEPS),
            ("epochs", self.epochs, MOST_EPOCHS),
            ("seed", self.seed, MOST_SEED),
        ):
            _require(
                value is None or not value > most, f"{name} must be at most {most}, got {value}"
            )
        _require(
            self.batch_size % self.accumulation == 0,
            f"accumulation must divide batch_size: {self.batch_size} examples do not cut into "
            f"{self.accumulation} equal microbatches",
        )
        _require(
            math.isfinite(self.epochs) and self.epochs > 0,
            f"epochs must be above 0, got {self.epochs}",
        )
        _require(
            math.isfinite(self.learning_rate) and self.learning_rate > 0,
            f"learning_rate must be above 0, got {self.learning_rate}",
        )
        _require(
            math.isfinite(self.warmup) and self.warmup >= 0,
            f"warmup must be at least 0, got {self.warmup}",
        )
        _require(0 <= self.b1 < 1, f"b1 must lie in [0, 1), got {self.b1}")
        _require(0 <= self.b2 < 1, f"b2 must lie in [0, 1), got {self.b2}")
        _require(self.eps > 0, f"eps must be above 0, got {self.eps}")
        _require(self.weight_decay >= 0, f"weight_decay must be at least 0: {self.weight_decay}")
        _require(
            self.clip_norm is None or self.clip_norm > 0,
            f"clip_norm must be above 0, got {self.clip_norm}",
        )
        _require(self.seed >= 0, f"seed must be at least 0, got {self.seed}")

    def total_steps(self, num_examples: int) -> int:
        """Optimizer steps of the run; with `epochs`, enough to see every example that often."""
        if self.steps is not None:
            return self.steps
        return max(1, math.ceil(self.epochs * num_examples / self.batch_size))

    def warmup_steps(self, total_steps: int) -> int:
        """Steps of the warm-up, below `total_steps`."""
        steps = round(self.warmup * total_steps) if self.warmup < 1 else round(self.warmup)
        return min(steps, total_steps - 1)
