"""See the reference of the same name for the formula and shapes."""

from forkkv_kernels.reference.residual_attention import (
    GroupResidual,
    PartialAttention,
    attend,
    attend_grouped,
    attend_padded,
    attend_plain,
    empty_partial,
    finish_partial,
    merge_partials_,
    reconstruct_k,
    reconstruct_v,
)

__all__ = [
    "GroupResidual",
    "PartialAttention",
    "attend",
    "attend_grouped",
    "attend_padded",
    "attend_plain",
    "empty_partial",
    "finish_partial",
    "merge_partials_",
    "reconstruct_k",
    "reconstruct_v",
]
