from __future__ import annotations

from forkkv_cluster.bench.quality.policies import Cell, Policy, Subject, plan_cells
from forkkv_cluster.core.request import Sharing, WriterMode

A, B, X = Subject("a", 8), Subject("b", 16), Subject("x", 16, is_alora=True)
CANONICAL, FIRST = WriterMode.CANONICAL, WriterMode.FIRST


def test_each_adapters_reference_comes_first_though_nobody_asked_for_it():
    cells = plan_cells([A, B], [Policy.EAGER], [CANONICAL], 1)
    assert [(cell.adapter, cell.policy) for cell in cells] == [
        ("a", Policy.ISOLATED),
        ("a", Policy.EAGER),
        ("b", Policy.ISOLATED),
        ("b", Policy.EAGER),
    ]
    assert [cell.is_reference for cell in cells] == [True, False, True, False]


def test_every_arrival_lets_another_adapter_come_first():
    cells = plan_cells([A, B, X], [Policy.EAGER], [CANONICAL], 3)
    firsts = {(cell.adapter, cell.first) for cell in cells if cell.policy is Policy.EAGER}
    assert firsts == {(one, other) for one in "abx" for other in "abx"}


def test_only_residual_knows_a_first_writer_and_an_alora_never_is_one():
    cells = plan_cells([A, B, X], list(Policy), [FIRST], 3)
    written = [cell for cell in cells if cell.writer is FIRST]
    assert written == [Cell(one, Policy.RESIDUAL, FIRST, first, one) for one, first in ("aa", "ab", "bb", "ba")]
    assert all(cell.writer is CANONICAL for cell in cells if cell.is_reference)


def test_dropped_is_of_ordinary_adapters_and_base_of_aloras():
    cells = plan_cells([A, X], list(Policy), [CANONICAL], 1)
    assert {cell.adapter for cell in cells if cell.policy is Policy.DROPPED} == {"a"}
    assert {cell.adapter for cell in cells if cell.policy is Policy.BASE} == {"x"}
    assert Policy.DROPPED.sharing is Policy.UNADAPTED.sharing is Sharing.BASE


def test_what_was_made_from_another_is_led_by_that_ones_isolated_and_has_its_own_too():
    made = Subject("made", 8, reference="a")
    cells = plan_cells([A, made], [Policy.ISOLATED, Policy.EAGER], [CANONICAL], 1)
    assert [(cell.adapter, cell.policy, cell.is_reference) for cell in cells] == [
        ("a", Policy.ISOLATED, True),
        ("a", Policy.EAGER, False),
        ("a", Policy.ISOLATED, True),
        ("made", Policy.ISOLATED, False),
        ("made", Policy.EAGER, False),
    ]
    assert {cell.reference for cell in cells} == {"a"}


def test_auto_is_measured_once_whoever_comes_first():
    cells = plan_cells([A, B, X], [Policy.AUTO], [CANONICAL, FIRST], 3)
    assert [cell.first for cell in cells if cell.policy is Policy.AUTO] == ["a", "b", "x"]
    assert Policy.AUTO.sharing is Sharing.AUTO
