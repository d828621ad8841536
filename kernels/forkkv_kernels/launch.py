"""Which implementation an op runs: Triton on CUDA tensors, else C++ or the PyTorch reference.

``TRITON_INTERPRET=1``, set before Triton is imported, makes every kernel run in Triton's interpreter, which takes CPU tensors:
slow, for tests of the numerics. A test asks for it by ``interpreted``; all else in that process runs as without it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from forkkv_kernels._cpu.library import is_off

__all__ = ["interpreted", "use_triton"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_is_interpreted = False


def use_triton(tensor: Tensor) -> bool:
    """Whether ops on ``tensor`` and its like run in Triton. False inside ``references_only``, and where Triton is missing."""
    on_device = tensor.device.type == "cuda" or (_is_interpreted and tensor.device.type == "cpu")
    return on_device and tensor.dtype in _DTYPES and not is_off() and _has_triton()


@contextmanager
def interpreted() -> Iterator[None]:
    """Run ops on CPU tensors in Triton's interpreter inside. For the whole process: not to be used while others compute.

    Raises RuntimeError where TRITON_INTERPRET is not 1: the kernels would then be compiled, and want a GPU.
    """
    global _is_interpreted
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("TRITON_INTERPRET is not 1: set it before Triton is imported, in a process of its own")
    before, _is_interpreted = _is_interpreted, True
    try:
        yield
    finally:
        _is_interpreted = before


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
