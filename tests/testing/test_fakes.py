from __future__ import annotations

import pytest

from forkkv_cluster.core.errors import Cancelled, InvalidArgument, Unavailable
from forkkv_cluster.core.events import BaseStored, EventBatch
from forkkv_cluster.core.ids import WorkerId
from forkkv_cluster.core.request import FinishReason
from forkkv_cluster.testing.fake_engine import FakeEngine
from forkkv_cluster.testing.in_memory_directory import InMemoryDirectory
from forkkv_cluster.testing.manual_clock import ManualClock
from forkkv_cluster.testing.requests import adapter_ref, context_request, generate_request


def run(engine: FakeEngine, request) -> list[int]:
    engine.add_request(request)
    tokens: list[int] = []
    while engine.has_work:
        tokens += [token for chunk in engine.step().chunks for token in chunk.token_ids]
    return tokens


def test_the_clock_moves_only_when_told_and_never_back() -> None:
    clock = ManualClock()
    wall = clock.wall()
    clock.advance(2.5)
    assert (clock.monotonic(), clock.wall() - wall) == (2.5, 2.5)
    with pytest.raises(InvalidArgument):
        clock.advance(-1)


async def test_the_directory_refuses_while_it_is_away() -> None:
    directory = InMemoryDirectory()
    directory.is_away = True
    with pytest.raises(Unavailable):
        await directory.apply(EventBatch(WorkerId("w"), 1, 0, (BaseStored(()),)))


def test_adapters_of_the_fake_engine_speak_differently() -> None:
    engine = FakeEngine()
    for name in ("planner", "critic"):
        engine.load_adapter(name, "dir")
    outputs = [run(engine, generate_request([1, 2], adapter=a)) for a in (None, adapter_ref("planner"), adapter_ref("critic"))]
    assert len({tuple(output) for output in outputs}) == 3


def test_the_fake_engine_counts_hits_of_whole_blocks() -> None:
    engine = FakeEngine()
    run(engine, context_request(range(5, 17)))
    engine.add_request(generate_request([*range(5, 17), 99], context_len=12, max_tokens=1))
    chunk = engine.step().chunks[0]
    assert chunk.usage is not None
    assert (chunk.usage.useful_hit_tokens, chunk.usage.prefill_tokens_run) == (12, 1)


def test_an_aborted_request_fails_once_in_the_next_step() -> None:
    engine = FakeEngine()
    request = generate_request([1, 2], max_tokens=100)
    engine.add_request(request)
    engine.abort(request.request_id)
    engine.abort(request.request_id)
    failures = engine.step().failures
    assert [(failure.request_id, type(failure.error)) for failure in failures] == [(request.request_id, Cancelled)]
    assert not engine.has_work


def test_every_request_of_the_fake_engine_ends_in_one_terminal_chunk() -> None:
    engine = FakeEngine()
    for number in range(3):
        engine.add_request(generate_request([1, 2], max_tokens=number + 1))
    ends = [chunk.finish_reason for _ in range(5) for chunk in engine.step().chunks if chunk.finish_reason]
    assert ends == [FinishReason.LENGTH] * 3
    engine.check_invariants()
