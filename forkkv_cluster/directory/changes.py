"""What the directory tells its mirrors: an ordered log of changes, cut into deltas by version."""

from __future__ import annotations

from dataclasses import dataclass

from forkkv_cluster.core.events import BaseEvicted, BaseStored, EventBatch, ResidualEvicted, ResidualStored
from forkkv_cluster.core.ids import WorkerId
from forkkv_cluster.directory.worker_blocks import WorkerBlocks

_WITH_HASHES = (BaseStored, BaseEvicted, ResidualStored, ResidualEvicted)


@dataclass(frozen=True, slots=True)
class WorkerDropped:
    """The worker is gone, or began a new epoch: all that it said before is void."""

    worker_id: WorkerId


Change = EventBatch | WorkerDropped


@dataclass(frozen=True, slots=True)
class Delta:
    """The changes that lead from version ``since`` to ``version`` of one incarnation.

    With ``is_snapshot`` the changes build the whole state from nothing, and ``since`` is 0.
    """

    incarnation: str
    since: int
    version: int
    changes: tuple[Change, ...]
    is_snapshot: bool = False


def apply_change(table: dict[WorkerId, WorkerBlocks], change: Change) -> None:
    """Apply one change of an ordered log to ``table``: no gaps, no epochs to look after."""
    if isinstance(change, WorkerDropped):
        table.pop(change.worker_id, None)
        return
    if change.is_snapshot or change.worker_id not in table:
        # Built aside and put in place at once, so that a reader in another thread never sees half of it.
        table[change.worker_id] = WorkerBlocks(change.events)
        return
    blocks = table[change.worker_id]
    for event in change.events:
        blocks.apply(event)


def num_hashes(change: Change) -> int:
    """Size of a change in block hashes, at least 1: what the bound of the log counts."""
    if isinstance(change, WorkerDropped):
        return 1
    return 1 + sum(len(event.hashes) for event in change.events if isinstance(event, _WITH_HASHES))
