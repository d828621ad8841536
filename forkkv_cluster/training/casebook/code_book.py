"""The mapper's fixed code book: city -> region. Nothing in a casebook tells it; only training does."""

from __future__ import annotations

import random

from forkkv_cluster.training.casebook.lexicon import CITIES, REGIONS

_SEED = 7


def _draw() -> dict[str, str]:
    cities = list(CITIES)
    random.Random(_SEED).shuffle(cities)
    return {city: REGIONS[index % len(REGIONS)] for index, city in enumerate(cities)}


_REGION_OF = _draw()


def region_of(city: str) -> str:
    """Raises KeyError for a word that is no city of the lexicon."""
    return _REGION_OF[city]
