"""Random weights in the shape of a config.json: for benchmarks, where speed depends on shapes and not on values."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor


class DummyWeights:
    """Stands in for a checkpoint's tensors. Seeded by tensor name: the same on every host of that device type and dtype."""

    def __init__(self, dtype: torch.dtype, device: torch.device, std: float) -> None:
        """``std`` is that of the linear weights; the config's ``initializer_range``."""
        self._dtype, self._device = dtype, device
        self._bound = std * math.sqrt(3)

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor of that shape: norms are ones and biases zeros, so that activations stay finite in any dtype."""
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=self._dtype, device=self._device)
        if name.endswith(".bias"):
            return torch.zeros(shape, dtype=self._dtype, device=self._device)
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])
        generator = torch.Generator(self._device).manual_seed(seed)
        # Uniform with the same deviation: a normal takes three times as long, minutes on eight billion weights.
        weight = torch.empty(shape, dtype=self._dtype, device=self._device)
        return weight.uniform_(-self._bound, self._bound, generator=generator)

    def digest(self, config_digest: str) -> str:
        """32 hex characters that no checkpoint has, by config, dtype and device type: what the values follow from."""
        text = f"{config_digest} dummy {self._dtype} {self._device.type} {self._bound}"
        return hashlib.sha256(text.encode()).hexdigest()[:32]
