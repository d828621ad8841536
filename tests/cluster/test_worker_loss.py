"""A worker is killed under its streams; no token changes."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Sequence

import pytest

from forkkv_cluster.client import Branch, BranchSpec, Delta, ForkKVClient, Generation
from forkkv_cluster.client.results import GenerationBuilder
from tests.cluster.helpers import ADAPTERS, opened, wait_for_workers, workers

pytestmark = pytest.mark.cluster

NUM_TOKENS = 150


class Reader(threading.Thread):
    """Reads one turn; ``has_begun`` is set after eight tokens."""

    def __init__(self, branch: Branch) -> None:
        super().__init__(daemon=True)
        self._branch = branch
        self._builder = GenerationBuilder()
        self.has_begun = threading.Event()
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            for event in self._branch.stream("And then?", max_tokens=NUM_TOKENS, ignore_eos=True):
                self._builder.add(event)
                if sum(len(delta.token_ids) for delta in self._builder.deltas) >= 8:
                    self.has_begun.set()
        except Exception as error:
            self.error = error
        self.has_begun.set()

    @property
    def worker_id(self) -> str:
        return next(delta.worker_id for delta in self._builder.deltas if isinstance(delta, Delta))

    def answer(self) -> Generation:
        self.join(120)
        if self.error is not None:
            raise self.error
        return self._builder.build()


def read_all(branches: Sequence[Branch]) -> list[Reader]:
    readers = [Reader(branch) for branch in branches]
    for reader in readers:
        reader.start()
    for reader in readers:
        assert reader.has_begun.wait(120)
    return readers


@pytest.mark.parametrize("sharing", ["eager", "isolated"])
def test_a_killed_worker_changes_no_token(client: ForkKVClient, sharing: str) -> None:
    with opened(client, sharing) as session:
        branches = session.fork([BranchSpec(f"{run}{i}", ADAPTERS[i % 4]) for run in "ab" for i in range(6)])
        expected = [reader.answer().token_ids for reader in read_all(branches[:6])]
        readers = read_all(branches[6:])
        ((busiest, _),) = Counter(reader.worker_id for reader in readers).most_common(1)
        (pid,) = [worker.pid for worker in workers(client) if worker.worker_id == busiest]
        os.kill(pid, signal.SIGKILL)
        answers = [reader.answer() for reader in readers]
        assert [answer.token_ids for answer in answers] == expected
        assert any(answer.finished.num_resumes > 0 for answer in answers)
        wait_for_workers(client, 2)
