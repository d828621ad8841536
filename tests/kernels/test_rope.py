"""Rotary embedding: R_j(x)."""

from __future__ import annotations

import pytest
import torch
from forkkv_kernels.ops.rope import apply_rope


def table(num_positions: int, head_dim: int) -> torch.Tensor:
    angles = torch.outer(torch.arange(num_positions).float(), 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim))
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


@pytest.mark.parametrize("head_dim", [2, 32, 80])
def test_it_is_a_rotation_of_complex_pairs(head_dim: int) -> None:
    x = torch.randn(7, 3, head_dim, generator=torch.Generator().manual_seed(0))
    half = head_dim // 2
    cos_sin = table(7, head_dim)
    turn = torch.complex(cos_sin[:, :half], cos_sin[:, half:]).unsqueeze(1)
    turned = torch.complex(x[..., :half], x[..., half:]) * turn
    torch.testing.assert_close(apply_rope(x, cos_sin), torch.cat((turned.real, turned.imag), dim=-1))


def test_it_is_linear_so_a_residual_may_be_added_later() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 5, 2, 32, generator=generator)
    cos_sin = table(5, 32)
    torch.testing.assert_close(apply_rope(x + y, cos_sin), apply_rope(x, cos_sin) + apply_rope(y, cos_sin))


def test_half_precision_is_rotated_in_float32() -> None:
    x = torch.randn(5, 2, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    cos_sin = table(5, 32)
    assert torch.equal(apply_rope(x, cos_sin), apply_rope(x.float(), cos_sin).bfloat16())
