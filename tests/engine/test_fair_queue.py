"""The order of the queue: priority, the tenant that has had least, arrival."""

from __future__ import annotations

from forkkv_cluster.core.request import Priority
from forkkv_cluster.engine.fair_queue import FairQueue
from forkkv_cluster.engine.sequence import Turn, token_buffer
from tests.engine.harness import FakeEngine

FAKE = FakeEngine()


class Line:
    """A queue and the names of its requests."""

    def __init__(self) -> None:
        self.queue = FairQueue()
        self.names: dict[str, str] = {}
        self.turns: dict[str, Turn] = {}

    def add(self, name: str, tenant: str, priority: Priority = Priority.NORMAL, running: tuple[Turn, ...] = ()) -> None:
        request = FAKE.request([], [1], None, "isolated", tenant=tenant, priority=priority)
        order = (int(priority), len(self.names))
        turn = Turn(request, order, None, None, (), None, token_buffer(request), 1)
        self.names[request.request_id] = name
        self.turns[name] = turn
        self.queue.add(turn, running)

    def order(self) -> str:
        return "".join(self.names[entry.request_id] for entry in self.queue.candidates())

    def serve(self, num_tokens: int) -> str:
        """Start everybody in turn, each for that many tokens."""
        served = ""
        for entry in self.queue.candidates():
            served += self.names[entry.request_id]
            self.queue.remove(entry)
            self.queue.charge(entry.tenant, num_tokens)
        return served


def test_one_tenant_is_served_in_order_of_arrival() -> None:
    line = Line()
    for name in "abc":
        line.add(name, "t")
    assert line.order() == "abc"


def test_higher_priorities_go_first_whoever_has_had_what() -> None:
    line = Line()
    line.add("a", "t")
    line.add("b", "u", Priority.HIGH)
    line.queue.charge("u", 1000)
    assert line.order() == "ba"


def test_tenants_take_turns_when_their_requests_weigh_alike() -> None:
    line = Line()
    for name in "abc":
        line.add(name, "many")
    line.add("x", "few")
    line.add("y", "few")
    assert line.serve(10) == "axbyc"


def test_the_tenant_that_has_had_least_goes_first() -> None:
    line = Line()
    line.add("a", "t")
    line.add("b", "u")
    line.queue.charge("t", 5)
    assert line.order() == "ba"


def test_a_pause_earns_no_credit() -> None:
    line = Line()
    line.add("a", "busy")
    line.queue.charge("busy", 1000)
    line.add("x", "returning")
    line.add("y", "returning")
    assert line.serve(10) == "axy", "level with the busy tenant, so it does not go before what has waited longer"


def test_a_tenant_whose_requests_run_keeps_its_debt_while_none_of_them_waits() -> None:
    line = Line()
    line.add("a", "t")
    line.queue.remove(line.turns["a"])
    line.queue.charge("t", 50)
    line.add("x", "u", running=(line.turns["a"],))
    line.add("b", "t", running=(line.turns["a"],))
    line.queue.charge("u", 10)
    assert line.order() == "bx", "u came back level with t, and has had ten since"


def test_a_request_that_left_is_found_no_more() -> None:
    line = Line()
    line.add("a", "t")
    request_id = line.turns["a"].request_id
    assert line.queue.find(request_id) is line.turns["a"]
    line.queue.remove(line.turns["a"])
    assert line.queue.find(request_id) is None
    assert (len(line.queue), line.order()) == (0, "")
