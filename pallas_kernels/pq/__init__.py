"""Product quantization: encode vectors, then choose keys from codes alone."""

from pallas_kernels.pq.api import pq_encode, pq_select, score_unit, scoring_codewords
from pallas_kernels.pq.types import Selection, TileSelection, TokenSelection

__all__ = [
    "Selection",
    "TileSelection",
    "TokenSelection",
    "pq_encode",
    "pq_select",
    "score_unit",
    "scoring_codewords",
]
