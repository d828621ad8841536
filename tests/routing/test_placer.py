from __future__ import annotations

from collections import Counter

import pytest

from forkkv_cluster.core.config import RoutingConfig
from forkkv_cluster.core.events import BaseStored, EventBatch, ResidualStored
from forkkv_cluster.core.ids import WorkerId
from forkkv_cluster.core.placement import WorkerLoad
from forkkv_cluster.directory.index import DirectoryIndex
from forkkv_cluster.directory.mirror import DirectoryMirror
from forkkv_cluster.routing.placer import Placer, WorkerReport
from forkkv_cluster.routing.policy import make_policy
from forkkv_cluster.testing.manual_clock import ManualClock
from forkkv_cluster.testing.requests import adapter_ref, context_request, generate_request

PLANNER = adapter_ref("planner")
REPORTS = [WorkerReport(WorkerId("w0")), WorkerReport(WorkerId("w1"))]
DOCUMENT = list(range(5, 5 + 64 * 4))
LOAD_TTL_S = 0.5


class Routing:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.mirror = DirectoryMirror(5.0, self.clock)
        self.index = DirectoryIndex("first")
        self.placer = Placer(make_policy(RoutingConfig()), self.mirror, self.clock, LOAD_TTL_S)
        self.num_tickets = 0

    def place(self, request, reports=REPORTS) -> WorkerId:
        self.num_tickets += 1
        return self.placer.place(request, reports, f"t{self.num_tickets}")[0].worker_id

    def cache(self, worker_id: str, request, *residual_of) -> None:
        chain = request.prefix.all_hashes
        events = [BaseStored(chain), *(ResidualStored(a.digest, "eager", request.prefix.context) for a in residual_of)]
        self.index.apply(EventBatch(WorkerId(worker_id), 1, 0, tuple(events)))
        self.mirror.apply(self.index.deltas(self.mirror.incarnation, self.mirror.version))


@pytest.fixture
def routing() -> Routing:
    return Routing()


def branch(number: int, **options):
    tokens = [*DOCUMENT, 900 + number]
    return generate_request(tokens, context_len=len(DOCUMENT), adapter=PLANNER, declared=(PLANNER,), **options)


@pytest.mark.parametrize("home", ["w0", "w1"])
def test_a_branch_goes_where_its_context_is(routing: Routing, home: str) -> None:
    routing.cache(home, context_request(DOCUMENT), PLANNER)
    assert routing.place(branch(0)) == home


def test_a_branch_follows_a_context_pass_that_is_still_running(routing: Routing) -> None:
    home = routing.place(context_request(DOCUMENT, declared=(PLANNER,)))
    routing.clock.advance(LOAD_TTL_S * 1.1)  # The load is reported by now, the events are not.
    assert routing.place(branch(0)) == home


def test_a_burst_of_branches_spreads_before_any_report_arrives(routing: Routing) -> None:
    routing.cache("w0", context_request(DOCUMENT), PLANNER)
    homes = Counter(routing.place(branch(number)) for number in range(16))
    assert homes["w0"] >= homes["w1"] > 0


def test_a_branch_follows_at_once_though_the_pass_is_not_known_to_have_ended(routing: Routing) -> None:
    home = routing.place(context_request(DOCUMENT, declared=(PLANNER,)))
    assert routing.place(branch(0)) == home


def test_a_branch_waits_for_a_running_pass_that_fills_the_reported_queue(routing: Routing) -> None:
    context = context_request(DOCUMENT, declared=(PLANNER,))
    routing.placer.routed(context, WorkerId("w0"), "pass")
    routing.clock.advance(LOAD_TTL_S * 1.1)
    busy = [WorkerReport(WorkerId("w0"), WorkerLoad(queued_prefill_blocks=60, num_active=1)), REPORTS[1]]
    assert routing.place(branch(0), busy) == "w0"
    assert routing.place(generate_request([9] * 64), busy) == "w1", "others see the whole queue"
    routing.placer.ended("pass")
    routing.clock.advance(LOAD_TTL_S * 1.1)
    ranked = routing.placer.place(branch(1), busy, "after")
    assert {entry.worker_id: entry.terms["queued"] for entry in ranked} == {"w0": 4.0 * 60, "w1": 0.0}


