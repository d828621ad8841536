"""Small integer tables that change from step to step, moved to the device in one copy."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Int32Array = npt.NDArray[np.int32]


def _aligned(size: int) -> int:
    """Triton compiles a kernel anew for pointers that are not aligned to 16 bytes."""
    return -(-size // 4) * 4


class PackedTables:
    """Named int32 arrays side by side in one piece of memory: ``host`` to be filled, ``device`` to be read, views both.

    The device's memory stays where it is, so that a CUDA graph can read it. ``host`` may be written again once the device has
    done what was issued before the last ``upload``: a step ends by waiting for its tokens.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> None:
        size = sum(_aligned(math.prod(shape)) for shape in shapes.values())
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = torch.zeros(size, dtype=torch.int32, device=device)
        self.host: dict[str, Int32Array] = {}
        self.device: dict[str, Tensor] = {}
        start = 0
        for name, shape in shapes.items():
            end = start + math.prod(shape)
            self.host[name] = self._host[start:end].numpy().reshape(shape)
            self.device[name] = self._device[start:end].view(shape)
            start += _aligned(end - start)

    def upload(self) -> None:
        """Asynchronous on a GPU, in order with what is issued after it."""
        self._device.copy_(self._host, non_blocking=True)
