"""NNX layers that models are made of, dense and sparse."""

from spt_jax.layers.attention import (
    Attention,
    AuxLosses,
    KeyValueCache,
    RotaryAngles,
    SparseAttention,
)
from spt_jax.layers.dense import DenseImplementation, dense_attention
from spt_jax.layers.feed_forward import FeedForward, RoutedFFN
from spt_jax.layers.linear import Embedding, Linear, dropout, split_key
from spt_jax.layers.lora import LoRA, dense_dot, lora_dot
from spt_jax.layers.recording import probed, probing, record, recording
from spt_jax.layers.rematerialization import choice, recomputed, rematerialized
from spt_jax.layers.rotary import RotaryConfig, rotary_angles, rotate
from spt_jax.layers.variables import (
    ADAPTER,
    CalibrationStat,
    CodebookParam,
    HeadParam,
    LoRAParam,
    RouterParam,
    TableParam,
)

__all__ = [
    "ADAPTER",
    "Attention",
    "AuxLosses",
    "CalibrationStat",
    "CodebookParam",
    "DenseImplementation",
    "Embedding",
    "FeedForward",
    "HeadParam",
    "KeyValueCache",
    "Linear",
    "LoRA",
    "LoRAParam",
    "RotaryAngles",
    "RotaryConfig",
    "RoutedFFN",
    "RouterParam",
    "SparseAttention",
    "TableParam",
    "choice",
    "dense_attention",
    "dense_dot",
    "dropout",
    "lora_dot",
    "probed",
    "probing",
    "recomputed",
    "record",
    "recording",
    "rematerialized",
    "rotary_angles",
    "rotate",
    "split_key",
]
