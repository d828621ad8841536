"""The GPU kit: facts and ceilings of the card, GPU tests, kernel benchmarks and end-to-end runs, in one go within ten minutes.

    python kernels/benchmarks/run.py                      on a GPU host with torch, triton and transformers; needs no install
    python kernels/benchmarks/run.py --only decode tests  some parts of it
    python kernels/benchmarks/run.py --cpu                every benchmark at tiny shapes in Triton's interpreter: no speeds

Every part is a process of its own with a time limit: one that hangs or fails costs the others nothing. Rows are kept as they
are measured. A short table comes last; all numbers go to OUT/kit.json, the parts' output to OUT/kit.log.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
END_TO_END = "end_to_end"
GRACE_S = 10
"""For a part to say where it stood when its time was over."""
FIRST = ("grouped", "decode", "extend", "lora")
"""Benchmarks that come first, in case time runs out: those with targets."""


class Part(NamedTuple):
    name: str
    command: tuple[str, ...]
    limit_s: float


class Outcome(NamedTuple):
    """status: ok, failed, timeout or skipped. output: the end of what it printed, or why it was skipped."""

    name: str
    status: str
    seconds: float
    output: str
    rows: list[dict[str, Any]]


def benchmark_names() -> list[str]:
    """Files beside this one that have a ``bench``, those with targets first, end-to-end runs last."""
    names = [path.stem for path in sorted(HERE.glob("*.py")) if re.search(r"^def bench\(", path.read_text(), re.MULTILINE)]

    def order(name: str) -> tuple[bool, int, str]:
        found = next((i for i, stem in enumerate(FIRST) if stem in name), len(FIRST))
        return name == END_TO_END, found, name

    return sorted(names, key=order)


def tests_part(limit_s: float, folders: Sequence[str]) -> Part | None:
    """None where pytest is missing. Several processes where pytest-xdist is there: most of the time is compilation."""
    if importlib.util.find_spec("pytest") is None:
        return None
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:benchmark",
        "-m",
        "gpu",
        "--continue-on-collection-errors",
    ]
    if importlib.util.find_spec("pydantic") is None:
        # The fixtures above need the cluster's dependencies, which a bare host does not have.
        command += ["--confcutdir", str(ROOT / "tests" / "kernels")]
    command += folders
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(6, os.cpu_count() or 1))]
    return Part("tests", tuple(command), limit_s)


def parts_of(options: argparse.Namespace, work: Path) -> list[Part]:
    """In the order in which they run."""
    facts = Part("facts", (sys.executable, str(HERE / "facts.py"), str(work / "facts.json")), 90)
    tests = (
        None if options.cpu else tests_part(options.tests_s, options.tests)
    )  # the interpreter's tests have a run of their own
    rows = ("--rows", str(work / "rows.jsonl"))
    quick = ("--quick",) if options.quick or options.cpu else ()
    part = (sys.executable, str(HERE / "part.py"))
    names = benchmark_names()
    if options.cpu:  # one process: starting torch for each would take most of the time
        chosen = [name for name in names if _is_chosen(name, options) and name != END_TO_END]
        benchmarks = [Part("benchmarks", (*part, *chosen, *quick, *rows), 600)] if chosen else []
        if END_TO_END in names and _is_chosen(END_TO_END, options):  # whole engines: the interpreter would take minutes
            benchmarks.append(Part(END_TO_END, (*part, END_TO_END, "--no-interpreter", *quick, *rows), 600))
    else:
        limits = {END_TO_END: options.end_to_end_s}
        benchmarks = [
            Part(name, (*part, name, *quick, *rows), limits.get(name, options.benchmark_s))
            for name in names
            if _is_chosen(name, options)
        ]
    chosen_tests = [tests] if tests is not None and _is_chosen("tests", options) else []
    return [facts, *chosen_tests, *benchmarks]


def _is_chosen(name: str, options: argparse.Namespace) -> bool:
    return (not options.only or name in options.only) and name not in (options.skip or ())


def run_part(part: Part, deadline: float, env: Mapping[str, str], work: Path, log_path: Path) -> Outcome:
    """Runs it in a process group of its own, which is ended as a whole at its limit or at the kit's."""
    left_s = deadline - time.monotonic()
    limit_s = min(part.limit_s, left_s)
    if left_s < 5:
        return Outcome(part.name, "skipped", 0.0, "no time left", [])
    rows_path = work / "rows.jsonl"
    rows_path.write_text("")
    start = time.monotonic()
    print(f"[kit] {part.name} (at most {limit_s:.0f} s)", flush=True)
    with (work / "output").open("w+") as output:
        process = subprocess.Popen(
            part.command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=dict(env), start_new_session=True
        )
        try:
            status = "ok" if process.wait(limit_s) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "timeout"
            _end(process)
        output.seek(0)
        text = output.read()
    seconds = time.monotonic() - start
    with log_path.open("a") as log:
        log.write(f"==== {part.name}: {status}, {seconds:.1f} s: {shlex.join(part.command)}\n{text}\n")
    rows = [json.loads(line) for line in rows_path.read_text().splitlines()]
    print(f"[kit] {part.name}: {status}, {seconds:.1f} s, {len(rows)} rows", flush=True)
    return Outcome(part.name, status, seconds, text[-4000:], rows)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ctrl-C first: pytest then says which tests failed so far, and Python where it stands. Then the whole group."""
    os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def environment(cpu: bool) -> dict[str, str]:
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    ours = [str(ROOT), str(ROOT / "kernels")]
    env["PYTHONPATH"] = os.pathsep.join([*ours, *filter(None, [env.get("PYTHONPATH")])])
    env.pop("TRITON_INTERPRET", None)
    if cpu:
        env |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return env


def source_digest() -> str:
    """Of everything in ``kernels/``: tells two runs apart where there is no repository."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "kernels").rglob("*")):
        if path.suffix in {".py", ".cpp", ".h"}:
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def commit() -> str | None:
    try:
        asked = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=10"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return asked.stdout.strip()


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def verdict(row: Mapping[str, Any], has_card: bool) -> str:
    if row["target"] is None or not has_card:
        return ""
    return "met" if row["ratio"] is not None and row["ratio"] >= row["target"] else "MISSED"


