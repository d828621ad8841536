"""The variants of all kernels, a set of them that covers the rest, and their compilation on several cores."""

from __future__ import annotations

import importlib
import itertools
import multiprocessing
import pkgutil
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import forkkv_kernels._triton as package
from forkkv_kernels._triton.aot import TUNED_ARCHS, AotVariant, compile_variant, over_budget

COVERING_ARCHS = TUNED_ARCHS
ALL_ARCHS = (80, 89, 90, 100, 120)


class Job(NamedTuple):
    """One cubin to make: variant ``index`` of what ``aot_variants`` of a module lists, for compute capability ``arch``."""

    module: str
    index: int
    name: str
    arch: int


class Result(NamedTuple):
    """problems: budgets that were exceeded, or why it did not compile; empty where all is well."""

    job: Job
    seconds: float
    problems: list[str]
    registers: int | None = None
    shared_bytes: int | None = None
    local_bytes: int | None = None
    cubin_bytes: int | None = None


def variants_by_module() -> dict[str, list[AotVariant]]:
    """Module name -> its variants, of every kernel file that states some."""
    found = {}
    for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(info.name)
        if hasattr(module, "aot_variants"):
            found[info.name] = list(module.aot_variants())
    return found


def all_jobs(archs: Sequence[int] = ALL_ARCHS) -> list[Job]:
    """Every variant for each of ``archs`` that uses it."""
    return [
        Job(module, index, variant.name, arch)
        for module, variants in variants_by_module().items()
        for index, variant in enumerate(variants)
        for arch in archs
        if variant.archs is None or arch in variant.archs
    ]


def covering_jobs(most: int = 40) -> list[Job]:
    """At most ``most`` cubins over ``COVERING_ARCHS``: the first variant of every kernel, then the second ones, and so on."""
    jobs = itertools.chain.from_iterable(_rounds(variants_by_module()))
    return list(itertools.islice(jobs, most))


def _rounds(by_module: dict[str, list[AotVariant]]) -> Iterator[list[Job]]:
    """By how many variants of the same kernel and arch stand before it."""
    rounds: dict[int, list[Job]] = {}
    for module, variants in by_module.items():
        seen: dict[tuple[str, int], int] = {}
        for index, variant in enumerate(variants):
            for arch in COVERING_ARCHS:
                if variant.archs is None or arch in variant.archs:
                    key = (variant.kernel.__name__, arch)
                    rounds.setdefault(seen.get(key, 0), []).append(Job(module, index, variant.name, arch))
                    seen[key] = seen.get(key, 0) + 1
    return (rounds[number] for number in sorted(rounds))


def run_job(job: Job) -> Result:
    """Compiles in this process."""
    start = time.perf_counter()
    try:
        variant = importlib.import_module(job.module).aot_variants()[job.index]
        made = compile_variant(variant, job.arch)
    except Exception:  # whatever the compiler raises is this cubin's result: the others are wanted, too
        return Result(job, time.perf_counter() - start, [f"{job.name} on sm_{job.arch}: {traceback.format_exc(limit=-4)}"])
    seconds = time.perf_counter() - start
    return Result(
        job, seconds, over_budget(variant, made), made.registers, made.shared_bytes, made.local_bytes, len(made.cubin)
    )  # fmt: skip


def run_jobs(jobs: Sequence[Job], num_processes: int) -> Iterator[Result]:
    """Results as they come. Processes are started afresh: a forked one would share torch's threads."""
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(run_job, jobs)
