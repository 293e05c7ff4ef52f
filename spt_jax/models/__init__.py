"""Pretrained encoders from Hugging Face checkpoints."""

from spt_jax.models.config import EncoderConfig
from spt_jax.models.encoder import Encoder
from spt_jax.models.pretrained import load_pretrained
from spt_jax.models.tokenizer import load_tokenizer

__all__ = ["Encoder", "EncoderConfig", "load_pretrained", "load_tokenizer"]
