"""Adapters from disk while an engine runs: a port, and a thread behind it, so that no step waits for a file."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from forkkv_cluster.core.errors import FailedPrecondition, ForkKVError, Internal
from forkkv_cluster.core.ids import AdapterDigest
from forkkv_cluster.core.request import AdapterInfo
from forkkv_cluster.engine.host_adapters import Weights

ReadAdapter = Callable[[str, str], Weights]
"""(name, path) -> weights. Raises ForkKVError. Safe on any thread."""


@dataclass(frozen=True, slots=True, eq=False)
class LoadResult:
    """Of one read: the weights, or why there are none."""

    digest: AdapterDigest
    weights: Weights | None
    error: ForkKVError | None


class AdapterLoader(Protocol):
    """Reads adapters one after the other, elsewhere."""

    def submit(self, info: AdapterInfo) -> None:
        """Read it; the result comes by ``take``."""
        ...

    def take(self) -> list[LoadResult]:
        """Results since the last call. Does not wait."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Until a result is there to take, at most this long."""
        ...


class ThreadLoader:
    """One thread, started with the first read."""

    def __init__(self, read: ReadAdapter) -> None:
        self._read = read
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-loader")
        self._results: list[LoadResult] = []
        self._has_result = threading.Condition()

    def submit(self, info: AdapterInfo) -> None:
        self._thread.submit(self._load, info)

    def take(self) -> list[LoadResult]:
        with self._has_result:
            results, self._results = self._results, []
        return results

    def wait(self, timeout_s: float) -> None:
        with self._has_result:
            self._has_result.wait_for(lambda: bool(self._results), timeout_s)

    def _load(self, info: AdapterInfo) -> None:
        result = read_again(self._read, info)
        with self._has_result:
            self._results.append(result)
            self._has_result.notify()


def read_again(read: ReadAdapter, info: AdapterInfo) -> LoadResult:
    """Read a registered adapter. Its files must be what they were: pages and requests name it by its digest."""
    try:
        weights = read(info.name, info.path)
    except ForkKVError as error:
        problem = f"adapter {info.name!r} cannot be read again: {error.message} Restore its files, or unload it."
        return LoadResult(info.digest, None, FailedPrecondition(problem))
    except Exception as error:  # Whatever it is, it fails the requests of this adapter alone.
        return LoadResult(info.digest, None, Internal(f"adapter {info.name!r} cannot be read again: {error!r}."))
    if weights.info.digest != info.digest:
        problem = (
            f"the files of adapter {info.name!r} in {info.path} have changed since it was loaded (digest {info.digest}, "
            f"now {weights.info.digest}). Restore them, or unload the adapter and load it again."
        )
        return LoadResult(info.digest, None, FailedPrecondition(problem))
    return LoadResult(info.digest, weights, None)
