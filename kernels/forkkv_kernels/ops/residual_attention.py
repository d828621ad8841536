"""See the reference of the same name for the formula and shapes."""

from forkkv_kernels.reference.residual_attention import (
    GroupResidual,
    attend,
    attend_grouped,
    attend_heads,
    reconstruct_k,
    reconstruct_v,
)

__all__ = ["GroupResidual", "attend", "attend_grouped", "attend_heads", "reconstruct_k", "reconstruct_v"]
