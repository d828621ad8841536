"""Time of one scheduling decision with many sequences decoding: the scheduler and its cache alone, no model."""

from __future__ import annotations

from forkkv_cluster.bench.measurement import median_us
from forkkv_cluster.bench.trace import generate_tokens
from forkkv_cluster.cache.geometry import KVGeometry
from forkkv_cluster.cache.kv_cache_manager import KVCacheManager
from forkkv_cluster.core.clock import SystemClock
from forkkv_cluster.core.config import AdapterMemoryConfig, SchedulerConfig
from forkkv_cluster.core.errors import Internal
from forkkv_cluster.core.ids import new_id
from forkkv_cluster.core.request import ModelInfo, SamplingParams
from forkkv_cluster.core.request_builder import Envelope, PromptSharing, RequestBuilder
from forkkv_cluster.engine.adapter_loader import ThreadLoader
from forkkv_cluster.engine.adapter_registry import AdapterRegistry
from forkkv_cluster.engine.adapter_tiers import AdapterTiers
from forkkv_cluster.engine.admission import Admission
from forkkv_cluster.engine.host_adapters import Weights
from forkkv_cluster.engine.scheduler import Scheduler
from forkkv_cluster.engine.sequence import Turn
from forkkv_cluster.engine.step_plan import StepPlan

VOCAB_SIZE = 8192
PROMPT_LEN = 48
GEOMETRY = KVGeometry(num_layers=12, num_kv_heads=4, head_dim=64, page_size=64, dtype_bytes=2)
MODEL = ModelInfo("bench", "digest", VOCAB_SIZE, 2**17, GEOMETRY.base_bytes_per_token, "bfloat16")


class NoDevice:
    """A runner and a loader for the base model alone; nothing runs here."""

    def read_adapter(self, name: str, path: str) -> Weights:
        raise Internal("the scheduler benchmark runs the base model.")

    def place_adapter(self, weights: Weights) -> int:
        raise Internal("the scheduler benchmark runs the base model.")

    def unload_adapter(self, slot: int) -> None:
        raise Internal("the scheduler benchmark runs the base model.")


class SchedulerBench:
    """``num_running`` turns that decode one token a step for ``num_steps`` steps."""

    def __init__(self, num_running: int, num_steps: int) -> None:
        tokens_each = PROMPT_LEN + num_steps + 8
        kv_bytes = 2 * num_running * (tokens_each + GEOMETRY.page_size) * GEOMETRY.base_bytes_per_token
        self._kv = KVCacheManager(GEOMETRY, kv_bytes)
        config = SchedulerConfig(max_num_seqs=num_running, max_num_batched_tokens=num_running * PROMPT_LEN)
        device = NoDevice()
        tiers = AdapterTiers(device, AdapterMemoryConfig(), ThreadLoader(device.read_adapter))
        self.scheduler = Scheduler(config, self._kv, tiers)
        admission = Admission(MODEL, GEOMETRY, kv_bytes, AdapterRegistry(tiers), SystemClock())
        builder = RequestBuilder(MODEL, block_size=GEOMETRY.page_size, namespace_of=lambda tenant, group: tenant)
        sampling = SamplingParams(max_tokens=num_steps + 8)
        for index in range(num_running):
            tokens = generate_tokens(index, PROMPT_LEN, VOCAB_SIZE)
            envelope = Envelope(new_id("bench"), "bench")
            self.scheduler.add(admission.turn(builder.prompt(tokens, None, PromptSharing(), sampling, envelope)))
        self._plan = StepPlan()
        self.schedule()
        self.commit()  # every prompt has run: from here on each step is one token of each turn

    def schedule(self) -> None:
        self._plan = self.scheduler.schedule()

    def commit(self) -> None:
        """As an engine does after the device: KV is written, one token is appended."""
        for scheduled in self._plan.work:
            turn = scheduled.item
            if isinstance(turn, Turn) and turn.lease is not None:
                turn.num_computed = scheduled.end
                self._kv.commit(turn.lease, scheduled.end)
                turn.append(5)

    @property
    def num_scheduled(self) -> int:
        return len(self._plan.work)


def scheduler_step(num_steps: int, num_running: int = 256) -> float:
    """Median time of ``Scheduler.schedule`` in microseconds while ``num_running`` turns decode."""
    bench = SchedulerBench(num_running, num_steps)
    return median_us(bench.schedule, num_steps, reset=bench.commit)
