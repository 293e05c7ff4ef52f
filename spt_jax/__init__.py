"""SPT for JAX: fine-tune Transformers with LoRA, sparse attention and routed FFNs."""

from spt_jax.adapt import adapt
from spt_jax.adaptation import AdaptationReport, LayerAdaptation
from spt_jax.config import (
    LoRAConfig,
    MeshConfig,
    RoutedFFNConfig,
    SparseAttentionConfig,
    SPTConfig,
    TrainConfig,
)
from spt_jax.export import load_adapter, save_adapter, save_pretrained
from spt_jax.forms import set_form
from spt_jax.generation import generate
from spt_jax.inspection import sparse_choices
from spt_jax.models import load_pretrained, load_tokenizer

__all__ = [
    "AdaptationReport",
    "LayerAdaptation",
    "LoRAConfig",
    "MeshConfig",
    "RoutedFFNConfig",
    "SPTConfig",
    "SparseAttentionConfig",
    "TrainConfig",
    "adapt",
    "generate",
    "load_adapter",
    "load_pretrained",
    "load_tokenizer",
    "save_adapter",
    "save_pretrained",
    "set_form",
    "sparse_choices",
]
__version__ = "0.1.0"
