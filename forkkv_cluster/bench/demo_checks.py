"""What must be true of a demo's results, and what the fork saved. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from forkkv_cluster.bench.demo_plan import AgentResult, PolicyResult
from forkkv_cluster.bench.worker_killer import MIN_TOKENS

MIN_PREFILL_RATIO = 2.0
"""Two workers run the shared context once each; without sharing each of at least five adapters does."""
MIN_RIGHT_SHARE = 0.8
"""The shipped adapters reach more on held-out casebooks: less than this is a fault of the serving."""


@dataclass(frozen=True, slots=True)
class Check:
    """A promise of the demo: what it says, whether it held, and the figures that say so."""

    promise: str
    holds: bool
    evidence: str


@dataclass(frozen=True, slots=True)
class Savings:
    """What sharing saved against isolated, in the same cluster and over the same work, and what it cost.

    ``lost_answers``: by adapter, how many fewer answers are right; only where there are fewer.
    """

    prefill_tokens: int
    prefill_ratio: float
    kv_bytes: int
    kv_ratio: float
    wall_s: float
    wall_ratio: float
    lost_answers: dict[str, int]


def savings(shared: PolicyResult, isolated: PolicyResult) -> Savings:
    return Savings(
        prefill_tokens=isolated.prefill_tokens_run - shared.prefill_tokens_run,
        prefill_ratio=isolated.prefill_tokens_run / max(1, shared.prefill_tokens_run),
        kv_bytes=isolated.kv_bytes_held - shared.kv_bytes_held,
        kv_ratio=isolated.kv_bytes_held / max(1, shared.kv_bytes_held),
        wall_s=isolated.wall_s - shared.wall_s,
        wall_ratio=isolated.wall_s / max(1e-9, shared.wall_s),
        lost_answers=dict(_num_right(isolated) - _num_right(shared)),
    )


def _num_right(result: PolicyResult) -> Counter[str]:
    return Counter(stream.agent.adapter for stream in result.streams for answer in stream.answers if answer.is_right)


def check_policies(eager: PolicyResult, isolated: PolicyResult) -> list[Check]:
    """The promises of the two runs. What sharing costs in right answers is shown, and no promise."""
    return [
        *_check_eager(eager),
        *(_check_answers(result) for result in (eager, isolated)),
        _check_right(isolated),
        _check_prefill(eager, isolated),
    ]


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


def _check_answers(result: PolicyResult) -> Check:
    ended = [answer.finish_reason for answer in result.answers if answer.finish_reason]
    num_questions = sum(len(stream.agent.questions) for stream in result.streams)
    return Check(
        f"every question of the {result.sharing} run has an answer with its last token",
        len(ended) == num_questions,
        f"{len(ended)} of {num_questions}, {ended.count('stop')} of them ended by the model",
    )


def _check_right(isolated: PolicyResult) -> Check:
    return Check(
        f"without sharing at least {MIN_RIGHT_SHARE:.0%} of the answers are right",
        isolated.num_right >= MIN_RIGHT_SHARE * len(isolated.answers),
        f"{isolated.num_right} of {len(isolated.answers)}",
    )


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
    moved = [stream.agent.name for stream in killed.streams if kill.worker_id in stream.workers[:-1]]
    num_resumes = sum(stream.num_resumes for stream in killed.streams)
    num_too_short = sum(
        num_tokens < MIN_TOKENS and not _has_ended(stream, num_tokens)
        for stream, num_tokens in zip(killed.agents, kill.tokens_at_kill, strict=True)
    )
    return [
        Check(
            f"every stream has {MIN_TOKENS} tokens when the worker dies, or has ended",
            num_too_short == 0,
            f"{list(kill.tokens_at_kill)} tokens",
        ),
        Check(
            "the streams of the dead worker go on elsewhere, in the middle of an answer",
            bool(moved) and num_resumes > 0,
            f"it served {kill.num_streams}; gone on: {', '.join(moved) or 'none'}; answers resumed: {num_resumes}",
        ),
        Check(
            "every stream ends with the token ids of the run without a kill",
            not different,
            f"different: {', '.join(different) or 'none'}",
        ),
    ]


def _has_ended(stream: AgentResult, num_tokens: int) -> bool:
    return num_tokens == len(stream.token_ids)


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
    counts = {"num_right": result.num_right, "num_answers": len(result.answers)}
    return {**values, **counts, "kv_bytes_held": result.kv_bytes_held}


def _agent_to_json(result: AgentResult) -> dict[str, Any]:
    values = asdict(result)
    agent, usage, answers = values.pop("agent"), values.pop("usage"), values.pop("answers")
    values.pop("is_done")
    said = [{**_asked(answer.pop("question")), **answer} for answer in answers]
    return {"name": agent["name"], "adapter": agent["adapter"], "answers": said, **values, **usage}


def _asked(question: dict[str, str]) -> dict[str, str]:
    return {"question": question["text"], "role": question["role"], "right_answer": question["answer"]}
