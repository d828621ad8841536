"""Sessions, agents and their errors through the SDK, on a real cluster."""

from __future__ import annotations

import asyncio
import time

import pytest

from forkkv_cluster.app import RunningCluster
from forkkv_cluster.client import AsyncForkKVClient, BranchSpec, Delta, Finished, ForkKVClient, PromptLogprobs, Started
from forkkv_cluster.core.errors import (
    Aborted,
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    ForkKVError,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from forkkv_cluster.core.request import FinishReason
from tests.cluster.helpers import ADAPTERS, DOCUMENT, is_idle, opened, wait_until_idle

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize("sharing", ["isolated", "residual", "eager", "base"])
def test_an_agent_answers_the_same_twice(client: ForkKVClient, sharing: str) -> None:
    with opened(client, sharing) as session:
        first, second = session.fork([BranchSpec("a", "planner"), BranchSpec("b", "planner")])
        answers = [branch.generate("And then?", max_tokens=12) for branch in (first, second)]
        assert answers[0].token_ids == answers[1].token_ids
        assert len(answers[0].token_ids) == 12
        assert answers[0].finish_reason is FinishReason.LENGTH


def test_agents_with_different_adapters_answer_differently(client: ForkKVClient) -> None:
    with opened(client) as session:
        branches = session.fork([BranchSpec(name, name) for name in ADAPTERS] + [BranchSpec("base")])
        answers = {branch.generate("And then?", max_tokens=12).token_ids for branch in branches}
        assert len(answers) == 5


def test_a_turn_is_told_event_by_event(client: ForkKVClient) -> None:
    with opened(client) as session:
        (branch,) = session.fork([BranchSpec("a", "planner")])
        events = list(branch.stream("And then?", max_tokens=8, logprobs=2, prompt_logprobs=1))
        assert isinstance(events[0], Started)
        assert isinstance(events[-1], Finished)
        scored = [event for event in events if isinstance(event, PromptLogprobs)]
        assert events[1 : 1 + len(scored)] == scored
        assert scored[0].first_position == session.info.num_context_tokens + 1
        assert scored[-1].first_position + len(scored[-1].tokens) == events[0].num_prompt_tokens
        deltas = [event for event in events if isinstance(event, Delta)]
        assert sum(len(delta.token_ids) for delta in deltas) == 8
        assert all(len(logprob.top) == 2 for delta in deltas for logprob in delta.logprobs)
        assert events[-1].worker_ids[0] == deltas[0].worker_id
        assert 0 < events[-1].ttft_s <= events[-1].e2e_s


def test_the_second_agent_finds_the_whole_context(client: ForkKVClient) -> None:
    with opened(client) as session:
        first, second = session.fork([BranchSpec("a", "planner"), BranchSpec("b", "critic")])
        first.generate("And then?", max_tokens=2)
        wait_until_idle(client)
        usage = second.generate("Why?", max_tokens=2).usage
        assert usage.useful_hit_tokens == session.info.num_context_tokens
        assert usage.prefill_tokens_run <= 4


def test_a_second_turn_goes_on_where_the_first_ended(client: ForkKVClient) -> None:
    with opened(client) as session:
        (branch,) = session.fork([BranchSpec("a", "planner")])
        first = branch.generate("And then?", max_tokens=6)
        second = branch.generate(" More?", max_tokens=6)
        assert second.finished.num_prompt_tokens > first.finished.num_prompt_tokens + 6
        own = session.refresh(include_tokens=True).branches[0].own_token_ids
        assert own is not None
        assert own[-6:] == second.token_ids


def test_a_new_agent_reads_what_another_wrote(client: ForkKVClient) -> None:
    with opened(client) as session:
        (author,) = session.fork([BranchSpec("author", "planner")])
        answer = author.generate("And then?", max_tokens=6)
        joined = session.join("author", "output")
        assert joined.num_joined_tokens == 6
        (reader,) = session.fork([BranchSpec("reader", "critic")])
        assert reader.info.num_context_tokens == session.info.num_context_tokens + 6
        assert reader.generate("Yes?", max_tokens=2).token_ids
        context = session.refresh(include_tokens=True).context_token_ids
        assert context is not None
        assert context[-6:] == answer.token_ids


def test_a_seed_repeats_a_sampled_answer(client: ForkKVClient) -> None:
    answers = [client.generate(DOCUMENT, adapter="planner", temperature=1.0, seed=seed, max_tokens=12) for seed in (7, 7, 8)]
    assert answers[0].token_ids == answers[1].token_ids != answers[2].token_ids
    assert answers[0].started.seed == 7


def test_a_stateless_request_answers_as_an_isolated_branch(client: ForkKVClient) -> None:
    with opened(client, "isolated") as session:
        (branch,) = session.fork([BranchSpec("a", "planner")])
        tokens = session.refresh(include_tokens=True).context_token_ids
        assert tokens is not None
        alone = client.generate(token_ids=[*tokens, 17, 18], adapter="planner", max_tokens=8)
        assert branch.generate(token_ids=[17, 18], max_tokens=8).token_ids == alone.token_ids


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda c, s: c.generate("x", adapter="nobody"), NotFound, "nobody"),
        (lambda c, s: c.session("session-none"), NotFound, "session-none"),
        (lambda c, s: c.create_session("x", adapters=["nobody"]), NotFound, "nobody"),
        (lambda c, s: c.generate(token_ids=[5] * 20_000), InvalidArgument, "too long"),
        (lambda c, s: c.generate(token_ids=[5], max_tokens=20_000), InvalidArgument, "max_tokens"),
        (lambda c, s: c.generate(token_ids=[10**6]), InvalidArgument, r"prompt\[0\]"),
        (lambda c, s: c.generate("x", temperature=-1.0), InvalidArgument, "temperature"),
        (lambda c, s: c.generate("x", sharing="eager"), InvalidArgument, "shared_prefix_tokens"),
        (lambda c, s: s.fork([]), InvalidArgument, "branches"),
        (lambda c, s: s.fork([BranchSpec("p")]), AlreadyExists, "p"),
        (lambda c, s: s.fork([BranchSpec("x", "nobody")]), NotFound, "nobody"),
        (lambda c, s: s.join("nobody"), NotFound, "nobody"),
        (lambda c, s: s.branch("p").generate(), InvalidArgument, "append"),
        (lambda c, s: c.generate("x", max_tokens=4000, timeout_s=0.2), DeadlineExceeded, "deadline"),
    ],
)
def test_a_mistake_is_named_and_nothing_is_lost(
    client: ForkKVClient, call: object, error: type[ForkKVError], says: str
) -> None:
    with opened(client) as session:
        session.fork([BranchSpec("p", "planner")])
        session.refresh()
        with pytest.raises(error, match=says):
            call(client, session)  # type: ignore[operator]
        assert [branch.name for branch in session.refresh().branches] == ["p"]
        assert session.branch("p").generate("ok", max_tokens=2).token_ids
    wait_until_idle(client)


