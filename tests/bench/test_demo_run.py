from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from forkkv_cluster.bench.demo_plan import Agent, AgentResult, DemoPlan
from forkkv_cluster.bench.demo_run import run_policy, warm_up
from forkkv_cluster.client import AsyncForkKVClient, Sharing
from forkkv_cluster.core.errors import ForkKVError

if TYPE_CHECKING:
    from forkkv_cluster.app import RunningCluster

pytestmark = pytest.mark.cluster

PLAN = DemoPlan(
    document="The river rose in the night and nobody slept. " * 12,
    agents=tuple(Agent(f"agent-{name}", name, " What now?") for name in ("planner", "critic", "coder", "tester")),
    follow_up=Agent("follow-up", "critic", " And then?"),
    max_tokens=10,
)


async def test_a_policy_runs_all_agents_and_a_reader_of_what_one_wrote(serve_cluster: RunningCluster):
    seen: list[int] = []

    def on_update(streams: object) -> None:
        assert isinstance(streams, list)
        seen.append(sum(len(stream.token_ids) for stream in streams))

    async with AsyncForkKVClient(serve_cluster.grpc_address) as client:
        await warm_up(client)
        eager = await run_policy(client, PLAN, Sharing.EAGER, on_update)
        isolated = await run_policy(client, PLAN, Sharing.ISOLATED, on_update)
    assert all(len(stream.token_ids) == PLAN.max_tokens for run in (eager, isolated) for stream in run.streams)
    assert eager.num_joined_tokens == PLAN.max_tokens
    assert eager.follow_up.num_context_tokens == eager.num_context_tokens + PLAN.max_tokens
    assert all(stream.usage.useful_hit_tokens == stream.num_context_tokens for stream in eager.streams)
    assert isolated.prefill_tokens_run > eager.prefill_tokens_run > eager.num_context_tokens
    assert isolated.residual_bytes_held == 0 < eager.residual_bytes_held
    assert seen[-1] == 5 * PLAN.max_tokens


async def test_one_streams_error_is_told_as_it_is(serve_cluster: RunningCluster):
    plan = DemoPlan(PLAN.document, PLAN.agents, PLAN.follow_up, max_tokens=10**6)

    def on_update(streams: object) -> None:
        assert not isinstance(streams, AgentResult)

    async with AsyncForkKVClient(serve_cluster.grpc_address) as client:
        with pytest.raises(ForkKVError, match="max_tokens"):
            await run_policy(client, plan, Sharing.EAGER, on_update)
