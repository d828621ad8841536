"""What sets a family apart from the others over the shared ``decoder``: a file for each, named in ``registry``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

RawConfig = Mapping[str, Any]
"""A checkpoint's config.json."""


class Biases(NamedTuple):
    """Which of attention's projections have one: q, k and v together, and o."""

    qkv: bool
    o: bool


def no_biases(config: RawConfig) -> Biases:
    return Biases(qkv=False, o=False)


def biases_as_configured(config: RawConfig) -> Biases:
    """On all four, or on none: ``attention_bias``."""
    has_bias = bool(config.get("attention_bias", False))
    return Biases(qkv=has_bias, o=has_bias)


def window_as_named(config: RawConfig, num_layers: int) -> int | None:
    """On every layer, if there is one."""
    return config.get("sliding_window") if config.get("use_sliding_window", True) else None


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture.

    architecture      ``architectures[0]`` of its config.json
    biases            of its attention
    sliding_window    config.json and number of layers -> tokens that some layer looks back over, None where all see all
    has_qk_norm       q and k are normalised over each head before they are rotated
    default_head_dim  elements where config.json does not say; None for hidden_size / heads
    """

    architecture: str
    biases: Callable[[RawConfig], Biases] = no_biases
    sliding_window: Callable[[RawConfig, int], int | None] = window_as_named
    has_qk_norm: bool = False
    default_head_dim: int | None = None
