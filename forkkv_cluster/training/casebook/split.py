"""Which pairs of a name and a value are held out of training.

Every sixth of a name's possible values, drawn by a hash of the pair, belongs to the held-out split and appears beside that
name in no training casebook; the other values appear beside it in no held-out casebook. So a right answer about a held-out
casebook cannot come from memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from typing import Literal, TypeAlias

from forkkv_cluster.training.casebook.lexicon import POOLS

Split: TypeAlias = Literal["train", "held_out"]

_SHARE = 6


@cache
def allowed_values(entity: str, pool: str, split: Split) -> tuple[str, ...]:
    """The values of ``pool`` that casebooks of ``split`` may state of ``entity``; never empty."""
    others = [value for value in POOLS[pool] if value != entity]
    ranked = sorted(others, key=lambda value: hashlib.blake2b(f"{entity}|{value}".encode(), digest_size=8).digest())
    num_held_out = max(1, len(ranked) // _SHARE)
    return tuple(ranked[:num_held_out] if split == "held_out" else ranked[num_held_out:])


def is_held_out(entity: str, value: str, pool: str) -> bool:
    return value in allowed_values(entity, pool, "held_out")


def among(entity: str, pool: str, split: Split, values: Sequence[str]) -> list[str]:
    """Those of ``values`` that ``split`` may state of ``entity``."""
    allowed = _allowed_set(entity, pool, split)
    return [value for value in values if value in allowed]


@cache
def _allowed_set(entity: str, pool: str, split: Split) -> frozenset[str]:
    return frozenset(allowed_values(entity, pool, split))
