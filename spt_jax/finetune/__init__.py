"""Fine-tuning on rows of a file: `finetune(FinetuneConfig(...))`, `python -m spt_jax.finetune`."""

from spt_jax.finetune.config import DataConfig, FinetuneConfig
from spt_jax.finetune.rows import BadRow
from spt_jax.finetune.run import FinetuneResult, finetune

__all__ = ["BadRow", "DataConfig", "FinetuneConfig", "FinetuneResult", "finetune"]
