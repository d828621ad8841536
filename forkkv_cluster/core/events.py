"""Facts about caches, told by workers to the directory. Applying one twice is harmless.

A worker numbers its events from 0 within an *epoch* (one life of its cache). A gap in the numbers asks for a snapshot;
a new epoch drops all that the worker said before.
"""

from __future__ import annotations

from dataclasses import dataclass

from forkkv_cluster.core.ids import AdapterDigest, BlockHash, WorkerId


@dataclass(frozen=True, slots=True)
class BaseStored:
    """Base pages of these whole blocks are there now, in chain order."""

    hashes: tuple[BlockHash, ...]


@dataclass(frozen=True, slots=True)
class BaseEvicted:
    """Base pages, and with them every residual page, of these blocks are gone."""

    hashes: tuple[BlockHash, ...]


@dataclass(frozen=True, slots=True)
class ResidualStored:
    """Residual pages of one adapter over these blocks are there now. ``semantics`` is ``eager`` or ``residual``."""

    adapter: AdapterDigest
    semantics: str
    hashes: tuple[BlockHash, ...]


@dataclass(frozen=True, slots=True)
class ResidualEvicted:
    """Residual pages of one adapter over these blocks are gone."""

    adapter: AdapterDigest
    semantics: str
    hashes: tuple[BlockHash, ...]


@dataclass(frozen=True, slots=True)
class AdapterLoaded:
    """The adapter's weights are on the worker's device."""

    adapter: AdapterDigest


@dataclass(frozen=True, slots=True)
class AdapterUnloaded:
    """The adapter's weights are gone from the worker's device."""

    adapter: AdapterDigest


@dataclass(frozen=True, slots=True)
class Cleared:
    """Every page of the worker is gone."""


CacheEvent = BaseStored | BaseEvicted | ResidualStored | ResidualEvicted | AdapterLoaded | AdapterUnloaded | Cleared


@dataclass(frozen=True, slots=True)
class EventBatch:
    """Consecutive events of one worker: event i has the number ``first_seq + i``.

    ``is_snapshot`` says that the events describe the whole state and replace all that was known before.
    """

    worker_id: WorkerId
    epoch: int
    first_seq: int
    events: tuple[CacheEvent, ...]
    is_snapshot: bool = False
