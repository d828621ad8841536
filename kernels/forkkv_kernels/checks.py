"""Checks of an op's arguments: each names the argument, what it is and what it has to be. All raise ValueError."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_device", "check_dtype", "check_rows", "check_shape"]


def check_shape(name: str, tensor: Tensor, *shape: int | None) -> None:
    """None stands for any size."""
    found = tuple(tensor.shape)
    if len(found) != len(shape) or any(size not in (None, actual) for size, actual in zip(shape, found, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} is {list(found)}, not [{wanted}]")


def check_dtype(name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}, not {' or '.join(str(dtype) for dtype in dtypes)}")


def check_device(device: torch.device, **tensors: Tensor | None) -> None:
    """All on one device; None is left out."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, not on {device}")


def check_rows(name: str, tensor: Tensor) -> None:
    """The last axis is contiguous: its elements lie side by side."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name} has strides {tensor.stride()}: its last axis has to be contiguous")
