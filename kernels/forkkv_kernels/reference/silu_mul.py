"""y = silu(gate) * up, gate and up side by side as one product of the MLP gives them."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import silu


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2 I] -> [T, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up
