"""Ends one worker in the middle of everything, as a crash would."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from forkkv_cluster.bench.demo_plan import AgentResult, KillResult

MIN_TOKENS = 8
"""Every stream has ended or has at least so many tokens when the worker dies."""


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


class WorkerKiller:
    """Kills once, when the time has come. ``pids`` of the workers by id; ``kill`` is SIGKILL unless a test says otherwise."""

    def __init__(self, pids: Mapping[str, int], kill: Callable[[int], None] = _kill) -> None:
        self._pids = pids
        self._kill = kill
        self.result: KillResult | None = None

    def observe(self, streams: Sequence[AgentResult]) -> None:
        """Call whenever a stream has grown: kills the worker that serves most of those that have not ended."""
        if self.result is not None or any(len(s.token_ids) < MIN_TOKENS and not s.is_done for s in streams):
            return
        serving = Counter(stream.worker for stream in streams if not stream.is_done)
        if not serving:
            return
        worker_id, num_streams = serving.most_common(1)[0]
        self.result = KillResult(worker_id, self._pids[worker_id], num_streams, tuple(len(s.token_ids) for s in streams))
        self._kill(self._pids[worker_id])
