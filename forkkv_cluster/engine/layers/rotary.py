"""The table of rotary cosines and sines, with every frequency scaling that does not depend on a sequence's length.

``dynamic`` and ``longrope`` change the frequencies as a sequence grows, so a cached rotated K would depend on history: they
run up to the length at which that starts (``RopeSettings.max_fixed_len``), and the model runner refuses them beyond it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RopeSettings:
    """Rotary settings of a checkpoint. Fields beyond ``theta`` belong to the scaling of that ``rope_type``.

    ``attention_factor`` multiplies every cosine and sine; ``short_factors`` [D / 2] divide the frequencies of longrope;
    ``max_fixed_len`` tokens is the longest sequence whose frequencies do not depend on its length, None for any.
    """

    theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factors: tuple[float, ...] = ()
    max_fixed_len: int | None = None


def inverse_frequencies(settings: RopeSettings, head_dim: int) -> Tensor:
    """theta^(-2i / D) for i < D / 2, scaled: [D / 2] fp32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / settings.theta**exponents
    if settings.rope_type == "linear":
        return frequencies / settings.factor
    if settings.rope_type == "llama3":
        return _llama3(frequencies, settings)
    if settings.rope_type == "yarn":
        return _yarn(frequencies, settings, head_dim)
    if settings.rope_type == "longrope":
        return frequencies / torch.tensor(settings.short_factors)
    return frequencies


def _llama3(frequencies: Tensor, settings: RopeSettings) -> Tensor:
    """Low frequencies are divided by ``factor``, high ones kept, those between interpolated (Llama 3.1)."""
    wavelengths = 2 * math.pi / frequencies
    turns = settings.original_max_position / wavelengths
    smooth = (turns - settings.low_freq_factor) / (settings.high_freq_factor - settings.low_freq_factor)
    smooth = smooth.clamp(0.0, 1.0)
    return (1 - smooth) * frequencies / settings.factor + smooth * frequencies


def _yarn(frequencies: Tensor, settings: RopeSettings, head_dim: int) -> Tensor:
    """Frequencies that turn fewer than ``beta_slow`` times in the original length are divided by ``factor``, those that
    turn more than ``beta_fast`` times kept, those between interpolated over their index (arXiv 2309.00071)."""

    def index_of(turns: float) -> float:
        return head_dim * math.log(settings.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(settings.theta))

    low, high = index_of(settings.beta_fast), index_of(settings.beta_slow)
    if settings.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    divided = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
    return frequencies / settings.factor * divided + frequencies * (1 - divided)


class RotaryTable:
    """cos|sin of every position times the attention factor: ``rows`` [max_positions, D] fp32, ``compact`` the same in
    the model's dtype. Every K and every query is rotated by one row of it once, so the factor is applied once to each."""

    def __init__(
        self, settings: RopeSettings, head_dim: int, max_positions: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        positions = torch.arange(max_positions, dtype=torch.int64).float()
        angles = torch.outer(positions, inverse_frequencies(settings, head_dim))
        self.rows = (torch.cat((angles.cos(), angles.sin()), dim=-1) * settings.attention_factor).to(device)
        self.compact = self.rows.to(dtype)
