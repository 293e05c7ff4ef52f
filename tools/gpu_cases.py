"""The programs that `tools.gpu_check` compiles, and the kernels that each must launch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

import spt_jax
from experiments.blocks import BlockStep
from experiments.comparisons import (
    OPT_2048,
    GPUSizes,
    Method,
    gpu_comparisons,
    with_implementation,
)
from experiments.kernels import step_function
from pallas_kernels import (
    Activation,
    Implementation,
    RoutedFFNLoRA,
    RoutedFFNWeights,
    pq_encode,
    pq_select,
    routed_ffn,
    sparse_attention,
)
from spt_jax.config import RoutedFFNConfig, SparseAttentionConfig, SPTConfig, TrainConfig
from spt_jax.models.encoder import Encoder
from spt_jax.models.encoder_config import EncoderConfig
from spt_jax.models.presets import llama_config
from spt_jax.training import cross_entropy, partition, start, supervised

Program = tuple[Callable[..., Any], tuple[Any, ...]]
Kind = Literal["kernel", "training step", "block", "benchmark"]

ATTENTION_KERNELS = (
    "sparse_attention_forward",
    "sparse_attention_dq",
    "sparse_attention_dkv",
)
FFN_KERNELS = ("routed_ffn_up", "routed_ffn_down", "routed_ffn_down_backward")
SELECT_KERNELS = {
    "tile": ("pq_tile_scores", "pq_tile_threshold"),
    "token": ("pq_token_threshold",),
}

#: Lengths over which an SPT block's memory must grow linearly.
GROWTH_LENGTHS = tuple(2048 << i for i in range(6))
GROWTH_BLOCK = llama_config(width=4096, heads=32, kv_heads=8, hidden=11008)
GROWTH_CASE = "llama_block_s{}"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A program to compile.

    Attributes:
      name: unique.
      kind: what it is there for.
      program: a function and its arguments, or their shapes; called with the described GPU as the
        default device.
      launches: kernels that it must launch, by name; `*` stands for anything.
      figure: name under which its temporaries stand in the figures.
    """

    name: str
    kind: Kind
    program: Callable[[], Program]
    launches: tuple[str, ...] = ()
    figure: str | None = None


