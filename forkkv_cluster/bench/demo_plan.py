"""What the demo asks, and what came of it: values."""

from __future__ import annotations

from dataclasses import dataclass, field

from forkkv_cluster.core.request import PrefixUsage


@dataclass(frozen=True, slots=True)
class Agent:
    """One branch: its name, the adapter that it runs with, and what it is asked."""

    name: str
    adapter: str
    question: str


AGENTS = (
    Agent("planner", "planner", "\n\nPlan the first week after the flood, day by day:"),
    Agent("critic", "critic", "\n\nName the three decisions that cost the town most:"),
    Agent("coder", "coder", "\n\nWrite the rule that the alarm should follow:"),
    Agent("tester", "tester", "\n\nList what the next exercise must try out:"),
    Agent("writer", "writer", "\n\nTell the night of the flood to those who were not there:"),
    Agent("reader", "reader", "\n\nWhich measurements does the casebook give?"),
    Agent("judge", "judge", "\n\nWas the warning early enough? Weigh both sides:"),
    Agent("scout", "scout", "\n\nWhere would the water come next time?"),
)
"""Eight agents with eight adapters, over the shipped casebook."""

FOLLOW_UP = Agent("follow-up", "critic", "\n\nYou have read the planner's answer. What is missing in it?")
"""Forked after the first agent's answer was joined: it reads what the planner wrote."""


@dataclass(frozen=True, slots=True)
class DemoPlan:
    """The workload of one policy. Greedy decoding, ``max_tokens`` exactly, so that runs can be compared token by token."""

    document: str
    agents: tuple[Agent, ...] = AGENTS
    follow_up: Agent = FOLLOW_UP
    max_tokens: int = 48

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(agent.adapter for agent in (*self.agents, self.follow_up)))


@dataclass(slots=True)
class AgentResult:
    """One agent's stream, as far as it has come. Times in seconds, as the server measured them."""

    agent: Agent
    num_context_tokens: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    worker: str = ""
    workers: tuple[str, ...] = ()
    is_done: bool = False
    ttft_s: float = 0.0
    e2e_s: float = 0.0
    num_resumes: int = 0
    usage: PrefixUsage = field(default_factory=PrefixUsage)


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
    def kv_bytes_held(self) -> int:
        return self.base_bytes_held + self.residual_bytes_held
