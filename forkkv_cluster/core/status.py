"""What a worker, a directory and a cluster say of themselves: values for ``forkkv status``, metrics and tests."""

from __future__ import annotations

from dataclasses import dataclass, field

from forkkv_cluster.core.agreement import Agreement
from forkkv_cluster.core.request import AdapterInfo, ModelInfo, Sharing


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """Pages of one pool: total = free + cached + pinned whenever the engine is idle. Bytes likewise."""

    name: str
    page_bytes: int
    num_total: int
    num_free: int
    num_cached: int
    num_pinned: int


@dataclass(frozen=True, slots=True)
class AdapterMemoryStatus:
    """Where the weights of an engine's adapters are. Bytes of the device and of host memory are counted separately: on a
    CPU both are the same memory, and an adapter that is in both is there once but counted in each.

    num_on_device   slots that hold weights; num_pinned of them are held by running or starting sequences
    num_loading     adapters that are being read from disk, each with a slot waiting for it
    disk_loads      reads from disk since the start, registrations not included
    """

    num_registered: int = 0
    max_on_device: int = 0
    num_on_device: int = 0
    num_pinned: int = 0
    num_loading: int = 0
    device_bytes: int = 0
    num_on_host: int = 0
    host_bytes: int = 0
    max_host_bytes: int = 0
    disk_loads: int = 0
    device_evictions: int = 0


@dataclass(frozen=True, slots=True)
class EngineCounters:
    """Counts since the start of the engine; tokens unless named otherwise. Names as in trace reports.

    What an engine does of its own (calibrations, shadow probes) counts as work (steps, prefill_tokens_run, pages), not as
    requests, output or hits.
    """

    num_steps: int = 0
    num_finished: int = 0
    num_failed: int = 0
    prefill_tokens_run: int = 0
    output_tokens: int = 0
    base_hit_tokens: int = 0
    residual_hit_tokens: int = 0
    useful_hit_tokens: int = 0
    cow_copies: int = 0
    evictions: int = 0
    preemptions: int = 0
    peak_base_bytes: int = 0
    peak_residual_bytes: int = 0
    swapped_out_pages: int = 0
    swapped_in_pages: int = 0
    swapped_out_bytes: int = 0
    swapped_in_bytes: int = 0
    calibrations: int = 0
    probes: int = 0
    dropped_probes: int = 0
    demotions: int = 0


@dataclass(frozen=True, slots=True)
class Holding:
    """KV memory of the device by whose it is. ``kind`` is one of three views, each of its own: they do not add up.

    tenant   all pages, base and residual, that this tenant was the first to need
    adapter  residual pages of this adapter
    session  pages that this session's ``keep_s`` covers
    """

    kind: str
    name: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class AdapterDrift:
    """What shadow probes found of one adapter under one sharing, against its reference, in the sliding window.

    num_diverged      probes with at least one disagreement
    first_divergence  median, over those, of output tokens before the first one; None where all agree
    """

    adapter: str
    digest: str
    sharing: Sharing
    num_probes: int
    num_diverged: int
    agreement: Agreement
    first_divergence: int | None = None


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """One engine, now.

    host_bytes_*: the host tier, 0 where there is none. sharing_saved_bytes: what caches of each adapter's own would need
    for the blocks over which adapters have residuals, less what is held for them (below 0 for a single adapter's).
    merged_bytes_held: KV memory that nobody else needs now, borrowed for adapters' whole keys; in neither of the two above.
    """

    num_running: int
    num_waiting: int
    num_pinned_pages: int
    kv_bytes_total: int
    base_bytes_held: int
    residual_bytes_held: int
    pools: tuple[PoolStatus, ...]
    counters: EngineCounters
    adapters: tuple[AdapterInfo, ...] = ()
    host_bytes_total: int = 0
    host_bytes_held: int = 0
    sharing_saved_bytes: int = 0
    holdings: tuple[Holding, ...] = ()
    adapter_memory: AdapterMemoryStatus = field(default_factory=AdapterMemoryStatus)
    merged_bytes_held: int = 0
    drift: tuple[AdapterDrift, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker of the cluster."""

    worker_id: str
    epoch: int
    pid: int
    device: str
    model: ModelInfo
    engine: EngineStatus
    events_published: int = 0
    busy_request_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DirectoryStatus:
    """The directory, now. ``incarnation`` changes when its actor restarts."""

    incarnation: str
    version: int
    num_workers: int
    num_base_blocks: int
    num_residual_blocks: int


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """All of it, as the gateway sees it."""

    version: str
    workers: tuple[WorkerStatus, ...]
    directory: DirectoryStatus | None
    num_sessions: int
    num_branches: int
    adapters: tuple[AdapterInfo, ...] = field(default=())
