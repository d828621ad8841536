"""The one door to the ops: an engine imports ``forkkv_kernels.ops.<op>`` and never asks which code runs behind it."""
