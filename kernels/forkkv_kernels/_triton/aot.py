"""Compiles Triton kernels to machine code for cards that this machine does not have, and reads what they take of them.

Each kernel file states its specialisations in ``aot_variants() -> list[AotVariant]``. In a process with TRITON_INTERPRET=1
kernels are Python functions and nothing can be compiled.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

KIB = 1024
MAX_SHARED_BYTES = {80: 163 * KIB, 86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB, 100: 227 * KIB, 103: 227 * KIB, 120: 99 * KIB}
"""Shared memory that one thread block may ask for, by compute capability (CUDA C++ Programming Guide, "Technical
Specifications per Compute Capability")."""

TUNED_ARCHS = (80, 90)
"""Cards whose cubins may not spill without saying so."""

_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_DIVISIBLE = re.compile(r"(?P<type>.+):16$")


class AotVariant(NamedTuple):
    """One specialisation of a kernel, with the budget that it has to keep.

    kernel: the ``@triton.jit`` function. signature: argument name -> "*bf16", "i32", "i64", "fp32" ...; every argument that is
    not in ``constants``. Pointers are taken to be multiples of 16 bytes, as torch allocates them ("*bf16:1": not); a number is
    so only as "i32:16". The launcher turns numbers that equal 1 into constants: list those in ``constants``, None pointers too.
    """

    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    name: str
    max_local_bytes: int | Mapping[int, int] = 0
    """Bytes of local memory that a thread may spill on ``TUNED_ARCHS``; a mapping: by compute capability, 0 where it leaves out
    one of those. On other cards spills are reported, not refused: blocks were chosen for none of them."""
    max_registers: int = 255
    archs: tuple[int, ...] | None = None
    """Compute capabilities that use this variant; None: all."""
    maxnreg: int | None = None
    """The launch's own limit on registers, where it sets one."""


class Resources(NamedTuple):
    """What a cubin takes: registers and local (spilled) bytes of a thread, shared bytes of a block."""

    name: str
    arch: int
    registers: int
    shared_bytes: int
    local_bytes: int
    cubin: bytes


def compile_variant(variant: AotVariant, arch: int) -> Resources:
    """Compiles for compute capability ``arch`` (80, 89, 90, 100 ...), past every cache.

    Raises RuntimeError under TRITON_INTERPRET=1, ValueError for a signature that does not fit the kernel, and Triton's own
    errors where the kernel does not compile.
    """
    made = compiled(variant, arch)
    cubin = made.asm["cubin"]
    registers, local_bytes = _usage(cubin)
    return Resources(variant.name, arch, registers, made.metadata.shared, local_bytes, cubin)


def compiled(variant: AotVariant, arch: int) -> Any:
    """Triton's own result, every stage of it in ``asm``. Errors as ``compile_variant``."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError(f"{variant.name}: TRITON_INTERPRET=1 compiles nothing; unset it before triton is imported")
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "maxnreg": variant.maxnreg}
    with tempfile.TemporaryDirectory(prefix="forkkv-cubin-") as directory, triton.knobs.cache.scope():
        triton.knobs.cache.dir = directory
        return triton.compile(_source(variant), target=GPUTarget("cuda", arch, 32), options=options)


def over_budget(variant: AotVariant, resources: Resources) -> list[str]:
    """One sentence for each limit that the cubin exceeds; empty where it keeps them all."""
    limits = (
        ("bytes of shared memory", resources.shared_bytes, MAX_SHARED_BYTES[resources.arch]),
        ("registers", resources.registers, variant.max_registers),
        ("bytes of local memory (spills)", resources.local_bytes, _max_local_bytes(variant, resources.arch)),
    )
    return [
        f"{resources.name} on sm_{resources.arch}: {used} {what}, more than {limit}"
        for what, used, limit in limits
        if used > limit
    ]


def _max_local_bytes(variant: AotVariant, arch: int) -> float:
    budget = variant.max_local_bytes
    by_arch = budget if isinstance(budget, Mapping) else dict.fromkeys(TUNED_ARCHS, budget)
    return by_arch.get(arch, 0 if arch in TUNED_ARCHS else math.inf)


def _source(variant: AotVariant) -> ASTSource:
    """Types, constants and alignment of all arguments, in the kernel's order."""
    types: dict[str, str] = {}
    aligned: dict[tuple[int], list[list[Any]]] = {}
    names: list[str] = variant.kernel.arg_names
    strangers = sorted({*variant.signature, *variant.constants} - {*names})
    if strangers:
        raise ValueError(f"{variant.name}: the kernel has no argument {', '.join(strangers)}; it has {', '.join(names)}")
    for index, name in enumerate(names):
        if name in variant.constants:
            types[name] = "constexpr"
        elif name in variant.signature:
            types[name] = variant.signature[name].split(":")[0]
            if _is_aligned(variant.signature[name]):
                aligned[(index,)] = [["tt.divisibility", 16]]
        else:
            raise ValueError(f"{variant.name}: argument {name} is in neither signature nor constants; add it to one")
    return ASTSource(fn=variant.kernel, signature=types, constexprs=dict(variant.constants), attrs=aligned)


def _is_aligned(type_: str) -> bool:
    return _DIVISIBLE.match(type_) is not None or (type_.startswith("*") and not type_.endswith(":1"))


def _usage(cubin: bytes) -> tuple[int, int]:
    """(registers, local bytes) of a thread, from the disassembler that Triton's package carries."""
    with tempfile.TemporaryDirectory(prefix="forkkv-cubin-") as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "--dump-resource-usage", str(path)], check=True, capture_output=True, text=True).stdout
    found = _USAGE.findall(text)
    if not found:
        raise RuntimeError(f"{tool} reports no resource usage: {text!r}")
    registers, stack, _, local = (max(int(row[column]) for row in found) for column in range(4))
    return registers, stack + local
