"""Kernels of SPT: product quantization, sparse attention, routed FFN. Arrays in, arrays out."""

from pallas_kernels.dispatch import (
    Implementation,
    best_implementation,
    why_not_mosaic,
    why_not_triton,
)
from pallas_kernels.pq import (
    Selection,
    TileSelection,
    TokenSelection,
    kept_keys,
    pq_encode,
    pq_select,
    score_unit,
    scoring_codewords,
    valid_keys,
)
from pallas_kernels.routed_ffn import (
    Activation,
    RoutedFFNLoRA,
    RoutedFFNWeights,
    activation_function,
    routed_ffn,
    routed_ffn_decode,
    split_blocks,
)
from pallas_kernels.sparse_attention import sparse_attention, sparse_decode
from pallas_kernels.tuning import autotune

__all__ = [
    "Activation",
    "Implementation",
    "RoutedFFNLoRA",
    "RoutedFFNWeights",
    "Selection",
    "TileSelection",
    "TokenSelection",
    "activation_function",
    "autotune",
    "best_implementation",
    "kept_keys",
    "pq_encode",
    "pq_select",
    "routed_ffn",
    "routed_ffn_decode",
    "score_unit",
    "scoring_codewords",
    "sparse_attention",
    "sparse_decode",
    "split_blocks",
    "valid_keys",
    "why_not_mosaic",
    "why_not_triton",
]
