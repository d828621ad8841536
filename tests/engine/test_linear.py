"""The packed linear layer against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from forkkv_cluster.engine.layers.linear import Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_rows", [0, 1, 3, 64, 700])
@pytest.mark.parametrize("has_bias", [False, True])
def test_every_dtype_and_number_of_rows_gives_the_plain_product(dtype: torch.dtype, num_rows: int, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    x, weight = (torch.randn(n, 48, generator=generator).to(dtype) for n in (num_rows, 80))
    bias = torch.randn(80, generator=generator).to(dtype) if has_bias else None
    found, wanted = Linear(weight, bias)(x), functional.linear(x, weight, bias)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found, wanted, rtol=2e-2 if dtype != torch.float32 else 1e-5, atol=2e-2 if dtype != torch.float32 else 1e-5
    )


def test_strided_rows_are_read_as_they_are() -> None:
    x = torch.randn(6, 2, 48, dtype=torch.bfloat16)[:, 1]
    weight = torch.randn(80, 48, dtype=torch.bfloat16)
    torch.testing.assert_close(Linear(weight)(x), Linear(weight)(x.contiguous()), rtol=0, atol=0)
