"""Product quantization: encode vectors, then choose keys from codes alone."""

from pallas_kernels.pq.api import pq_encode, pq_select, score_unit, scoring_codewords
from pallas_kernels.pq.reference import kept_keys, valid_keys
from pallas_kernels.pq.types import Selection, TileSelection, TokenSelection

__all__ = [
    "Selection",
    "TileSelection",
    "TokenSelection",
    "kept_keys",
    "pq_encode",
    "pq_select",
    "score_unit",
    "scoring_codewords",
    "valid_keys",
]
