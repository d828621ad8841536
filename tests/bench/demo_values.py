"""Agents of the demo and their streams, without a model."""

from __future__ import annotations

from forkkv_cluster.bench.demo_plan import Agent, AgentResult, Answer, Question
from forkkv_cluster.core.request import PrefixUsage

ADAPTERS = ("planner", "critic", "coder")


def agent(adapter: str, num_questions: int = 2) -> Agent:
    asked = (Question(f"{adapter} {index}?", f" {adapter} {index}?", "some", f"{index}.") for index in range(num_questions))
    return Agent(adapter, adapter, tuple(asked))


AGENTS = tuple(agent(adapter) for adapter in ADAPTERS)
FOLLOW_UP = Agent("follow-up", "critic", agent("follow-up", 1).questions)


def answered(agent: Agent, num_tokens: int, *, is_right: bool = True, finish_reason: str = "stop") -> list[Answer]:
    """Every question answered, with so many tokens in all."""
    per_answer, rest = divmod(num_tokens, len(agent.questions))
    lengths = [per_answer + (index < rest) for index in range(len(agent.questions))]
    return [
        Answer(question, f" {question.text} yes", list(range(length)), finish_reason, is_right)
        for question, length in zip(agent.questions, lengths, strict=True)
    ]


def stream(agent: Agent, num_context_tokens: int, num_tokens: int, useful: int | None = None, **changes: object) -> AgentResult:
    hit = num_context_tokens if useful is None else useful
    usage = PrefixUsage(base_hit_tokens=hit, residual_hit_tokens=hit, useful_hit_tokens=hit)
    values = {"worker": "w", "workers": ("w",), "is_done": True, "usage": usage, "answers": answered(agent, num_tokens)}
    return AgentResult(agent, num_context_tokens, **{**values, **changes})  # type: ignore[arg-type]
