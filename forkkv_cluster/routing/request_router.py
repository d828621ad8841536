"""The thin Serve shell around ``Placer``: replicas in, singleton ranks out. No call leaves the process on this path.

Serve pickles this module by value, so it holds no state; the mirror lives in ``directory.mirror_registry``.
"""

from __future__ import annotations

from typing import Any

from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from forkkv_cluster.core.clock import SystemClock
from forkkv_cluster.core.config import ClusterConfig, RoutingConfig
from forkkv_cluster.core.ids import WorkerId
from forkkv_cluster.core.placement import WorkerLoad
from forkkv_cluster.core.request import ContextRequest, GenerateRequest
from forkkv_cluster.directory import mirror_registry
from forkkv_cluster.routing.placement_request import WorkRequest
from forkkv_cluster.routing.placer import Placer, WorkerReport
from forkkv_cluster.routing.policy import make_policy

_LOAD_FIELDS = ("queued_prefill_blocks", "decode_blocks", "num_active", "free_bytes", "total_bytes")


def router_config(config: ClusterConfig, directory: str) -> RequestRouterConfig:
    """What the worker deployment needs to be routed by this router; ``directory`` is the directory actor's name."""
    return RequestRouterConfig.model_validate(
        {
            "request_router_class": f"{__name__}:PrefixAffinityRouter",
            "request_router_kwargs": {
                "directory": directory,
                "routing": config.routing.model_dump(),
                "stats_interval_s": config.worker.stats_interval_s,
            },
            "request_routing_stats_period_s": config.worker.stats_interval_s,
        }
    )


def worker_report(replica: RunningReplica) -> WorkerReport:
    """What the replica said of itself: its metadata once it is ready, its load some time later."""
    stats: dict[str, Any] = replica.routing_stats or {}
    metadata: dict[str, Any] = replica.replica_metadata or {}
    worker_id = WorkerId(str(stats.get("worker_id") or metadata.get("worker_id") or replica.replica_id.unique_id))
    load = WorkerLoad(**{name: stats[name] for name in _LOAD_FIELDS if name in stats})
    return WorkerReport(worker_id, load, int(metadata.get("block_bytes", 0)))


def work_request(pending_request: PendingRequest | None) -> WorkRequest | None:
    """The request with a prompt that a handle call carries as its first argument, if it does."""
    if pending_request is None or not pending_request.args:
        return None
    first = pending_request.args[0]
    return first if isinstance(first, GenerateRequest | ContextRequest) else None


class PrefixAffinityRouter(RequestRouter):
    """Keyword arguments come from ``router_config``; named, not ``**kwargs``, so that an unknown one is refused."""

    def initialize_state(  # type: ignore[override]
        self, *, directory: str, routing: dict[str, Any], stats_interval_s: float
    ) -> None:
        config = RoutingConfig.model_validate(routing)
        self._directory = directory
        mirror = mirror_registry.mirror_of(directory, config.speculative_ttl_s)
        # A report is at most one period late when it is sent, and one more when it arrives.
        self._placer = Placer(make_policy(config), mirror, SystemClock(), load_ttl_s=2.5 * stats_interval_s)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        mirror_registry.ensure_following(self._directory)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Singleton ranks, so that Serve keeps our order; one rank of all for calls without a prompt."""
        if pending_request is not None:
            # Without this the retry loop spins while every rank rejects.
            pending_request.routing_context.should_backoff = True
        request = work_request(pending_request)
        if pending_request is None or request is None or not candidate_replicas:
            return [candidate_replicas]
        mirror_registry.ensure_following(self._directory)
        reports = [worker_report(replica) for replica in candidate_replicas]
        ranked = self._placer.place(request, reports, pending_request.metadata.internal_request_id)
        replica_of = {report.worker_id: replica for report, replica in zip(reports, candidate_replicas, strict=True)}
        return [[replica_of[entry.worker_id]] for entry in ranked]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        request, replica = work_request(pending_request), self.curr_replicas.get(replica_id)
        if request is not None and replica is not None:
            self._placer.routed(request, worker_report(replica).worker_id, pending_request.metadata.internal_request_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._placer.ended(internal_request_id)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        replica = self.curr_replicas.get(replica_id)
        super().on_replica_actor_died(replica_id)
        if replica is not None:
            self._placer.worker_died(worker_report(replica).worker_id)
