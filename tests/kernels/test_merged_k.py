"""Attention over an adapter's whole K, where it is at hand, against base K and a_k B_k."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from forkkv_kernels.ops.residual_attention import GroupResidual, attend_grouped, reconstruct_k

from tests.kernels.test_residual_attention import finish, make


def whole(residual: GroupResidual, base_k: torch.Tensor, cos_sin: torch.Tensor) -> GroupResidual:
    assert residual.a_k is not None
    assert residual.b_k is not None
    merged_k = reconstruct_k(base_k, residual.a_k, residual.b_k, cos_sin).transpose(0, 1).contiguous()
    return replace(residual, merged_k=merged_k)


@pytest.mark.parametrize("which", [[0], [1], [0, 1]], ids=str)
def test_whole_k_gives_what_base_and_residual_give(which: list[int]) -> None:
    """Two adapters of one and three rows, one row of the base model between them."""
    one, two = make(5, 20, seed=1), make(5, 20, seed=2)
    built = [
        GroupResidual(0, 1, one.a_k, one.b_k, one.a_v, one.b_v),
        GroupResidual(2, 5, two.a_k, two.b_k, None, None),
    ]
    at_hand = [whole(r, one.base_k, one.cos_sin) if n in which else r for n, r in enumerate(built)]
    hidden = torch.arange(20)[None, :] > torch.arange(15, 20)[:, None]
    outputs = [
        finish([(attend_grouped(one.grouped_q, one.base_k, one.base_v, one.cos_sin, r, hidden), torch.arange(5))], 5)
        for r in (built, at_hand)
    ]
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-5)


def test_where_every_row_has_its_whole_k_base_k_is_not_read() -> None:
    case = make(3, 20)
    residual = whole(case.residual, case.base_k, case.cos_sin)
    poisoned = torch.full_like(case.base_k, float("nan"))
    partial = attend_grouped(case.grouped_q, poisoned, case.base_v, case.cos_sin, [residual])
    assert torch.isfinite(partial.output).all()
