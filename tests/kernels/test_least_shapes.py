"""Kernels compile at the least sizes that a batch or a model can have: the launcher makes a constant of a number that is 1."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is for Linux")

import triton
from forkkv_kernels._triton import lora_tiles, residual_attention_decode, store_residuals
from forkkv_kernels._triton.aot import AotVariant, compile_variant

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="nothing compiles under TRITON_INTERPRET=1")


def of_one(variant: AotVariant, name: str) -> AotVariant:
    """The variant that is launched where ``name`` is 1."""
    (parameter,) = (parameter for parameter in variant.kernel.params if parameter.name == name)
    if parameter.do_not_specialize:
        return variant
    signature = {argument: type_ for argument, type_ in variant.signature.items() if argument != name}
    return variant._replace(signature=signature, constants={**variant.constants, name: 1})


@pytest.mark.parametrize(
    "variant",
    [*lora_tiles.aot_variants()[:2], *store_residuals.aot_variants()],
    ids=lambda variant: variant.name,
)
def test_a_batch_may_have_one_entry(variant: AotVariant) -> None:
    assert compile_variant(of_one(variant, "num_entries"), 90).cubin


@pytest.mark.parametrize("rank", [0, 16])
def test_decode_serves_heads_of_eight(rank: int) -> None:
    assert compile_variant(residual_attention_decode._variant("bf16", 2, 2, 8, rank), 90).cubin
