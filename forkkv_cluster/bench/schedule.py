"""When each event of a trace may start. Pure: the caller brings the time and says what has started and ended."""

from __future__ import annotations

from forkkv_cluster.bench.trace import ContextEvent, Trace, TraceEvent
from forkkv_cluster.bench.trace_checks import implicit_waits


class Schedule:
    """Events by their index in ``trace.events``; all times are seconds from the run's start.

    An event is due at the latest of: ``at_s``; ``think_s`` after the last of ``after`` has ended (without ``after``: after
    the last event of its branch); and the end of every event that it waits for by the file's order.
    """

    def __init__(self, trace: Trace) -> None:
        self.events: tuple[TraceEvent, ...] = trace.events
        position = {event.id: i for i, event in enumerate(self.events) if not isinstance(event, ContextEvent)}
        self._implicit = implicit_waits(self.events)
        self._thinks_after = [
            tuple(position[name] for name in event.timing.after) or self._implicit[i] for i, event in enumerate(self.events)
        ]
        self._waiting_for = [set(self._implicit[i]) | set(self._thinks_after[i]) for i in range(len(self.events))]
        self._followers: list[list[int]] = [[] for _ in self.events]
        for index, waits in enumerate(self._waiting_for):
            for other in waits:
                self._followers[other].append(index)
        self._ended_s: dict[int, float] = {}
        self._due_s: dict[int, float] = {}
        self._started: set[int] = set()
        for index, waits in enumerate(self._waiting_for):
            if not waits:
                self._due_s[index] = self.events[index].timing.at_s

    @property
    def is_done(self) -> bool:
        return len(self._ended_s) == len(self.events)

    @property
    def num_ended(self) -> int:
        return len(self._ended_s)

    def due_s(self, index: int) -> float:
        """When the event was due; known once all that it waits for has ended."""
        return self._due_s[index]

    def start_due(self, now_s: float) -> list[int]:
        """Events that are due and have not started, by due time, then by their place in the file. They count as started."""
        due = [i for i, due_s in self._due_s.items() if due_s <= now_s and i not in self._started]
        self._started.update(due)
        return sorted(due, key=lambda i: (self._due_s[i], i))

    def next_due_s(self) -> float | None:
        """When the next event starts, as far as is known; None while all that is left waits for running events."""
        return min((due_s for i, due_s in self._due_s.items() if i not in self._started), default=None)

    def end(self, index: int, now_s: float) -> None:
        """The event has ended; what waited for it alone becomes due."""
        self._ended_s[index] = now_s
        for follower in self._followers[index]:
            self._waiting_for[follower].discard(index)
            if not self._waiting_for[follower]:
                self._due_s[follower] = self._compute_due_s(follower)

    def _compute_due_s(self, index: int) -> float:
        timing = self.events[index].timing
        thought_s = max((self._ended_s[i] for i in self._thinks_after[index]), default=0.0) + timing.think_s
        ordered_s = max((self._ended_s[i] for i in self._implicit[index]), default=0.0)
        return max(timing.at_s, thought_s, ordered_s)
