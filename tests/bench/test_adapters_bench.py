"""The benchmark of many adapters counts what happened; times are not checked."""

import json
from pathlib import Path

import pytest

from forkkv_cluster.bench.adapters_bench import AdaptersBench, Load, Row, most_overtaken, rows_json, rows_table, verdicts
from forkkv_cluster.bench.adapters_kit import run_adapters
from forkkv_cluster.core.errors import Internal
from forkkv_cluster.testing.adapter_kit import build_adapter_kit
from tests.engine.harness import FakeEngine

LOAD = Load(num_clients=4, num_rounds=3, prompt_len=5, max_tokens=3)


@pytest.fixture
def fake() -> FakeEngine:
    return FakeEngine(max_device_adapters=2, host_bytes=0, num_slabs=200)


def bench_of(fake: FakeEngine) -> AdaptersBench:
    return AdaptersBench(fake.engine, [fake.adapters[name] for name in ("a8", "b8", "c16", "n0")], fake.page_size, LOAD)


def test_every_request_of_a_row_ends_and_reads_from_disk_are_counted(fake: FakeEngine):
    row = bench_of(fake).row(4)
    assert (row.num_requests, row.num_active, row.num_slots) == (12, 4, 2)
    assert row.output_tokens_per_s * row.wall_s == pytest.approx(36)
    assert row.disk_loads == row.device_evictions >= 2
    assert row.ttft_p50_s <= row.ttft_p99_s <= row.ttft_max_s <= row.wall_s


def test_a_request_that_fails_ends_the_benchmark(fake: FakeEngine):
    fake.runner.changed_files["fake:c16:16"] = "gone"
    with pytest.raises(Internal, match="cannot be read again"):
        bench_of(fake).row(4)


def test_nothing_is_left_after_all_adapters_are_unloaded(fake: FakeEngine):
    bench = bench_of(fake)
    bench.row(4)
    assert all(measurement.is_met for measurement in bench.leaks(list(fake.adapters)))


def test_a_slot_that_somebody_still_holds_is_reported(fake: FakeEngine):
    fake.add(fake.request([], [1], "a8", "isolated"))
    fake.step()
    missed = [m.name for m in bench_of(fake).leaks(list(fake.adapters)) if not m.is_met]
    assert "slots held by nobody" in missed


def test_the_most_overtaken_request_is_the_one_that_most_later_ones_passed():
    assert most_overtaken([(1, 0.1), (2, 0.2), (3, 0.3)]) == 0
    assert most_overtaken([(1, 0.4), (2, 0.1), (3, 0.3)]) == 2


def row_of(num_active: int, tokens_per_s: float, ttft_max_s: float = 1.0) -> Row:
    return Row(num_active, 8, 10, 4.0, 0.1, 0.5, ttft_max_s, tokens_per_s, 0, 0, 0, fair_round_s=1.0)


def test_throughput_that_falls_by_more_than_half_at_a_doubling_is_a_cliff():
    met = {m.name: m.is_met for m in verdicts([row_of(8, 100.0), row_of(16, 60.0), row_of(32, 29.0)])}
    assert met["throughput, 16 active over 8"] is True
    assert met["throughput, 32 active over 16"] is False


def test_a_wait_of_more_than_two_fair_rounds_is_starvation():
    (wait,) = verdicts([row_of(8, 1.0, ttft_max_s=2.1)])
    assert wait.is_met is False


def test_a_small_run_over_real_files_meets_its_checks(tmp_path: Path):
    rows, measurements = run_adapters(tmp_path / "kit", 8, (1, 4), 2, lambda name: None, LOAD)
    assert [(row.num_active, row.num_slots) for row in rows] == [(1, 2), (4, 2), (4, 4)]
    assert all(m.is_met for m in measurements if m.at_most == 0)
    assert json.loads(json.dumps(rows_json(rows)))[1]["num_requests"] == 12
    assert rows_table(rows, 8).row_count == 3


def test_the_adapters_of_a_kit_differ_and_are_the_same_again(tmp_path: Path):
    one, two = (build_adapter_kit(tmp_path / name, 3) for name in ("one", "two"))
    weights = [[(path / "adapter_model.safetensors").read_bytes() for path in kit.adapter_dirs] for kit in (one, two)]
    assert weights[0] == weights[1]
    assert len(set(weights[0])) == 3


def test_a_directory_that_holds_something_else_is_not_overwritten(tmp_path: Path):
    build_adapter_kit(tmp_path / "kit", 2)
    with pytest.raises(FileExistsError):
        build_adapter_kit(tmp_path / "kit", 3)
