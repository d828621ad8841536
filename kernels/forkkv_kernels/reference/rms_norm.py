"""y = x / sqrt(mean(x^2) + eps) * weight, the mean over the last axis, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, H] any float dtype, weight [H] -> [T, H] in x's dtype."""
    if x.dtype == torch.float32:
        return functional.rms_norm(x, weight.shape, weight, eps)
    # The statistics in fp32 and the product in the model's dtype: what Hugging Face checkpoints were trained with.
    return weight * functional.rms_norm(x.float(), weight.shape, None, eps).to(x.dtype)


def add_rms_norm_(hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """hidden [T, H] += delta [T, H] in place, then its norm [T, H]; None adds nothing."""
    if delta is not None:
        hidden += delta
    return rms_norm(hidden, weight, eps)
