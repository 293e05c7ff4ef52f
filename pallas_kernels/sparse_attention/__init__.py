"""Attention over the keys that `pq_select` keeps."""

from pallas_kernels.sparse_attention.api import sparse_attention, sparse_decode

__all__ = ["sparse_attention", "sparse_decode"]
