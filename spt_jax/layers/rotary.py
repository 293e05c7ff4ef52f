"""Rotary position embedding, and its scalings to sequences longer than a model was trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.arguments import checked

RotaryKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True, kw_only=True)
class RotaryConfig:
    """Frequencies of a rotary embedding.

    Attributes:
        theta: base of the frequencies `theta ** (-2 i / H)`.
        kind: scaling: "default" (none), "linear" (positions divided by `factor`), "dynamic" (a
            base that grows with the sequence), "llama3" (low frequencies divided by `factor`) or
            "yarn" (Peng et al., arXiv 2309.00071).
        factor: how many times longer sequences become.
        original_length: positions of the model before scaling.
        low_freq_factor: of llama3: wavelengths above `original_length / low_freq_factor` scale.
        high_freq_factor: of llama3: wavelengths below `original_length / high_freq_factor` stay.
        beta_fast: of yarn: frequencies of more rotations than this stay.
        beta_slow: of yarn: frequencies of fewer rotations than this scale.
        attention_factor: factor on sine and cosine.
        truncate: of yarn: whether its range of frequencies is rounded outwards.
    """

    theta: float = 10000.0
    kind: RotaryKind = "default"
    factor: float = 1.0
    original_length: int = 2048
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


@checked()
def rotary_angles(
    positions: Int[Array, "B S"], head_width: int, config: RotaryConfig
) -> tuple[Float[Array, "B S h"], Float[Array, "B S h"]]:
    """Cosine and sine of each position's angles, float32, h = H / 2.

    Args:
        positions: of the tokens. With the dynamic kind the highest of them sets the base.
        head_width: H, even.
        config: frequencies.

    Raises:
        ValueError: shapes or types do not fit together, or H is odd.
    """
    if head_width < 2 or head_width % 2:
        raise ValueError(f"rotary_angles: head_width must be even, got {head_width}")
    if config.kind == "dynamic":
        frequencies = _dynamic_frequencies(positions, head_width, config)
    else:
        frequencies = jnp.asarray(_frequencies(head_width, config), jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return (
        jnp.cos(angles) * config.attention_factor,
        jnp.sin(angles) * config.attention_factor,
    )


@checked()
def rotate(
    x: Float[Array, "B S N H"], cos: Float[Array, "B S h"], sin: Float[Array, "B S h"]
) -> Float[Array, "B S N H"]:
    """Rotate the pairs `(x_i, x_{i + H/2})` of each head, in float32.

    Raises:
        ValueError: shapes or types do not fit together.

    References:
        Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv
        2104.09864, with the pairs of Hugging Face's checkpoints.
    """
    if x.shape[-1] != 2 * cos.shape[-1]:
        raise ValueError(
            f"rotate: x has heads of width {x.shape[-1]}; the angles serve {2 * cos.shape[-1]}"
        )
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _exponents(head_width: int) -> np.ndarray:
    return np.arange(0, head_width, 2) / head_width


def _dynamic_frequencies(
    positions: Int[Array, "B S"], head_width: int, config: RotaryConfig
) -> Float[Array, " h"]:
    length = jnp.maximum(jnp.max(positions) + 1, config.original_length).astype(jnp.float32)
    growth = config.factor * length / config.original_length - (config.factor - 1)
    theta = config.theta * growth ** (head_width / (head_width - 2))
    return theta ** -jnp.asarray(_exponents(head_width), jnp.float32)


def _frequencies(head_width: int, config: RotaryConfig) -> np.ndarray:
    plain = config.theta ** -_exponents(head_width)
    match config.kind:
        case "linear":
            return plain / config.factor
        case "llama3":
            turns = config.original_length * plain / (2 * math.pi)
            low, high = config.low_freq_factor, config.high_freq_factor
            kept = np.clip((turns - low) / (high - low), 0, 1)
        case "yarn":
            kept = 1 - _yarn_ramp(head_width, config)
        case _:
            return plain
    return plain * kept + plain / config.factor * (1 - kept)


def _yarn_ramp(head_width: int, config: RotaryConfig) -> np.ndarray:
    """How far each frequency is scaled: 0 for the high ones, 1 for the low ones."""

    def dimension(rotations: float) -> float:
        turns = config.original_length / (rotations * 2 * math.pi)
        return head_width * math.log(turns) / (2 * math.log(config.theta))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_width - 1)
    width = high - low if high != low else 0.001
    return np.clip((np.arange(head_width // 2) - low) / width, 0, 1)
