"""The demo's workload on a cluster: fork all agents at once, stream them, join one answer, let a new branch read it."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace

from forkkv_cluster.bench.demo_plan import Agent, AgentResult, Answer, DemoPlan, PolicyResult
from forkkv_cluster.bench.idle import wait_until_idle
from forkkv_cluster.bench.metrics import add_counters, counters_between
from forkkv_cluster.bench.worker_killer import WorkerKiller
from forkkv_cluster.client import (
    AsyncBranch,
    AsyncForkKVClient,
    AsyncSession,
    BranchSpec,
    Delta,
    Finished,
    JoinWhat,
    Sharing,
    Status,
)
from forkkv_cluster.client.messages import GenerateOptions

OnUpdate = Callable[[Sequence[AgentResult]], None]
"""Called with all streams of the moment whenever one of them has grown."""

_TIMEOUT_S = 240.0
_WARM_UP_TOKENS = (5, 6, 7, 8)


async def warm_up(client: AsyncForkKVClient) -> None:
    """A few requests of the base model: the first pass in a worker pays for what later ones find done."""
    num_workers = len((await client.status()).cluster.workers)
    requests = [client.generate(token_ids=_WARM_UP_TOKENS, max_tokens=2, tenant="warm-up") for _ in range(2 * num_workers)]
    await asyncio.gather(*requests)


async def run_policy(client: AsyncForkKVClient, plan: DemoPlan, sharing: Sharing, on_update: OnUpdate) -> PolicyResult:
    """The workload under one policy, on an idle cluster, by a tenant that no earlier run was."""
    before = await wait_until_idle(client)
    result = await _PolicyRun(client, plan, sharing, on_update).run()
    after = await wait_until_idle(client)
    return _with_costs(result, before, after)


async def run_with_kill(client: AsyncForkKVClient, plan: DemoPlan, sharing: Sharing, on_update: OnUpdate) -> PolicyResult:
    """The workload again, with the worker that serves most streams killed once every stream has eight tokens.

    Costs are not read: the counters of the killed worker are gone with it.
    """
    workers = (await wait_until_idle(client)).cluster.workers
    killer = WorkerKiller({worker.worker_id: worker.pid for worker in workers})
    return await _PolicyRun(client, plan, sharing, on_update, killer).run()


class _PolicyRun:
    def __init__(
        self,
        client: AsyncForkKVClient,
        plan: DemoPlan,
        sharing: Sharing,
        on_update: OnUpdate,
        killer: WorkerKiller | None = None,
    ) -> None:
        self._client = client
        self._plan = plan
        self._sharing = sharing
        self._on_update = on_update
        self._killer = killer
        self._streams: list[AgentResult] = []

    async def run(self) -> PolicyResult:
        started_s = time.monotonic()
        tenant = f"demo-{self._sharing}-{uuid.uuid4().hex[:8]}"
        session = await self._client.create_session(
            self._plan.document, adapters=self._plan.adapters, sharing=self._sharing, tenant=tenant
        )
        if self._killer is not None:
            await self._bring_context_everywhere(session)
        agents = await self._stream_all(session, self._plan.agents)
        joined = await session.join(self._plan.joined, JoinWhat.OUTPUT)
        (follow_up,) = await self._stream_all(session, (self._plan.follow_up,))
        wall_s = time.monotonic() - started_s
        await session.close()
        return PolicyResult(
            sharing=str(self._sharing),
            wall_s=wall_s,
            num_context_tokens=session.info.num_context_tokens,
            num_joined_tokens=joined.num_joined_tokens,
            agents=agents,
            follow_up=follow_up,
            kill=self._killer.result if self._killer is not None else None,
        )

    async def _bring_context_everywhere(self, session: AsyncSession) -> None:
        """One token for each agent on branches of their own: else the streams of one worker could end before another
        worker, still at its context pass, has begun, and no moment would exist in which all of them run."""
        specs = [BranchSpec(f"early-{agent.name}", agent.adapter) for agent in self._plan.agents]
        branches = await session.fork(specs)
        prompts = [agent.questions[0].prompt for agent in self._plan.agents]
        turns = [branch.generate(prompt, max_tokens=1) for branch, prompt in zip(branches, prompts, strict=True)]
        await asyncio.gather(*turns)

    async def _stream_all(self, session: AsyncSession, agents: Sequence[Agent]) -> tuple[AgentResult, ...]:
        branches = await session.fork([BranchSpec(agent.name, agent.adapter) for agent in agents])
        results = tuple(
            AgentResult(agent, branch.info.num_context_tokens) for agent, branch in zip(agents, branches, strict=True)
        )
        self._streams.extend(results)
        try:
            async with asyncio.TaskGroup() as group:
                for branch, result in zip(branches, results, strict=True):
                    group.create_task(self._follow(branch, result, results))
        except ExceptionGroup as errors:
            # One stream's error ends the others; it alone is worth telling.
            raise errors.exceptions[0] from None
        return results

    async def _follow(self, branch: AsyncBranch, result: AgentResult, group: Sequence[AgentResult]) -> None:
        for question in result.agent.questions:
            result.answers.append(Answer(question))
            await self._answer(branch, result, group)
        result.is_done = True
        self._on_update(self._streams)

    async def _answer(self, branch: AsyncBranch, result: AgentResult, group: Sequence[AgentResult]) -> None:
        """One turn: the last of ``result``'s answers."""
        answer, plan = result.answers[-1], self._plan
        options = GenerateOptions(max_tokens=plan.max_tokens, ignore_eos=plan.ignore_eos, seed=0, timeout_s=_TIMEOUT_S)
        async for event in branch.stream(answer.question.prompt, **options):
            if isinstance(event, Delta):
                answer.token_ids.extend(event.token_ids)
                answer.text += event.text
                result.worker = event.worker_id or result.worker
                if self._killer is not None and len(group) > 1:
                    self._killer.observe(group)
            elif isinstance(event, Finished):
                answer.finish_reason = str(event.finish_reason)
                answer.is_right = plan.is_right(answer.question, answer.text)
                _add_turn(result, event)
            self._on_update(self._streams)


def _add_turn(result: AgentResult, event: Finished) -> None:
    if len(result.answers) == 1:
        result.ttft_s, result.usage = event.ttft_s, event.usage
    result.num_resumes += event.num_resumes
    for worker in event.worker_ids:
        if worker not in result.workers[-1:]:
            result.workers = (*result.workers, worker)


def _with_costs(result: PolicyResult, before: Status, after: Status) -> PolicyResult:
    old, new = ([worker.engine for worker in status.cluster.workers] for status in (before, after))
    counted = counters_between(*(add_counters(engine.counters for engine in engines) for engines in (old, new)))
    return replace(
        result,
        prefill_tokens_run=counted.prefill_tokens_run,
        base_bytes_held=sum(e.base_bytes_held for e in new) - sum(e.base_bytes_held for e in old),
        residual_bytes_held=sum(e.residual_bytes_held for e in new) - sum(e.residual_bytes_held for e in old),
    )
