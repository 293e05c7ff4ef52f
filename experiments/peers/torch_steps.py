"""Training steps of transformers' layers; imported only where torch, transformers and peft are."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax.numpy as jnp
import peft
import torch
import transformers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.models.opt.modeling_opt import OPTDecoderLayer

from experiments.blocks import BlockStep
from spt_jax.config import LoRAConfig
from spt_jax.models.config import ModelConfig

LAYERS = {"bert": BertLayer, "llama": LlamaDecoderLayer, "opt": OPTDecoderLayer}
#: Names under which transformers' configurations keep rates of dropout.
DROPOUTS = (
    "activation_dropout",
    "attention_dropout",
    "attention_probs_dropout_prob",
    "dropout",
    "hidden_dropout_prob",
)
#: Steps before those that are timed: the first compiles, and makes the optimizer's state.
WARM_UP = 3


def transformers_config(config: ModelConfig) -> Any:
    """The same sizes as a configuration of transformers', without dropout."""
    found = AutoConfig.for_model(**config.to_hugging_face(), attn_implementation="sdpa")
    for name in DROPOUTS:
        if hasattr(found, name):
            setattr(found, name, 0.0)
    return found


class PreNormHalf(nn.Module):
    """`x + body(norm(x))`."""

    def __init__(self, norm: nn.Module, body: nn.Module) -> None:
        super().__init__()
        self.norm, self.body = norm, body

    def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        """Apply it."""
        y = self.body(self.norm(x), **options)
        return x + (y[0] if isinstance(y, tuple) else y)


class BertAttentionHalf(nn.Module):
    """BERT's attention with its norm, which follows the sum."""

    def __init__(self, layer: BertLayer) -> None:
        super().__init__()
        self.attention = layer.attention

    def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        """Apply it."""
        return self.attention(x, **options)[0]


class BertFeedForwardHalf(nn.Module):
    """BERT's FFN with its norm, which follows the sum."""

    def __init__(self, layer: BertLayer) -> None:
        super().__init__()
        self.intermediate, self.output = layer.intermediate, layer.output

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply it."""
        return self.output(self.intermediate(x), x)


def half(layer: nn.Module, part: str) -> nn.Module:
    """A layer's first or second half, without the other's weights."""
    match layer, part:
        case BertLayer(), "mha":
            return BertAttentionHalf(layer)
        case BertLayer(), "ffn":
            return BertFeedForwardHalf(layer)
        case OPTDecoderLayer(), "mha":
            return PreNormHalf(layer.self_attn_layer_norm, layer.self_attn)
        case OPTDecoderLayer(), "ffn":
            body = nn.Sequential(layer.fc1, layer.activation_fn, layer.fc2)
            return PreNormHalf(layer.final_layer_norm, body)
        case LlamaDecoderLayer(), "mha":
            return PreNormHalf(layer.input_layernorm, layer.self_attn)
        case LlamaDecoderLayer(), "ffn":
            return PreNormHalf(layer.post_attention_layernorm, layer.mlp)
    raise ValueError(f"no half {part!r} of a {type(layer).__name__}")


def with_lora(module: nn.Module) -> nn.Module:
    """Give every linear map PEFT's LoRA, as `spt_jax.LoRAConfig` has it, and freeze the rest.

    The factors are float32, to which PEFT casts narrower ones.
    """
    config = LoRAConfig()
    peft.get_peft_model(
        module,
        peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            use_rslora=config.use_rslora,
            target_modules=[n for n, m in module.named_modules() if isinstance(m, nn.Linear)],
        ),
    )
    return module  # itself changed: a step is spared the wrapper's overhead


class TrainingStep:
    """A training step, which a call takes.

    Args:
        step: what of which layer, and how it trains; its dtype is float32 or bfloat16.
        autocast: whether LoRA runs under torch.autocast; full fine-tuning does where its weights
            are not in the compute dtype.
        compiled: whether torch.compile makes the forward and the backward pass.
        device: where.
        seed: of weights and inputs.
    """

    def __init__(
        self, step: BlockStep, *, autocast: bool, compiled: bool, device: torch.device, seed: int
    ) -> None:
        torch.manual_seed(seed)
        self.dtype = getattr(torch, jnp.dtype(step.dtype).name)
        full = step.method == "full"
        config = transformers_config(step.config)
        with device:
            layer = LAYERS[config.model_type](config, layer_idx=0)
            self.module = layer if step.part == "block" else half(layer, step.part)
            self.module.to(torch.float32 if full else self.dtype).train()
            if not full:
                with_lora(self.module)
            size = (step.batch, step.length, step.config.width)
            self.x = torch.randn(size, dtype=self.dtype, requires_grad=True)
            self.options = self._options(step, config)
        self.device, self.remat = device, step.remat
        self.autocast = self.dtype != torch.float32 and (full or autocast)
        trained = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained, lr=1e-4, weight_decay=1e-4, fused=device.type == "cuda"
        )
        self._forward: Callable[[torch.Tensor], torch.Tensor] = self.forward
        if compiled:
            self._forward = torch.compile(self.forward, dynamic=False)

    def _options(self, step: BlockStep, config: Any) -> Mapping[str, Any]:
        if step.part == "ffn":
            return {}
        if config.model_type != "llama":
            return {"attention_mask": None}
        positions = torch.arange(step.length)[None]
        rotary = LlamaRotaryEmbedding(config)(self.x, positions)
        return {"attention_mask": None, "position_embeddings": rotary}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output."""
        if not self.remat:
            return self.module(x, **self.options)
        # There is no dropout, so that no state of a random generator is to be kept.
        return checkpoint(
            self.module, x, use_reentrant=False, preserve_rng_state=False, **self.options
        )

    def gradient(self) -> torch.Tensor:
        """Gradients of all that is trained, in place, and that of x."""
        self.x.grad = None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            y = self._forward(self.x)
        y.backward((y * y).detach())
        assert self.x.grad is not None
        return self.x.grad

    def __call__(self) -> None:
        """Take the step."""
        self.gradient()
        self.optimizer.step()
        self.optimizer.zero_grad()


def attention_kernels(device: torch.device) -> AbstractContextManager[None]:
    """On a GPU attention takes the flash kernel, or raises; rematerialization needs it too."""
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION]) if device.type == "cuda" else nullcontext()


def measure(
    step: BlockStep, *, autocast: bool, compiled: bool, steps: int, seed: int
) -> tuple[list[float], int | None]:
    """Times of so many steps in ms, after those of the warm-up, and the peak of memory in bytes.

    Memory is that of tensors on a GPU while the timed steps ran; None on a CPU.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with attention_kernels(device):
        run = TrainingStep(step, autocast=autocast, compiled=compiled, device=device, seed=seed)
        for _ in range(WARM_UP):
            run()
        if device.type != "cuda":
            return [_wall_ms(run) for _ in range(steps)], None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        events[0].record()
        for event in events[1:]:
            run()
            event.record()
        torch.cuda.synchronize()
        times_ms = [start.elapsed_time(end) for start, end in itertools.pairwise(events)]
        return times_ms, torch.cuda.max_memory_allocated()


def _wall_ms(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def release() -> None:
    """Give back what the last step compiled and allocated."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def gpu_kind() -> str | None:
    """The GPU's name, if there is one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def versions() -> dict[str, str | None]:
    """Versions of what a peer is made of; torch's CUDA is None where it was built without."""
    modules = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    return modules | {"cuda": torch.version.cuda}
