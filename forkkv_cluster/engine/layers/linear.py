"""A linear layer over fixed weights, kept in the layout in which the device multiplies fastest."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_PACK_ROWS = 512
"""Rows that the packed layout is chosen for. Packed so, 1 to 512 rows all run as fast as with a layout of their own."""


class Linear:
    """y = x W^T + bias; weight [out, in] as in a checkpoint, bias [out] or None.

    In bf16 on a CPU the weight is packed once by oneDNN, which otherwise packs it in every call: 8 rows through
    [4096, 768] take 0.5 ms instead of 0.85 on one core. The plain weight is not kept then.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._bias = bias
        self._is_packed = _can_pack(weight)
        self._weight = _pack(weight) if self._is_packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out]."""
        if self._is_packed and len(x):
            packed: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
            return packed
        if self._is_packed:
            return x.new_empty(0, self._weight.shape[0])
        return functional.linear(x, self._weight, self._bias)


def _can_pack(weight: Tensor) -> bool:
    is_bf16_on_cpu = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    return is_bf16_on_cpu and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # False where oneDNN is not built in


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACK_ROWS)
    return packed
