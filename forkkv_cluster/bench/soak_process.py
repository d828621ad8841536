"""What a process holds besides KV: threads, tasks, open files, memory, and decode state that nothing runs any more."""

from __future__ import annotations

import asyncio
import gc
import os
import statistics
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from forkkv_cluster.bench.soak_ledger import SoakFailure
from forkkv_cluster.engine.sequence import ContextPass, Demand, Turn

_CONSTANT = ("num_threads", "num_os_threads", "num_tasks", "num_open_files", "num_decode_states")
_DECODE_STATES = (Turn, Demand, ContextPass)


@dataclass(frozen=True, slots=True)
class ProcessReading:
    """One reading, taken while no request is under way. 0 where the system does not say.

    num_threads        of Python; num_os_threads: all of the process
    num_tasks          asyncio tasks alive, in whatever loop
    num_decode_states  turns, context requests and passes of any engine that are still referenced
    """

    elapsed_s: float
    rss_bytes: int
    num_threads: int
    num_os_threads: int
    num_tasks: int
    num_open_files: int
    num_decode_states: int


def read_process(elapsed_s: float) -> ProcessReading:
    """Collects garbage first, so that cycles do not pass for leaks. Takes some hundredths of a second."""
    gc.collect()
    objects = gc.get_objects()
    return ProcessReading(
        elapsed_s=elapsed_s,
        rss_bytes=_rss_bytes(),
        num_threads=threading.active_count(),
        num_os_threads=_num_entries("/proc/self/task"),
        num_tasks=sum(issubclass(type(o), asyncio.Task) and not o.done() for o in objects),
        num_open_files=_num_entries("/proc/self/fd"),
        num_decode_states=sum(type(o) in _DECODE_STATES for o in objects),
    )


def _rss_bytes() -> int:
    try:
        with open("/proc/self/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _num_entries(directory: str) -> int:
    try:
        return len(os.listdir(directory))
    except OSError:
        return 0


class ProcessWatch:
    """Readings of a run. Counts must be those of the first one; memory may grow by ``max_growth_bytes`` after warm-up."""

    def __init__(self, max_growth_bytes: int) -> None:
        self.max_growth_bytes = max_growth_bytes
        self.readings: list[ProcessReading] = []
        self._num_warm_up = 0

    def take(self, reading: ProcessReading) -> None:
        """Raises SoakFailure when a count differs from the first reading's."""
        self.readings.append(reading)
        first = self.readings[0]
        for name in _CONSTANT:
            before, now = getattr(first, name), getattr(reading, name)
            if now != before:
                raise SoakFailure("process", f"{name} was {before} and is {now} after {reading.elapsed_s:.0f} s")

    def end_warm_up(self) -> None:
        """Caches of Python, torch and the allocator have filled: memory counts from here."""
        self._num_warm_up = max(0, len(self.readings) - 1)

    @property
    def growth_bytes(self) -> int:
        """Medians of the last and of the first three readings after warm-up, compared."""
        rss = [reading.rss_bytes for reading in self.readings[self._num_warm_up :]]
        return int(_median(rss[-3:]) - _median(rss[:3]))

    def check_growth(self) -> None:
        if self.growth_bytes > self.max_growth_bytes:
            raise SoakFailure("memory", f"the process grew by {self.growth_bytes / 2**20:.1f} MiB after warm-up, "
                              f"the bound is {self.max_growth_bytes / 2**20:.1f} MiB")  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        return {
            "rss_growth_bytes": self.growth_bytes,
            "max_rss_growth_bytes": self.max_growth_bytes,
            "warm_up_readings": self._num_warm_up,
            "series": [asdict(reading) for reading in self.readings],
        }


def _median(values: Sequence[int]) -> float:
    return statistics.median(values) if values else 0.0
