"""Feed-forward network that computes only some blocks of hidden units for each token."""

from pallas_kernels.routed_ffn.api import routed_ffn, routed_ffn_decode
from pallas_kernels.routed_ffn.types import (
    Activation,
    RoutedFFNLoRA,
    RoutedFFNWeights,
    activation_function,
    split_blocks,
)

__all__ = [
    "Activation",
    "RoutedFFNLoRA",
    "RoutedFFNWeights",
    "activation_function",
    "routed_ffn",
    "routed_ffn_decode",
    "split_blocks",
]
