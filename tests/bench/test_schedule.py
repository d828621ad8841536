import json
from typing import Any

from forkkv_cluster.bench.schedule import Schedule
from forkkv_cluster.bench.trace_file import parse_trace

HEADER = {"format": "forkkv-trace/1", "vocab_size": 100, "adapters": ["a"]}
CONTEXT = {"type": "context", "id": "c0", "adapters": ["a"], "num_tokens": 8, "seed": 1}


def turn(id: str, branch: str, **more: Any) -> dict[str, Any]:
    values = {"type": "turn", "id": id, "context": "c0", "branch": branch, "adapter": "a", "max_tokens": 2}
    return {**values, "append": {"tokens": [7]}, **more}


def schedule_of(*events: dict[str, Any]) -> Schedule:
    return Schedule(parse_trace([json.dumps(line) for line in (HEADER, *events)]))


def open_context(schedule: Schedule) -> None:
    """The context of the first line is created at once."""
    assert schedule.start_due(0.0) == [0]
    schedule.end(0, 0.0)


def test_nothing_of_a_context_starts_before_the_context_has_ended():
    schedule = schedule_of(CONTEXT, turn("t0", "b0"))
    assert schedule.start_due(0.0) == [0]
    assert schedule.start_due(9.0) == []
    assert schedule.next_due_s() is None
    schedule.end(0, 1.5)
    assert schedule.start_due(1.5) == [1]
    assert schedule.due_s(1) == 1.5


def test_an_event_waits_for_its_time():
    schedule = schedule_of({**CONTEXT, "at_s": 2.0})
    assert schedule.start_due(1.9) == []
    assert schedule.next_due_s() == 2.0
    assert schedule.start_due(2.0) == [0]


def test_an_event_starts_once():
    schedule = schedule_of(CONTEXT)
    assert [schedule.start_due(0.0), schedule.start_due(0.0)] == [[0], []]


def test_a_turn_thinks_after_the_last_of_what_it_waits_for():
    schedule = schedule_of(CONTEXT, turn("t0", "b0"), turn("t1", "b1"), turn("t2", "b2", after=["t0", "t1"], think_s=0.5))
    open_context(schedule)
    schedule.start_due(0.0)
    schedule.end(1, 3.0)
    assert schedule.next_due_s() is None
    schedule.end(2, 4.0)
    assert schedule.next_due_s() == 4.5


def test_with_a_time_and_a_wait_the_later_counts():
    schedule = schedule_of(CONTEXT, turn("t0", "b0"), turn("t1", "b1", after=["t0"], at_s=10.0))
    open_context(schedule)
    schedule.end(1, 3.0)
    assert schedule.due_s(2) == 10.0


def test_turns_of_one_branch_run_in_file_order_and_think_after_each_other():
    schedule = schedule_of(CONTEXT, turn("t0", "b0"), turn("t1", "b0", think_s=0.25))
    open_context(schedule)
    assert schedule.start_due(0.0) == [1]
    schedule.end(1, 2.0)
    assert schedule.due_s(2) == 2.25


def test_a_join_waits_for_the_turns_of_its_branch_before_it_and_holds_the_ones_behind_it():
    schedule = schedule_of(CONTEXT, turn("t0", "b0"), {"type": "join", "context": "c0", "from": "b0"}, turn("t1", "b0"))
    open_context(schedule)
    assert schedule.start_due(0.0) == [1]
    schedule.end(1, 1.0)
    assert schedule.start_due(1.0) == [2]
    schedule.end(2, 1.5)
    assert schedule.start_due(1.5) == [3]


def test_a_close_waits_for_everything_of_its_context():
    schedule = schedule_of(CONTEXT, turn("t0", "b0"), turn("t1", "b1"), {"type": "close", "context": "c0", "after": ["t0"]})
    open_context(schedule)
    schedule.start_due(0.0)
    schedule.end(1, 1.0)
    assert schedule.start_due(1.0) == []
    schedule.end(2, 2.0)
    assert schedule.start_due(2.0) == [3]
    schedule.end(3, 2.0)
    assert schedule.is_done


def test_events_due_together_start_by_due_time_then_file_order():
    early = {**CONTEXT, "id": "c1", "at_s": 0.5}
    late = {**CONTEXT, "at_s": 1.0}
    schedule = schedule_of(late, early, {**CONTEXT, "id": "c2", "at_s": 1.0})
    assert schedule.start_due(1.0) == [1, 0, 2]
