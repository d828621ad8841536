"""The speed workloads on our own engine, one after the other in this process, and their ratios beside the targets."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from forkkv_cluster.bench.measurement import Measurement
from forkkv_cluster.bench.offline import OfflineTarget
from forkkv_cluster.bench.offline_run import EngineFacade
from forkkv_cluster.bench.offline_workloads import EIGHT, FORK, POOL_BYTES, PRIME, SINGLE, SIXTEEN, Workload
from forkkv_cluster.bench.runner import run_trace
from forkkv_cluster.core.request import Sharing

NO_ADAPTER = "no adapters"
KV_BYTES = 2**30
_WARM_UP = Workload("warm-up", 2, 128, max_tokens=4)

MakeEngine = Callable[[int], EngineFacade]
"""KV bytes -> an idle engine with the adapters loaded."""
PeerSeconds = Callable[[Workload, bool], float]
"""(workload, with adapters) -> median seconds on the peer."""
OnRun = Callable[[str], None]
"""Called with what runs next."""


@dataclass(frozen=True, slots=True)
class Suite:
    """What to run. Smaller workloads in place of the real ones make a test of seconds."""

    single: Workload = SINGLE
    eight: Workload = EIGHT
    sixteen: Workload = SIXTEEN
    fork: Workload = FORK
    pool_bytes: int = POOL_BYTES
    kv_bytes: int = KV_BYTES


class OfflineBench:
    """Runs workloads on engines that ``make_engine`` gives; ``adapters`` names one for each agent."""

    def __init__(
        self,
        make_engine: MakeEngine,
        adapters: tuple[str, ...],
        block_size: int,
        repeats: int,
        on_run: OnRun = lambda name: None,
    ) -> None:
        self._make_engine = make_engine
        self._adapters = adapters
        self._block_size = block_size
        self._repeats = repeats
        self._on_run = on_run
        self._num_runs = 0

    def measure(self, suite: Suite, peer: PeerSeconds | None = None) -> list[Measurement]:
        """Every workload; with ``peer``, the ratios against it too."""
        engine = self._make_engine(suite.kv_bytes)
        rows: list[Measurement] = []
        for workload, modes, lora_target, base_target in (
            (suite.single, (NO_ADAPTER, "isolated", "eager"), None, None),
            (suite.eight, (NO_ADAPTER, "eager", "residual", "isolated"), 6.0, 1.0),
            (suite.sixteen, (NO_ADAPTER, "eager", "residual", "isolated"), 12.0, None),
        ):
            seconds = {mode: self.wall_s(engine, workload, mode) for mode in modes}
            rows += [Measurement(f"{workload.name}: {mode}", s, "s") for mode, s in seconds.items()]
            if workload is not suite.single:
                rows.append(_speed(f"{workload.name}: eager over no adapters", seconds[NO_ADAPTER], seconds["eager"], 0.9))
            # Sharing must not cost where there is nobody to share with: the target for one agent, too.
            rows.append(_speed(f"{workload.name}: eager over isolated", seconds["isolated"], seconds["eager"], 1.0))
            if peer is not None:
                rows += self._against_peer(workload, seconds, peer, lora_target, base_target)
        rows += self._fork(engine, suite.fork)
        del engine  # its arena, before the next one is made
        return rows + self._small_pool(suite)

    def wall_s(self, engine: EngineFacade, workload: Workload, mode: str) -> float:
        """Median seconds of a whole workload, caches cold, context passes included."""
        return float(statistics.median(report["wall_s"] for report in self._reports(engine, workload, mode)))

    def _reports(self, engine: EngineFacade, workload: Workload, mode: str) -> list[dict[str, Any]]:
        sharing = Sharing.EAGER if mode == NO_ADAPTER else Sharing(mode)
        adapters = () if mode == NO_ADAPTER else self._adapters
        target = OfflineTarget(engine, block_size=self._block_size, sharing=sharing)
        reports = []
        for which in (_WARM_UP, *[workload] * self._repeats):
            self._on_run(f"{workload.name}, {mode}")
            self._num_runs += 1
            trace = which.trace(adapters, engine.model_info.vocab_size, tenant=f"run-{self._num_runs}")
            result = run_trace(trace, target, sharing=sharing, seed=0, on_progress=lambda num_ended: None)
            reports.append(result.report)
        return reports[1:]

    def _against_peer(
        self, workload: Workload, seconds: dict[str, float], peer: PeerSeconds, lora: float | None, base: float | None
    ) -> list[Measurement]:
        self._on_run(f"{workload.name}, the peer")
        with_adapters, without = peer(workload, True), peer(workload, False)
        rows = [
            Measurement(f"{workload.name}: peer with adapters", with_adapters, "s"),
            Measurement(f"{workload.name}: peer without", without, "s"),
        ]
        if lora is None:
            name = f"{workload.name}: isolated over the peer with adapters"
            return [
                *rows,
                _speed(name, with_adapters, seconds["isolated"], 1.0),
                _speed(f"{workload.name}: no adapters over the peer without", without, seconds[NO_ADAPTER], 0.9),
            ]
        return [
            *rows,
            _speed(f"{workload.name}: eager over the peer with adapters", with_adapters, seconds["eager"], lora),
            _speed(f"{workload.name}: eager over the peer without", without, seconds["eager"], base),
        ]

    def run_once(self, engine: EngineFacade, workload: Workload, mode: str) -> None:
        """A warm-up and one run of a workload, for an engine that watches itself."""
        self._reports(engine, workload, mode)

    def _fork(self, engine: EngineFacade, workload: Workload) -> list[Measurement]:
        eager = self._reports(engine, workload, "eager")
        base = self._reports(engine, workload, NO_ADAPTER)
        run = statistics.median(report["prefill_tokens_run"] for report in eager)
        least = workload.context_len + (workload.num_agents * workload.num_turns + 1) * workload.turn_len
        eager_s, base_s = _branch_ttft_s(eager), _branch_ttft_s(base)
        return [
            Measurement(f"{workload.name}: TTFT of a branch, eager", eager_s * 1000, "ms"),
            Measurement(f"{workload.name}: TTFT of a branch, base model", base_s * 1000, "ms"),
            Measurement(f"{workload.name}: TTFT, eager over base model", eager_s / base_s, "x", at_most=1.2),
            Measurement(f"{workload.name}: tokens run again", run - least, "tokens", at_most=0),
        ]

    def _small_pool(self, suite: Suite) -> list[Measurement]:
        engine, name = self._make_engine(suite.pool_bytes), f"{suite.eight.name}, {suite.pool_bytes / 2**20:.0f} MiB pool"
        seconds = {mode: self.wall_s(engine, suite.eight, mode) for mode in ("residual", "isolated")}
        rows = [Measurement(f"{name}: {mode}", s, "s") for mode, s in seconds.items()]
        return [*rows, _speed(f"{name}: residual over isolated", seconds["isolated"], seconds["residual"], 2.0)]


def _speed(name: str, other_s: float, ours_s: float, at_least: float | None = None) -> Measurement:
    """How many times as fast as ``other_s``."""
    return Measurement(name, other_s / ours_s, "x", at_least=at_least)


def _branch_ttft_s(reports: Sequence[dict[str, Any]]) -> float:
    """Median over all branches of all repeats, from the moment that the context was there."""
    return float(statistics.median(turn["ttft_s"] for report in reports for turn in report["turns"] if turn["id"] != PRIME))
