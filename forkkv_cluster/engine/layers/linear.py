"""A linear layer over fixed weights, kept in the layout in which the device multiplies fastest."""

from __future__ import annotations

import torch
from forkkv_kernels.ops.linear import pack_weight, packed_linear
from torch import Tensor
from torch.nn import functional

_PACK_ROWS = 512
"""Rows that oneDNN's packed layout is chosen for. Packed so, 1 to 512 rows all run as fast as with a layout of their own."""


class Linear:
    """y = x W^T + bias; weight [out, in] as in a checkpoint, bias [out] or None.

    In bf16 on a CPU the weight is packed once, by our own op or, where there is none, by oneDNN, which otherwise packs it in
    every call. The plain weight is not kept then.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._bias = bias
        self._packed = pack_weight(weight)
        self._is_onednn = self._packed is None and _can_pack(weight)
        self._weight = weight
        if self._packed is not None:
            self._weight = weight.new_empty(0, weight.shape[1])
        elif self._is_onednn:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACK_ROWS)

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out]."""
        if self._packed is not None:
            ours: Tensor = packed_linear(x, self._packed, self._bias)
            return ours
        if self._is_onednn and len(x):
            theirs: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
            return theirs
        if self._is_onednn:
            return x.new_empty(0, self._weight.shape[0])
        return functional.linear(x, self._weight, self._bias)


def _can_pack(weight: Tensor) -> bool:
    is_bf16_on_cpu = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    return is_bf16_on_cpu and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # False where oneDNN is not built in
