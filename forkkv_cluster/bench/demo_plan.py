"""What the demo asks, and what came of it: values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from forkkv_cluster.core.request import PrefixUsage


@dataclass(frozen=True, slots=True)
class Question:
    """``text`` is for people, ``prompt`` what the turn appends. ``answer`` is the right one for whoever has that ``role``."""

    text: str
    prompt: str
    role: str
    answer: str


@dataclass(frozen=True, slots=True)
class Agent:
    """One branch: its name, the adapter that it runs with, and what it is asked, one turn after the other."""

    name: str
    adapter: str
    questions: tuple[Question, ...]


IsRight = Callable[[Question, str], bool]


@dataclass(frozen=True, slots=True)
class DemoPlan:
    """The workload of one policy. Greedy decoding, so that runs can be compared token by token.

    ``follow_up`` is forked after the answers of the agent called ``joined`` became shared context. ``max_tokens`` limits an
    answer; ``ignore_eos`` makes each as long, for models that never end one.
    """

    document: str
    agents: tuple[Agent, ...]
    joined: str
    follow_up: Agent
    is_right: IsRight
    max_tokens: int = 64
    ignore_eos: bool = False

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(agent.adapter for agent in (*self.agents, self.follow_up)))


@dataclass(slots=True)
class Answer:
    """What an agent answered, as far as it has come. ``finish_reason`` is empty until it has ended."""

    question: Question
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    is_right: bool = False


@dataclass(slots=True)
class AgentResult:
    """One agent's stream over all its turns, as far as it has come. ``ttft_s`` (seconds, as the server measured it) and
    ``usage`` are of the first turn, which is the one that meets the shared context."""

    agent: Agent
    num_context_tokens: int
    answers: list[Answer] = field(default_factory=list)
    worker: str = ""
    workers: tuple[str, ...] = ()
    is_done: bool = False
    ttft_s: float = 0.0
    num_resumes: int = 0
    usage: PrefixUsage = field(default_factory=PrefixUsage)

    @property
    def token_ids(self) -> list[int]:
        return [token for answer in self.answers for token in answer.token_ids]


@dataclass(frozen=True, slots=True)
class KillResult:
    """A worker that was killed: how many streams it served then, and how many tokens each stream had."""

    worker_id: str
    pid: int
    num_streams: int
    tokens_at_kill: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PolicyResult:
    """One policy's run. Bytes and tokens are differences between two readings of the cluster's status.

    wall_s is the client's, from before the session was created to the last token.
    """

    sharing: str
    wall_s: float
    num_context_tokens: int
    num_joined_tokens: int
    agents: tuple[AgentResult, ...]
    follow_up: AgentResult
    prefill_tokens_run: int = 0
    base_bytes_held: int = 0
    residual_bytes_held: int = 0
    kill: KillResult | None = None

    @property
    def streams(self) -> tuple[AgentResult, ...]:
        return (*self.agents, self.follow_up)

    @property
    def answers(self) -> tuple[Answer, ...]:
        return tuple(answer for stream in self.streams for answer in stream.answers)

    @property
    def num_right(self) -> int:
        return sum(answer.is_right for answer in self.answers)

    @property
    def kv_bytes_held(self) -> int:
        return self.base_bytes_held + self.residual_bytes_held
