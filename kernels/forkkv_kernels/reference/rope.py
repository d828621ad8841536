"""Rotary position embedding, halves apart (the Llama layout): with x = [x1 | x2] and angle theta_i at position j,

    R_j(x) = [x1 cos(j theta) - x2 sin(j theta) | x2 cos(j theta) + x1 sin(j theta)]

R_j is linear, so R_j(x W + x A B) = R_j(x W) + R_j(x A B): base K is stored rotated and a residual is added later.
"""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rope(x: Tensor, cos_sin: Tensor) -> Tensor:
    """x [T, H, D], cos_sin [T, D] fp32 (cos in the first half, sin in the second) -> [T, H, D] in x's dtype.

    Computed in fp32: at position 100,000 a bf16 cosine would be noise.
    """
    cos, sin = cos_sin.unsqueeze(1).chunk(2, dim=-1)
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)
