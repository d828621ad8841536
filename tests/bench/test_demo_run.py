from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from forkkv_cluster.bench.demo_plan import AgentResult, DemoPlan, Question
from forkkv_cluster.bench.demo_run import run_policy, warm_up
from forkkv_cluster.client import AsyncForkKVClient, Sharing
from forkkv_cluster.core.errors import ForkKVError
from tests.bench.demo_values import FOLLOW_UP, agent

if TYPE_CHECKING:
    from forkkv_cluster.app import RunningCluster

pytestmark = pytest.mark.cluster


def is_right(question: Question, answer: str) -> bool:
    return question.text.startswith("coder") and bool(answer)


PLAN = DemoPlan(
    document="The river rose in the night and nobody slept. " * 12,
    agents=tuple(agent(name) for name in ("planner", "critic", "coder", "tester")),
    joined="critic",
    follow_up=FOLLOW_UP,
    is_right=is_right,
    max_tokens=5,
    ignore_eos=True,
)
"""Ten tokens from each agent, five from the follow-up."""


async def test_a_policy_runs_all_agents_and_a_reader_of_what_one_wrote(serve_cluster: RunningCluster):
    seen: list[int] = []

    def on_update(streams: object) -> None:
        assert isinstance(streams, list)
        seen.append(sum(len(stream.token_ids) for stream in streams))

    async with AsyncForkKVClient(serve_cluster.grpc_address) as client:
        await warm_up(client)
        eager = await run_policy(client, PLAN, Sharing.EAGER, on_update)
        isolated = await run_policy(client, PLAN, Sharing.ISOLATED, on_update)
    for run in (eager, isolated):
        assert [len(stream.token_ids) for stream in run.streams] == [10, 10, 10, 10, 5]
        assert [answer.question for answer in run.answers] == [q for a in (*PLAN.agents, FOLLOW_UP) for q in a.questions]
        assert {answer.finish_reason for answer in run.answers} == {"length"}
        assert [answer.is_right for answer in run.answers] == [False] * 4 + [True] * 2 + [False] * 3
    assert eager.num_joined_tokens == 10
    assert eager.follow_up.num_context_tokens == eager.num_context_tokens + 10
    assert all(stream.usage.useful_hit_tokens == stream.num_context_tokens for stream in eager.streams)
    assert isolated.prefill_tokens_run > eager.prefill_tokens_run > eager.num_context_tokens
    assert isolated.residual_bytes_held == 0 < eager.residual_bytes_held
    assert seen[-1] == 45


async def test_one_streams_error_is_told_as_it_is(serve_cluster: RunningCluster):
    plan = replace(PLAN, max_tokens=10**6)

    def on_update(streams: object) -> None:
        assert not isinstance(streams, AgentResult)

    async with AsyncForkKVClient(serve_cluster.grpc_address) as client:
        with pytest.raises(ForkKVError, match="max_tokens"):
            await run_policy(client, plan, Sharing.EAGER, on_update)
