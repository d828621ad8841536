"""See the reference of the same name for the formula and shapes."""

from forkkv_kernels.reference.merged_attention import attend_merged

__all__ = ["attend_merged"]
