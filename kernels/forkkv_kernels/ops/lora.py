"""See the reference of the same name for the formula and shapes."""

from forkkv_kernels.reference.lora import lora_expand_, lora_shrink

__all__ = ["lora_expand_", "lora_shrink"]
