"""y = x / sqrt(mean(x^2) + eps) * weight."""

from __future__ import annotations

import pytest
import torch
from forkkv_kernels.ops.rms_norm import rms_norm


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 128)])
def test_it_equals_the_formula(dtype: torch.dtype, tolerance: float, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(*shape, generator=generator).to(dtype), torch.randn(shape[1], generator=generator).to(dtype)
    wanted = x.double() / torch.sqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-5) * weight.double()
    actual = rms_norm(x, weight, 1e-5)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), wanted, atol=tolerance, rtol=tolerance)


def test_eps_keeps_a_zero_row_finite() -> None:
    assert torch.equal(rms_norm(torch.zeros(1, 8), torch.ones(8), 1e-6), torch.zeros(1, 8))
