"""The microbenchmarks measure what they say: structure and arithmetic are checked, times are not."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from forkkv_cluster.bench.cache_bench import CONTEXT_LEN, LLAMA_8B, ForkBench, TreeBench, memory
from forkkv_cluster.bench.cli import app
from forkkv_cluster.bench.measurement import Measurement, median_us
from forkkv_cluster.bench.scheduler_bench import SchedulerBench


def test_a_fork_of_a_hashed_context_matches_all_of_it_and_runs_none():
    bench = ForkBench(LLAMA_8B, 1)
    lease = bench.opener(0)()
    assert lease is not None
    assert lease.num_computed == CONTEXT_LEN
    assert len(lease.residual_pages) == CONTEXT_LEN // 64
    bench.manager.check_invariants()


def test_memory_is_the_arithmetic_of_shared_pages():
    rows = {m.name: m.value for m in memory()}
    base, residual = 128 / 1024, 2 / 1024  # MiB a token, Llama-3.1-8B in bf16 at rank 16
    assert rows["KV of 1 agent, Llama-3.1-8B"] == pytest.approx(32768 * (base + residual) + 128 * base)
    assert rows["KV of 16 agents, Llama-3.1-8B"] == pytest.approx(32768 * (base + 16 * residual) + 16 * 128 * base)
    assert rows["KV of 16 agents over 1, Llama-3.1-8B"] <= 1.35


@pytest.mark.parametrize(("num_leaves", "depth"), [(30, 1), (1, 10)])
def test_the_tree_keeps_its_shape_while_evictions_are_timed(num_leaves: int, depth: int):
    bench = TreeBench(num_leaves, depth)
    tree = bench._tree
    assert (len(tree), tree.num_evictable) == (num_leaves + depth - 1, num_leaves)
    bench.pin_us(3)
    bench.evict_us(5)
    assert (len(tree), tree.num_evictable) == (num_leaves + depth - 1, num_leaves)


def test_every_running_sequence_decodes_in_every_timed_step():
    bench = SchedulerBench(num_running=32, num_steps=4)
    for _ in range(3):
        bench.schedule()
        assert bench.num_scheduled == bench.scheduler.num_running == 32
        bench.commit()


def test_the_first_run_does_not_count_and_reset_follows_each():
    calls: list[str] = []
    assert median_us(lambda: calls.append("run"), 2, reset=lambda: calls.append("reset")) > 0
    assert calls == ["run", "reset"] * 3


def test_a_measurement_knows_whether_its_target_is_met():
    assert Measurement("m", 5.0, "us", at_most=5).is_met is True
    assert Measurement("m", 5.1, "us", at_most=5).is_met is False
    assert Measurement("m", 5.9, "x", at_least=6).is_met is False
    assert Measurement("m", 5.9, "x").is_met is None


def test_the_command_prints_and_writes_every_measurement(tmp_path: Path):
    out = tmp_path / "cache.json"
    result = CliRunner().invoke(app, ["cache", "--repeats", "3", "--leaves", "500", "--json", str(out)])
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    names = [m["name"] for m in report["measurements"]]
    assert {"scheduler step, 256 running", "peak process memory", "evict one, 500 leaves"} <= set(names)
    assert all(m["value"] > 0 for m in report["measurements"])
    assert "evict one, 500 leaves" in result.output
    assert report["commit"]
