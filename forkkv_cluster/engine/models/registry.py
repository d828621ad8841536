"""Which family a checkpoint belongs to, by ``architectures[0]`` of its config.json."""

from __future__ import annotations

from forkkv_cluster.core.errors import Unsupported
from forkkv_cluster.engine.models.family import Family
from forkkv_cluster.engine.models.llama import LLAMA
from forkkv_cluster.engine.models.mistral import MISTRAL
from forkkv_cluster.engine.models.qwen2 import QWEN2
from forkkv_cluster.engine.models.qwen3 import QWEN3

FAMILIES = {family.architecture: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}


def family_of(architectures: object) -> Family:
    """Raises Unsupported, naming those there are, for any other."""
    name = architectures[0] if isinstance(architectures, list) and architectures else architectures
    if not isinstance(name, str) or name not in FAMILIES:
        raise Unsupported("architectures", name, "is not supported", f"Use one of {', '.join(sorted(FAMILIES))}.")
    return FAMILIES[name]
