"""Running counts of one engine."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from forkkv_cluster.cache.kv_cache_manager import KVCacheManager
from forkkv_cluster.core.status import EngineCounters
from forkkv_cluster.engine.auto_sharing import AutoSharing
from forkkv_cluster.engine.shadow_probe import ShadowProbe


@dataclass(slots=True)
class EngineCounts:
    """What the engine itself counts; names and units as in ``EngineCounters``."""

    num_steps: int = 0
    num_finished: int = 0
    num_failed: int = 0
    prefill_tokens_run: int = 0
    output_tokens: int = 0
    base_hit_tokens: int = 0
    residual_hit_tokens: int = 0
    useful_hit_tokens: int = 0
    cow_copies: int = 0

    def freeze(self, kv: KVCacheManager, num_preemptions: int, auto: AutoSharing, probe: ShadowProbe) -> EngineCounters:
        """With what the cache, the scheduler, calibration and guardrail count, as a value."""
        peak_base, peak_residual = kv.peak_bytes
        host = kv.host
        return EngineCounters(
            **asdict(self),
            evictions=kv.num_evictions,
            preemptions=num_preemptions,
            peak_base_bytes=peak_base,
            peak_residual_bytes=peak_residual,
            swapped_out_pages=host.num_swapped_out if host is not None else 0,
            swapped_in_pages=host.num_swapped_in if host is not None else 0,
            swapped_out_bytes=host.swapped_out_bytes if host is not None else 0,
            swapped_in_bytes=host.swapped_in_bytes if host is not None else 0,
            calibrations=auto.num_calibrations,
            probes=probe.num_probes,
            dropped_probes=probe.num_dropped,
            demotions=auto.num_demotions,
        )