def test_a_busy_branch_aborts_and_cannot_be_joined(client: ForkKVClient) -> None:
    with opened(client) as session:
        (branch,) = session.fork([BranchSpec("a", "planner")])
        stream = branch.stream("And then?", max_tokens=2000, ignore_eos=True)
        next(event for event in stream if isinstance(event, Delta))
        with pytest.raises(Aborted):
            branch.generate("Me too", max_tokens=1)
        with pytest.raises(FailedPrecondition):
            session.join("a")
        stream.close()  # type: ignore[attr-defined]
        wait_until_idle(client)


def test_a_client_that_leaves_frees_what_it_held(client: ForkKVClient) -> None:
    with opened(client) as session:
        (branch,) = session.fork([BranchSpec("a", "planner")])
        wait_until_idle(client)
        stream = branch.stream("And then?", max_tokens=4000, ignore_eos=True)
        next(event for event in stream if isinstance(event, Delta))
        assert not is_idle(client)
        stream.close()  # type: ignore[attr-defined]
        wait_until_idle(client)
        assert session.refresh().branches[0].num_own_tokens == 0
        assert branch.generate("Again", max_tokens=2).token_ids


def test_a_connection_that_breaks_frees_what_it_held(client: ForkKVClient, serve_cluster: RunningCluster) -> None:
    other = ForkKVClient(serve_cluster.grpc_address)
    stream = other.stream("Once", adapter="planner", max_tokens=4000, ignore_eos=True)
    next(event for event in stream if isinstance(event, Delta))
    assert not is_idle(client)
    other.close()
    wait_until_idle(client)


def test_clients_that_leave_at_any_moment_free_what_they_held(client: ForkKVClient) -> None:
    for moment in range(30):
        stream = client.stream("Once", max_tokens=8000, ignore_eos=True)
        next(stream)
        time.sleep(moment % 10 * 0.001)  # Not to wait for anything: to leave at another point of the server's work.
        stream.close()  # type: ignore[attr-defined]
        wait_until_idle(client)


def test_a_named_turn_is_picked_up_after_a_disconnect(client: ForkKVClient) -> None:
    with opened(client) as session:
        one, other = session.fork([BranchSpec("a", "planner"), BranchSpec("b", "planner")])
        whole = one.generate("And then?", max_tokens=120, ignore_eos=True)
        stream = other.stream("And then?", max_tokens=120, ignore_eos=True, turn_id="turn-1")
        delta = next(event for event in stream if isinstance(event, Delta))
        stream.close()  # type: ignore[attr-defined]
        num_received = len(delta.token_ids)
        rest = other.generate("And then?", max_tokens=120, ignore_eos=True, turn_id="turn-1", num_received_tokens=num_received)
        assert delta.token_ids + rest.token_ids == whole.token_ids


def test_many_agents_stream_at_once(serve_cluster: RunningCluster, client: ForkKVClient) -> None:
    async def run() -> list[int]:
        async with (
            AsyncForkKVClient(serve_cluster.grpc_address) as connection,
            await connection.create_session(DOCUMENT, adapters=ADAPTERS) as session,
        ):
            branches = await session.fork([BranchSpec(f"b{i}", ADAPTERS[i % 4]) for i in range(8)])
            answers = await asyncio.gather(*(branch.generate("Go", max_tokens=8, ignore_eos=True) for branch in branches))
            return [len(answer.token_ids) for answer in answers]

    assert asyncio.run(run()) == [8] * 8


def test_an_async_task_that_is_cancelled_frees_what_it_held(serve_cluster: RunningCluster, client: ForkKVClient) -> None:
    async def run() -> None:
        async with AsyncForkKVClient(serve_cluster.grpc_address) as connection:
            began = asyncio.Event()

            async def read() -> None:
                async for event in connection.stream("Once", max_tokens=4000, ignore_eos=True):
                    if isinstance(event, Delta):
                        began.set()

            task = asyncio.create_task(read())
            await began.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(run())
    wait_until_idle(client)


def test_nobody_there_is_unavailable() -> None:
    with ForkKVClient("127.0.0.1:1", timeout_s=5.0) as client, pytest.raises(Unavailable):
        client.status()
