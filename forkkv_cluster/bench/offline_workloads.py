"""The workloads of ``forkkv bench offline``: agents over one context, as traces and as token lists for a peer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from forkkv_cluster.bench.trace import ContextEvent, Timing, TokenSource, Trace, TurnEvent

PRIME = "prime"
_CONTEXT = "c"


@dataclass(frozen=True, slots=True)
class Workload:
    """``num_agents`` over ``context_len`` tokens; each of ``num_turns`` appends ``turn_len`` and generates ``max_tokens``.

    The next turn starts when all agents have ended theirs, as in one batched call after another. ``is_primed``: one turn of
    another branch runs before, so that the agents find the context there.
    """

    name: str
    num_agents: int
    context_len: int
    num_turns: int = 1
    turn_len: int = 64
    max_tokens: int = 64
    is_primed: bool = False

    def trace(self, adapters: tuple[str, ...], vocab_size: int, tenant: str) -> Trace:
        """``adapters`` has one name for each agent, or is empty: all run the base model. A new tenant finds cold caches."""
        used = adapters[: self.num_agents]
        events: list[ContextEvent | TurnEvent] = [ContextEvent(_CONTEXT, self._context(), used, tenant)]
        before: tuple[str, ...] = ()
        if self.is_primed:
            prime = TokenSource(num_tokens=self.turn_len, seed=9)
            events.append(TurnEvent(PRIME, _CONTEXT, PRIME, used[0] if used else None, prime, max_tokens=1))
            before = (PRIME,)
        for turn in range(self.num_turns):
            ids = tuple(f"t{turn}-{agent}" for agent in range(self.num_agents))
            for agent, name in enumerate(ids):
                adapter = used[agent] if used else None
                timing, source = Timing(after=before), self._append(turn, agent)
                events.append(TurnEvent(name, _CONTEXT, f"b{agent}", adapter, source, self.max_tokens, timing))
            before = ids
        return Trace(vocab_size=vocab_size, adapters=used, events=tuple(events), name=self.name)

    def for_peer(self, vocab_size: int) -> dict[str, Any]:
        """The same tokens: ``context`` [c] and ``appends`` [turn][agent][k]."""
        appends = [
            [self._append(turn, agent).array(vocab_size).tolist() for agent in range(self.num_agents)]
            for turn in range(self.num_turns)
        ]
        return {"context": self._context().array(vocab_size).tolist(), "appends": appends, "max_tokens": self.max_tokens}

    def _context(self) -> TokenSource:
        return TokenSource(num_tokens=self.context_len, seed=1)

    def _append(self, turn: int, agent: int) -> TokenSource:
        return TokenSource(num_tokens=self.turn_len, seed=1000 + 100 * turn + agent)


SINGLE = Workload("1 agent, 2,048 shared", 1, 2048, num_turns=3)
EIGHT = Workload("8 agents, 2,048 shared", 8, 2048, num_turns=3)
SIXTEEN = Workload("16 agents, 4,096 shared", 16, 4096)
FORK = Workload("fork of 16 over 8,192", 16, 8192, max_tokens=8, is_primed=True)
POOL_BYTES = 114 * 2**20
"""Four full isolated sequences of ``EIGHT``."""
