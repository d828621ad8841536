"""The speed workloads on a toy shape: what runs and how often is checked, how fast is not."""

import sys
from pathlib import Path

import pytest

from forkkv_cluster.bench.offline_bench import Suite
from forkkv_cluster.bench.offline_kit import run_offline
from forkkv_cluster.bench.offline_workloads import EIGHT, PRIME, Workload
from forkkv_cluster.bench.peer import Peer
from forkkv_cluster.bench.trace_file import parse_trace
from forkkv_cluster.core.errors import InvalidArgument, Unavailable
from forkkv_cluster.testing.speed_kit import SpeedSpec, build_speed_kit

SPEC = SpeedSpec(
    hidden_size=64, intermediate_size=64, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=128, num_adapters=2
)
SUITE = Suite(
    single=Workload("one", 1, 128, num_turns=2, turn_len=8, max_tokens=3),
    eight=Workload("eight", 2, 128, num_turns=2, turn_len=8, max_tokens=3),
    sixteen=Workload("sixteen", 2, 128, turn_len=8, max_tokens=3),
    fork=Workload("fork", 2, 192, turn_len=8, max_tokens=2, is_primed=True),
    pool_bytes=2**20,
    kv_bytes=2**22,
)


def test_every_workload_runs_and_no_shared_token_runs_again(tmp_path: Path):
    rows = {m.name: m.value for m in run_offline(tmp_path / "kit", 1, None, lambda name: None, SPEC, SUITE)}
    for mode in ("no adapters", "eager", "residual", "isolated"):
        assert rows[f"eight: {mode}"] > 0
        assert rows[f"sixteen: {mode}"] > 0
    assert rows["eight: eager over no adapters"] == pytest.approx(rows["eight: no adapters"] / rows["eight: eager"])
    assert rows["fork: tokens run again"] == 0
    assert rows["eight, 1 MiB pool: residual over isolated"] > 0
    assert rows["eight, adapters that leave k alone: eager over no adapters"] > 0
    lora = []
    for mode in ("no adapters", "eager"):
        whole = rows[f"eight, {mode}: a decode step under the profiler"]
        parts = {name: value for name, value in rows.items() if name.startswith(f"eight, {mode}: ") and name.endswith("of it")}
        assert sum(parts.values()) == pytest.approx(whole)
        by_part = {name.split(": ")[1].split(",")[0]: value for name, value in parts.items()}
        assert min(by_part.values()) > 0
        lora.append(by_part["LoRA"])
    assert lora[0] < lora[1]


def test_a_workload_is_a_valid_trace_whose_turns_wait_for_all_of_the_turn_before():
    workload = Workload("w", 2, 128, num_turns=2, is_primed=True)
    trace = workload.trace(("a", "b", "c"), 8192, tenant="t")
    assert parse_trace(trace.to_lines()).events == trace.events
    by_id = {turn.id: turn for turn in trace.turns}
    assert by_id["t0-0"].timing.after == (PRIME,)
    assert by_id["t1-1"].timing.after == ("t0-0", "t0-1")
    assert [by_id[name].adapter for name in (PRIME, "t0-0", "t1-1")] == ["a", "a", "b"]


def test_a_peer_gets_the_tokens_of_the_trace():
    trace, job = EIGHT.trace((), 8192, "t"), EIGHT.for_peer(8192)
    assert job["context"] == trace.context("c").source.array(8192).tolist()
    turns = iter(trace.turns)
    for turn in job["appends"]:
        for tokens in turn:
            assert tokens == next(turns).append.array(8192).tolist()
    assert next(turns, None) is None


def test_a_kit_is_built_once_and_anything_else_is_left_alone(tmp_path: Path):
    kit = build_speed_kit(tmp_path / "kit", SPEC)
    before = (kit.model_dir / "model.safetensors").stat().st_mtime_ns
    assert build_speed_kit(tmp_path / "kit", SPEC) == kit
    assert (kit.model_dir / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="not this speed kit"):
        build_speed_kit(tmp_path / "kit", SpeedSpec(num_layers=1))


SCRIPT = """
import json, sys
job = json.load(sys.stdin)
print("noise")
print(json.dumps({"wall_s": [len(job["adapters"]), job["repeats"], 100]}))
"""


def peer(tmp_path: Path, text: str) -> Peer:
    script = tmp_path / "peer.py"
    script.write_text(text)
    return Peer(Path(sys.executable), tmp_path, 128, 1, script)


def test_a_peer_reports_the_median_of_its_repeats(tmp_path: Path):
    adapters = [tmp_path / f"a{i}" for i in range(16)]
    assert peer(tmp_path, SCRIPT).wall_s(EIGHT, adapters, repeats=50) == 50  # of 8 adapters, 50 repeats and 100


@pytest.mark.parametrize(("text", "message"), [("raise SystemExit('no vLLM')", "no vLLM"), ("print('done')", "not its report")])
def test_a_peer_that_fails_says_why(tmp_path: Path, text: str, message: str):
    with pytest.raises(Unavailable, match=message):
        peer(tmp_path, text).wall_s(EIGHT, [], repeats=1)


def test_a_peer_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(InvalidArgument, match="--peer-python"):
        Peer(tmp_path / "python", tmp_path, 128, 1)
