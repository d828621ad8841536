"""Transposed operands of a warpgroup's products have to come out of a ring of pipelined loads: where one was loaded into
registers and stored to shared memory from there, an H100 computed with something else, silently (Triton 3.6, bf16, fp16)."""

from __future__ import annotations

import re

import pytest

triton = pytest.importorskip("triton")

from forkkv_kernels._triton import residual_attention_grouped as op  # noqa: E402
from forkkv_kernels._triton.aot import AotVariant, compiled  # noqa: E402

VARIANTS = [*op.aot_variants(), op._variant("bf16", 2, 1, 256, 16, 4, page_size=16), op._variant("bf16", 8, 4, 128, 64, 2)]


def stored_from_registers(ttgir: str) -> set[str]:
    """Names of pieces of shared memory that are filled from a tensor at once."""
    return set(re.findall(r"(%[\w#]+) = ttg\.local_alloc %", ttgir))


def transposed(ttgir: str) -> set[str]:
    """Of pieces that a warpgroup's product reads transposed."""
    turned = dict(re.findall(r"(%[\w#]+) = ttg\.memdesc_trans (%[\w#]+)", ttgir))
    read = {name for operands in re.findall(r"warp_group_dot (%[\w#]+), (%[\w#]+)", ttgir) for name in operands}
    return {name for to, name in turned.items() if to in read}


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_what_a_product_takes_transposed_was_loaded_ahead(variant: AotVariant) -> None:
    ttgir = compiled(variant, 90).asm["ttgir"]
    assert transposed(ttgir)
    assert not transposed(ttgir) & stored_from_registers(ttgir)


def test_one_stage_would_be_found() -> None:
    variant = op._variant("bf16", 2, 1, 256, 16, 4, page_size=16)._replace(num_stages=1)
    ttgir = compiled(variant, 90).asm["ttgir"]
    assert transposed(ttgir) & stored_from_registers(ttgir)
