"""Runs benchmarks in this process: ``python kernels/benchmarks/part.py OP... [--quick] [--rows FILE]``.

Each row is written as one line of JSON as soon as it is measured, so that what stops a benchmark costs no row before it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import TextIO

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where nothing is installed

from forkkv_kernels.launch import interpreted
from harness import Row, is_tiny


def run_benchmark(name: str, quick: bool, rows_file: TextIO | None) -> bool:
    """Whether it ran to its end."""
    try:
        for values in importlib.import_module(name).bench(quick):
            row = Row.from_dict(values)
            print(f"{name}: {row.name}  {row.ms:.4f} ms", "" if row.ratio is None else f" ratio {row.ratio:.2f}", row.note)
            if rows_file is not None:
                rows_file.write(json.dumps({"op": name, **row._asdict()}) + "\n")
                rows_file.flush()
    except Exception:
        traceback.print_exc()
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description="Run kernel benchmarks in this process.")
    parser.add_argument("ops", nargs="+", help="Names of files beside this one.")
    parser.add_argument("--quick", action="store_true", help="Fewer repeats and shapes.")
    parser.add_argument("--rows", type=Path, help="Write rows here, one JSON object a line.")
    parser.add_argument("--no-interpreter", action="store_true", help="Without a card: what a CPU runs otherwise.")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        rows_file = stack.enter_context(options.rows.open("a")) if options.rows else None
        if is_tiny() and not options.no_interpreter and os.environ.get("TRITON_INTERPRET") == "1":
            stack.enter_context(interpreted())
        ran = [run_benchmark(name, options.quick, rows_file) for name in options.ops]
    return 0 if all(ran) else 1


if __name__ == "__main__":
    sys.exit(main())
