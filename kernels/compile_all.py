"""``make cubins``: compiles every variant of every kernel for every card, and says what each takes.

    python kernels/compile_all.py [--covering] [--arch 90 ...] [--only decode ...] [--json]

Exits with 1 where a cubin exceeds its budget of shared memory, registers or spills, or does not compile.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported: under it nothing compiles

from forkkv_kernels._triton import aot_matrix
from forkkv_kernels._triton.aot import MAX_SHARED_BYTES


def as_dict(result: aot_matrix.Result) -> dict[str, Any]:
    job = result.job
    return {
        "kernel": job.name,
        "module": job.module,
        "arch": job.arch,
        "registers": result.registers,
        "shared_bytes": result.shared_bytes,
        "local_bytes": result.local_bytes,
        "cubin_bytes": result.cubin_bytes,
        "seconds": round(result.seconds, 2),
        "problems": result.problems,
    }


def table_of(results: Iterable[aot_matrix.Result]) -> Table:
    table = Table("kernel", "arch", title="cubins")
    for column in ("registers", "shared KiB", "of", "spills B", "seconds"):
        table.add_column(column, justify="right")
    table.add_column("")
    for result in results:
        job = result.job
        sizes = (
            [str(result.registers), f"{result.shared_bytes / 1024:.1f}", f"{MAX_SHARED_BYTES[job.arch] / 1024:.0f}"]
            if result.shared_bytes is not None
            else ["", "", ""]
        )
        spills = "" if result.local_bytes is None else str(result.local_bytes)
        verdict = "[red]over budget[/]" if result.problems else ""
        if result.problems and result.registers is None:
            verdict = "[red]does not compile[/]"
        table.add_row(job.name.replace("[", r"\["), f"sm_{job.arch}", *sizes, spills, f"{result.seconds:.1f}", verdict)
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--covering", action="store_true", help="Only the set that the tests compile.")
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(MAX_SHARED_BYTES), help="Compute capabilities.")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="Variants whose module or name holds one of these.")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true", help="Print JSON in place of the table.")
    options = parser.parse_args()
    jobs = aot_matrix.covering_jobs() if options.covering else aot_matrix.all_jobs(options.arch or aot_matrix.ALL_ARCHS)
    if options.only:
        jobs = [job for job in jobs if any(word in job.name or word in job.module for word in options.only)]
    progress = Console(stderr=True)
    results = list(track(aot_matrix.run_jobs(jobs, options.processes), "compiling", total=len(jobs), console=progress))
    if options.json:
        print(json.dumps([as_dict(result) for result in results], indent=1))
    else:
        Console(width=None if sys.stdout.isatty() else 140).print(table_of(results))
    for problem in (problem for result in results for problem in result.problems):
        progress.print(problem, markup=False, highlight=False)
    return 1 if any(result.problems for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
