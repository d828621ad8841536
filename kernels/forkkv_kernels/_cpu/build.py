"""Compiles the C++ of this folder for this machine's processor: five seconds once, then read from the cache.

The library is known by what it is made of: sources, flags, compiler and processor. It goes to ``FORKKV_KERNELS_CACHE``, or
``forkkv_kernels`` in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE_DIR = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wno-psabi")
CACHE_VARIABLE = "FORKKV_KERNELS_CACHE"


class BuildError(Exception):
    """There is no compiler, or it failed; the message holds what it said."""


def built_library() -> Path:
    """The compiled library, compiled now unless the cache has it. Raises BuildError."""
    compiler = _compiler()
    library = _cache_dir() / f"cpu-{_identity(compiler)}.so"
    if not library.exists():
        _compile(compiler, library)
    return library


def _compiler() -> list[str]:
    """The command; CXX may hold arguments, too, as in ``ccache g++``."""
    named = os.environ.get("CXX", "").split()
    found = named or [path for path in (shutil.which("g++"), shutil.which("c++")) if path is not None][:1]
    if not found:
        raise BuildError("no C++ compiler was found. Install g++, or name one in CXX.")
    return found


def _cache_dir() -> Path:
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home) / "forkkv_kernels"


def _identity(compiler: list[str]) -> str:
    digest = hashlib.sha256()
    for path in sorted((*SOURCE_DIR.glob("*.h"), *SOURCE_DIR.glob("*.cpp"))):
        digest.update(path.name.encode() + path.read_bytes())
    digest.update(" ".join((*FLAGS, *compiler, _version(compiler), torch.__version__, _processor())).encode())
    return digest.hexdigest()[:16]


def _version(compiler: list[str]) -> str:
    return _run([*compiler, "--version"], timeout_s=60)


def _processor() -> str:
    """What -march=native depends on: a cache folder may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "".join(sorted({line for line in lines if line.startswith(wanted)}))


def _compile(compiler: list[str], library: Path) -> None:
    sources = [str(path) for path in sorted(SOURCE_DIR.glob("*.cpp"))]
    try:
        library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            output = Path(scratch) / "cpu.so"
            _run([*compiler, *FLAGS, "-o", str(output), *sources, *_openmp()], timeout_s=300)
            output.replace(library)  # at once: other processes see all of it or nothing
    except OSError as error:
        raise BuildError(f"compiling to {library} failed: {error}") from error


def _run(command: list[str], timeout_s: float) -> str:
    """What the command prints. Raises BuildError with what it says when it fails, in whatever encoding."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=timeout_s)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return done.stdout


def _openmp() -> list[str]:
    """torch's own OpenMP library. A second one in the process would bring a second pool of threads, each spinning while the
    other works."""
    folder = Path(torch.__file__).parent
    found = sorted((*folder.glob("lib/lib*omp*.so*"), *folder.parent.glob("torch.libs/lib*omp*.so*")))
    return [str(path) for path in found if path.name.startswith(("libgomp", "libomp", "libiomp"))][:1]
