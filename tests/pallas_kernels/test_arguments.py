"""Arrays of the wrong rank, size or type are named where an op is traced, at no cost to it."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Array, Bool, Float

from pallas_kernels import (
    RoutedFFNWeights,
    pq_encode,
    pq_select,
    routed_ffn,
    routed_ffn_decode,
    score_unit,
    scoring_codewords,
    sparse_attention,
    sparse_decode,
    valid_keys,
)
from pallas_kernels.arguments import checked
from spt_jax.layers import dense_attention, dense_dot, lora_dot, rotate
from spt_jax.layers.dense import dense_decode
from spt_jax.layers.quantizer import codebook_loss

B, S, N, K, H, M, E, C = 2, 8, 4, 2, 4, 2, 3, 2


def of(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


def floats(*shape):
    return of("float32", *shape)


codes = functools.partial(of, "uint8")
BOOKS, WORDS = floats(K, M, E, C), of("int8", K, M, E, C)
HEADS = {"q": floats(B, S, N, H), "k": floats(B, S, K, H), "v": floats(B, S, K, H)}
MASKS = {"key_mask": of("bool", B, S), "segment_ids": of("int32", B, S)}
CODES = {"query_codes": codes(B, S, N, M), "key_codes": codes(B, S, K, M)}
WORDS_OF_BOTH = {"query_codewords": WORDS, "key_codewords": WORDS}
CACHE = {"q": floats(B, N, H), "k": floats(B, K, S, H), "v": floats(B, K, S, H)}
ROUTE = {"x": floats(6, 5), "block_index": of("int32", 6, 2), "coefficients": floats(6, 2)}
SELECT = CODES | WORDS_OF_BOTH | MASKS
OPTIONS = {"num_keys": 3, "block_q": 4, "key_group": 2}


def select(granularity):
    return functools.partial(pq_select, granularity=granularity, **OPTIONS)


def attend(granularity, **arrays):
    heads = {name: arrays.pop(name) for name in HEADS}
    selection = pq_select(
        *(jnp.zeros(a.shape, a.dtype) for a in (CODES | WORDS_OF_BOTH).values()),
        granularity=granularity,
        **OPTIONS,
    )
    return sparse_attention(**heads, selection=selection, **arrays)


# Op and its arrays; of each a longer last axis fits nothing.
OPS = {
    "pq_encode": (pq_encode, {"x": HEADS["q"], "codebooks": BOOKS}),
    "pq_select by token": (select("token"), SELECT),
    "pq_select by tile": (select("tile"), SELECT | {"score_unit": floats(K)}),
    "scoring_codewords": (
        scoring_codewords,
        {"query_codebooks": BOOKS, "key_codebooks": BOOKS},
    ),
    "score_unit": (score_unit, {"query_codebooks": BOOKS, "key_codebooks": BOOKS}),
    "valid_keys": (functools.partial(valid_keys, S), MASKS),
    "sparse_attention by token": (functools.partial(attend, "token"), HEADS | MASKS),
    "sparse_attention by tile": (functools.partial(attend, "tile"), HEADS | MASKS),
    "sparse_decode": (
        functools.partial(sparse_decode, num_keys=3),
        CACHE
        | {"query_codes": codes(B, N, M), "key_codes": codes(B, K, M, S)}
        | WORDS_OF_BOTH
        | {"key_mask": MASKS["key_mask"]},
    ),
    "routed_ffn": (
        functools.partial(
            routed_ffn,
            weights=RoutedFFNWeights(w_in=jnp.ones((4, 5, 3)), w_out=jnp.ones((4, 3, 5))),
        ),
        ROUTE,
    ),
    "routed_ffn_decode": (
        functools.partial(
            routed_ffn_decode,
            num_blocks=4,
            weights=RoutedFFNWeights(w_in=jnp.ones((5, 12)), w_out=jnp.ones((12, 5))),
        ),
        ROUTE,
    ),
    "dense_attention": (dense_attention, HEADS | MASKS),
    "dense_decode": (dense_decode, CACHE | {"key_mask": MASKS["key_mask"]}),
    "codebook_loss": (
        codebook_loss,
        {"x": HEADS["q"], "codebooks": BOOKS, "codes": codes(B, S, N, M)}
        | {"mask": MASKS["key_mask"]},
    ),
    "rotate": (
        rotate,
        {"x": HEADS["q"], "cos": floats(B, S, H // 2), "sin": floats(B, S, H // 2)},
    ),
    "lora_dot": (
        lora_dot,
        {"x": floats(3, 5), "w": floats(5, 4), "a": floats(5, 2), "b": floats(2, 4)},
    ),
    "dense_dot": (dense_dot, {"x": floats(3, 5)} | {"w": floats(5, 4)}),
}
WRONG = {
    "rank": lambda a: of(a.dtype, 1, *a.shape),
    "size": lambda a: of(a.dtype, *a.shape[:-1], a.shape[-1] + 1),
    "type": lambda a: of("int32" if a.dtype in ("float32", "bool") else "float32", *a.shape),
}
FITS = [("lora_dot", "x", "rank"), ("dense_dot", "x", "rank"), ("dense_dot", "w", "size")]


def traced(function, arrays):
    return jax.eval_shape(lambda given: function(**given), arrays)


@pytest.mark.parametrize("op", OPS)
def test_wrong_arrays_are_named(op):
    function, arrays = OPS[op]
    traced(function, arrays)
    for name, array in arrays.items():
        for kind, change in WRONG.items():
            if (op, name, kind) in FITS:
                continue
            wrong = arrays | {name: change(array)}
            with pytest.raises(ValueError, match=f"^{op.partition(' ')[0]}: .*"):
                traced(function, wrong)
        given = {other: jnp.zeros(a.shape, a.dtype) for other, a in arrays.items()}
        with pytest.raises(ValueError, match=f": {name} is a list; expected"):
            function(**given | {name: [1]})


def test_batches_are_not_broadcast():
    for name, array in MASKS.items():
        with pytest.raises(ValueError, match=rf"{name} is .*\[1, 8\]; expected .* = \[2, 8\]"):
            traced(dense_attention, HEADS | {name: of(array.dtype, 1, S)})


@pytest.mark.parametrize("op", ["pq_encode", "score_unit", "dense_attention", "rotate"])
def test_checks_add_nothing_to_a_program(op):
    function, arrays = OPS[op]
    programs = [
        str(jax.make_jaxpr(lambda given, f=f: f(**given))(arrays))
        for f in (function, function.__wrapped__)
    ]
    assert programs[0] == programs[1]


def test_arguments_are_held_against_annotations():
    class Layer:
        width = 3

        @checked(D="self.width")
        def __call__(
            self,
            x: Float[Array, "... D"],
            mask: Bool[Array, "S"] | None = None,
        ) -> None: ...

    layer = Layer()
    for x in (jnp.ones(3), jnp.ones((2, 5, 3), jnp.bfloat16)):
        layer(x, mask=None)
    for arguments, message in [
        ((jnp.ones(4),), r"Layer: x is float32\[4\]; expected float \[..., D\] = \[..., 3\]\."),
        ((jnp.ones(()),), r"x is float32\[\]; expected"),
        ((None,), "x is None; expected float"),
        ((jnp.ones(3), jnp.ones(2, bool)[None]), r"mask is bool\[1, 2\]; expected bool \[S\]\."),
    ]:
        with pytest.raises(ValueError, match=message):
            layer(*arguments)
