"""Attention over adapters' whole K, where it is at hand, against base K and a_k B_k."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from forkkv_kernels.ops.merged_attention import attend_merged
from forkkv_kernels.ops.residual_attention import GroupResidual, attend_grouped, reconstruct_k

from tests.kernels.test_residual_attention import HKV, D, finish, make


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


@pytest.mark.parametrize("places", [[0, 1, 2, 3], [2, 0, 3, 1], [0, 2, 4, 7]], ids=str)
@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("is_masked", [False, True])
def test_adapters_side_by_side_in_one_product_give_what_each_gives(places: list[int], length: int, is_masked: bool) -> None:
    """Four adapters whose K lie at these places of one arena, in an order that is not that of the rows."""
    cases = [make(4 * length, 20, seed=seed) for seed in range(4)]
    one = cases[0]
    arena = torch.full((8, HKV, 20, D), float("nan"))
    residuals = []
    for number, (case, place) in enumerate(zip(cases, places, strict=True)):
        is_v_alone = number == 3
        built = GroupResidual(
            number * length, (number + 1) * length, case.a_k, case.b_k,
            None if is_v_alone else case.a_v, None if is_v_alone else case.b_v,
        )  # fmt: skip
        arena[place] = whole(built, one.base_k, one.cos_sin).merged_k  # type: ignore[call-overload]
        residuals.append(replace(built, merged_k=arena[place]))
    num_rows = 4 * length
    hidden = torch.arange(20)[None, :] > torch.arange(20 - num_rows, 20)[:, None] if is_masked else None
    together = attend_merged(one.grouped_q, one.base_v, residuals, hidden)
    assert together is not None
    apart = attend_grouped(one.grouped_q, one.base_k, one.base_v, one.cos_sin, residuals, hidden)
    rows = torch.arange(num_rows)
    torch.testing.assert_close(finish([(together, rows)], num_rows), finish([(apart, rows)], num_rows), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.lse, apart.lse, atol=1e-5, rtol=1e-5)


def test_one_product_is_not_for_rows_without_whole_k_nor_for_uneven_numbers_of_rows() -> None:
    case = make(3, 20)
    at_hand = whole(GroupResidual(0, 1, case.a_k, case.b_k, None, None), case.base_k, case.cos_sin)
    uneven = replace(at_hand, row_start=1, row_end=3)
    for residuals in ([at_hand], [at_hand, replace(uneven, merged_k=None)], [at_hand, uneven]):
        assert attend_merged(case.grouped_q, case.base_v, residuals) is None


def test_adjacent_keys_of_other_lengths_are_not_read_with_the_strides_of_the_first() -> None:
    """Whole K of 20 tokens, then, right behind it, the first 20 of 30."""
    cases = [make(2, 20, seed=seed) for seed in range(2)]
    one = cases[0]
    arena = torch.full((HKV * 50 * D,), float("nan"))
    short, long = arena[: HKV * 20 * D].view(HKV, 20, D), arena[HKV * 20 * D :].view(HKV, 30, D)[:, :20]
    residuals = []
    for number, (case, place) in enumerate(zip(cases, (short, long), strict=True)):
        built = GroupResidual(number, number + 1, case.a_k, case.b_k, case.a_v, case.b_v)
        place.copy_(whole(built, one.base_k, one.cos_sin).merged_k)  # type: ignore[arg-type]
        residuals.append(replace(built, merged_k=place))
    together = attend_merged(one.grouped_q, one.base_v, residuals)
    assert together is not None
    apart = attend_grouped(one.grouped_q, one.base_k, one.base_v, one.cos_sin, residuals)
    torch.testing.assert_close(together.output, apart.output, atol=1e-5, rtol=1e-5)
