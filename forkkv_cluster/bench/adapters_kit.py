"""``forkkv bench adapters`` put together: the tiny random model, its many adapters, engines over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from forkkv_cluster.bench.adapters_bench import AdaptersBench, Load, Row, run_rows
from forkkv_cluster.bench.measurement import Measurement
from forkkv_cluster.core.config import parse_config
from forkkv_cluster.core.request import AdapterRef
from forkkv_cluster.engine.engine import Engine
from forkkv_cluster.testing.adapter_kit import AdapterKit, build_adapter_kit

HOST_BYTES = 16 * 2**20
"""Room for a fifth of a thousand adapters: the others are on disk alone."""


def run_adapters(
    directory: Path, num_adapters: int, active: Sequence[int], num_slots: int, on_row: Callable[[str], None],
    load: Load | None = None,
) -> tuple[list[Row], list[Measurement]]:  # fmt: skip
    """Rows by number of active adapters, and the verdicts over them."""
    on_row(f"{num_adapters:,} adapters on disk")
    kit = build_adapter_kit(directory, num_adapters)
    names = [path.name for path in kit.adapter_dirs]

    def make_bench(slots: int) -> AdaptersBench:
        on_row(f"registering {num_adapters:,} adapters, {slots} slots")
        engine, page_size = make_engine(kit, slots)
        infos = [engine.load_adapter(path.name, str(path)) for path in kit.adapter_dirs]
        refs = [AdapterRef(info.name, info.digest) for info in infos]
        return AdaptersBench(engine, refs, page_size, load or Load())

    return run_rows(make_bench, active, num_slots, names, on_row)


def make_engine(kit: AdapterKit, num_slots: int) -> tuple[Engine, int]:
    """In fp32 on one core, and its page size."""
    config = parse_config(
        {
            "model": {"path": str(kit.model_dir), "dtype": "float32"},
            "cache": {"kv_bytes": "128MiB", "page_size": 16},
            "adapter_memory": {"max_device_adapters": num_slots, "host_bytes": HOST_BYTES},
            "defaults": {"adapter_sharing": "isolated"},  # nothing is measured beside what is timed
            "worker": {"num_threads": 1},  # products this small gain nothing by a second one
        }
    )
    return Engine.from_config(config), config.cache.page_size
