"""Pretrained encoders and decoders from Hugging Face checkpoints."""

from spt_jax.models.decoder import Decoder
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.encoder import Encoder
from spt_jax.models.encoder_config import EncoderConfig
from spt_jax.models.pretrained import load_pretrained
from spt_jax.models.tokenizer import load_tokenizer

__all__ = [
    "Decoder",
    "DecoderConfig",
    "Encoder",
    "EncoderConfig",
    "load_pretrained",
    "load_tokenizer",
]
