"""The GPU kit on a machine without a card: its parts, their limits, and every benchmark once in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "kernels" / "benchmarks"


@pytest.fixture(scope="module")
def kit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("forkkv_kit_run", BENCHMARKS / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def python(code: str) -> tuple[str, str, str]:
    return (sys.executable, "-c", code)


def run_part(kit: ModuleType, folder: Path, code: str, limit_s: float = 60, left_s: float = 60):
    part = kit.Part("part", python(code), limit_s)
    return kit.run_part(part, time.monotonic() + left_s, kit.environment(cpu=True), folder, folder / "kit.log")


def test_every_benchmark_runs_in_the_interpreter(kit: ModuleType, tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--cpu", "--out", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    report = json.loads((tmp_path / "kit.json").read_text())
    log = (tmp_path / "kit.log").read_text()
    assert {part["status"] for part in report["parts"]} == {"ok"}, log
    assert {row["op"] for part in report["parts"] for row in part["rows"]} == {*kit.benchmark_names()}, log
    assert ran.returncode == 0
    assert "no card" in ran.stdout


def test_a_part_that_hangs_is_ended_with_its_children_and_keeps_its_rows(kit: ModuleType, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    part = kit.Part("part", ("sh", "-c", f'echo \'{{"op": "x"}}\' > {rows}; sleep 600 & echo $!; sleep 600'), 2)
    outcome = kit.run_part(part, time.monotonic() + 60, kit.environment(cpu=True), tmp_path, tmp_path / "kit.log")
    assert outcome.status == "timeout"
    assert outcome.rows == [{"op": "x"}]
    child = Path("/proc") / outcome.output.split()[0] / "stat"
    for _ in range(200):
        if not child.exists() or child.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child still runs")


def test_a_part_says_where_it_stood_when_its_time_was_over(kit: ModuleType, tmp_path: Path) -> None:
    trap = "trap 'echo was at test 7; exit 1' INT; echo started; while true; do sleep 0.1; done"
    part = kit.Part("part", ("sh", "-c", trap), 2)
    outcome = kit.run_part(part, time.monotonic() + 60, kit.environment(cpu=True), tmp_path, tmp_path / "kit.log")
    assert (outcome.status, outcome.output.split("\n")[:2]) == ("timeout", ["started", "was at test 7"])


def test_a_part_that_fails_says_with_what(kit: ModuleType, tmp_path: Path) -> None:
    outcome = run_part(kit, tmp_path, "raise SystemExit('no such card')")
    assert (outcome.status, outcome.output.strip()) == ("failed", "no such card")
    assert "no such card" in (tmp_path / "kit.log").read_text()


def test_parts_are_skipped_once_the_time_of_the_kit_is_over(kit: ModuleType, tmp_path: Path) -> None:
    outcome = run_part(kit, tmp_path, "raise SystemExit('was run')", left_s=1)
    assert (outcome.status, outcome.output) == ("skipped", "no time left")


def test_without_pytest_there_is_no_part_for_tests(kit: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kit.importlib.util, "find_spec", lambda name: None)
    assert kit.tests_part(10, ["tests/kernels"]) is None


def test_the_table_tells_met_from_missed_targets(kit: ModuleType) -> None:
    row = {
        "op": "decode",
        "name": "a",
        "ms": 2.0,
        "baseline_ms": 8.0,
        "ratio": 4.0,
        "target": 3.9,
        "floor_ms": None,
        "note": "",
    }
    rows = [row, {**row, "name": "b", "target": 4.1}, {**row, "name": "c", "target": None}]
    part = {"name": "decode", "status": "ok", "seconds": 1.0, "output": "", "rows": rows}
    table = kit.short_table({"facts": {"card": {"name": "C"}}, "commit": "c", "source": "s", "parts": [part]})
    assert [line.split()[-1] for line in table.splitlines()[2:5]] == ["met", "MISSED", "4.00"]


def test_predictions_have_a_floor_and_an_expectation_for_each_line() -> None:
    command = [sys.executable, str(BENCHMARKS / "predictions.py"), "H200"]
    lines = [
        line for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines() if "|" in line
    ]
    by_name = {cells[1]: cells[2:5] for cells in ([cell.strip() for cell in line.split("|")] for line in lines[2:])}
    # 82 GFLOP at 791 TFLOP/s, and half of that rate; beside 4.29 GB at 4.29 TB/s
    assert by_name["grouped, 32 agents, 32 adapters on q, k, v"] == ["4x", "0.103 ms, 9.70x", "0.206 ms, 4.85x"]
    assert all(floor and expected for _, floor, expected in by_name.values())


def test_rows_of_unknown_fields_are_refused() -> None:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from harness import Row, row
    finally:
        sys.path.remove(str(BENCHMARKS))
    assert row("a", 2.0, baseline_ms=8.0)["ratio"] == 4.0
    with pytest.raises(TypeError, match="unit"):
        Row.from_dict({"name": "a", "ms": 1.0, "unit": "s"})
