"""What a step of the engine hands back: values, no callbacks."""

from __future__ import annotations

from dataclasses import dataclass

from forkkv_cluster.core.errors import ForkKVError
from forkkv_cluster.core.events import CacheEvent
from forkkv_cluster.core.ids import RequestId
from forkkv_cluster.core.request import TokenChunk


@dataclass(frozen=True, slots=True)
class Failure:
    """The terminal result of a request that did not end well."""

    request_id: RequestId
    error: ForkKVError


@dataclass(frozen=True, slots=True)
class StepOutput:
    """chunks: new tokens and good ends; failures: bad ends; events: what the step changed in the cache.

    Every request ends in exactly one terminal result: a chunk with a ``finish_reason``, or a failure.
    """

    chunks: tuple[TokenChunk, ...] = ()
    failures: tuple[Failure, ...] = ()
    events: tuple[CacheEvent, ...] = ()
