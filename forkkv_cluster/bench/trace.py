"""Traces as values: the format ``forkkv-trace/1``, JSON lines that every tool here reads and writes.

    {"format": "forkkv-trace/1", "vocab_size": 8192, "adapters": ["planner", "critic"], "note": "free text"}
    {"type": "context", "id": "c0", "at_s": 0.0, "tenant": "t0", "adapters": ["planner"], "num_tokens": 2048, "seed": 1}
    {"type": "turn", "id": "t0", "context": "c0", "branch": "b0", "adapter": "planner",
     "append": {"num_tokens": 64, "seed": 5}, "max_tokens": 64}
    {"type": "turn", "id": "t1", ..., "after": ["t0"], "think_s": 0.2, ...}
    {"type": "join", "id": "j0", "context": "c0", "from": "b0", "after": ["t0"], "what": "all"}
    {"type": "close", "context": "c0", "after": ["t1"]}

Tokens are given (``"tokens": [..]``) or generated from ``num_tokens`` and ``seed`` (:func:`generate_tokens`), so that any
tool makes the same ones. Ids of turns, joins and closes share one space, which ``after`` refers to.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from forkkv_cluster.core.prefix import TokenArray
from forkkv_cluster.core.session import JoinWhat

FORMAT = "forkkv-trace/1"
NUM_RESERVED = 5
"""Generated tokens start here, so that none is a special token of a usual tokenizer."""


def generate_tokens(seed: int, num_tokens: int, vocab_size: int) -> TokenArray:
    """[num_tokens] int32: token k is 5 + splitmix64(seed * 2^32 + k) mod (vocab_size - 5).

    splitmix64 with its golden-ratio increment (Steele, Lea, Flood 2014). Seed 1 and vocabulary 8192 give 6072, 2163, 1382.
    """
    first = (seed << 32) & (2**64 - 1)
    with np.errstate(over="ignore"):
        z = np.uint64(first) + np.arange(num_tokens, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (NUM_RESERVED + z % np.uint64(vocab_size - NUM_RESERVED)).astype(np.int32)


@dataclass(frozen=True, slots=True)
class TokenSource:
    """Tokens as written, or ``num_tokens`` of them from ``seed``."""

    tokens: tuple[int, ...] | None = None
    num_tokens: int = 0
    seed: int = 0

    def __len__(self) -> int:
        return self.num_tokens if self.tokens is None else len(self.tokens)

    def array(self, vocab_size: int) -> TokenArray:
        """The tokens, [n] int32."""
        if self.tokens is None:
            return generate_tokens(self.seed, self.num_tokens, vocab_size)
        return np.array(self.tokens, dtype=np.int32)

    def to_json(self) -> dict[str, Any]:
        return {"num_tokens": self.num_tokens, "seed": self.seed} if self.tokens is None else {"tokens": list(self.tokens)}


@dataclass(frozen=True, slots=True)
class Timing:
    """When an event starts: at ``at_s`` (seconds from the run's start), or ``think_s`` after all of ``after`` have ended;
    with both, at the later."""

    at_s: float = 0.0
    after: tuple[str, ...] = ()
    think_s: float = 0.0

    def to_json(self) -> dict[str, Any]:
        values: dict[str, Any] = {"at_s": self.at_s, "after": list(self.after), "think_s": self.think_s}
        return {key: value for key, value in values.items() if value}


@dataclass(frozen=True, slots=True)
class ContextEvent:
    """Opens a session over a shared context."""

    id: str
    source: TokenSource
    adapters: tuple[str, ...] = ()
    tenant: str = ""
    timing: Timing = Timing()

    def to_json(self) -> dict[str, Any]:
        tenant = {"tenant": self.tenant} if self.tenant else {}
        timing = self.timing.to_json()
        return {"type": "context", "id": self.id, **timing, **tenant, "adapters": list(self.adapters), **self.source.to_json()}


@dataclass(frozen=True, slots=True)
class TurnEvent:
    """Appends to a branch and generates exactly ``max_tokens``. A branch's first turn forks it when it starts."""

    id: str
    context: str
    branch: str
    adapter: str | None
    append: TokenSource
    max_tokens: int
    timing: Timing = Timing()

    def to_json(self) -> dict[str, Any]:
        where = {"context": self.context, "branch": self.branch, "adapter": self.adapter}
        what = {"append": self.append.to_json(), "max_tokens": self.max_tokens}
        return {"type": "turn", "id": self.id, **where, **self.timing.to_json(), **what}


@dataclass(frozen=True, slots=True)
class JoinEvent:
    """Appends what ``branch`` added since its fork to the shared context."""

    id: str
    context: str
    branch: str
    what: JoinWhat = JoinWhat.ALL
    timing: Timing = Timing()

    def to_json(self) -> dict[str, Any]:
        what = {"what": str(self.what)} if self.what is not JoinWhat.ALL else {}
        return {"type": "join", "id": self.id, "context": self.context, "from": self.branch, **self.timing.to_json(), **what}


@dataclass(frozen=True, slots=True)
class CloseEvent:
    """Ends the session."""

    id: str
    context: str
    timing: Timing = Timing()

    def to_json(self) -> dict[str, Any]:
        return {"type": "close", "id": self.id, "context": self.context, **self.timing.to_json()}


TraceEvent = ContextEvent | TurnEvent | JoinEvent | CloseEvent


@dataclass(frozen=True, slots=True)
class Trace:
    """A whole trace. ``trace_file.parse_trace`` makes only ones whose names are all there and whose waits have an order.

    name and sha256 (hex) are of the file that it was read from, empty otherwise.
    """

    vocab_size: int
    adapters: tuple[str, ...]
    events: tuple[TraceEvent, ...]
    note: str = ""
    name: str = ""
    sha256: str = field(default="", compare=False)

    @property
    def turns(self) -> tuple[TurnEvent, ...]:
        return tuple(event for event in self.events if isinstance(event, TurnEvent))

    def context(self, context_id: str) -> ContextEvent:
        return next(e for e in self.events if isinstance(e, ContextEvent) and e.id == context_id)

    def to_lines(self) -> list[str]:
        """JSON lines without their newlines: the header, then the events in order."""
        header: dict[str, Any] = {"format": FORMAT, "vocab_size": self.vocab_size, "adapters": list(self.adapters)}
        if self.note:
            header["note"] = self.note
        return [json.dumps(header), *(json.dumps(event.to_json()) for event in self.events)]
