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


def silu_mul(gate_up: Tensor, added: Tensor | None = None) -> Tensor:
    """gate_up [T, 2 I], gate in the first half of a row, up in the second -> [T, I] contiguous.

    added [T, 2 I]: what is to be added to gate_up first, such as the LoRA of the linear that gave it.
    """
    if use_triton(gate_up):
        from forkkv_kernels._triton import silu_mul as kernels

        gate_up, added = (x if x is None or x.stride(1) == 1 else x.contiguous() for x in (gate_up, added))
        return kernels.silu_mul(gate_up, added)
    if added is not None:
        gate_up = gate_up + added
    functions = functions_for(gate_up)
    if functions is None:
        return reference.silu_mul(gate_up)
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(num_rows, width)
    rows = gate_up.contiguous()  # named: a copy has to live until it is read
    functions.silu_mul(rows.data_ptr(), out.data_ptr(), num_rows, width, num_threads())
    return out
