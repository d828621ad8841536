"""Where a run took place: without it no number means anything."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "ray", "transformers", "triton")


def host_info() -> dict[str, Any]:
    """Name, processor, memory (bytes) and the versions that matter. Packages that are not installed are left out."""
    return {
        "name": platform.node(),
        "system": platform.platform(),
        "processor": _processor(),
        "num_cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name)) is not None},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str:
    """The commit of this code, with ``-dirty`` where files differ from it; ``unknown`` outside a git checkout."""
    directory = Path(__file__).resolve().parent
    try:
        head = _git(directory, "rev-parse", "HEAD")
        return head + ("-dirty" if _git(directory, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(directory: Path, *arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=directory, check=True, capture_output=True, text=True)
    return result.stdout.strip()
