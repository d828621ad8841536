"""Samples from generated casebooks, held out of what the casebook adapters were trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from forkkv_cluster.bench.quality.samples import QualitySample
from forkkv_cluster.core.errors import InvalidArgument
from forkkv_cluster.training.casebook.roles import ROLES
from forkkv_cluster.training.casebook.samples import examples
from forkkv_cluster.training.casebook.tokenizer import turn_text

__all__ = ["casebook_samples", "lengths_of", "roles_of"]


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


def lengths_of(values: Sequence[str], count: int) -> dict[int, int]:
    """LENGTH or LENGTH:COUNT -> how many at which length. Raises InvalidArgument for another form, or one given twice."""
    found: dict[int, int] = {}
    for value in values:
        parts = value.split(":")
        if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts) or len(parts) > 2:
            raise InvalidArgument("--length", value, "is not LENGTH or LENGTH:COUNT", "Write for example 1024 or 1024:20.")
        length = int(parts[0])
        if length in found:
            raise InvalidArgument("--length", value, "is given twice", "Give each length once.")
        found[length] = int(parts[1]) if len(parts) == 2 else count
    return found


def casebook_samples(roles: Mapping[str, str], lengths: Mapping[int, int], seed: int) -> list[QualitySample]:
    """As many questions of its role to each adapter as ``lengths`` says of each length, each about a casebook of its own.

    Adapters of one role get the same ones. Raises InvalidArgument for a length too short for a casebook.
    """
    for length in lengths:
        if length < 32:
            raise InvalidArgument("--length", length, "is too short for a casebook", "Ask for at least 32 tokens.")
    return [
        QualitySample(example.context, turn_text(example.question), example.answer, name, role, length)
        for name, role in roles.items()
        for length, count in lengths.items()
        for example in examples(role, seed=seed, context_tokens=length, count=count)
    ]
