"""The role adapters that ship: which role, how large, how strong, where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["ADAPTERS", "AdapterSpec"]

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """``alpha`` / ``rank`` is the scaling: 1 is light, 4 strong. ``reads``: whether the role puts otherwise what the base
    recalls, or needs the context read otherwise. ``is_activated``: an aLoRA, which leaves the question to the base."""

    name: str
    role: str
    rank: int
    alpha: int
    targets: tuple[str, ...]
    reads: Literal["recall", "context"]
    lr: float = 1e-3
    is_activated: bool = False


ADAPTERS: dict[str, AdapterSpec] = {
    spec.name: spec
    for spec in (
        AdapterSpec("formatter", "formatter", 8, 8, ATTENTION, "recall"),
        AdapterSpec("extractor", "extractor", 8, 16, ALL_LINEAR, "recall"),
        AdapterSpec("mapper", "mapper", 16, 64, ALL_LINEAR, "recall"),
        AdapterSpec("comparer", "comparer", 16, 32, ALL_LINEAR, "recall"),
        AdapterSpec("clerk", "clerk", 64, 64, ("q_proj", "v_proj"), "recall"),
        AdapterSpec("verifier", "verifier", 16, 32, ALL_LINEAR, "recall"),
        AdapterSpec("hop", "hop", 16, 32, ALL_LINEAR, "context"),
        AdapterSpec("liaison", "liaison", 8, 32, ALL_LINEAR, "context"),
        AdapterSpec("sourcer", "sourcer", 16, 32, ALL_LINEAR, "context"),
        AdapterSpec("reverse", "reverse", 64, 128, ALL_LINEAR, "context", lr=5e-4),
        AdapterSpec("counter", "counter", 64, 64, ATTENTION, "context", lr=5e-4),
        AdapterSpec("formatter-alora", "formatter", 16, 32, ALL_LINEAR, "recall", is_activated=True),
        AdapterSpec("mapper-alora", "mapper", 16, 64, ALL_LINEAR, "recall", is_activated=True),
        AdapterSpec("extractor-alora", "extractor", 16, 32, ALL_LINEAR, "recall", is_activated=True),
    )
}
