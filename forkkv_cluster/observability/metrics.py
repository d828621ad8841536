"""Every metric: name, kind, unit, labels and meaning in one table, and the Prometheus text that a gateway serves.

Cluster metrics are read from a ``ClusterStatus`` when somebody asks, so they cost nothing in between. Gateway metrics
are counted where requests pass. Units are in the names: ``_tokens``, ``_bytes``, ``_seconds``; counters end in ``_total``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from forkkv_cluster.core.status import AdapterDrift, ClusterStatus, EngineCounters, WorkerStatus

Sample = tuple[tuple[str, ...], float]
"""(label values, value)."""

_LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_GAP_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


@dataclass(frozen=True, slots=True)
class ClusterMetric:
    """One row of the table; ``samples`` reads it from a status. Counters are named without ``_total``."""

    name: str
    kind: Literal["counter", "gauge"]
    labels: tuple[str, ...]
    help: str
    samples: Callable[[ClusterStatus], Iterable[Sample]]


def _of_workers(read: Callable[[WorkerStatus], float]) -> Callable[[ClusterStatus], Iterator[Sample]]:
    return lambda status: (((worker.worker_id,), float(read(worker))) for worker in status.workers)


def _pool_pages(status: ClusterStatus) -> Iterator[Sample]:
    for worker in status.workers:
        for pool in worker.engine.pools:
            pages = {"free": pool.num_free, "cached": pool.num_cached, "pinned": pool.num_pinned}
            yield from (((worker.worker_id, pool.name, state), float(count)) for state, count in pages.items())


def _hit_tokens(status: ClusterStatus) -> Iterator[Sample]:
    for worker in status.workers:
        counters = worker.engine.counters
        hits = {
            "base": counters.base_hit_tokens,
            "residual": counters.residual_hit_tokens,
            "useful": counters.useful_hit_tokens,
        }
        yield from (((worker.worker_id, kind), float(count)) for kind, count in hits.items())


def _kv_bytes(status: ClusterStatus) -> Iterator[Sample]:
    for worker in status.workers:
        engine = worker.engine
        held = {"base": engine.base_bytes_held, "residual": engine.residual_bytes_held, "merged": engine.merged_bytes_held}
        yield from (((worker.worker_id, kind), float(count)) for kind, count in held.items())


def _holdings(status: ClusterStatus) -> Iterator[Sample]:
    for worker in status.workers:
        yield from (((worker.worker_id, held.kind, held.name), float(held.num_bytes)) for held in worker.engine.holdings)


def _host_bytes(status: ClusterStatus) -> Iterator[Sample]:
    for worker in status.workers:
        yield (worker.worker_id, "held"), float(worker.engine.host_bytes_held)
        yield (worker.worker_id, "total"), float(worker.engine.host_bytes_total)


def _adapters(status: ClusterStatus) -> Iterator[Sample]:
    for worker in status.workers:
        memory = worker.engine.adapter_memory
        adapters = {"registered": memory.num_registered, "host": memory.num_on_host, "device": memory.num_on_device}
        yield from (((worker.worker_id, tier), float(count)) for tier, count in adapters.items())


def _adapter_slots(status: ClusterStatus) -> Iterator[Sample]:
    for worker in status.workers:
        memory = worker.engine.adapter_memory
        slots = {
            "pinned": memory.num_pinned,
            "idle": memory.num_on_device - memory.num_pinned,
            "loading": memory.num_loading,
            "free": memory.max_on_device - memory.num_on_device - memory.num_loading,
        }
        yield from (((worker.worker_id, state), float(count)) for state, count in slots.items())


def _adapter_bytes(status: ClusterStatus) -> Iterator[Sample]:
    for worker in status.workers:
        yield (worker.worker_id, "device"), float(worker.engine.adapter_memory.device_bytes)
        yield (worker.worker_id, "host"), float(worker.engine.adapter_memory.host_bytes)


def _sharing(status: ClusterStatus) -> Iterator[Sample]:
    for worker in status.workers:
        for info in worker.engine.adapters:
            if info.verdict is not None and not info.verdict.is_plain:
                yield (worker.worker_id, info.name, str(info.verdict.sharing), str(info.verdict.state)), 1.0


def _disagreement(status: ClusterStatus) -> Iterator[Sample]:
    for worker in status.workers:
        for info in worker.engine.adapters:
            for entry in info.verdict.measured if info.verdict is not None else ():
                labels = (worker.worker_id, info.name, str(entry.sharing))
                yield (*labels, "measured"), entry.agreement.disagreement
                yield (*labels, "upper"), entry.agreement.upper_bound


def _drift(status: ClusterStatus) -> Iterator[Sample]:
    for worker in status.workers:
        for drift in worker.engine.drift:
            labels = (worker.worker_id, drift.adapter, str(drift.sharing))
            yield (*labels, "measured"), drift.agreement.disagreement
            yield (*labels, "lower"), drift.agreement.lower_bound
            yield (*labels, "upper"), drift.agreement.upper_bound


def _of_drift(read: Callable[[AdapterDrift], float]) -> Callable[[ClusterStatus], Iterator[Sample]]:
    return lambda status: (
        ((worker.worker_id, drift.adapter, str(drift.sharing)), float(read(drift)))
        for worker in status.workers
        for drift in worker.engine.drift
    )


def _swapped(read: Callable[[EngineCounters], tuple[int, int]]) -> Callable[[ClusterStatus], Iterator[Sample]]:
    def samples(status: ClusterStatus) -> Iterator[Sample]:
        for worker in status.workers:
            for direction, count in zip(("out", "in"), read(worker.engine.counters), strict=True):
                yield (worker.worker_id, direction), float(count)

    return samples


def _directory_blocks(status: ClusterStatus) -> Iterator[Sample]:
    if status.directory is not None:
        yield ("base",), float(status.directory.num_base_blocks)
        yield ("residual",), float(status.directory.num_residual_blocks)


_W = ("worker",)

CLUSTER_METRICS: tuple[ClusterMetric, ...] = (
    ClusterMetric("forkkv_workers", "gauge", (), "Workers that answered.", lambda s: [((), float(len(s.workers)))]),
    ClusterMetric("forkkv_sessions", "gauge", (), "Open sessions.", lambda s: [((), float(s.num_sessions))]),
    ClusterMetric("forkkv_branches", "gauge", (), "Branches of open sessions.", lambda s: [((), float(s.num_branches))]),
    ClusterMetric(
        "forkkv_directory_up", "gauge", (), "1 when the directory answered.", lambda s: [((), float(s.directory is not None))]
    ),
    ClusterMetric("forkkv_directory_blocks", "gauge", ("kv",), "Blocks that the directory knows of.", _directory_blocks),
    ClusterMetric(
        "forkkv_running_requests", "gauge", _W, "Sequences in the running batch.", _of_workers(lambda w: w.engine.num_running)
    ),
    ClusterMetric(
        "forkkv_waiting_requests", "gauge", _W, "Sequences waiting for admission.", _of_workers(lambda w: w.engine.num_waiting)
    ),
    ClusterMetric(
        "forkkv_pinned_pages",
        "gauge",
        _W,
        "Pages that running requests hold.",
        _of_workers(lambda w: w.engine.num_pinned_pages),
    ),
    ClusterMetric("forkkv_pool_pages", "gauge", ("worker", "pool", "state"), "Pages by pool and state.", _pool_pages),
    ClusterMetric("forkkv_kv_capacity_bytes", "gauge", _W, "KV memory.", _of_workers(lambda w: w.engine.kv_bytes_total)),
    ClusterMetric(
        "forkkv_kv_held_bytes",
        "gauge",
        ("worker", "kv"),
        "KV memory in use, cached pages included; merged is lent to adapters' whole keys while nobody else needs it.",
        _kv_bytes,
    ),
    ClusterMetric(
        "forkkv_kv_owned_bytes",
        "gauge",
        ("worker", "kind", "name"),
        "KV memory by tenant (first to need it), by adapter (residuals) and by session (kept by keep_s); views of their own.",
        _holdings,
    ),
    ClusterMetric(
        "forkkv_sharing_saved_bytes",
        "gauge",
        _W,
        "What caches of each adapter's own would need for shared blocks, less what is held for them.",
        _of_workers(lambda w: w.engine.sharing_saved_bytes),
    ),
    ClusterMetric("forkkv_host_bytes", "gauge", ("worker", "state"), "Host tier: memory held, and in all.", _host_bytes),
    ClusterMetric(
        "forkkv_adapters", "gauge", ("worker", "tier"), "Adapters registered, in host memory and on the device.", _adapters
    ),
    ClusterMetric(
        "forkkv_adapter_slots", "gauge", ("worker", "state"), "Device slots for adapters by what is in them.", _adapter_slots
    ),
    ClusterMetric(
        "forkkv_adapter_bytes",
        "gauge",
        ("worker", "tier"),
        "Weights of adapters on the device and in host memory.",
        _adapter_bytes,
    ),
    ClusterMetric(
        "forkkv_adapter_host_capacity_bytes",
        "gauge",
        _W,
        "Host memory that weights of adapters may take.",
        _of_workers(lambda w: w.engine.adapter_memory.max_host_bytes),
    ),
    ClusterMetric(
        "forkkv_adapter_disk_loads",
        "counter",
        _W,
        "Adapters read from disk again, registrations not included.",
        _of_workers(lambda w: w.engine.adapter_memory.disk_loads),
    ),
    ClusterMetric(
        "forkkv_adapter_evictions",
        "counter",
        _W,
        "Adapters that left their device slot for others.",
        _of_workers(lambda w: w.engine.adapter_memory.device_evictions),
    ),
    ClusterMetric(
        "forkkv_adapter_sharing_info",
        "gauge",
        ("worker", "adapter", "sharing", "state"),
        "1 for the sharing that auto comes to on an adapter, and how that was decided; not of unmeasured adapters.",
        _sharing,
    ),
    ClusterMetric(
        "forkkv_adapter_disagreement_ratio",
        "gauge",
        ("worker", "adapter", "sharing", "bound"),
        "Share of positions at which a sharing disagreed with the reference when the adapter was measured; its upper bound.",
        _disagreement,
    ),
    ClusterMetric(
        "forkkv_adapter_drift_ratio",
        "gauge",
        ("worker", "adapter", "sharing", "bound"),
        "The same of what was served, by shadow probes, in the sliding window, with both bounds.",
        _drift,
    ),
    ClusterMetric(
        "forkkv_adapter_drift_kl_nats",
        "gauge",
        ("worker", "adapter", "sharing"),
        "KL of next-token distributions (top 20, rest as one) in the sliding window, mean over positions.",
        _of_drift(lambda drift: drift.agreement.mean_kl),
    ),
    ClusterMetric(
        "forkkv_adapter_drift_first_divergence_tokens",
        "gauge",
        ("worker", "adapter", "sharing"),
        "Median of output tokens before the first disagreement, over the probes that had one; -1 without any.",
        _of_drift(lambda drift: drift.first_divergence if drift.first_divergence is not None else -1),
    ),
    ClusterMetric(
        "forkkv_calibrations",
        "counter",
        _W,
        "Adapters measured for auto.",
        _of_workers(lambda w: w.engine.counters.calibrations),
    ),
    ClusterMetric(
        "forkkv_shadow_probes", "counter", _W, "Finished branches run again.", _of_workers(lambda w: w.engine.counters.probes)
    ),
    ClusterMetric(
        "forkkv_dropped_shadow_probes",
        "counter",
        _W,
        "Shadow probes given up, mostly because requests waited.",
        _of_workers(lambda w: w.engine.counters.dropped_probes),
    ),
    ClusterMetric(
        "forkkv_adapter_demotions",
        "counter",
        _W,
        "Adapters that fell back to isolated because what was served drifted.",
        _of_workers(lambda w: w.engine.counters.demotions),
    ),
    ClusterMetric(
        "forkkv_swapped_pages",
        "counter",
        ("worker", "direction"),
        "Pages copied to the host tier and back.",
        _swapped(lambda counters: (counters.swapped_out_pages, counters.swapped_in_pages)),
    ),
    ClusterMetric(
        "forkkv_swapped_bytes",
        "counter",
        ("worker", "direction"),
        "Bytes copied to the host tier and back.",
        _swapped(lambda counters: (counters.swapped_out_bytes, counters.swapped_in_bytes)),
    ),
    ClusterMetric(
        "forkkv_prefill_tokens",
        "counter",
        _W,
        "Prompt tokens run through a layer stack, context passes included.",
        _of_workers(lambda w: w.engine.counters.prefill_tokens_run),
    ),
    ClusterMetric(
        "forkkv_output_tokens", "counter", _W, "Tokens generated.", _of_workers(lambda w: w.engine.counters.output_tokens)
    ),
    ClusterMetric("forkkv_hit_tokens", "counter", ("worker", "kv"), "Prompt tokens found in the cache.", _hit_tokens),
    ClusterMetric("forkkv_engine_steps", "counter", _W, "Forward passes.", _of_workers(lambda w: w.engine.counters.num_steps)),
    ClusterMetric(
        "forkkv_finished_requests",
        "counter",
        _W,
        "Requests that ended well.",
        _of_workers(lambda w: w.engine.counters.num_finished),
    ),
    ClusterMetric(
        "forkkv_failed_requests",
        "counter",
        _W,
        "Requests that ended in an error, cancellation included.",
        _of_workers(lambda w: w.engine.counters.num_failed),
    ),
    ClusterMetric(
        "forkkv_cow_copies", "counter", _W, "Pages copied on write.", _of_workers(lambda w: w.engine.counters.cow_copies)
    ),
    ClusterMetric("forkkv_evictions", "counter", _W, "Pages evicted.", _of_workers(lambda w: w.engine.counters.evictions)),
    ClusterMetric(
        "forkkv_preemptions",
        "counter",
        _W,
        "Running requests set back for want of pages.",
        _of_workers(lambda w: w.engine.counters.preemptions),
    ),
    ClusterMetric(
        "forkkv_events_published",
        "counter",
        _W,
        "Cache events that the directory acknowledged.",
        _of_workers(lambda w: w.events_published),
    ),
)


class GatewayMetrics:
    """What one gateway counts as requests pass. A registry of its own: tests and several gateways do not meet in it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "forkkv_gateway_requests", "Requests that ended, by method and status.", ("method", "code"), registry=self.registry
        )
        self._in_flight = Gauge("forkkv_gateway_in_flight_requests", "Requests in flight.", ("method",), registry=self.registry)
        self._tokens = Counter(
            "forkkv_gateway_tokens", "Tokens by direction (prompt, output).", ("direction",), registry=self.registry
        )
        self._resumes = Counter(
            "forkkv_gateway_stream_resumes", "Broken streams resumed on another worker.", registry=self.registry
        )
        self._ttft = Histogram(
            "forkkv_gateway_ttft_seconds", "Arrival to first token.", registry=self.registry, buckets=_LATENCY_BUCKETS_S
        )
        self._itl = Histogram(
            "forkkv_gateway_itl_seconds",
            "Time per output token after the first.",
            registry=self.registry,
            buckets=_GAP_BUCKETS_S,
        )
        self._e2e = Histogram(
            "forkkv_gateway_request_seconds", "Arrival to end.", ("method",), registry=self.registry, buckets=_LATENCY_BUCKETS_S
        )

    def request_started(self, method: str) -> None:
        self._in_flight.labels(method).inc()

    def request_ended(self, method: str, code: str, elapsed_s: float) -> None:
        """``code`` is ``OK`` or the error's gRPC status name."""
        self._in_flight.labels(method).dec()
        self._requests.labels(method, code).inc()
        self._e2e.labels(method).observe(elapsed_s)

    def tokens(self, *, num_prompt: int, num_output: int) -> None:
        self._tokens.labels("prompt").inc(num_prompt)
        self._tokens.labels("output").inc(num_output)

    def first_token(self, ttft_s: float) -> None:
        self._ttft.observe(ttft_s)

    def later_tokens(self, num_tokens: int, elapsed_s: float) -> None:
        """``num_tokens`` came ``elapsed_s`` after the chunk before them: streams are coalesced, so their mean counts."""
        for _ in range(num_tokens):
            self._itl.observe(elapsed_s / num_tokens)

    def stream_resumed(self) -> None:
        self._resumes.inc()


class _StatusCollector(Collector):
    def __init__(self, status: ClusterStatus) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        for metric in CLUSTER_METRICS:
            kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = kind(metric.name, metric.help, labels=metric.labels)
            for labels, value in metric.samples(self._status):
                family.add_metric(labels, value)
            yield family


def render(status: ClusterStatus | None, gateway: GatewayMetrics) -> str:
    """Prometheus text (format 0.0.4) of both; without a status, of the gateway alone."""
    text = generate_latest(gateway.registry).decode()
    if status is not None:
        registry = CollectorRegistry()
        registry.register(_StatusCollector(status))
        text += generate_latest(registry).decode()
    return text
