"""How large a soak run's load may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from forkkv_cluster.core.request import Guide


@dataclass(frozen=True, slots=True)
class SoakPlan:
    """Lengths in tokens.

    adapters        name -> directories of different contents that take turns under it
    page_size       of the engine
    guides          structured outputs to ask for now and then
    max_live        requests under way beyond which only a burst adds more
    step_s          the virtual clock's seconds per step: deadlines and a seed's whole run repeat exactly
    check_every     rounds between two drains with all checks
    """

    adapters: Mapping[str, Sequence[str]]
    page_size: int
    guides: tuple[Guide, ...] = ()
    num_documents: int = 4
    num_tenants: int = 3
    max_sessions: int = 6
    max_context: int = 120
    max_append: int = 40
    max_branch: int = 280
    max_tokens: int = 96
    max_live: int = 24
    step_s: float = 0.02
    check_every: int = 250
    replays: int = 3
