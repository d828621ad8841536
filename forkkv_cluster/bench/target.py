"""What a trace runs against, and what of it is the same everywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from forkkv_cluster.bench.metrics import RunRecord
from forkkv_cluster.bench.trace import ContextEvent, TokenSource, Trace, TurnEvent
from forkkv_cluster.core.errors import InvalidArgument, NotFound, Unsupported
from forkkv_cluster.core.request import Sharing
from forkkv_cluster.core.status import EngineCounters

OnProgress = Callable[[int], None]
"""Called with the number of events that have ended so far."""

_WARM_UP_TOKENS = TokenSource(tokens=(5, 6, 7, 8))
WARM_UP = Trace(
    vocab_size=9,
    adapters=(),
    events=(
        ContextEvent("warm-up", _WARM_UP_TOKENS, tenant="warm-up"),
        TurnEvent("warm-up", "warm-up", "warm-up", None, _WARM_UP_TOKENS, max_tokens=2),
    ),
)
"""Two tokens of the base model, by a tenant of its own: the first pass pays for what later ones find done."""


def check_sharing(sharing: Sharing) -> Sharing:
    """Raises Unsupported for ``auto``, under which adapters of one run would be served in different ways."""
    if sharing is Sharing.AUTO:
        raise Unsupported("sharing", str(sharing), "is no policy to measure", "Name isolated, residual, eager or base.")
    return sharing


@dataclass(frozen=True, slots=True)
class TargetFacts:
    """What a report says of a target. kv_bytes is the sum over workers."""

    name: str
    model: str
    vocab_size: int
    writer: str
    dtype: str
    kv_bytes: int
    adapters: tuple[str, ...]


class Target(Protocol):
    """Runs a whole trace. Nothing else may use it meanwhile, else the counters would count that too."""

    def facts(self) -> TargetFacts: ...

    def counters(self) -> EngineCounters:
        """Since the target's start, summed over its workers. Call it while the target is idle."""
        ...

    def warm_up(self) -> None:
        """Run ``WARM_UP``."""
        ...

    def run(self, trace: Trace, on_progress: OnProgress) -> RunRecord:
        """Run every event at its time; returns when the target is idle again. Raises the first turn's error."""
        ...


def check_runnable(trace: Trace, facts: TargetFacts) -> None:
    """Raises InvalidArgument or NotFound for a trace that this target cannot run."""
    if trace.vocab_size > facts.vocab_size:
        raise InvalidArgument(
            "trace line 1, vocab_size",
            trace.vocab_size,
            f"is larger than the vocabulary of {facts.model}, {facts.vocab_size} tokens",
            "Write a trace for this model.",
        )
    for name in trace.adapters:
        if name not in facts.adapters:
            known = ", ".join(facts.adapters) or "none"
            raise NotFound("adapter", name, f"The target has: {known}. Load it with --adapter {name}=DIR.")
