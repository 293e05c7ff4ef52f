"""What `experiments.kernels` measures: baselines, and the candidates that should beat them.

Nothing is computed here: methods are functions and recipes for their arguments, so that a program
can be compiled for a machine that is not there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from experiments.blocks import (
    BlockStep,
    LoRAForm,
    attention_operations,
)
from experiments.text_like import codebooks, text_like
from pallas_kernels import (
    Activation,
    Implementation,
    RoutedFFNLoRA,
    RoutedFFNWeights,
    Selection,
    activation_function,
    pq_encode,
    pq_select,
    routed_ffn,
    score_unit,
    scoring_codewords,
    sparse_attention,
)
from spt_jax.config import RoutedFFNConfig, SparseAttentionConfig
from spt_jax.layers import DenseImplementation, dense_attention, lora_dot
from spt_jax.models.config import ModelConfig
from spt_jax.models.presets import PRESETS, llama_config, one_layer, opt_config

Trained = Any
Frozen = Any
LORA_RANK = 16


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way of computing something: `function(trained, frozen)`, differentiated in `trained`.

    Attributes:
      name: for tables.
      function: what is timed; returns any pytree of arrays.
      arguments: `(trained, frozen)` from a random key; traceable.
      operations: of its products, forward and then forward with backward; None if not counted.
      kernels: those that it must launch on a GPU that has them; `*` stands for anything.
      optional: whether a machine without it is complete.
      eager: whether `arguments` consists of programs that methods share, and is not jitted itself.
      program_of: name of the method of the comparison whose programs it runs, on its own
        arguments; None if it has its own.
    """

    name: str
    function: Callable[[Trained, Frozen], Any]
    arguments: Callable[[jax.Array], tuple[Trained, Frozen]]
    operations: tuple[float, float] | None = None
    kernels: tuple[str, ...] = ()
    optional: bool = False
    eager: bool = False
    program_of: str | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Baselines and candidates on one shape.

    Attributes:
      name: prefix of the baselines' figures.
      shape: for tables.
      baselines: by the ends of their figures' names; a candidate is held against the fastest.
      candidates: by the names of their figures: NAME_speedup.
      length: of a sequence, for plots over it.
      density: of each candidate, likewise.
    """

    name: str
    shape: str
    baselines: dict[str, Method]
    candidates: dict[str, Method]
    length: int | None = None
    density: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class FFNShape:
    """Sizes of a feed-forward network: T tokens, width D, F hidden units in G blocks."""

    tokens: int
    width: int
    hidden: int
    blocks: int = 4
    activation: Activation = "gelu"
    gated: bool = False

    def __str__(self) -> str:
        gated = " gated" if self.gated else ""
        return f"T={self.tokens} D={self.width} F={self.hidden} G={self.blocks}{gated}"


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of an attention layer, and the share of the keys that a query keeps."""

    length: int
    heads: int
    head_width: int
    density: float
    batch: int = 1
    causal: bool = False

    def __str__(self) -> str:
        size = f"S={self.length} N={self.heads} H={self.head_width}"
        batch = f"B={self.batch} " if self.batch > 1 else ""
        return f"{batch}{size}{' causal' if self.causal else ''} density={self.density:g}"


def _by_block(array: jax.Array, blocks: int) -> jax.Array:
    """Splits the last axis, hidden units, into blocks and puts them first."""
    return jnp.moveaxis(array.reshape(*array.shape[:-1], blocks, -1), -2, 0)


def _ffn_inputs(shape: FFNShape, dtype: Any, key: jax.Array) -> dict[str, Any]:
    """Random input, router, weights and LoRA factors, by name."""
    keys = iter(jax.random.split(key, 12))
    d, f, r = shape.width, shape.hidden, LORA_RANK

    def normal(*size: int, scale: float = 1.0) -> jax.Array:
        return scale * jax.random.normal(next(keys), size, dtype)

    ups = ("in", "gate") if shape.gated else ("in",)
    weights = {f"w_{name}": normal(d, f, scale=d**-0.5) for name in ups}
    weights |= {} if shape.gated else {"b_in": normal(f), "b_out": normal(d)}
    factors: dict[str, jax.Array] = {}
    for name in ups:
        factors |= {f"a_{name}": normal(d, r, scale=d**-0.5)}
        factors |= {f"b_{name}": normal(r, f, scale=r**-0.5)}
    return {
        "x": normal(shape.tokens, d),
        "router": normal(d, shape.blocks, scale=d**-0.5),
        "weights": weights | {"w_out": normal(f, d, scale=f**-0.5)},
        "factors": factors
        | {"a_out": normal(f, r, scale=f**-0.5), "b_out": normal(r, d, scale=r**-0.5)},
    }


