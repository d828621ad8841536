"""See the reference of the same name for the formula and shapes."""

from forkkv_kernels.reference.qk_norm import KeyScale, inverse_rms, key_scale

__all__ = ["KeyScale", "inverse_rms", "key_scale"]
