"""See the reference of the same name for the formula.

hidden, delta and the result are [T, H], weight [H], all of one dtype (fp32, fp16, bf16); sums run in fp32. Half precision is
rounded before the product with the weight. Source: arXiv 1910.07467.
"""

from __future__ import annotations

from torch import Tensor

from forkkv_kernels._cpu.library import functions_for
from forkkv_kernels._cpu.structs import num_threads
from forkkv_kernels.launch import use_triton
from forkkv_kernels.reference import rms_norm as reference

__all__ = ["add_rms_norm_", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, H], rows may be strided -> [T, H] contiguous."""
    if not use_triton(x) or x.dim() != 2:
        return reference.rms_norm(x, weight, eps)
    from forkkv_kernels._triton import rms_norm as kernels

    return kernels.add_rms_norm_(_rows(x), None, weight, eps)


def add_rms_norm_(hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float, added: Tensor | None = None) -> Tensor:
    """hidden [T, H] contiguous += delta [T, H] in place, then its norm [T, H]; None adds nothing.

    added [T, H], only beside a delta: what is to be added to delta first, such as the LoRA of the linear that gave it.
    """
    if use_triton(hidden):
        from forkkv_kernels._triton import rms_norm as kernels

        delta, added = (_rows(x) if x is not None else None for x in (delta, added))
        return kernels.add_rms_norm_(hidden, delta, weight, eps, added)
    if delta is not None and added is not None:
        delta = delta + added
    functions = functions_for(hidden)
    if functions is None:
        return reference.add_rms_norm_(hidden, delta, weight, eps)
    out = hidden.new_empty(hidden.shape)
    added = delta.contiguous() if delta is not None else None
    functions.add_rms_norm(
        hidden.data_ptr(), added.data_ptr() if added is not None else None, weight.data_ptr(), out.data_ptr(),
        hidden.shape[0], hidden.shape[1], eps, num_threads(),
    )  # fmt: skip
    return out


def _rows(x: Tensor) -> Tensor:
    """Its last axis contiguous."""
    return x if x.stride(1) == 1 else x.contiguous()
