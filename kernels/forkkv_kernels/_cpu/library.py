"""The compiled library, loaded once; what it computes is in the headers and sources beside this file."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from forkkv_kernels._cpu.build import BuildError, built_library

SWITCH = "FORKKV_CPU_KERNELS"
"""Environment: ``0`` runs the PyTorch references instead."""

_SUFFIXES = {torch.bfloat16: "bf16", torch.float32: "f32"}
_is_off = False
_log = logging.getLogger("forkkv_kernels")


class Functions:
    """The library's functions for one dtype. Each takes addresses and returns when it is done; the GIL is not held."""

    def __init__(self, library: ctypes.CDLL, suffix: str) -> None:
        address, size, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
        self.decode = _function(library, f"forkkv_decode_{suffix}", address)
        self.gather = _function(library, f"forkkv_gather_{suffix}", address)
        self.lora = _function(library, f"forkkv_lora_{suffix}", address)
        self.rope_store = _function(library, f"forkkv_rope_store_{suffix}", address)
        self.add_rms_norm = _function(
            library, f"forkkv_add_rms_norm_{suffix}", address, address, address, address, size, size, real, ctypes.c_int
        )
        self.pack_weight = _function(library, "forkkv_pack_weight", address, address, size, size, ctypes.c_int)
        self.linear = _function(library, "forkkv_linear", address, address, address, address, size, size, size, ctypes.c_int)
        self.has_linear = library.forkkv_has_linear
        self.silu_mul = _function(library, f"forkkv_silu_mul_{suffix}", address, address, size, size, ctypes.c_int)


def functions_for(tensor: Tensor) -> Functions | None:
    """None where the references run: on another device, in another dtype, or without the library."""
    return functions_on(tensor.device, tensor.dtype)


def functions_on(device: torch.device, dtype: torch.dtype) -> Functions | None:
    """As ``functions_for`` of a tensor there."""
    return _functions_of(dtype) if device.type == "cpu" and not _is_off else None


def is_off() -> bool:
    """Inside ``references_only``."""
    return _is_off


@contextmanager
def references_only() -> Iterator[None]:
    """Run the references inside, for tests and comparisons. For the whole process: not to be used while others compute."""
    global _is_off
    before, _is_off = _is_off, True
    try:
        yield
    finally:
        _is_off = before


@functools.cache
def _functions_of(dtype: torch.dtype) -> Functions | None:
    library, suffix = _library(), _SUFFIXES.get(dtype)
    return Functions(library, suffix) if library is not None and suffix is not None else None


@functools.cache
def _library() -> ctypes.CDLL | None:
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        return ctypes.CDLL(str(built_library()))
    except (BuildError, OSError) as error:
        _log.warning("CPU kernels are not there, so the slower PyTorch ops run: %s", error)
        return None


def _function(library: ctypes.CDLL, name: str, *arguments: type) -> ctypes._NamedFuncPointer:
    function = library[name]
    function.argtypes, function.restype = arguments, None
    return function
