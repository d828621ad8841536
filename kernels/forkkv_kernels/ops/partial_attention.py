"""See the reference of the same name for the formula and shapes."""

from forkkv_kernels.reference.partial_attention import (
    PartialAttention,
    attend_padded,
    attend_plain,
    empty_partial,
    finish_partial,
    merge_partials_,
)

__all__ = ["PartialAttention", "attend_padded", "attend_plain", "empty_partial", "finish_partial", "merge_partials_"]
