"""Rows that share runs of base pages, each run read once for all: against loops in float64 over each row's own keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from forkkv_kernels.ops.combine_partials import combine_partials, new_partials
from forkkv_kernels.ops.residual_attention import GroupResidual, attend_grouped
from forkkv_kernels.ops.residual_attention_grouped import residual_attention_grouped
from torch import Tensor

from tests.kernels.attention_cases import (
    Agent,
    Case,
    Run,
    Shape,
    assert_close,
    basis_of,
    decode,
    decode_in_groups,
    make_case,
    moved,
    shared_runs,
)
from tests.kernels.places import ALL_PLACES, Place, _place

places = pytest.mark.parametrize(
    "place",
    [_place("interpreter", torch.float32), _place("interpreter", torch.float16), _place("gpu", torch.bfloat16)],
)
few_places = pytest.mark.parametrize("place", [_place("interpreter", torch.float32), _place("gpu", torch.bfloat16)])
"""For shapes of a test's own: compiling takes a GPU's host seconds each."""


def case_at(place: Place, agents: Sequence[Agent], **shape: object) -> Case:
    return make_case(agents, Shape(dtype=place.dtype, device=place.device, **shape))


def found(case: Case, runs: Sequence[Run], place: Place, **options: object) -> Tensor:
    with place.entered():
        return decode_in_groups(case, runs, **options)


def wanted(case: Case) -> Tensor:
    """Without groups, by the loops, on the CPU."""
    with Place("reference", case.dtype).entered():
        return decode(moved(case, torch.device("cpu"))).to(case.q.device)


def assert_right(case: Case, runs: Sequence[Run], place: Place, **options: object) -> None:
    assert_close(found(case, runs, place, **options), wanted(case))


def everyone(case: Case, end: int) -> Run:
    return Run(0, end, range(len(case.q)))


@pytest.mark.parametrize("place", ALL_PLACES)
def test_a_group_and_tails_equal_rows_by_themselves(place: Place) -> None:
    agents = [Agent(100, 90, 0), Agent(80, 64, 1), Agent(65, 65, 0), Agent(70)]
    case = case_at(place, agents, ranks=((16, 16), (8, 8)), shared_len=64)
    assert_right(case, [everyone(case, 64)], place)


@few_places
def test_every_rank_in_one_group(place: Place) -> None:
    ranks = ((0, 0), (1, 1), (8, 8), (16, 16), (17, 17), (64, 64))
    agents = [Agent(50, 48, a) for a in range(len(ranks))]
    case = case_at(place, [*agents, Agent(49)], ranks=ranks, stack_rank=64, shared_len=48)
    assert_right(case, [everyone(case, 48)], place, members=8)


@places
@pytest.mark.parametrize("ranks", [(0, 9), (9, 0)])
def test_adapters_that_leave_k_or_v_alone(place: Place, ranks: tuple[int, int]) -> None:
    case = case_at(place, [Agent(60, 50, 0), Agent(60, 50, 1)], ranks=(ranks, (4, 4)), shared_len=48)
    assert_right(case, [everyone(case, 48)], place)


@few_places
def test_adapters_none_of_which_touches_k(place: Place) -> None:
    case = case_at(place, [Agent(60, 50, 0), Agent(60, 50, 1), Agent(50)], ranks=((0, 9), (0, 16)), shared_len=48)
    assert_right(case, [everyone(case, 48)], place, has_k=False)


@few_places
@pytest.mark.parametrize(
    ("num_kv_heads", "group", "head_dim"), [(3, 3, 80), (1, 7, 96), (2, 1, 256), (1, 4, 128), (1, 8, 64), (2, 2, 8)]
)
def test_heads_of_any_number_and_size(place: Place, num_kv_heads: int, group: int, head_dim: int) -> None:
    shape = {"num_kv_heads": num_kv_heads, "group": group, "head_dim": head_dim, "ranks": ((16, 16), (4, 4))}
    case = case_at(place, [Agent(50, 48, 0), Agent(49, 48, 1), Agent(50)], shared_len=48, **shape)
    assert_right(case, [everyone(case, 48)], place)


@few_places
@pytest.mark.parametrize("page_size", [8, 64])
def test_pages_of_any_size(place: Place, page_size: int) -> None:
    case = case_at(place, [Agent(150, 140, 0), Agent(131, 128, 0)], page_size=page_size, shared_len=128)
    assert_right(case, [everyone(case, 128)], place)


@places
@pytest.mark.parametrize("num_splits", [2, 5])
def test_the_number_of_splits_changes_nothing(place: Place, num_splits: int) -> None:
    case = case_at(place, [Agent(100, 97, 0), Agent(97, 97, 1)], ranks=((4, 4), (8, 8)), shared_len=96)
    assert_right(case, [everyone(case, 96)], place, num_splits=num_splits)


@places
def test_runs_of_some_behind_a_run_of_all(place: Place) -> None:
    agents = [Agent(100, 96, 0), Agent(97, 97, 1), Agent(98, 96, 0), Agent(99)]
    case = case_at(place, agents, ranks=((4, 4), (8, 8)), shared_len=96)
    runs = [Run(0, 48, range(4)), Run(48, 96, [2, 0], first_split=1), Run(48, 80, [3, 1], first_split=1)]
    assert_right(case, runs, place)


@places
def test_one_run_in_groups_that_each_hold_a_part_of_its_agents(place: Place) -> None:
    agents = [Agent(50, 48, n % 2) for n in range(5)]
    case = case_at(place, agents, ranks=((4, 4), (8, 8)), shared_len=48)
    assert_right(case, [Run(0, 48, [0, 2]), Run(0, 48, [4, 1]), Run(0, 48, [3])], place)


@few_places
def test_keys_scaled_under_qk_norm(place: Place) -> None:
    agents = [Agent(60, 50, 0), Agent(60, 50, 1), Agent(50)]
    case = case_at(place, agents, ranks=((5, 5), (0, 6)), is_normed=True, num_kv_heads=2, shared_len=48)
    assert_right(case, [everyone(case, 48)], place)


@places
def test_a_group_without_adapters_equals_one_that_knows_of_none_bit_by_bit(place: Place) -> None:
    case = case_at(place, [Agent(50), Agent(49), Agent(60)], shared_len=48)
    runs = [everyone(case, 48)]
    assert torch.equal(found(case, runs, place), found(case, runs, place, residuals=False))


@places
def test_rows_and_splits_of_others_stay_as_they_are(place: Place) -> None:
    case = case_at(place, [Agent(50, 48, 0), Agent(49), Agent(48)], shared_len=48)
    partials = new_partials(*case.q.shape[:2], 3, case.q.shape[2], case.q.device)
    partials.lse.fill_(7.0)
    partials.out.fill_(5.0)
    runs = shared_runs(case, [Run(0, 48, [2, 0], first_split=1)], members=4)
    with place.entered():
        residual_attention_grouped(
            case.q, case.k_plane, case.v_plane, case.rows, runs, case.scale, partials, 1, case.residuals, basis_of(case)
        )
    is_own = torch.zeros_like(partials.lse, dtype=torch.bool)
    is_own[[0, 2], :, 1] = True
    assert (partials.lse[~is_own] == 7.0).all()
    assert (partials.out[~is_own] == 5.0).all()
    assert (partials.lse[is_own] != 7.0).all()


@places
def test_it_equals_the_engine_s_attention_over_gathered_keys(place: Place) -> None:
    case = case_at(place, [Agent(49, 48, 0), Agent(49, 48, 0), Agent(49)], num_kv_heads=2, shared_len=48)
    partials = new_partials(*case.q.shape[:2], 1, case.q.shape[2], case.q.device)
    runs = shared_runs(case, [Run(0, 48, [2, 0, 1])], members=4)
    with place.entered():
        residual_attention_grouped(
            case.q, case.k_plane, case.v_plane, case.rows, runs, case.scale, partials, 1, case.residuals, basis_of(case)
        )
        result = combine_partials(partials, case.dtype)
    cpu = moved(case, torch.device("cpu"))
    slots, own_slots = (
        pages[torch.arange(48) // 16].long() * 16 + torch.arange(48) % 16
        for pages in (cpu.rows.base_pages[0], cpu.residuals.pages[0])
    )
    width, row_class = 2 * case.q.shape[2], int(cpu.residuals.rank_class[0])
    planes = [plane.float() for plane in (cpu.k_plane, cpu.v_plane)]
    k, v = (p[: len(p) // width * width].view(-1, 2, case.q.shape[2])[slots] for p in planes)
    a_k, a_v = (p[: len(p) // row_class * row_class].view(-1, row_class)[own_slots, :4] for p in planes)
    q = (case.scale * cpu.q.float()).unflatten(1, (2, 2)).transpose(0, 1)
    residual = GroupResidual(0, 2, a_k, cpu.residuals.b_k[0, :4].float(), a_v, cpu.residuals.b_v[0, :4].float())
    right = attend_grouped(q, k, v, cpu.residuals.cos_sin[:48], [residual]).output.transpose(0, 1).flatten(1, 2)
    assert_close(result, right.to(case.q.device))


def test_a_capacity_that_is_no_power_of_two_is_refused() -> None:
    case = make_case([Agent(50, 48, 0), Agent(49)], Shape(shared_len=48))
    runs = shared_runs(case, [everyone(case, 48)], members=4)
    wrong = replace(runs, members=runs.members[:, :3].contiguous())
    partials = new_partials(*case.q.shape[:2], 1, case.q.shape[2], case.q.device)
    with pytest.raises(ValueError, match=r"runs\.members has 3 places"):
        residual_attention_grouped(case.q, case.k_plane, case.v_plane, case.rows, wrong, case.scale, partials, 1)


def test_a_basis_of_other_heads_is_refused() -> None:
    case = make_case([Agent(50, 48, 0), Agent(49)], Shape(shared_len=48))
    runs = shared_runs(case, [everyone(case, 48)], members=4)
    basis = replace(basis_of(case), near=64)
    partials = new_partials(*case.q.shape[:2], 1, case.q.shape[2], case.q.device)
    with pytest.raises(ValueError, match=r"basis\.features is"):
        residual_attention_grouped(
            case.q, case.k_plane, case.v_plane, case.rows, runs, case.scale, partials, 1, case.residuals, basis
        )


@places
def test_scratch_for_no_more_positions_than_runs_reach_changes_nothing(place: Place) -> None:
    case = case_at(place, [Agent(1300, 1290, 0), Agent(600, 590, 1)], ranks=((4, 4), (8, 8)), shared_len=512, num_kv_heads=1)
    partials = [new_partials(*case.q.shape[:2], 1, case.q.shape[2], case.q.device) for _ in range(2)]
    runs = shared_runs(case, [everyone(case, 512)], members=2)
    for into, reach in zip(partials, (None, 512), strict=True):
        with place.entered():
            residual_attention_grouped(
                case.q, case.k_plane, case.v_plane, case.rows, runs, case.scale, into, 1, case.residuals, basis_of(case), reach
            )
    assert torch.equal(partials[0].out, partials[1].out)
