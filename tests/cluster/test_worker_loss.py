"""A worker is killed under its streams; no token changes."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from forkkv_cluster.client import Branch, BranchSpec, Delta, ForkKVClient, Generation, Session
from forkkv_cluster.client.results import GenerationBuilder
from forkkv_cluster.testing.tiny_models import save_alora_adapter
from tests.cluster.helpers import ADAPTERS, DOCUMENT, opened, wait_for_workers, workers

pytestmark = pytest.mark.cluster

NUM_TOKENS = 150
QUESTION = "And then?"


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
            for event in self._branch.stream(QUESTION, max_tokens=NUM_TOKENS, ignore_eos=True):
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


def answers_with_a_killed_worker(client: ForkKVClient, session: Session, adapters: Sequence[str]) -> list[Generation]:
    """One branch for each adapter, twice; the second time the busiest worker is killed, and no token may change."""
    num = len(adapters)
    branches = session.fork([BranchSpec(f"{run}{i}", adapter) for run in "ab" for i, adapter in enumerate(adapters)])
    expected = [reader.answer().token_ids for reader in read_all(branches[:num])]
    readers = read_all(branches[num:])
    ((busiest, _),) = Counter(reader.worker_id for reader in readers).most_common(1)
    (pid,) = [worker.pid for worker in workers(client) if worker.worker_id == busiest]
    os.kill(pid, signal.SIGKILL)
    answers = [reader.answer() for reader in readers]
    assert [answer.token_ids for answer in answers] == expected
    assert any(answer.finished.num_resumes > 0 for answer in answers)
    wait_for_workers(client, 2)
    return answers


@pytest.mark.parametrize("sharing", ["eager", "isolated"])
def test_a_killed_worker_changes_no_token(client: ForkKVClient, sharing: str) -> None:
    with opened(client, sharing) as session:
        answers_with_a_killed_worker(client, session, (*ADAPTERS, *ADAPTERS[:2]))


def test_a_killed_worker_changes_no_token_of_an_alora(client: ForkKVClient, tiny_model_dir: Path, tmp_path: Path) -> None:
    invocation = AutoTokenizer.from_pretrained(tiny_model_dir)(QUESTION, add_special_tokens=False).input_ids
    directories = {
        "invoked": save_alora_adapter(tiny_model_dir, tmp_path / "invoked", invocation),
        "silent": save_alora_adapter(tiny_model_dir, tmp_path / "silent", [*invocation, 5]),
    }
    for name, directory in directories.items():
        client.load_adapter(name, str(directory))
    try:
        with client.create_session(DOCUMENT, adapters=[*directories, "planner"], sharing="eager") as session:
            answers = answers_with_a_killed_worker(client, session, ["invoked", "silent", "invoked", "planner"])
        assert [answer.is_adapter_inactive for answer in answers] == [False, True, False, False]
        assert answers[0].token_ids == answers[2].token_ids != answers[1].token_ids
    finally:
        for name in directories:
            client.unload_adapter(name)
