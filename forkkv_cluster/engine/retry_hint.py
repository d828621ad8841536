"""When a refused request should come again, from how fast places in the queue have become free."""

from __future__ import annotations

from forkkv_cluster.core.clock import Clock

_WEIGHT = 0.2
"""Of the newest interval in the running mean."""
_LONGEST_S = 60.0


class RetryHint:
    """Each refused request is told the time after which its place should be free: the n-th one since a place became free
    last waits for n places. So those refused together do not all come again together."""

    def __init__(self, least_s: float, clock: Clock) -> None:
        self._least_s = least_s
        self._clock = clock
        self._interval_s: float | None = None
        self._freed_s: float | None = None
        self._num_refused = 0

    def place_freed(self, *, is_queue_busy: bool) -> None:
        """A request has left the queue. An interval counts only while others wait: else it measures who comes, not how
        fast we are."""
        now = self._clock.monotonic()
        if self._freed_s is not None:
            interval_s = now - self._freed_s
            mean = self._interval_s
            self._interval_s = interval_s if mean is None else (1 - _WEIGHT) * mean + _WEIGHT * interval_s
        self._freed_s = now if is_queue_busy else None
        self._num_refused = 0

    def next_s(self) -> float:
        """Seconds for one more refused request."""
        self._num_refused += 1
        estimate_s = (self._interval_s or 0.0) * self._num_refused
        return min(max(estimate_s, self._least_s), max(_LONGEST_S, self._least_s))
