from __future__ import annotations

import pytest

from forkkv_cluster.bench.quality.comparison import Outcome, Row, rows_of
from forkkv_cluster.bench.quality.policies import Cell, Policy, Subject
from forkkv_cluster.bench.quality.summary import summaries
from forkkv_cluster.core.agreement import Agreement
from forkkv_cluster.core.request import Sharing, WriterMode
from forkkv_cluster.core.verdict import SharingVerdict, VerdictState


def outcomes(num_right: int, *, shared: float = 1.0) -> list[Outcome]:
    """Of ten samples, half of each length."""
    return [Outcome(64 if index % 2 else 128, index < num_right, 1.0, (1,), Agreement(1), None, shared) for index in range(10)]


def rows(
    adapter: str, policy: Policy, num_right: int, served: Sharing | None = None, reference: str = "", first: str = ""
) -> list[Row]:
    verdict = SharingVerdict(served, VerdictState.MEASURED, Sharing.ISOLATED, "") if served is not None else None
    cell = Cell(adapter, policy, WriterMode.CANONICAL, first or adapter, reference or adapter)
    own = outcomes(num_right, shared=0.0 if served is Sharing.ISOLATED else 0.8)
    return rows_of(cell, Subject(adapter, 8), own, outcomes(10), verdict=verdict)


def test_a_policy_is_summed_up_over_all_adapters_and_converted_ones_apart():
    found = summaries(
        [
            *rows("a", Policy.ISOLATED, 10),
            *rows("a", Policy.EAGER, 10),
            *rows("a", Policy.EAGER, 2, first="b"),
            *rows("b", Policy.ISOLATED, 10),
            *rows("b", Policy.EAGER, 3),
            *rows("b-made", Policy.EAGER, 9, reference="b"),
        ]
    )
    plain, converted = found
    assert [(entry.policy, entry.is_converted) for entry in found] == [("eager", False), ("eager", True)]
    assert (plain.num_adapters, plain.num_samples, plain.worst, plain.num_level) == (2, 20, "b", 1)
    assert plain.loss.value == pytest.approx(0.35)
    assert plain.worst_loss.value == pytest.approx(0.7)
    assert (converted.num_adapters, converted.worst) == (1, "b-made")


def test_what_auto_serves_isolated_does_not_share():
    (found,) = summaries([*rows("a", Policy.AUTO, 10, Sharing.EAGER), *rows("b", Policy.AUTO, 10, Sharing.ISOLATED)])
    assert (found.num_shared, found.num_adapters) == (1, 2)
    assert found.shared_share == pytest.approx(0.4)
