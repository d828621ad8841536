"""Engines that work on batches: one of this process, or one in each of several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager
from multiprocessing import get_context
from typing import Any, Protocol, Self, TypeVar

from forkkv_cluster.bench.quality.engine import QualityEngine
from forkkv_cluster.core.config import ClusterConfig

__all__ = ["Local", "Pool", "Processes"]

Task = TypeVar("Task")
Result = TypeVar("Result")


class Pool(Protocol):
    def run(self, work: Callable[[QualityEngine, Task], Result], tasks: Sequence[Task]) -> Iterator[tuple[int, Result]]:
        """The result of each task with its index, as they end. Raises the error of the first that failed."""
        ...


class Local:
    """The engine of this process, one task after the other."""

    def __init__(self, engine: QualityEngine) -> None:
        self._engine = engine

    def run(self, work: Callable[[QualityEngine, Task], Result], tasks: Sequence[Task]) -> Iterator[tuple[int, Result]]:
        for index, task in enumerate(tasks):
            yield index, work(self._engine, task)


class Processes(AbstractContextManager["Processes"]):
    """``num_workers`` processes with an engine each, all over the same ``config``. A task's result does not depend on who runs
    it: what runs in one step is of one task."""

    def __init__(self, config: ClusterConfig, num_workers: int) -> None:
        self._executor = ProcessPoolExecutor(num_workers, get_context("spawn"), _open, (config,))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(cancel_futures=True)

    def run(self, work: Callable[[QualityEngine, Task], Result], tasks: Sequence[Task]) -> Iterator[tuple[int, Result]]:
        futures = {self._executor.submit(_call, work, task): index for index, task in enumerate(tasks)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            for future in futures:
                future.cancel()


_opened: list[QualityEngine] = []
"""Of a worker process, whose initializer has no other place to leave it."""


def _open(config: ClusterConfig) -> None:
    _opened.append(QualityEngine(config))


def _call(work: Callable[[QualityEngine, Any], Any], task: Any) -> Any:
    return work(_opened[0], task)
