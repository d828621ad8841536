"""A peer engine in an interpreter of its own: it gets the workload's tokens and says how long it took."""

from __future__ import annotations

import json
import statistics
import subprocess
from pathlib import Path
from typing import Any

from forkkv_cluster.bench.offline_workloads import Workload
from forkkv_cluster.core.errors import InvalidArgument, Unavailable

SCRIPT = Path(__file__).resolve().parents[2] / "loadtests" / "peers" / "vllm_cpu.py"


class Peer:
    """Runs ``script`` with ``python``; see the script for what goes in and out. Raises InvalidArgument for missing files."""

    def __init__(self, python: Path, model_dir: Path, vocab_size: int, num_threads: int, script: Path = SCRIPT) -> None:
        for field, path in (("--peer-python", python), ("peer script", script)):
            if not path.exists():
                raise InvalidArgument(field, str(path), "is not there", "Run from a checkout, with a Python that has vLLM.")
        self._command = [str(python), str(script)]
        self._job = {"model": str(model_dir.resolve()), "num_threads": num_threads}
        self._vocab_size = vocab_size

    def wall_s(self, workload: Workload, adapter_dirs: list[Path], repeats: int) -> float:
        """Median seconds of a whole workload, caches cold. Raises Unavailable with the end of what the peer wrote."""
        adapters = [str(path.resolve()) for path in adapter_dirs[: workload.num_agents]]
        job = {**self._job, **workload.for_peer(self._vocab_size), "adapters": adapters, "repeats": repeats}
        done = subprocess.run(self._command, input=json.dumps(job), capture_output=True, text=True)
        if done.returncode != 0:
            raise Unavailable(f"the peer ended with {done.returncode}: {done.stderr[-2000:]}")
        return float(statistics.median(self._report(done.stdout)["wall_s"]))

    @staticmethod
    def _report(output: str) -> dict[str, Any]:
        try:
            report: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
        except (ValueError, IndexError):
            raise Unavailable(f"the peer's last line is not its report: {output[-500:]!r}") from None
        return report
