"""What a gateway knows of how workers serve ``auto``, how old that may be, and what it does without it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from forkkv_cluster.core.agreement import Agreement
from forkkv_cluster.core.errors import Unavailable
from forkkv_cluster.core.ids import AdapterDigest
from forkkv_cluster.core.request import AdapterInfo, Sharing
from forkkv_cluster.core.verdict import PolicyAgreement, SharingVerdict, decide
from forkkv_cluster.gateway.sharing_view import FRESH_S, MAX_AGE_S, SharingView
from forkkv_cluster.testing.manual_clock import ManualClock
from tests.gateway.fakes import FakePool, adapter_info


def verdict(wrong: int = 0) -> SharingVerdict:
    return decide(
        Sharing.ISOLATED,
        [PolicyAgreement(Sharing.EAGER, Agreement(2000, wrong))],
        max_disagreement=0.02,
        min_positions=2000,
        samples="some",
        decided_s=1.0,
    )


class Workers(FakePool):
    """``lists``: what each worker lists; None for one that does not answer. ``num_asked`` counts questions."""

    def __init__(self, *lists: tuple[AdapterInfo, ...] | None) -> None:
        super().__init__()
        self.lists = list(lists)
        self.num_asked = 0
        self.is_away = False

    async def broadcast(self, method: str, *arguments: object) -> list[object]:
        assert method == "list_adapters"
        self.num_asked += 1
        if self.is_away:
            raise Unavailable("no worker is up.")
        return [Unavailable("gone") if infos is None else infos for infos in self.lists]


PLANNER = replace(adapter_info("planner"), verdict=verdict())
REFUSED = replace(PLANNER, verdict=verdict(500))


async def served(view: SharingView, info: AdapterInfo = PLANNER) -> Sharing | None:
    return (await view.modes([info.ref])).get(info.name)


async def test_it_goes_by_what_the_workers_say() -> None:
    assert await served(SharingView(Workers((PLANNER,)), ManualClock())) is Sharing.EAGER
    assert await served(SharingView(Workers((PLANNER,), (REFUSED,)), ManualClock())) is Sharing.ISOLATED
    assert await served(SharingView(Workers((PLANNER,), None), ManualClock())) is Sharing.EAGER


async def test_of_what_nobody_knows_it_says_nothing_which_is_isolated() -> None:
    view = SharingView(Workers((PLANNER,)), ManualClock())
    assert await served(view, adapter_info("critic")) is None
    changed = replace(PLANNER, digest=AdapterDigest("e" * 32))
    assert await served(view, changed) is None


async def test_nobody_is_asked_where_auto_is_not_wanted() -> None:
    pool = Workers((PLANNER,))
    assert await SharingView(pool, ManualClock()).modes([]) == {}
    assert pool.num_asked == 0


async def test_a_demotion_is_known_within_seconds() -> None:
    clock, pool = ManualClock(), Workers((PLANNER,))
    view = SharingView(pool, clock)
    assert await served(view) is Sharing.EAGER
    pool.lists = [(REFUSED,)]
    assert await served(view) is Sharing.EAGER  # fresh
    assert pool.num_asked == 1
    clock.advance(FRESH_S)
    assert await served(view) is Sharing.EAGER  # it asks beside this request ...
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert await served(view) is Sharing.ISOLATED  # ... for the next one
    pool.lists = [(PLANNER,)]
    clock.advance(MAX_AGE_S)
    assert await served(view) is Sharing.EAGER  # too old to be used at all


async def test_requests_that_come_together_ask_once() -> None:
    pool = Workers((PLANNER,))
    view = SharingView(pool, ManualClock())
    assert await asyncio.gather(*(served(view) for _ in range(5))) == [Sharing.EAGER] * 5
    assert pool.num_asked == 1


async def test_without_an_answer_everything_is_isolated_until_there_is_one() -> None:
    clock, pool = ManualClock(), Workers((PLANNER,))
    view = SharingView(pool, clock)
    assert await served(view) is Sharing.EAGER
    pool.is_away = True
    clock.advance(MAX_AGE_S)
    assert await served(view) is None
    pool.is_away = False
    clock.advance(MAX_AGE_S)
    assert await served(view) is Sharing.EAGER


@pytest.mark.parametrize("is_asked", [True, False])
async def test_a_change_of_adapters_makes_it_ask_anew(is_asked: bool) -> None:
    pool = Workers((PLANNER,))
    view = SharingView(pool, ManualClock())
    await served(view)
    pool.lists = [(REFUSED,)]
    if is_asked:
        view.forget()
    assert await served(view) is (Sharing.ISOLATED if is_asked else Sharing.EAGER)
