"""Exit 1, with the remedy, when the torch that pip chose is built for CUDA. Run by the Makefile before its dependencies."""

import sys
from importlib.metadata import requires, version

_REMEDY = """torch {version} is a build for CUDA: its dependencies would add gigabytes that a CPU cluster never uses.
Tell pip where builds for the CPU are, in its configuration or through make, and run again:

    make PIP_ARGS="--index-url URL_OF_AN_INDEX_WITH_CPU_BUILDS" ...
    make PIP_ARGS="--find-links DIRECTORY_WITH_A_CPU_WHEEL" ...
"""


def is_cuda_build(requirements: list[str] | None) -> bool:
    """True when torch's own metadata asks for CUDA libraries."""
    required = [line for line in requirements or [] if "extra ==" not in line]
    return any(line.startswith(("nvidia-", "cuda-", "triton")) for line in required)


def main() -> int:
    if is_cuda_build(requires("torch")):
        print(_REMEDY.format(version=version("torch")), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
