"""Samples from generated casebooks, held out of what the casebook adapters were trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from forkkv_cluster.bench.quality.samples import QualitySample
from forkkv_cluster.core.errors import InvalidArgument
from forkkv_cluster.training.casebook.roles import ROLES
from forkkv_cluster.training.casebook.samples import examples
from forkkv_cluster.training.casebook.tokenizer import turn_text

__all__ = ["casebook_samples", "roles_of"]


def roles_of(adapters: Iterable[str], given: Mapping[str, str]) -> dict[str, str]:
    """Adapter -> its casebook role: the given one, else the longest that its name begins with. Raises InvalidArgument."""
    names = tuple(adapters)
    for name, role in given.items():
        if name not in names:
            raise InvalidArgument("--role", f"{name}={role}", "names no adapter", f"Name one of {', '.join(names)}.")
        if role not in ROLES:
            raise InvalidArgument("--role", f"{name}={role}", "names no role", f"Roles: {', '.join(ROLES)}.")
    return {name: given.get(name) or _role_in(name) for name in names}


def _role_in(name: str) -> str:
    found = [role for role in ROLES if name.startswith(role)]
    if not found:
        raise InvalidArgument(
            "--adapter", name, "does not begin with a casebook role", f"Add --role {name}=ROLE, one of {', '.join(ROLES)}."
        )
    return max(found, key=len)


def casebook_samples(roles: Mapping[str, str], lengths: Sequence[int], count: int, seed: int) -> list[QualitySample]:
    """``count`` questions of its role to each adapter at each length, each about a casebook of its own.

    Adapters of one role get the same ones. Raises InvalidArgument for a length too short for a casebook.
    """
    for length in lengths:
        if length < 32:
            raise InvalidArgument("--length", length, "is too short for a casebook", "Ask for at least 32 tokens.")
    return [
        QualitySample(example.context, turn_text(example.question), example.answer, name, role, length)
        for name, role in roles.items()
        for length in lengths
        for example in examples(role, seed=seed, context_tokens=length, count=count)
    ]