def _spec(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _loss_gradient(function: Callable[..., jax.Array], argnums: tuple[int, ...]) -> Any:
    """`f(cotangent, *arguments)`: a function's result and its gradients."""

    def run(cotangent: jax.Array, *arguments: Any) -> Any:
        def chosen(*trained: Any) -> jax.Array:
            given = dict(zip(argnums, trained, strict=True))
            return function(*(given.get(i, a) for i, a in enumerate(arguments)))

        y, pullback = jax.vjp(chosen, *(arguments[i] for i in argnums))
        return y, pullback(cotangent)

    return run


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Sizes and options of the attention and selection cases."""

    width: int = 64
    granularity: Literal["token", "tile"] = "tile"
    key_group: int = 16
    block_q: int = 64
    share_heads: bool = False
    causal: bool = True
    kv_heads: int = 8
    masked: bool = False
    batch: int = 2
    length: int = 1000
    heads: int = 8
    dtype: Any = jnp.bfloat16
    implementation: Implementation | None = None

    def _masks(self) -> dict[str, Any]:
        if not self.masked:
            return {}
        size = (self.batch, self.length)
        return {
            "key_mask": _spec(*size, dtype=jnp.bool_),
            "segment_ids": _spec(*size, dtype=jnp.int32),
        }

    def _codes(self) -> tuple[Any, ...]:
        spaces = self.width // 2
        books = self.kv_heads, spaces, 16, 2
        return (
            *(_spec(self.batch, self.length, n, spaces, dtype=jnp.uint8) for n in self._heads()),
            *(_spec(*books, dtype=jnp.int8) for _ in range(2)),
        )

    def _heads(self) -> tuple[int, int]:
        return self.heads, self.kv_heads

    def _select(self, codes: Any, masks: Any) -> Any:
        return pq_select(
            *codes,
            num_keys=128,
            granularity=self.granularity,
            causal=self.causal,
            block_q=self.block_q,
            key_group=self.key_group,
            share_heads=self.share_heads,
            implementation=self.implementation,
            **masks,
        )

    def select(self) -> Program:
        """Selection from codes."""
        return self._select, (self._codes(), self._masks())

    def attend(self) -> Program:
        """Attention over a selection, and its gradients."""
        selection = jax.eval_shape(self._select, self._codes(), self._masks())
        q, k = (_spec(self.batch, self.length, n, self.width) for n in self._heads())

        def attend(q: Any, k: Any, v: Any, selection: Any, masks: Any) -> jax.Array:
            options: dict[str, Any] = {"causal": self.causal, "implementation": self.implementation}
            return sparse_attention(q, k, v, selection, **options, **masks)

        arguments = (q, q, k, k, selection, self._masks())
        arguments = jax.tree.map(
            lambda a: _spec(*a.shape, dtype=self.dtype) if a.dtype == jnp.bfloat16 else a, arguments
        )
        return _loss_gradient(attend, (0, 1, 2)), arguments


ATTENTION_CASES = {
    **{f"h{width}": Attention(width=width) for width in (32, 64, 80, 96, 128)},
    "h128_bidirectional": Attention(width=128, causal=False),
    "h128_grouped_heads": Attention(width=128, kv_heads=2),
    "h128_shared_heads": Attention(width=128, kv_heads=2, block_q=16, share_heads=True),
    "h64_group8": Attention(key_group=8),
    "h64_group32": Attention(key_group=32),
    "h64_group64": Attention(key_group=64),
    "h64_masked": Attention(causal=False, masked=True),
    "h64_masked_causal": Attention(masked=True),
    "h64_float16": Attention(dtype=jnp.float16),
    "h64_token": Attention(granularity="token"),
    "h128_token": Attention(granularity="token", width=128),
    "h32_token_masked": Attention(granularity="token", width=32, causal=False, masked=True),
    "h64_token_grouped_heads": Attention(granularity="token", kv_heads=2),
}


#: Beside those, at sizes that the Triton kernels alone take.
TRITON_ATTENTION_CASES = {
    "h64_group1": Attention(key_group=1),
    "h128_group1": Attention(key_group=1, width=128),
    "h256": Attention(width=256, heads=4, kv_heads=4),
    "h64_float32": Attention(dtype=jnp.float32),
    "h128_float32": Attention(width=128, dtype=jnp.float32),
    "h64_float32_token": Attention(granularity="token", dtype=jnp.float32),
}


def _encode(
    width: int,
    codeword_width: int,
    codewords: int,
    implementation: Implementation | None,
    dtype: Any = jnp.bfloat16,
) -> Program:
    books = (8, width // codeword_width, codewords, codeword_width)
    encode = functools.partial(pq_encode, implementation=implementation)
    return encode, (_spec(2, 1000, 8, width, dtype=dtype), _spec(*books, dtype=jnp.float32))


def _ffn(
    mode: Literal["full", "frozen", "lora"],
    *,
    gated: bool,
    implementation: Implementation | None,
    dtype: Any = jnp.bfloat16,
) -> Program:
    tokens, width, units, blocks, active, rank = 1000, 512, 512, 4, 2, 16
    names = ("in", "gate") if gated else ("in",)
    spec = functools.partial(_spec, dtype=dtype)
    weights = RoutedFFNWeights(
        **{f"w_{name}": spec(blocks, width, units) for name in names},
        **({} if gated else {"b_in": spec(blocks, units), "b_out": spec(width)}),
        w_out=spec(blocks, units, width),
    )
    lora = RoutedFFNLoRA(
        **{f"a_{name}": spec(width, rank) for name in names},
        **{f"b_{name}": spec(blocks, rank, units) for name in names},
        a_out=spec(blocks, units, rank),
        b_out=spec(rank, width),
    )

    def run(x: Any, coefficients: Any, weights: Any, lora: Any, index: Any) -> jax.Array:
        activation: Activation = "silu" if gated else "gelu"
        options: dict[str, Any] = {"activation": activation, "implementation": implementation}
        return routed_ffn(x, index, coefficients, weights, lora=lora, **options)

    x = spec(tokens, width)
    trained = {"full": (0, 1, 2), "frozen": (0, 1), "lora": (0, 1, 3)}[mode]
    return _loss_gradient(run, trained), (
        x,
        x,
        spec(tokens, active),
        weights,
        lora if mode == "lora" else None,
        spec(tokens, active, dtype=jnp.int32),
    )


def _kernel_cases(implementation: Implementation | None) -> Iterator[Case]:
    triton = implementation == "triton"
    for width, codeword_width, codewords in (
        (64, 2, 16),
        (64, 4, 16),
        (128, 8, 256),
        (64, 16, 64),
        (64, 32, 16),
    ):
        yield Case(
            name=f"pq_encode_h{width}_c{codeword_width}_e{codewords}",
            kind="kernel",
            program=functools.partial(_encode, width, codeword_width, codewords, implementation),
            launches=("pq_encode",),
        )
    for name, attention in (ATTENTION_CASES | (TRITON_ATTENTION_CASES if triton else {})).items():
        attention = replace(attention, implementation=implementation)
        yield Case(
            name=f"pq_select_{name}",
            kind="kernel",
            program=attention.select,
            launches=SELECT_KERNELS[attention.granularity],
        )
        yield Case(
            name=f"sparse_attention_{name}",
            kind="kernel",
            program=attention.attend,
            launches=ATTENTION_KERNELS,
        )
    for dtype in (jnp.bfloat16, jnp.float32) if triton else (jnp.bfloat16,):
        for gated in (False, True):
            for mode in ("lora", "frozen", "full"):
                gradients = () if mode == "frozen" else ("routed_ffn_weight_gradient",)
                suffix = "_gated" if gated else ""
                suffix += "_float32" if dtype == jnp.float32 else ""
                yield Case(
                    name=f"routed_ffn_{mode}{suffix}",
                    kind="kernel",
                    program=functools.partial(
                        _ffn, mode, gated=gated, implementation=implementation, dtype=dtype
                    ),
                    launches=(*FFN_KERNELS, *gradients),
                )


def _bert_step() -> Program:
    """The training step of a small BERT in bfloat16, adapted by `spt_jax.adapt`."""
    config = EncoderConfig(
        model_type="bert",
        vocab_size=1024,
        width=256,
        num_layers=2,
        num_heads=4,
        hidden=1024,
        num_positions=512,
        num_token_types=2,
    )
    size = (8, 256)
    with jax.default_device(jax.devices()[0]):  # this much is computed
        model = Encoder(
            config, num_labels=2, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
        )
        ids = jax.random.randint(jax.random.key(0), (2, 64), 0, config.vocab_size)
        spt = SPTConfig(serve=None, attention=SparseAttentionConfig(granularity="token"))
        model = spt_jax.adapt(model, spt, calibration_batch={"input_ids": ids})
        parts = partition(model, "adapter")
        state, step = start(
            parts, TrainConfig(), total_steps=100, objective=supervised(cross_entropy)
        )
    integers, floats = _spec(*size, dtype=jnp.int32), _spec(size[0], dtype=jnp.float32)
    batch = {"input_ids": integers, "attention_mask": integers, "token_type_ids": integers}
    batch |= {"label": _spec(size[0], dtype=jnp.int32), "weight": floats}
    return jax.jit(step, donate_argnums=0), (state, parts.frozen, batch)


def _step_program(method: Method) -> Program:
    trained, frozen = jax.eval_shape(lambda: method.arguments(jax.random.key(0)))
    if not jax.tree.leaves(trained):
        return method.function, (trained, frozen)
    result = jax.eval_shape(method.function, trained, frozen)
    return step_function(method), (trained, frozen, result)


def _block(
    name: str,
    step: BlockStep,
    figure: str | None = None,
    implementation: Implementation | None = None,
) -> Case:
    step = with_implementation(step, implementation)
    sparse = step.method == "spt"
    granularity = step.attention.granularity_at(step.length)
    attention = () if granularity == "dense" else (*SELECT_KERNELS[granularity], *ATTENTION_KERNELS)
    launches = (*attention, *FFN_KERNELS, "routed_ffn_weight_gradient")

    def loss(trained: Any, frozen: Any) -> jax.Array:
        y, losses = step.run(trained, frozen)
        return y.astype(jnp.float32).sum() + sum(losses.values())

    def program() -> Program:
        arguments = jax.eval_shape(lambda: step.arguments(jax.random.key(0)))
        return jax.value_and_grad(loss), arguments

    return Case(
        name=name,
        kind="block",
        program=program,
        launches=launches if sparse else (),
        figure=figure,
    )


def _block_cases(implementation: Implementation | None) -> Iterator[Case]:
    block = functools.partial(_block, implementation=implementation)
    opt = BlockStep(config=OPT_2048, batch=16, length=512, method="full")
    spt, lora = replace(opt, method="spt"), replace(opt, method="lora")
    yield block("opt_block_full", opt, "full_block_temp_bytes")
    for form in ("skinny", "factored", "merged"):
        step = replace(lora, lora_form=form)
        yield block(f"opt_block_lora_{form}", step, f"lora_{form}_block_temp_bytes")
    step = replace(lora, lora_form="skinny_float32")
    yield block("opt_block_lora_skinny_float32", step, "lora_block_temp_bytes")
    yield block("opt_block_spt", spt, "spt_block_temp_bytes")
    for granularity in ("tile", "token"):
        attention = SparseAttentionConfig(granularity=granularity)
        yield block(
            f"opt_block_spt_{granularity}",
            replace(spt, attention=attention),
            f"spt_{granularity}_block_temp_bytes",
        )
    quarter = RoutedFFNConfig(active_blocks=1)
    yield block("opt_block_spt_quarter", replace(spt, ffn=quarter), "spt_quarter_block_temp_bytes")
    for length in GROWTH_LENGTHS:
        step = BlockStep(config=GROWTH_BLOCK, batch=1, length=length, method="spt")
        yield block(GROWTH_CASE.format(length), step)


def _benchmark_cases(sizes: GPUSizes) -> Iterator[Case]:
    """The programs of `experiments.kernels --device gpu`; blocks are cases of their own."""
    for comparison in gpu_comparisons(sizes):
        if comparison.name == "block":
            continue
        methods = {f"{comparison.name}_{name}": m for name, m in comparison.baselines.items()}
        for name, method in (methods | comparison.candidates).items():
            if method.program_of is not None:
                continue
            yield Case(
                name=f"benchmark_{name}",
                kind="benchmark",
                program=functools.partial(_step_program, method),
                launches=method.kernels,
            )


@functools.cache
def cases(
    *, all_lengths: bool = False, implementation: Implementation | None = None
) -> dict[str, Case]:
    """All cases by name.

    Args:
      all_lengths: whether benchmarks are compiled at every length and density of their sweep, or
        only at the lowest density of the shortest and the longest.
      implementation: of the kernels; with "triton" there are cases that no other implementation
        takes. The training step takes the device's default.
    """
    sizes = GPUSizes(implementation=implementation)
    if not all_lengths:
        ends = (sizes.lengths[0], sizes.lengths[-1])
        sizes = replace(sizes, lengths=ends, densities=sizes.densities[-1:], parts_lengths=(8192,))
    steps = Case(
        name="bert_training_step",
        kind="training step",
        program=_bert_step,
        launches=(
            *SELECT_KERNELS["token"],
            *ATTENTION_KERNELS,
            *FFN_KERNELS,
            "routed_ffn_weight_gradient",
        ),
    )
    found = [
        *_kernel_cases(implementation),
        steps,
        *_block_cases(implementation),
        *_benchmark_cases(sizes),
    ]
    return {case.name: case for case in found}
