"""An adapter loader without a thread: a read takes a number of steps, the same every time."""

from __future__ import annotations

from forkkv_cluster.core.request import AdapterInfo
from forkkv_cluster.engine.adapter_loader import LoadResult, ReadAdapter, read_again


class ManualLoader:
    """A read submitted in one step is there ``delay`` steps after the next. ``num_submitted`` counts reads."""

    def __init__(self, read: ReadAdapter, delay: int = 0) -> None:
        self._read = read
        self._delay = delay
        self._waiting: list[tuple[AdapterInfo, int]] = []
        self.num_submitted = 0

    def submit(self, info: AdapterInfo) -> None:
        self.num_submitted += 1
        self._waiting.append((info, self._delay))

    def take(self) -> list[LoadResult]:
        ready = [info for info, steps in self._waiting if steps == 0]
        self._waiting = [(info, steps - 1) for info, steps in self._waiting if steps > 0]
        return [read_again(self._read, info) for info in ready]

    def wait(self, timeout_s: float) -> None:
        """Time passes by steps alone."""
