"""Facts of host and card, and the card's two ceilings: ``python kernels/benchmarks/facts.py FILE``. Part of the kit."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import harness
import torch

PACKAGES = ("torch", "triton", "transformers", "numpy", "pytest")


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def host() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        **{package: version(package) for package in PACKAGES},
    }


def card() -> dict[str, Any]:
    """Empty without one."""
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(0)
    facts = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda,
    }
    query = "driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
        facts["nvidia_smi"] = {"query": query, "answer": asked.stdout.strip()}
    return facts


def main() -> None:
    found = {"host": host(), "card": card()}
    if found["card"]:
        found |= {
            "copy_tb_per_s": harness.copy_tb_per_s(),
            "read_tb_per_s": harness.read_tb_per_s(),
            "matmul_tflop_per_s": harness.matmul_tflop_per_s(),
        }
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
