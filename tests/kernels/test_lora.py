"""Shrink and expand."""

from __future__ import annotations

import pytest
import torch
from forkkv_kernels.ops.lora import lora_expand_, lora_shrink


@pytest.mark.parametrize(("num_rows", "rank"), [(1, 1), (3, 8), (17, 5)])
def test_shrink_then_expand_adds_the_low_rank_product(num_rows: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_rows, 12, generator=generator)
    a, b = torch.randn(rank, 12, generator=generator), torch.randn(rank, 9, generator=generator)
    out = torch.ones(num_rows, 9)
    lora_expand_(out, lora_shrink(x, a), b)
    torch.testing.assert_close(out, 1 + x @ a.T @ b)


def test_expand_writes_through_a_view() -> None:
    whole = torch.zeros(4, 6)
    lora_expand_(whole[1:3, 2:4], torch.ones(2, 3), torch.ones(3, 2))
    assert whole.sum() == whole[1:3, 2:4].sum() == 12


def test_a_bias_is_one_rank_more_with_a_column_of_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    x, a = torch.randn(5, 12, generator=generator), torch.randn(3, 12, generator=generator)
    b, bias = torch.randn(3, 9, generator=generator), torch.randn(9, generator=generator)
    out = torch.zeros(5, 9)
    shrunk = lora_shrink(x, torch.cat((a, torch.zeros(1, 12))), torch.tensor([0.0, 0.0, 0.0, 1.0]))
    lora_expand_(out, shrunk, torch.cat((b, bias[None])))
    torch.testing.assert_close(out, x @ a.T @ b + bias)
