"""Fine-tuned models as files that other tools read: Hugging Face directories, PEFT adapters."""

from spt_jax.export.adapter import load_adapter, save_adapter
from spt_jax.export.pretrained import save_pretrained

__all__ = ["load_adapter", "save_adapter", "save_pretrained"]