def _routed_parameters(kind: Any, arrays: dict[str, jax.Array], blocks: int) -> Any:
    """`RoutedFFNWeights` or `RoutedFFNLoRA` of a dense network's arrays."""

    def split(name: str, array: jax.Array) -> jax.Array:
        if name in ("w_out", "a_out"):
            return array.reshape(blocks, -1, array.shape[-1])
        whole = name == "b_out" or name in ("a_in", "a_gate")
        return array if whole else _by_block(array, blocks)

    return kind(**{name: split(name, array) for name, array in arrays.items()})


def dense_ffn(
    x: jax.Array,
    w: dict[str, jax.Array],
    lora: dict[str, jax.Array] | None = None,
    *,
    activation: Activation,
) -> jax.Array:
    """The network that the routed one is measured against; LoRA in its fastest form."""

    def linear(name: str, x: jax.Array) -> jax.Array:
        kernel, bias = w[f"w_{name}"], w.get(f"b_{name}")
        if lora is None:
            y = x @ kernel
        else:
            y = lora_dot(x, kernel, lora[f"a_{name}"], lora[f"b_{name}"], form="merged")
        return y if bias is None else y + bias

    act = activation_function(activation)
    if "w_gate" in w:
        return linear("out", act(linear("gate", x)) * linear("in", x))
    return linear("out", act(linear("in", x)))


