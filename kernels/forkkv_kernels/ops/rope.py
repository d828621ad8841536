"""See the reference of the same name for the formula and shapes."""

from forkkv_kernels.reference.rope import apply_rope

__all__ = ["apply_rope"]
