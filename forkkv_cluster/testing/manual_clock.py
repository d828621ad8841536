"""A clock that stands still until a test moves it."""

from __future__ import annotations

from forkkv_cluster.core.errors import InvalidArgument


class ManualClock:
    """Implements ``core.clock.Clock``; both hands move together, in seconds."""

    def __init__(self, monotonic_s: float = 0.0, wall_s: float = 1_700_000_000.0) -> None:
        self._monotonic_s = monotonic_s
        self._wall_s = wall_s

    def monotonic(self) -> float:
        return self._monotonic_s

    def wall(self) -> float:
        return self._wall_s

    def advance(self, seconds: float) -> None:
        """Move both hands forward. Raises InvalidArgument for a step back: monotonic time never does that."""
        if seconds < 0:
            raise InvalidArgument("seconds", seconds, "moves the clock back", "Advance by zero or more seconds.")
        self._monotonic_s += seconds
        self._wall_s += seconds
