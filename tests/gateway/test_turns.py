"""One turn over workers that die, lose adapters, stop answering, or stop at a string."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from forkkv_cluster.core.clock import Clock, SystemClock
from forkkv_cluster.core.config import DefaultsConfig
from forkkv_cluster.core.errors import DeadlineExceeded, Internal, NotFound, ResourceExhausted, Unavailable
from forkkv_cluster.core.request import AdapterRef, FinishReason, GenerateRequest, SamplingParams
from forkkv_cluster.gateway.commands import StatelessTarget, TurnDelta, TurnEvent, TurnFinished, TurnStarted
from forkkv_cluster.gateway.request_builder import Envelope, RequestBuilder
from forkkv_cluster.gateway.tokenization import Tokenization
from forkkv_cluster.gateway.turns import MAX_FAULTS, TurnRunner
from forkkv_cluster.gateway.worker_pool import WorkerLost
from forkkv_cluster.testing.manual_clock import ManualClock
from tests.gateway.fakes import MODEL, ByteTokenizer, FakePool, adapter_info

BUILDER = RequestBuilder(MODEL, block_size=4, salt="salt", defaults=DefaultsConfig())
PLANNER = AdapterRef("planner", adapter_info("planner").digest)


def request_for(max_tokens: int = 6, **changes: object) -> GenerateRequest:
    prompt = np.asarray(list(b"prompt"), dtype=np.int32)
    sampling = SamplingParams(max_tokens=max_tokens, stop=changes.pop("stop", ()))  # type: ignore[arg-type]
    built = BUILDER.stateless(prompt, PLANNER, StatelessTarget("planner"), sampling, Envelope("request-1", "t"))
    return replace(built, **changes)  # type: ignore[arg-type]


async def run(
    pool: FakePool, request: GenerateRequest, *, max_resumes: int = 3, restores: bool = True, clock: Clock | None = None
) -> tuple[list[TurnEvent], list[int]]:
    async def restore(adapter: AdapterRef) -> bool:
        pool.missing.discard(adapter.name)
        return restores

    runner = TurnRunner(
        pool, BUILDER, Tokenization(ByteTokenizer()), clock or ManualClock(), max_resumes=max_resumes, restore_adapter=restore
    )
    output = runner.output_of(request)
    return [event async for event in runner.run(request, output)], output.token_ids


def text_of(events: list[TurnEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, TurnDelta))


def finished(events: list[TurnEvent]) -> TurnFinished:
    (last,) = (event for event in events if isinstance(event, TurnFinished))
    assert events[-1] is last
    return last


async def test_a_turn_begins_and_ends_once() -> None:
    events, token_ids = await run(FakePool(), request_for())
    assert isinstance(events[0], TurnStarted)
    assert text_of(events) == "abcdef"
    assert token_ids == list(b"abcdef")
    end = finished(events)
    assert (end.finish_reason, end.num_prompt_tokens, end.num_generated_tokens) == (FinishReason.LENGTH, 6, 6)
    assert (end.usage.base_hit_tokens, end.worker_ids, end.num_resumes) == (3, ("worker-1",), 0)


@pytest.mark.parametrize("die_after", [[0], [1], [5], [2, 1], [0, 0, 0]])
async def test_a_lost_worker_changes_no_token(die_after: list[int]) -> None:
    pool = FakePool(die_after=list(die_after))
    events, token_ids = await run(pool, request_for())
    assert token_ids == list(b"abcdef")
    assert text_of(events) == "abcdef"
    assert finished(events).num_resumes == len(die_after)


async def test_the_next_worker_gets_what_was_generated_and_is_not_the_lost_one() -> None:
    pool = FakePool(die_after=[4])
    await run(pool, request_for())
    second = pool.generated[1]
    assert second.num_resumed == 4
    assert second.tokens[-4:].tolist() == list(b"abcd")
    assert second.sampling == pool.generated[0].sampling
    assert second.excluded_workers == ("worker-1",)


async def test_prompt_tokens_run_add_up_over_workers_and_hits_are_the_firsts() -> None:
    events, _ = await run(FakePool(die_after=[2]), request_for())
    usage = finished(events).usage
    assert (usage.useful_hit_tokens, usage.prefill_tokens_run) == (2, 4 + 4)


async def test_a_worker_that_dies_with_the_last_token_said_ends_the_turn() -> None:
    pool = FakePool(die_after=[6])
    pool.answer = b"abcdefgh"
    request = request_for(max_tokens=6)
    pool._chunk = _without_end(pool)  # type: ignore[method-assign]
    events, token_ids = await run(pool, request)
    assert token_ids == list(b"abcdef")
    assert finished(events).finish_reason is FinishReason.LENGTH
    assert len(pool.generated) == 1


def _without_end(pool: FakePool):  # type: ignore[no-untyped-def]
    whole = pool._chunk
    return lambda *arguments: replace(whole(*arguments), finish_reason=None)


async def test_too_many_lost_workers_end_in_one_error() -> None:
    pool = FakePool(die_after=[1, 1, 1])
    with pytest.raises(Unavailable, match="3 workers"):
        await run(pool, request_for(), max_resumes=2)
    assert pool.num_open == 0


async def test_a_request_that_meets_failing_engines_does_not_walk_through_the_cluster() -> None:
    pool = FakePool(errors=[WorkerLost("its engine failed", is_fault=True) for _ in range(3)])
    with pytest.raises(Internal, match="failing engines"):
        await run(pool, request_for(), max_resumes=9)
    assert len(pool.generated) == MAX_FAULTS


async def test_one_failed_engine_is_no_reason_to_give_up() -> None:
    _, token_ids = await run(FakePool(errors=[WorkerLost("its engine failed", is_fault=True)]), request_for())
    assert token_ids == list(b"abcdef")


async def test_a_stop_string_ends_the_turn_and_cancels_the_worker() -> None:
    pool = FakePool()
    events, token_ids = await run(pool, request_for(max_tokens=20, stop=("de",)))
    assert text_of(events) == "abc"
    assert token_ids == list(b"abcde")
    assert finished(events).finish_reason is FinishReason.STOP
    assert (pool.num_open, pool.num_cancelled) == (0, 1)


async def test_a_stop_string_is_found_across_a_lost_worker() -> None:
    events, token_ids = await run(FakePool(die_after=[4]), request_for(max_tokens=20, stop=("de",)))
    assert text_of(events) == "abc"
    assert token_ids == list(b"abcde")


async def test_tokens_behind_a_stop_string_are_dropped_with_their_chunk() -> None:
    _, token_ids = await run(FakePool(chunk_len=8), request_for(max_tokens=20, stop=("c",)))
    assert token_ids == list(b"abc")


async def test_the_end_of_sequence_token_is_kept_but_not_shown() -> None:
    events, token_ids = await run(FakePool(answer=b"ab"), request_for())
    assert text_of(events) == "ab"
    assert token_ids == [*b"ab", MODEL.eos_token_ids[0]]
    assert finished(events).finish_reason is FinishReason.STOP


async def test_half_a_character_comes_at_the_end() -> None:
    events, _ = await run(FakePool(answer="é".encode() * 3), request_for(max_tokens=3))
    assert text_of(events) == "é�"


async def test_a_worker_without_the_adapter_gets_it_once() -> None:
    pool = FakePool(missing={"planner"})
    events, _ = await run(pool, request_for())
    assert text_of(events) == "abcdef"
    assert len(pool.generated) == 2


async def test_an_adapter_that_cannot_be_restored_is_not_found() -> None:
    with pytest.raises(NotFound):
        await run(FakePool(missing={"planner"}), request_for(), restores=False)


async def test_a_workers_refusal_reaches_the_client() -> None:
    with pytest.raises(ResourceExhausted):
        await run(FakePool(errors=[ResourceExhausted("full", 2.0)]), request_for())


async def test_the_deadline_ends_a_turn_whose_worker_is_silent() -> None:
    clock = SystemClock()
    pool = FakePool(gate=asyncio.Event())
    with pytest.raises(DeadlineExceeded):
        await run(pool, request_for(deadline_s=clock.wall() + 0.05), clock=clock)
    assert (pool.num_open, pool.num_cancelled) == (0, 1)


async def test_a_request_past_its_deadline_does_not_run() -> None:
    clock = ManualClock()
    with pytest.raises(DeadlineExceeded):
        await run(FakePool(gate=asyncio.Event()), request_for(deadline_s=clock.wall() - 1), clock=clock)
