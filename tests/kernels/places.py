"""Where a test of an op runs: its reference, Triton's interpreter (a process of its own, TRITON_INTERPRET=1), a GPU.

The interpreter computes garbage for products of bf16 matrices, so that one is left to the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from forkkv_kernels._cpu.library import references_only
from forkkv_kernels.launch import interpreted


@dataclass(frozen=True, slots=True)
class Place:
    """name: reference, interpreter or gpu."""

    name: str
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.name == "gpu" else "cpu")

    @contextmanager
    def entered(self) -> Iterator[None]:
        if self.name == "gpu":
            yield
            return
        with references_only() if self.name == "reference" else interpreted():
            yield


def _place(name: str, dtype: torch.dtype) -> object:
    marks = {"interpreter": pytest.mark.interpreter, "gpu": pytest.mark.gpu}
    return pytest.param(Place(name, dtype), id=f"{name}-{str(dtype)[6:]}", marks=[marks[name]] if name in marks else [])


HALVES = {"interpreter": (torch.float16,), "gpu": (torch.float16, torch.bfloat16)}
TRITON_PLACES = [_place(name, dtype) for name, halves in HALVES.items() for dtype in (torch.float32, *halves)]
ALL_PLACES = [_place("reference", torch.float32), *TRITON_PLACES]
"""With the reference, where a test's oracle is independent of it."""
