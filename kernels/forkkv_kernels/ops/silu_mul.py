"""See the reference of the same name for the formula.

fp32, fp16 or bf16; silu(gate) is computed in fp32 and rounded before the product. Source: SwiGLU (arXiv 2002.05202).
"""

from __future__ import annotations

from torch import Tensor

from forkkv_kernels._cpu.library import functions_for
from forkkv_kernels._cpu.structs import num_threads
from forkkv_kernels.launch import use_triton
from forkkv_kernels.reference import silu_mul as reference

__all__ = ["silu_mul"]


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2 I], gate in the first half of a row, up in the second -> [T, I] contiguous."""
    if use_triton(gate_up):
        from forkkv_kernels._triton import silu_mul as kernels

        return kernels.silu_mul(gate_up if gate_up.stride(1) == 1 else gate_up.contiguous())
    functions = functions_for(gate_up)
    if functions is None:
        return reference.silu_mul(gate_up)
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(num_rows, width)
    rows = gate_up.contiguous()  # named: a copy has to live until it is read
    functions.silu_mul(rows.data_ptr(), out.data_ptr(), num_rows, width, num_threads())
    return out