def routed(
    x: jax.Array,
    router: jax.Array,
    weights: RoutedFFNWeights,
    lora: RoutedFFNLoRA | None,
    *,
    active: int,
    activation: Activation,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Router and routed FFN."""
    p = jax.nn.sigmoid(x @ router)
    chosen, index = jax.lax.top_k(p, active)
    return routed_ffn(
        x,
        index.astype(jnp.int32),
        2 * chosen,
        weights,
        lora=lora,
        activation=activation,
        implementation=implementation,
    )


def ffn_comparison(
    name: str,
    shape: FFNShape,
    mode: Literal["full", "frozen", "lora"],
    dtype: Any = jnp.float32,
    *,
    whole: bool = False,
    implementation: Implementation | None = None,
) -> Comparison:
    """Compares routed and dense networks.

    Args:
      name: prefix of the figures.
      shape: sizes.
      mode: what trains beside the input and the router: all weights, none, or LoRA factors.
      dtype: of everything.
      whole: whether the routed network is given dense weights and cuts them into blocks itself,
        as a model does. The GPU kernels read blocks where they lie in dense weights.
      implementation: of the routed network.
    """
    blocks, activation = shape.blocks, shape.activation
    inputs = partial(_ffn_inputs, shape, dtype)

    def operations(active: int) -> tuple[float, float]:
        products = (3 if shape.gated else 2) * shape.width * shape.hidden * active / blocks
        forward = 2.0 * shape.tokens * products
        return forward, forward * (3 if mode == "full" else 2)

    def dense_arguments(key: jax.Array) -> tuple[Trained, Frozen]:
        given = inputs(key)
        if mode == "full":
            return (given["x"], given["weights"], None), None
        lora = given["factors"] if mode == "lora" else None
        return (given["x"], None, lora), given["weights"]

    def dense(trained: Trained, frozen: Frozen) -> jax.Array:
        x, weights, lora = trained
        return dense_ffn(x, weights or frozen, lora, activation=activation)

    def routed_arguments(key: jax.Array) -> tuple[Trained, Frozen]:
        given = inputs(key)
        weights, factors = given["weights"], given["factors"] if mode == "lora" else None
        if not whole:
            weights, factors = in_blocks(weights, factors)
        if mode == "full":
            return (given["x"], given["router"], weights, None), None
        return (given["x"], given["router"], None, factors), weights

    def in_blocks(weights: Any, factors: Any) -> tuple[Any, Any]:
        weights = _routed_parameters(RoutedFFNWeights, weights, blocks)
        return weights, factors and _routed_parameters(RoutedFFNLoRA, factors, blocks)

    def candidate(active: int) -> Method:
        def function(trained: Trained, frozen: Frozen) -> jax.Array:
            x, router, weights, lora = trained
            weights = weights or frozen
            if whole:
                weights, lora = in_blocks(weights, lora)
            return routed(
                x,
                router,
                weights,
                lora,
                active=active,
                activation=activation,
                implementation=implementation,
            )

        return Method(
            name=f"routed, {active} of {blocks}",
            function=function,
            arguments=routed_arguments,
            operations=operations(active),
            kernels=("routed_ffn_*",),
        )

    baseline = Method(
        name="dense, merged LoRA" if mode == "lora" else "dense",
        function=dense,
        arguments=dense_arguments,
        operations=operations(blocks),
    )
    return Comparison(
        name=name,
        shape=str(shape),
        baselines={"dense": baseline},
        candidates={
            f"{name}_half": candidate(blocks // 2),
            f"{name}_quarter": candidate(blocks // 4),
        },
        density={f"{name}_half": 1 / 2, f"{name}_quarter": 1 / 4},
    )


#: Queries and keys: normal numbers, or such as those of text.
Inputs = Literal["random", "text"]


def _attention_inputs(
    shape: AttentionShape, dtype: Any, key: jax.Array, *, inputs: Inputs = "random"
) -> tuple[Trained, Frozen]:
    """Queries, keys and random values, and the library's codebooks of them."""
    size = (shape.batch, shape.length, shape.heads, shape.head_width)
    q_key, k_key, v_key = jax.random.split(key, 3)
    v = jax.random.normal(v_key, size, dtype)
    if inputs == "text":
        q, k = text_like(q_key, *size, dtype)
    else:
        q, k = (jax.random.normal(key, size, dtype) for key in (q_key, k_key))
    return (q, k, v), codebooks(q, k)


@dataclass(frozen=True)
class _Sparse:
    """Sparse attention in its parts."""

    shape: AttentionShape
    granularity: Literal["token", "tile"]
    implementation: Implementation | None = None
    inputs: Inputs = "random"

    def arguments(self, dtype: Any, key: jax.Array) -> tuple[Trained, Frozen]:
        """Queries, keys and values, and codebooks."""
        return _attention_inputs(self.shape, dtype, key, inputs=self.inputs)

    @property
    def num_keys(self) -> int:
        return SparseAttentionConfig(density=self.shape.density).num_keys(self.shape.length)

    def encode(self, qkv: Trained, codebooks: Frozen) -> tuple[jax.Array, jax.Array]:
        encode = partial(pq_encode, implementation=self.implementation)
        return encode(qkv[0], codebooks[0]), encode(qkv[1], codebooks[1])

    def select(self, codes: Any, codebooks: Frozen) -> Selection:
        query_codes, key_codes = codes
        query_codewords, key_codewords = scoring_codewords(*codebooks)
        return pq_select(
            query_codes,
            key_codes,
            query_codewords,
            key_codewords,
            num_keys=self.num_keys,
            granularity=self.granularity,
            score_unit=score_unit(*codebooks),
            causal=self.shape.causal,
            implementation=self.implementation,
        )

    def attend(self, qkv: Trained, selection: Selection) -> jax.Array:
        q, k, v = qkv
        return sparse_attention(
            q, k, v, selection, causal=self.shape.causal, implementation=self.implementation
        )

    def whole(self, qkv: Trained, codebooks: Frozen) -> jax.Array:
        return self.attend(qkv, self.select(self.encode(qkv, codebooks), codebooks))

    def operations(self) -> tuple[float, float] | None:
        shape = self.shape
        if not shape.causal:
            return None
        forward = attention_operations(
            shape.batch, shape.length, shape.heads, shape.head_width, self.num_keys
        )
        return forward, 3.5 * forward

    def method(self, dtype: Any) -> Method:
        """All parts, as a layer runs them."""
        return Method(
            name=f"sparse, {self.granularity}, density {self.shape.density:g}",
            function=self.whole,
            arguments=partial(self.arguments, dtype),
            operations=self.operations(),
            kernels=("pq_*", "sparse_attention_*"),
            eager=True,
        )

    def parts(self, dtype: Any) -> dict[str, Method]:
        """The parts alone.

        Encoding and selection have no backward pass. The others have one gradient kernel each,
        whose time is that of their backward pass; the forward kernel's is their forward pass.
        """

        def codes(key: jax.Array) -> tuple[Trained, Frozen]:
            qkv, codebooks = self.arguments(dtype, key)
            return (), (self.encode(qkv, codebooks), codebooks)

        def selected(key: jax.Array, trained: str) -> tuple[Trained, Frozen]:
            qkv, codebooks = self.arguments(dtype, key)
            given = dict(zip("qkv", qkv, strict=True))
            selection = self.select(self.encode(qkv, codebooks), codebooks)
            return {name: given.pop(name) for name in trained}, (given, selection)

        def attend(trained: Trained, frozen: Frozen) -> jax.Array:
            given, selection = frozen
            qkv = trained | given
            return self.attend((qkv["q"], qkv["k"], qkv["v"]), selection)

        def attention(name: str, trained: str, operations: float, *kernels: str) -> Method:
            total = self.operations()
            return Method(
                name=f"{name}, {self.granularity}",
                function=attend,
                arguments=partial(selected, trained=trained),
                operations=total and (total[0], operations * total[0]),
                kernels=tuple(f"sparse_attention_{kernel}" for kernel in kernels),
                eager=True,
            )

        # Of the products of a query and a key, the forward pass takes two, dq three and dkv four.
        return {
            "encode": Method(
                name="encode queries and keys",
                function=lambda _, given: self.encode(*given),
                arguments=lambda key: ((), self.arguments(dtype, key)),
                kernels=(),  # codewords of width 1 are compared in one elementwise pass
                eager=True,
            ),
            "select": Method(
                name=f"select, {self.granularity}",
                function=lambda _, given: self.select(*given),
                arguments=codes,
                kernels=(f"pq_{self.granularity}_*",),
                eager=True,
            ),
            "dq": attention("gradient of queries", "q", 2.5, "forward", "dq"),
            "dkv": attention("gradients of keys and values", "kv", 3.0, "forward", "dkv"),
        }


def attention_comparison(name: str, shape: AttentionShape) -> Comparison:
    """Compares sparse attention, encoding and selection included, with dense attention."""
    return Comparison(
        name=name,
        shape=str(shape),
        baselines={
            "dense": Method(
                name="dense_attention",
                function=lambda qkv, _: dense_attention(*qkv),
                arguments=partial(_attention_inputs, shape, jnp.float32),
            ),
            "dense_whole": Method(
                name="jax.nn.dot_product_attention",
                function=lambda qkv, _: jax.nn.dot_product_attention(*qkv),
                arguments=partial(_attention_inputs, shape, jnp.float32),
            ),
        },
        candidates={name: _Sparse(shape, "tile").method(jnp.float32)},
    )


def _step_method(name: str, step: BlockStep) -> Method:
    sparse = step.method == "spt"
    return Method(
        name=name,
        function=step.run,
        arguments=step.arguments,
        operations=step.operations(),
        kernels=("pq_*", "sparse_attention_*", "routed_ffn_*") if sparse else (),
    )


def stack_comparison(name: str, step: BlockStep) -> Comparison:
    """Compares SPT with LoRA on decoder layers, with and without rematerialization.

    Args:
      name: prefix of the figures.
      step: layers, batch and types; its method is not looked at.
    """
    lora, spt = replace(step, method="lora"), replace(step, method="spt")
    merged = replace(lora, lora_form="merged")
    return Comparison(
        name=name,
        shape=str(step),
        baselines={
            "lora_merged": _step_method("LoRA, merged", merged),
            "lora_factored": _step_method("LoRA, factored", replace(lora, lora_form="factored")),
            "lora_remat": _step_method("LoRA, merged, remat", replace(merged, remat=True)),
        },
        candidates={
            f"{name}_spt": _step_method("SPT", spt),
            f"{name}_spt_remat": _step_method("SPT, remat", replace(spt, remat=True)),
        },
    )


LARGE = FFNShape(4096, 1024, 4096)
MINILM = FFNShape(4096, 384, 1536)  # 32 sequences of 128 tokens.
OPT_2048 = one_layer(PRESETS["opt-2048"])
ATTENTION = AttentionShape(4096, 8, 64, 1 / 8)
STACK = BlockStep(
    config=llama_config(width=512, heads=8, kv_heads=4, hidden=1376, layers=4),
    batch=1,
    length=2048,
    method="lora",
    dense_attention="xla",
    dtype=jnp.float32,
)


def cpu_comparisons() -> Iterator[Comparison]:
    """The comparisons that a CPU runs, in float32."""
    yield ffn_comparison("routed_ffn", LARGE, "full")
    yield ffn_comparison("routed_ffn_frozen", LARGE, "frozen")
    yield ffn_comparison("routed_ffn_minilm_lora", MINILM, "lora")
    yield attention_comparison("sparse_attention", ATTENTION)
    yield stack_comparison("llama_stack", STACK)


@dataclass(frozen=True, kw_only=True)
class GPUSizes:
    """What the sweep on a GPU covers.

    Attributes:
      lengths: of the sequences of the attention sweep.
      densities: of that sweep.
      token_parts_length: of sequences whose parts, by token, are timed alone.
      parts_lengths: the same by tile.
      heads: attention heads.
      head_width: of them.
      tokens: batch times length, or one sequence where that is longer.
      ffn: the network.
      block: the decoder layer.
      block_batch: sequences of its step.
      block_length: their tokens.
      dense_attention: implementation of the dense baselines.
      implementation: of the candidates.
      dtype: of everything but what is kept in float32.
    """

    lengths: tuple[int, ...] = tuple(256 << i for i in range(9))
    densities: tuple[float, ...] = (1 / 4, 1 / 8, 1 / 16)
    token_parts_length: int = 256
    parts_lengths: tuple[int, ...] = (512, 2048, 8192, 32768)
    heads: int = 32
    head_width: int = 128
    tokens: int = 32768
    ffn: FFNShape = FFNShape(8192, 4096, 11008, activation="silu", gated=True)
    block: ModelConfig = OPT_2048
    block_batch: int = 16
    block_length: int = 512
    dense_attention: DenseImplementation = "cudnn"
    implementation: Implementation | None = None
    dtype: Any = jnp.bfloat16


#: What a rehearsal on a CPU takes in their place.
REHEARSAL = GPUSizes(
    lengths=(),
    densities=(1 / 4,),
    token_parts_length=64,
    parts_lengths=(128,),
    heads=1,
    head_width=32,
    tokens=128,
    ffn=FFNShape(64, 32, 256, activation="silu", gated=True),
    block=opt_config(width=32, heads=2, hidden=64),
    block_batch=2,
    block_length=64,
    dense_attention="xla",
)


def _tokamax_attention(qkv: Trained, _: Frozen) -> jax.Array:
    import tokamax  # type: ignore[import-not-found]

    return tokamax.dot_product_attention(*qkv, is_causal=True)


def _sweep_shape(sizes: GPUSizes, length: int, density: float) -> AttentionShape:
    batch = max(1, sizes.tokens // length)
    return AttentionShape(length, sizes.heads, sizes.head_width, density, batch, causal=True)


def _dense_attention(sizes: GPUSizes, length: int) -> dict[str, Method]:
    """cuDNN, and tokamax where it is installed."""
    shape = _sweep_shape(sizes, length, 1.0)
    forward = attention_operations(shape.batch, length, shape.heads, shape.head_width, length)
    options: dict[str, Any] = {
        "arguments": partial(_attention_inputs, shape, sizes.dtype),
        "operations": (forward, 3.5 * forward),
    }

    def dense(qkv: Trained, _: Frozen) -> jax.Array:
        return dense_attention(*qkv, causal=True, implementation=sizes.dense_attention)

    methods = {"dense": Method(name=f"dense, {sizes.dense_attention}", function=dense, **options)}
    if importlib.util.find_spec("tokamax") is not None:
        methods["tokamax"] = Method(
            name="dense, tokamax", function=_tokamax_attention, optional=True, **options
        )
    return methods


def attention_sweep(sizes: GPUSizes, length: int) -> Comparison:
    """Causal attention at one length, dense against all densities.

    By token it runs at the shortest alone: there it takes longer than dense attention already.
    """
    candidates, densities = {}, {}
    name = f"sparse_attention_s{length}"
    for density in sizes.densities:
        shape = _sweep_shape(sizes, length, density)
        granularities: tuple[Literal["token", "tile"], ...] = ("tile",)
        if length <= sizes.token_parts_length:
            granularities = ("token", "tile")
        for granularity in granularities:
            figure = f"{name}_{granularity}_d{round(1 / density)}"
            candidates[figure] = _Sparse(shape, granularity, sizes.implementation).method(
                sizes.dtype
            )
            densities[figure] = density
    shape = _sweep_shape(sizes, length, 1.0)
    return Comparison(
        name=name,
        shape=f"B={shape.batch} S={length} N={shape.heads} H={shape.head_width} causal",
        baselines=_dense_attention(sizes, length),
        candidates=candidates,
        length=length,
        density=densities,
    )


def attention_parts(
    sizes: GPUSizes, length: int, granularity: Literal["token", "tile"]
) -> Comparison:
    """Sparse attention at density 1/8 and its parts, each against dense attention.

    Queries and keys are such as those of text. The names of what also runs on random ones, the
    same programs, end in `_random`.
    """
    shape = _sweep_shape(sizes, length, 1 / 8)
    name = f"parts_s{length}_{granularity}"

    def methods(inputs: Inputs) -> dict[str, Method]:
        sparse = _Sparse(shape, granularity, sizes.implementation, inputs)
        parts = {"whole": sparse.method(sizes.dtype)} | sparse.parts(sizes.dtype)
        return {f"{name}_{part}": method for part, method in parts.items()}

    random = {
        f"{part}_random": replace(method, name=f"{method.name}, random keys", program_of=part)
        for part, method in methods("random").items()
        if not part.endswith(("_encode", "_select"))  # whose time does not depend on keys
    }
    return Comparison(
        name=name,
        shape=str(shape),
        baselines=_dense_attention(sizes, length),
        candidates=methods("text") | random,
    )


def with_implementation(step: BlockStep, implementation: Implementation | None) -> BlockStep:
    """A step whose sparse modules run on an implementation."""
    return replace(
        step,
        attention=replace(step.attention, implementation=implementation),
        ffn=step.ffn and replace(step.ffn, implementation=implementation),
    )


def block_comparison(sizes: GPUSizes) -> Comparison:
    """One decoder layer's training step: full fine-tuning and every form of LoRA against SPT."""
    full = BlockStep(
        config=sizes.block,
        batch=sizes.block_batch,
        length=sizes.block_length,
        method="full",
        dense_attention=sizes.dense_attention,
        dtype=sizes.dtype,
    )
    lora = replace(full, method="lora")
    spt = with_implementation(replace(full, method="spt"), sizes.implementation)
    forms: dict[LoRAForm, str] = {
        "skinny": "two skinny products",
        "skinny_float32": "two skinny float32 products",
        "factored": "factored",
        "merged": "merged",
    }
    baselines = {
        f"lora_{form}": _step_method(f"LoRA, {text}", replace(lora, lora_form=form))
        for form, text in forms.items()
    }
    tile, token = (
        replace(spt, attention=replace(spt.attention, granularity=granularity))
        for granularity in ("tile", "token")
    )
    ffn = RoutedFFNConfig(active_blocks=1, implementation=sizes.implementation)
    quarter = replace(spt, ffn=ffn)
    return Comparison(
        name="block",
        shape=str(full),
        baselines={"full": _step_method("full", full)} | baselines,
        candidates={
            "block_spt": _step_method("SPT", spt),
            "block_spt_tile": _step_method("SPT, tile", tile),
            "block_spt_token": _step_method("SPT, token", token),
            "block_spt_quarter": _step_method("SPT, 1 of 4 blocks", quarter),
        },
    )


def gpu_comparisons(sizes: GPUSizes | None = None) -> Iterator[Comparison]:
    """The comparisons that a GPU runs."""
    sizes = sizes or GPUSizes()
    ffn = partial(
        ffn_comparison,
        shape=sizes.ffn,
        dtype=sizes.dtype,
        whole=True,
        implementation=sizes.implementation,
    )
    yield ffn("routed_ffn", mode="full")
    yield ffn("routed_ffn_frozen", mode="frozen")
    yield ffn("routed_ffn_lora", mode="lora")
    yield block_comparison(sizes)
    for length in sizes.lengths:
        yield attention_sweep(sizes, length)
    yield attention_parts(sizes, sizes.token_parts_length, "token")
    for length in sizes.parts_lengths:
        yield attention_parts(sizes, length, "tile")


def with_triton(sizes: GPUSizes | None = None) -> Iterator[Comparison]:
    """Those of `gpu_comparisons`, with every candidate a second time on the Triton kernels."""
    sizes = sizes or GPUSizes()
    others = gpu_comparisons(replace(sizes, implementation="triton"))
    for comparison, other in zip(gpu_comparisons(sizes), others, strict=True):
        more = {
            f"{name}_triton": replace(
                method,
                name=f"{method.name}, triton",
                program_of=method.program_of and f"{method.program_of}_triton",
            )
            for name, method in other.candidates.items()
        }
        density = {f"{name}_triton": value for name, value in other.density.items()}
        yield replace(
            comparison,
            candidates=comparison.candidates | more,
            density=comparison.density | density,
        )
