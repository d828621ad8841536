"""See the reference of the same name for the formula and shapes."""

from forkkv_kernels.reference.rms_norm import rms_norm

__all__ = ["rms_norm"]
