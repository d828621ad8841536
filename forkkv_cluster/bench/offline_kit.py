"""``forkkv bench offline`` put together: the random 82M-parameter model, engines over it, and a peer."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from forkkv_cluster.bench.measurement import Measurement
from forkkv_cluster.bench.offline_bench import NO_ADAPTER, OfflineBench, OnRun, Suite
from forkkv_cluster.bench.offline_workloads import Workload
from forkkv_cluster.bench.peer import Peer
from forkkv_cluster.bench.step_profile import ProfiledEngine
from forkkv_cluster.core.config import ClusterConfig, parse_config
from forkkv_cluster.engine.engine import Engine
from forkkv_cluster.testing.speed_kit import SpeedKit, SpeedSpec, build_speed_kit


def run_offline(
    directory: Path, repeats: int, peer_python: Path | None, on_run: OnRun, spec: SpeedSpec | None = None,
    suite: Suite | None = None,
) -> list[Measurement]:  # fmt: skip
    """All workloads. Raises InvalidArgument for a peer that is not there, Unavailable for one that failed."""
    spec, num_threads = spec or SpeedSpec(), os.cpu_count() or 1
    kit = build_speed_kit(directory, spec)
    peer = Peer(peer_python, kit.model_dir, spec.vocab_size, num_threads) if peer_python is not None else None
    adapter_dirs = list(kit.adapter_dirs.values())

    def peer_seconds(workload: Workload, has_adapters: bool) -> float:
        if peer is None:
            raise ValueError("asked for the seconds of a peer that was not named")
        return peer.wall_s(workload, adapter_dirs if has_adapters else [], repeats)

    def make_engine(kv_bytes: int) -> Engine:
        return Engine.from_config(engine_config(kit, kv_bytes, num_threads))

    page_size = engine_config(kit, 1, num_threads).cache.page_size
    bench = OfflineBench(make_engine, tuple(kit.adapter_dirs), page_size, repeats, on_run)
    suite = suite or Suite()
    rows = bench.measure(suite, peer_seconds if peer is not None else None)
    rows += _without_k(directory, spec, suite, repeats, num_threads, on_run)
    return rows + _step_shares(kit, suite, page_size, num_threads, on_run)


def _without_k(
    directory: Path, spec: SpeedSpec, suite: Suite, repeats: int, num_threads: int, on_run: OnRun
) -> list[Measurement]:
    """What is left of the cost of sharing where no adapter has K of its own, which decoding has to read."""
    targets = tuple(target for target in spec.targets if target != "k_proj")
    kit = build_speed_kit(directory.with_name(f"{directory.name}-without-k"), replace(spec, targets=targets))
    config = engine_config(kit, suite.kv_bytes, num_threads)
    engine = Engine.from_config(config)
    bench = OfflineBench(lambda _: engine, tuple(kit.adapter_dirs), config.cache.page_size, repeats, on_run)
    seconds = {mode: bench.wall_s(engine, suite.eight, mode) for mode in (NO_ADAPTER, "eager")}
    name = f"{suite.eight.name}, adapters that leave k alone: eager"
    return [
        Measurement(name, seconds["eager"], "s"),
        Measurement(f"{name} over no adapters", seconds[NO_ADAPTER] / seconds["eager"], "x"),
    ]


def _step_shares(kit: SpeedKit, suite: Suite, page_size: int, num_threads: int, on_run: OnRun) -> list[Measurement]:
    """Where a decode step's time goes, with adapters and without, in runs of their own: the profiler slows them down."""
    rows: list[Measurement] = []

    def make_engine(kv_bytes: int) -> ProfiledEngine:
        return ProfiledEngine.from_config(engine_config(kit, kv_bytes, num_threads))

    bench = OfflineBench(make_engine, tuple(kit.adapter_dirs), page_size, 1, on_run)
    for mode in (NO_ADAPTER, "eager"):
        engine = make_engine(suite.kv_bytes)
        bench.run_once(engine, suite.eight, mode)
        rows += engine.step_shares(f"{suite.eight.name}, {mode}")
    return rows


def engine_config(kit: SpeedKit, kv_bytes: int, num_threads: int) -> ClusterConfig:
    """bf16 on all cores, everything else that is timed at its default."""
    return parse_config(
        {
            "model": {"path": str(kit.model_dir), "name": "llama-82m", "dtype": "bfloat16"},
            "adapters": [{"name": name, "path": str(path)} for name, path in kit.adapter_dirs.items()],
            "cache": {"kv_bytes": kv_bytes},
            "worker": {"num_threads": num_threads},
            "defaults": {"adapter_sharing": "isolated"},  # nothing is measured beside what is timed
        }
    )
