"""Writes ``forkkv_cluster/api/v1`` from the .proto files beside this script.

python protos/generate.py           write
python protos/generate.py --check   exit 1 when what is committed differs from what would be written
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTO_ROOT = ROOT / "protos"
PACKAGE = Path("forkkv_cluster/api/v1")


def generate(out: Path) -> dict[str, str]:
    """Run protoc into ``out``; returns the generated files of the package by name."""
    protos = sorted(str(path.relative_to(PROTO_ROOT)) for path in (PROTO_ROOT / PACKAGE).glob("*.proto"))
    include = str(resources.files("grpc_tools") / "_proto")
    arguments = [f"-I{PROTO_ROOT}", f"-I{include}", f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}"]
    if protoc.main(["protoc", *arguments, *protos]) != 0:
        raise SystemExit("protoc failed")
    return {path.name: path.read_text() for path in sorted((out / PACKAGE).iterdir()) if path.is_file()}


def differences(expected: dict[str, str], target: Path) -> list[str]:
    """Names of generated files that are missing, stale, or left over in ``target``."""
    present = {path.name: path.read_text() for path in target.glob("*_pb2*.py*")}
    return sorted(name for name in expected.keys() | present.keys() if expected.get(name) != present.get(name))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 on a difference")
    options = parser.parse_args(argv)
    target = ROOT / PACKAGE
    with tempfile.TemporaryDirectory() as directory:
        expected = generate(Path(directory))
    stale = differences(expected, target)
    if options.check:
        for name in stale:
            print(f"{PACKAGE / name} is not what the .proto files give: run python protos/generate.py", file=sys.stderr)
        return 1 if stale else 0
    for name in stale:
        if name in expected:
            (target / name).write_text(expected[name])
        else:
            (target / name).unlink()
    print(f"{len(stale)} of {len(expected)} files written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
