"""What must be true of a demo's results, and what the fork saved. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from forkkv_cluster.bench.demo_plan import AgentResult, PolicyResult
from forkkv_cluster.bench.worker_killer import MIN_TOKENS

MIN_PREFILL_RATIO = 3.0


@dataclass(frozen=True, slots=True)
class Check:
    """A promise of the demo: what it says, whether it held, and the figures that say so."""

    promise: str
    holds: bool
    evidence: str


@dataclass(frozen=True, slots=True)
class Savings:
    """What sharing saved against isolated, in the same cluster and over the same work."""

    prefill_tokens: int
    prefill_ratio: float
    kv_bytes: int
    kv_ratio: float
    wall_s: float
    wall_ratio: float


def savings(shared: PolicyResult, isolated: PolicyResult) -> Savings:
    return Savings(
        prefill_tokens=isolated.prefill_tokens_run - shared.prefill_tokens_run,
        prefill_ratio=isolated.prefill_tokens_run / max(1, shared.prefill_tokens_run),
        kv_bytes=isolated.kv_bytes_held - shared.kv_bytes_held,
        kv_ratio=isolated.kv_bytes_held / max(1, shared.kv_bytes_held),
        wall_s=isolated.wall_s - shared.wall_s,
        wall_ratio=isolated.wall_s / max(1e-9, shared.wall_s),
    )


def check_policies(eager: PolicyResult, isolated: PolicyResult, max_tokens: int) -> list[Check]:
    """The promises of the two runs."""
    return [*_check_eager(eager), *_check_streams(eager, isolated, max_tokens=max_tokens), _check_prefill(eager, isolated)]


def _check_eager(eager: PolicyResult) -> Iterator[Check]:
    missed = [
        f"{s.agent.name}: {s.usage.useful_hit_tokens} of {s.num_context_tokens}"
        for s in eager.streams
        if s.usage.useful_hit_tokens != s.num_context_tokens
    ]
    promise = "under eager every agent finds the whole shared context in the cache"
    found = f"{len(eager.streams)} agents, {eager.num_context_tokens} tokens and more"
    yield Check(promise, not missed, "; ".join(missed) or found)
    grown = eager.num_context_tokens + eager.num_joined_tokens
    yield Check(
        "the branch forked after the join reads the joined answer",
        eager.num_joined_tokens > 0 and eager.follow_up.num_context_tokens == grown,
        f"its context has {eager.follow_up.num_context_tokens} tokens: {eager.num_context_tokens} + {eager.num_joined_tokens}",
    )


def _check_streams(*results: PolicyResult, max_tokens: int) -> Iterator[Check]:
    for result in results:
        lengths = [len(stream.token_ids) for stream in result.streams]
        promise = f"every stream of the {result.sharing} run ends with its last token"
        yield Check(promise, all(n == max_tokens for n in lengths), f"{lengths} tokens of {max_tokens}")


def _check_prefill(eager: PolicyResult, isolated: PolicyResult) -> Check:
    ratio = isolated.prefill_tokens_run / max(1, eager.prefill_tokens_run)
    return Check(
        f"eager runs at least {MIN_PREFILL_RATIO:.0f} times fewer prefill tokens than isolated",
        ratio >= MIN_PREFILL_RATIO,
        f"{eager.prefill_tokens_run} against {isolated.prefill_tokens_run}: {ratio:.1f} times",
    )


def check_kill(unkilled: PolicyResult, killed: PolicyResult) -> list[Check]:
    """The promises of the run in which a worker died."""
    kill = killed.kill
    if kill is None:
        return [Check("a worker dies while all streams run", False, "the streams ended before the worker could be killed")]
    different = [a.agent.name for a, b in zip(unkilled.streams, killed.streams, strict=True) if a.token_ids != b.token_ids]
    resumed = [stream.agent.name for stream in killed.streams if stream.num_resumes > 0]
    return [
        Check(
            f"every stream has {MIN_TOKENS} tokens when the worker dies",
            min(kill.tokens_at_kill) >= MIN_TOKENS,
            f"{list(kill.tokens_at_kill)} tokens",
        ),
        Check(
            "the streams of the dead worker go on elsewhere",
            len(resumed) >= kill.num_streams,
            f"it served {kill.num_streams}; resumed: {', '.join(resumed) or 'none'}",
        ),
        Check(
            "every stream ends with the token ids of the run without a kill",
            not different,
            f"different: {', '.join(different) or 'none'}",
        ),
    ]


def to_json(results: list[PolicyResult], saved: Savings, checks: list[Check]) -> dict[str, Any]:
    """Everything that the tables show, and the token ids."""
    return {
        "runs": [_run_to_json(result) for result in results],
        "saved": asdict(saved),
        "checks": [asdict(check) for check in checks],
    }


def _run_to_json(result: PolicyResult) -> dict[str, Any]:
    values = asdict(result)
    values["agents"] = [_agent_to_json(stream) for stream in result.agents]
    values["follow_up"] = _agent_to_json(result.follow_up)
    return {**values, "kv_bytes_held": result.kv_bytes_held}


def _agent_to_json(result: AgentResult) -> dict[str, Any]:
    values = asdict(result)
    agent, usage = values.pop("agent"), values.pop("usage")
    values.pop("is_done")
    return {**agent, **values, **usage}
