"""What is compared: how an adapter's branch is served, who wrote the shared context, who came first. Pure."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from forkkv_cluster.core.request import Sharing, WriterMode

__all__ = ["Cell", "Policy", "Subject", "plan_cells"]


class Policy(enum.StrEnum):
    """``isolated``, ``residual``, ``eager`` and ``base`` are the sharing of that name. What goes beyond:

    auto       as the engine's calibration of that adapter says, at its default bound
    base       of an aLoRA alone, for which it is exact; of every other adapter it is ``dropped``
    dropped    sharing ``base`` with an ordinary adapter. Its own tokens run through it, but of the shared context it reads the
               base model's K and V, without its residual. The known bad case
    unadapted  no adapter: what the base model by itself makes of the task
    """

    ISOLATED = "isolated"
    RESIDUAL = "residual"
    EAGER = "eager"
    BASE = "base"
    DROPPED = "dropped"
    UNADAPTED = "unadapted"
    AUTO = "auto"

    @property
    def sharing(self) -> Sharing:
        """How its branches are forked."""
        return Sharing.BASE if self in (Policy.DROPPED, Policy.UNADAPTED) else Sharing(self.value)

    def fits(self, *, is_alora: bool) -> bool:
        """Whether the policy says something about such an adapter that no other one says."""
        return self is not (Policy.DROPPED if is_alora else Policy.BASE)


@dataclass(frozen=True, slots=True)
class Subject:
    """An adapter that is measured. ``reference``: the adapter whose ``isolated`` answers it is held against: itself, or the
    one that it was made from."""

    name: str
    lora_rank: int
    is_alora: bool = False
    reference: str = ""

    def __post_init__(self) -> None:
        if not self.reference:
            object.__setattr__(self, "reference", self.name)


@dataclass(frozen=True, slots=True)
class Cell:
    """One way to serve ``adapter``. ``first`` is the adapter whose branch came first over each context: itself or another.
    ``reference``: as its subject's; under ``isolated`` that is the cell which all others are held against."""

    adapter: str
    policy: Policy
    writer: WriterMode
    first: str
    reference: str

    @property
    def is_reference(self) -> bool:
        return self.policy is Policy.ISOLATED and self.adapter == self.reference


def plan_cells(
    subjects: Sequence[Subject], policies: Sequence[Policy], writers: Sequence[WriterMode], num_arrivals: int
) -> list[Cell]:
    """Cells of one adapter after the other, each led by ``isolated`` of its reference, whether asked for or not.

    ``num_arrivals``: 1 lets the adapter come first, each further one another adapter before it. Only sharing of context knows
    an order, and only ``residual`` another writer than the base model, which is an ordinary adapter's branch.
    """
    return [cell for index in range(len(subjects)) for cell in _cells_of(index, subjects, policies, writers, num_arrivals)]


def _cells_of(
    index: int,
    subjects: Sequence[Subject],
    policies: Sequence[Policy],
    writers: Sequence[WriterMode],
    num_arrivals: int,
) -> list[Cell]:
    subject = subjects[index]
    order = [*subjects[index:], *subjects[:index]]
    reference = subject.reference
    cells = [Cell(reference, Policy.ISOLATED, WriterMode.CANONICAL, reference, reference)]
    for policy in dict.fromkeys(policies):
        if policy is Policy.ISOLATED:
            own = Cell(subject.name, policy, WriterMode.CANONICAL, subject.name, reference)
            cells += [own] if not own.is_reference else []
            continue
        if not policy.fits(is_alora=subject.is_alora):
            continue
        for writer in dict.fromkeys(writers):
            if writer is WriterMode.FIRST and (policy is not Policy.RESIDUAL or subject.is_alora):
                continue
            arrivals = [other for other in order if writer is WriterMode.CANONICAL or not other.is_alora]
            count = 1 if policy in (Policy.UNADAPTED, Policy.AUTO) else num_arrivals
            cells += [Cell(subject.name, policy, writer, other.name, reference) for other in arrivals[:count]]
    return cells