def short_table(report: Mapping[str, Any]) -> str:
    """What a person reads: card, ceilings, rows with their verdicts, and how each part ended."""
    facts = report["facts"]
    card = (facts.get("card") or {}).get("name", "no card: tiny shapes, times mean nothing")
    host = facts.get("host") or {}
    lines = [
        f"{card}; torch {host.get('torch')}, triton {host.get('triton')}; copy {number(facts.get('copy_tb_per_s'), 2)} TB/s, "
        f"read {number(facts.get('read_tb_per_s'), 2)} TB/s, "
        f"matmul {number(facts.get('matmul_tflop_per_s'), 0)} TFLOP/s; commit {report['commit']}, source {report['source']}",
        f"{'op':<17} {'what':<76} {'ms':>9} {'baseline':>9} {'ratio':>6} {'target':>6} {'floor':>8}  outcome, note",
    ]
    for row in (row for part in report["parts"] for row in part["rows"]):
        lines.append(
            f"{row['op'].removeprefix('residual_')[:17]:<17} {row['name'][:76]:<76} "
            f"{number(row['ms'], 4):>9} {number(row['baseline_ms'], 4):>9} "
            f"{number(row['ratio'], 2):>6} {number(row['target'], 2):>6} {number(row['floor_ms'], 4):>8}  "
            f"{verdict(row, bool(facts.get('card')))} {row['note']}".rstrip()
        )
    for part in report["parts"]:
        said = [line for line in part["output"].splitlines() if line.strip()]
        end = said[-1][:100] if said and (part["status"] != "ok" or part["name"] == "tests") else ""
        lines.append(f"{part['name']:<24} {part['status']:<8} {part['seconds']:6.1f} s  {end}".rstrip())
    return "\n".join(lines)


def write_report(out: Path, report: Mapping[str, Any]) -> None:
    (out / "kit.json").write_text(json.dumps(report, indent=1) + "\n")


def run(options: argparse.Namespace) -> int:
    options.out.mkdir(parents=True, exist_ok=True)
    log_path = options.out / "kit.log"
    log_path.write_text("")
    deadline = time.monotonic() + 60 * options.minutes
    report: dict[str, Any] = {
        "format": "forkkv-kit/1",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "commit": options.commit or commit(),
        "source": source_digest(),
        "facts": {},
        "parts": [],
    }
    with tempfile.TemporaryDirectory(prefix="forkkv-kit-") as directory:
        work = Path(directory)
        parts = parts_of(options, work)
        if not options.cpu and importlib.util.find_spec("pytest") is None:
            report["parts"].append(Outcome("tests", "skipped", 0.0, "pytest is not installed", [])._asdict())
        for part in parts:
            report["parts"].append(run_part(part, deadline, environment(options.cpu), work, log_path)._asdict())
            facts = work / "facts.json"
            if facts.exists():
                report["facts"] = json.loads(facts.read_text())
            write_report(options.out, report)  # after each part: what ends the kit costs no part before it
    print(short_table(report))
    return 0 if all(part["status"] == "ok" for part in report["parts"]) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="Tiny shapes in Triton's interpreter, without a card.")
    parser.add_argument("--quick", action="store_true", help="Fewer repeats and shapes.")
    parser.add_argument("--only", nargs="+", metavar="PART", help="tests, or names of benchmarks; facts are always taken.")
    parser.add_argument("--skip", nargs="+", metavar="PART", help="The same names, to leave out.")
    parser.add_argument("--minutes", type=float, default=9.5, help="For all of it; parts that find no time left are skipped.")
    parser.add_argument(
        "--tests", nargs="+", default=["tests/kernels"], help="Folders of tests, of which those marked gpu run."
    )
    parser.add_argument("--tests-s", type=float, default=180, help="Limit of the tests.")
    parser.add_argument("--benchmark-s", type=float, default=90, help="Limit of each kernel benchmark.")
    parser.add_argument("--end-to-end-s", type=float, default=200, help="Limit of the end-to-end runs.")
    parser.add_argument("--commit", help="What to note where there is no repository.")
    parser.add_argument("--list", action="store_true", help="Names of the benchmarks, and nothing else.")
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / ".forkkv" / "kit"), help="Folder for results."
    )
    options = parser.parse_args()
    if options.list:
        print("\n".join(benchmark_names()))
        return 0
    unknown = sorted({*(options.only or ()), *(options.skip or ())} - {"tests", *benchmark_names()})
    if unknown:
        parser.error(f"there is no part {', '.join(unknown)}; there are tests, {', '.join(benchmark_names())}")
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