def test_a_burst_over_different_prefixes_spreads_at_once(routing: Routing) -> None:
    homes = Counter(routing.place(generate_request([number] * 64)) for number in range(5, 21))
    assert homes["w0"] == homes["w1"] == 8


def test_load_that_was_sent_counts_until_a_report_must_show_it(routing: Routing) -> None:
    routing.placer.routed(generate_request(DOCUMENT), WorkerId("w0"), "t")

    def active_on_w0(ticket: str) -> float:
        ranked = routing.placer.place(generate_request([9, 9, 9, 9]), [REPORTS[0]], ticket)
        routing.placer.ended(ticket)
        return ranked[0].terms["active"]

    assert active_on_w0("u") == 1.0
    routing.clock.advance(LOAD_TTL_S * 1.1)
    assert active_on_w0("v") == 0.0


def test_a_retry_of_a_rejected_attempt_does_not_see_itself_as_load(routing: Routing) -> None:
    request = generate_request(DOCUMENT)
    first = routing.placer.place(request, REPORTS, "same")
    again = routing.placer.place(request, REPORTS, "same")
    assert again[0].worker_id == first[0].worker_id
    assert again[0].terms["queued"] == first[0].terms["queued"] == 0.0


def test_an_attempt_that_was_never_routed_is_forgotten_by_time(routing: Routing) -> None:
    home = routing.place(generate_request(DOCUMENT))
    routing.clock.advance(6.0)
    ranked = routing.placer.place(generate_request(DOCUMENT), REPORTS, "later")
    assert ranked[0].worker_id == home, "rendezvous alone"
    assert [entry.terms["prefill"] for entry in ranked] == [4.0 * 64, 4.0 * 64]


def test_a_routed_request_holds_its_prefix_until_it_ended(routing: Routing) -> None:
    request = generate_request(DOCUMENT)
    routing.placer.routed(request, WorkerId("w1"), "t")
    routing.clock.advance(60.0)
    assert routing.place(generate_request(DOCUMENT)) == "w1"
    routing.placer.ended("t")
    routing.clock.advance(60.0)
    ranked = routing.placer.place(generate_request(DOCUMENT), REPORTS, "later")
    assert {entry.terms["prefill"] for entry in ranked} == {4.0 * 64}


def test_where_a_request_really_went_replaces_where_it_was_meant_to_go(routing: Routing) -> None:
    request = generate_request(DOCUMENT)
    meant = routing.placer.place(request, REPORTS, "t")[0].worker_id
    other = next(report.worker_id for report in REPORTS if report.worker_id != meant)
    routing.placer.routed(request, other, "t")
    terms = {entry.worker_id: entry.terms for entry in routing.placer.place(generate_request([7] * 8), REPORTS, "u")}
    assert terms[meant]["active"] == 0.0
    assert terms[other]["active"] > 0.0


def test_branches_follow_a_pass_that_its_first_choice_did_not_take(routing: Routing) -> None:
    context = context_request(DOCUMENT, declared=(PLANNER,))
    meant = routing.placer.place(context, REPORTS, "pass")[0].worker_id
    other = next(report.worker_id for report in REPORTS if report.worker_id != meant)
    routing.placer.routed(context, other, "pass")
    routing.placer.ended("pass")
    assert routing.place(branch(0)) == other


def test_an_excluded_worker_is_left_out(routing: Routing) -> None:
    routing.cache("w0", context_request(DOCUMENT), PLANNER)
    ranked = routing.placer.place(branch(0, excluded_workers=(WorkerId("w0"),)), REPORTS, "t")
    assert [entry.worker_id for entry in ranked] == ["w1"]


def test_when_all_workers_are_excluded_all_are_tried(routing: Routing) -> None:
    request = branch(0, excluded_workers=(WorkerId("w0"), WorkerId("w1")))
    assert len(routing.placer.place(request, REPORTS, "t")) == 2


def test_a_dead_workers_prefix_draws_nothing(routing: Routing) -> None:
    routing.cache("w0", context_request(DOCUMENT), PLANNER)
    routing.placer.worker_died(WorkerId("w0"))
    ranked = routing.placer.place(branch(0), REPORTS, "t")
    assert len({entry.terms["prefill"] for entry in ranked}) == 1
