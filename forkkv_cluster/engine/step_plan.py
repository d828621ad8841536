"""What a scheduler decides: the work of one step, and for each request why it starts or does not."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from forkkv_cluster.core.ids import RequestId
from forkkv_cluster.engine.sequence import Demand, Scheduled, Waiting


class Outcome(enum.Enum):
    """Of an attempt to start a request that does not run after it."""

    WAITS = enum.auto()  # for a pass under way, or for weights on their way
    ENDED = enum.auto()  # without running: nothing was missing, or nothing can help
    NO_SLOT = enum.auto()
    NO_ROOM = enum.auto()


@dataclass(slots=True)
class StepPlan:
    """Work of one step; context requests that found everything there; requests that cannot go on; those that start later, as
    work of this step computes their prefix."""

    work: list[Scheduled] = field(default_factory=list)
    completed: list[Demand] = field(default_factory=list)
    starved: list[Waiting] = field(default_factory=list)
    held: set[RequestId] = field(default_factory=set)
