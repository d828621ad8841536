"""One row a sequence over base pages and residual pages, split over keys, in Triton: against loops in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from forkkv_kernels.ops.combine_partials import combine_partials, new_partials
from forkkv_kernels.ops.residual_attention_decode import residual_attention_decode
from torch import Tensor

from tests.kernels.attention_cases import Agent, Case, Shape, assert_close, decode, make_case, moved
from tests.kernels.places import TRITON_PLACES, Place, _place

RANKS = ((0, 0), (1, 1), (8, 8), (16, 16), (17, 17), (64, 64))

places = pytest.mark.parametrize(
    "place",
    [_place("interpreter", torch.float32), _place("interpreter", torch.float16), _place("gpu", torch.bfloat16)],
)
few_places = pytest.mark.parametrize("place", [_place("interpreter", torch.float32), _place("gpu", torch.bfloat16)])
"""For shapes of a test's own: compiling takes a GPU's host seconds each."""

exact_places = pytest.mark.parametrize("place", [_place("interpreter", torch.float32), _place("gpu", torch.float32)])


def case_at(place: Place, agents: Sequence[Agent], **shape: object) -> Case:
    return make_case(agents, Shape(dtype=place.dtype, device=place.device, **shape))


def found(case: Case, place: Place, num_splits: int = 1, residuals: bool = True) -> Tensor:
    with place.entered():
        return decode(case, num_splits, residuals)


def wanted(case: Case) -> Tensor:
    """By the loops, on the CPU."""
    with Place("reference", case.dtype).entered():
        return decode(moved(case, torch.device("cpu"))).to(case.q.device)


def assert_right(case: Case, place: Place, num_splits: int = 1) -> None:
    assert_close(found(case, place, num_splits), wanted(case))


@pytest.mark.parametrize("place", TRITON_PLACES)
def test_every_rank_in_one_batch(place: Place) -> None:
    agents = [Agent(30 + 7 * a, 25 + 7 * a, a) for a in range(len(RANKS))]
    assert_right(case_at(place, [*agents, Agent(50)], ranks=RANKS, stack_rank=64), place)


@places
@pytest.mark.parametrize("ranks", [(0, 9), (9, 0)])
def test_an_adapter_that_leaves_k_or_v_alone(place: Place, ranks: tuple[int, int]) -> None:
    assert_right(case_at(place, [Agent(100, 90, 0)], ranks=(ranks,)), place)


@few_places
@pytest.mark.parametrize(
    ("num_kv_heads", "group", "head_dim"), [(5, 3, 80), (1, 7, 96), (3, 1, 256), (2, 4, 128), (1, 8, 64), (2, 2, 8)]
)
def test_heads_of_any_number_and_size(place: Place, num_kv_heads: int, group: int, head_dim: int) -> None:
    shape = {"num_kv_heads": num_kv_heads, "group": group, "head_dim": head_dim, "ranks": ((16, 16),)}
    assert_right(case_at(place, [Agent(70, 40, 0)], **shape), place)


@few_places
@pytest.mark.parametrize("page_size", [8, 64])
def test_pages_of_any_size(place: Place, page_size: int) -> None:
    assert_right(case_at(place, [Agent(131, 70, 0), Agent(64, 64, 0)], page_size=page_size), place)


@places
@pytest.mark.parametrize("residual_len", [1, 64, 99])
def test_a_residual_may_end_anywhere(place: Place, residual_len: int) -> None:
    assert_right(case_at(place, [Agent(100, residual_len, 0)]), place)


@places
@pytest.mark.parametrize("num_splits", [3, 20])
def test_the_number_of_splits_changes_nothing(place: Place, num_splits: int) -> None:
    case = case_at(place, [Agent(130, 100, 0), Agent(1), Agent(64, 64, 0)])
    assert_right(case, place, num_splits)


@few_places
def test_keys_scaled_under_qk_norm(place: Place) -> None:
    agents = [Agent(80, 70, 0), Agent(60, 60, 1), Agent(40)]
    assert_right(case_at(place, agents, ranks=((5, 5), (0, 6)), is_normed=True, num_kv_heads=2), place)


@places
def test_factors_in_fp16_beside_other_kv(place: Place) -> None:
    case = case_at(place, [Agent(100, 90, 0)], ranks=((16, 16),))
    factors = replace(case.residuals, b_k=case.residuals.b_k.half())
    assert_right(replace(case, residuals=factors), place)


@places
def test_an_attention_factor_counts_once(place: Place) -> None:
    assert_right(case_at(place, [Agent(100, 90, 0)], attention_factor=1.4), place)


@exact_places
def test_positions_beyond_64k(place: Place) -> None:
    case = case_at(place, [Agent(66_000, 65_990, 0)], num_kv_heads=1, group=1, ranks=((16, 16),), page_size=64)
    starts = replace(case.rows, kv_starts=torch.tensor([65_536 + 7], device=place.device).int())
    assert_right(replace(case, rows=starts), place)


@places
def test_a_row_may_start_behind_what_others_have_read_for_it(place: Place) -> None:
    case = case_at(place, [Agent(100, 90, 0), Agent(50), Agent(40, 40, 0)])
    rows = replace(case.rows, kv_starts=torch.tensor([48, 0, 40], device=place.device).int())
    case = replace(case, rows=rows)
    result = found(case, place)
    assert_close(result, wanted(case))
    assert (result[2] == 0).all()  # it has no key at all


@places
def test_rows_without_an_adapter_equal_those_of_a_batch_without_adapters_bit_by_bit(place: Place) -> None:
    case = case_at(place, [Agent(100, 90, 0), Agent(77), Agent(90, 0, 0)])
    assert torch.equal(found(case, place)[1:], found(case, place, residuals=False)[1:])


@places
def test_shared_pages_and_copies_of_them_give_the_same_bits(place: Place) -> None:
    agents = [Agent(70, 70, 0), Agent(90, 64, 0), Agent(77, 70, 1)]
    shared, copied = (
        case_at(place, agents, ranks=((4, 4), (8, 8)), shared_len=64, is_copied=is_copied) for is_copied in (False, True)
    )
    assert not torch.equal(shared.rows.base_pages, copied.rows.base_pages)
    # Contents are equal in what is shared, queries and factors are drawn after it.
    kv_lens = torch.full_like(shared.rows.kv_lens, 64)
    copied = replace(copied, q=shared.q, residuals=replace(shared.residuals, pages=copied.residuals.pages))
    first, second = (found(replace(case, rows=replace(case.rows, kv_lens=kv_lens)), place) for case in (shared, copied))
    assert torch.equal(first, second)


@places
def test_other_splits_stay_as_they_are(place: Place) -> None:
    case = case_at(place, [Agent(70, 60, 0)])
    partials = new_partials(*case.q.shape[:2], 4, case.q.shape[2], case.q.device)
    partials.lse[:, :, ::3] = 7.0
    partials.out[:, :, ::3] = 5.0
    with place.entered():
        residual_attention_decode(
            case.q, case.k_plane, case.v_plane, case.rows, case.scale, partials, range(1, 3), case.residuals
        )
    assert (partials.lse[:, :, ::3] == 7.0).all()
    assert (partials.out[:, :, ::3] == 5.0).all()


@places
def test_a_sequence_of_no_keys_gives_zeros(place: Place) -> None:
    case = case_at(place, [Agent(40, 30, 0), Agent(1)])
    rows = replace(case.rows, kv_lens=torch.tensor([40, 0], device=place.device).int())
    result = found(replace(case, rows=rows), place)
    assert (result[1] == 0).all()
    assert result[0].isfinite().all()


def test_splits_that_the_buffers_do_not_have_are_refused() -> None:
    case = make_case([Agent(20)])
    partials = new_partials(*case.q.shape[:2], 2, case.q.shape[2], case.q.device)
    with pytest.raises(ValueError, match="splits is range"):
        residual_attention_decode(case.q, case.k_plane, case.v_plane, case.rows, case.scale, partials, range(1, 3))


def test_a_table_of_another_size_is_refused_by_its_name() -> None:
    case = make_case([Agent(20, 20, 0)])
    partials = new_partials(*case.q.shape[:2], 1, case.q.shape[2], case.q.device)
    wrong = replace(case.residuals, lens=case.residuals.lens.repeat(2))
    with pytest.raises(ValueError, match=r"residuals\.lens"):
        residual_attention_decode(case.q, case.k_plane, case.v_plane, case.rows, case.scale, partials, range(1), wrong)


def test_merged_splits_are_weighted_by_their_sums() -> None:
    partials = new_partials(1, 1, 3, 2, torch.device("cpu"))
    partials.lse[0, 0] = torch.tensor([1.0, 2.0, -torch.inf])
    partials.out[0, 0] = torch.tensor([[1.0, 0.0], [0.0, 1.0], [torch.nan, torch.nan]])
    expected = torch.softmax(torch.tensor([1.0, 2.0]), dim=0)
    torch.testing.assert_close(combine_partials(partials, torch.float32)[0, 0], expected)
