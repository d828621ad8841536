"""The end-to-end runs of the GPU kit, on a small shape."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from forkkv_cluster.bench.offline_workloads import Workload

BENCHMARK = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks" / "end_to_end.py"


@pytest.fixture(scope="module")
def end_to_end() -> ModuleType:
    spec = importlib.util.spec_from_file_location("forkkv_end_to_end", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_nothing_but_the_workload_runs_while_it_is_timed(end_to_end: ModuleType, tmp_path: Path) -> None:
    """No adapter is measured for ``auto`` beside it: that alone would be two thousand positions for each."""
    agents, context, turn = 3, 192, 8
    adapters = end_to_end.write_adapters(tmp_path, "tiny", agents)
    engine = end_to_end.make_engine(end_to_end.write_model(tmp_path, "tiny"), adapters, 16 << 20, "cpu", 512)
    workload = Workload("agents", agents, context, 1, turn, turn)
    found = end_to_end.run_mode(engine, workload, "eager", tuple(path.name for path in adapters), "timed")
    assert found["prefill_tokens_run"] == context + agents * turn
