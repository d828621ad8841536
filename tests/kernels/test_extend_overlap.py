"""What the compiler made of the kernel of ``residual_attention_extend``, from its machine code."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is for Linux")

import triton
from forkkv_kernels._triton.aot import AotVariant, compile_variant
from forkkv_kernels._triton.residual_attention_extend import aot_variants

HOPPER = [variant for variant in aot_variants() if variant.name.startswith("extend") and "d128,g4,page64" in variant.name]


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="nothing compiles under TRITON_INTERPRET=1")
@pytest.mark.parametrize("variant", HOPPER[:3], ids=lambda variant: variant.name)
def test_the_products_of_a_tile_are_issued_together_on_hopper(variant: AotVariant, tmp_path: Path) -> None:
    """Where the compiler finds the accumulator touched in between it waits for each product of 16 columns by itself: attention
    then took 1.3 times as long on an H100, and said so nowhere."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compile_variant(variant, 90).cubin)
    code = subprocess.run(
        [triton.knobs.nvidia.nvdisasm.path, "-c", str(cubin)], check=True, capture_output=True, text=True
    ).stdout
    products, waits = code.count("HGMMA"), code.count("WARPGROUP.DEPBAR")
    assert products >= 24
    assert waits <= products / 4
