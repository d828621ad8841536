"""Tasks of an engine's own: rounds, what they are answered, and what happens to those that end before their time."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from forkkv_cluster.core.errors import Cancelled, NotFound, ResourceExhausted
from forkkv_cluster.core.ids import RequestId
from forkkv_cluster.core.request import FinishReason, GenerateRequest, TokenChunk
from forkkv_cluster.engine.background import Lane, Outcome, Rounds
from forkkv_cluster.engine.outputs import Failure
from forkkv_cluster.testing.requests import generate_request


class Desk:
    """Stands for the engine: takes requests, or refuses them with ``refusals`` in turn."""

    def __init__(self) -> None:
        self.taken: list[str] = []
        self.aborted: list[str] = []
        self.refusals: list[Exception] = []
        self.lane = Lane(self.add, self.aborted.append)

    def add(self, request: GenerateRequest) -> None:
        if self.refusals:
            raise self.refusals.pop(0)
        self.taken.append(request.request_id)

    def end(self, *request_ids: str) -> tuple[list[TokenChunk], list[Failure]]:
        chunks = [TokenChunk(RequestId(r), (len(r),), finish_reason=FinishReason.LENGTH) for r in request_ids]
        return self.lane.take(chunks, [])


@pytest.fixture
def desk() -> Desk:
    return Desk()


def ask(*request_ids: str) -> list[GenerateRequest]:
    return [generate_request([1, 2], request_id=request_id) for request_id in request_ids]


def task(log: list[list[Outcome]], *rounds: tuple[str, ...]) -> Rounds:
    """Asks for the requests of each round, and logs what came of them."""

    def run() -> Generator[list[GenerateRequest], list[Outcome], None]:
        for request_ids in rounds:
            log.append((yield ask(*request_ids)))

    return run()


def test_a_round_is_asked_when_the_one_before_it_is_answered_in_the_order_of_asking(desk: Desk) -> None:
    log: list[list[Outcome]] = []
    desk.lane.start("x", task(log, ("a", "bb"), ("ccc",)))
    desk.lane.submit()
    assert desk.taken == ["a", "bb"]
    desk.end("bb")
    desk.lane.submit()
    assert (desk.taken, log) == (["a", "bb"], [])
    desk.end("a")
    desk.lane.submit()
    assert desk.taken == ["a", "bb", "ccc"]
    desk.end("ccc")
    assert [[outcome.token_ids for outcome in outcomes] for outcomes in log] == [[(1,), (2,)], [(3,)]]
    assert not desk.lane.has_work


def test_what_belongs_to_others_is_handed_back(desk: Desk) -> None:
    desk.lane.start("x", task([], ("a",)))
    desk.lane.submit()
    chunks, failures = desk.lane.take(
        [TokenChunk(RequestId("other"), (1,)), TokenChunk(RequestId("a"), (1,))],
        [Failure(RequestId("third"), Cancelled("gone"))],
    )
    assert [chunk.request_id for chunk in chunks] == ["other"]
    assert [failure.request_id for failure in failures] == ["third"]


def test_tasks_run_one_after_the_other(desk: Desk) -> None:
    desk.lane.start("x", task([], ("a",)))
    desk.lane.start("y", task([], ("b",)))
    desk.lane.submit()
    assert (desk.taken, desk.lane.num_waiting) == (["a"], 1)
    desk.end("a")
    desk.lane.submit()
    assert desk.taken == ["a", "b"]


def test_a_full_queue_keeps_the_rest_of_a_round_for_later(desk: Desk) -> None:
    log: list[list[Outcome]] = []
    desk.lane.start("x", task(log, ("a", "b")))
    desk.refusals = [ResourceExhausted("full", 1.0), ResourceExhausted("full", 1.0)]
    desk.lane.submit()
    desk.lane.submit()
    assert desk.taken == []
    desk.lane.submit()
    assert desk.taken == ["a", "b"]
    desk.end("a", "b")
    assert len(log[0]) == 2


def test_a_request_that_is_refused_is_answered_with_its_error(desk: Desk) -> None:
    log: list[list[Outcome]] = []
    desk.lane.start("x", task(log, ("a", "b"), ("c",)))
    desk.refusals = [NotFound("adapter", "p", "Load it.")]
    desk.lane.submit()
    desk.end("b")
    desk.lane.submit()
    assert isinstance(log[0][0].error, NotFound)
    assert (log[0][1].error, desk.taken) == (None, ["b", "c"])


def test_a_round_of_refusals_alone_goes_on_at_once(desk: Desk) -> None:
    log: list[list[Outcome]] = []
    desk.lane.start("x", task(log, ("a",), ("b",)))
    desk.refusals = [NotFound("adapter", "p", "Load it.")]
    desk.lane.submit()
    assert desk.taken == ["b"]


def test_a_failure_is_an_answer_too(desk: Desk) -> None:
    log: list[list[Outcome]] = []
    desk.lane.start("x", task(log, ("a",)))
    desk.lane.submit()
    assert desk.lane.take([], [Failure(RequestId("a"), Cancelled("gone"))]) == ([], [])
    assert isinstance(log[0][0].error, Cancelled)


def test_a_cancelled_task_is_closed_and_its_requests_aborted_and_nobody_hears_of_them(desk: Desk) -> None:
    log: list[list[Outcome]] = []
    desk.lane.start("x", task(log, ("a", "b")))
    desk.lane.submit()
    desk.end("b")
    assert desk.lane.cancel("x") == 1
    assert desk.aborted == ["a"]
    assert desk.lane.take([TokenChunk(RequestId("a"), (1,))], [Failure(RequestId("a"), Cancelled("gone"))]) == ([], [])
    assert desk.lane.take([TokenChunk(RequestId("a"), (1,))], [])[0] != []  # its id is free again
    assert (log, desk.lane.has_work) == ([], False)


def test_tasks_of_others_go_on_when_one_is_cancelled(desk: Desk) -> None:
    for owner, request_id in (("x", "a"), ("y", "b"), ("x", "c")):
        desk.lane.start(owner, task([], (request_id,)))
    desk.lane.submit()
    assert desk.lane.cancel("x") == 2
    desk.lane.submit()
    assert desk.taken == ["a", "b"]


def test_the_task_that_has_waited_longest_is_dropped(desk: Desk) -> None:
    for request_id in ("a", "b", "c"):
        desk.lane.start("x", task([], (request_id,)))
    desk.lane.drop_oldest()
    desk.lane.submit()
    assert desk.taken == ["b"]


def test_a_task_without_a_request_ends_by_itself(desk: Desk) -> None:
    log: list[list[Outcome]] = []
    desk.lane.start("x", task(log, (), ()))
    desk.lane.submit()
    assert (log, desk.lane.has_work) == ([[], []], False)
