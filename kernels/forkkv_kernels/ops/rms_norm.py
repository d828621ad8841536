"""See the reference of the same name for the formula and shapes."""

from __future__ import annotations

from torch import Tensor

from forkkv_kernels._cpu.library import functions_for
from forkkv_kernels._cpu.structs import num_threads
from forkkv_kernels.reference import rms_norm as reference
from forkkv_kernels.reference.rms_norm import rms_norm

__all__ = ["add_rms_norm_", "rms_norm"]


def add_rms_norm_(hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """hidden [T, H] contiguous += delta [T, H] in place, then its norm [T, H]; None adds nothing."""
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
