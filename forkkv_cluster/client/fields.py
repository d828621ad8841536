"""Values of a caller into the fields of a message; errors name the field, where protobuf would speak of itself. Pure."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable
from typing import Any, TypeVar

from forkkv_cluster.core.errors import InvalidArgument

Choice = TypeVar("Choice", bound=enum.Enum)
Filled = TypeVar("Filled", bound=Any)  # A generated message; the stubs' own base class knows no descriptor.

_INTEGER = "Send an integer from {} to {}."
_REMEDIES = {
    "int32": _INTEGER.format("-2^31", "2^31-1"),
    "int64": _INTEGER.format("-2^63", "2^63-1"),
    "float": "Send a number.",
    "double": "Send a number.",
    "bool": "Send True or False.",
    "string": "Send text that UTF-8 can hold.",
}


def filled(message: Filled, **fields: Any) -> Filled:
    """``message`` with ``fields`` set; None leaves one out. Raises InvalidArgument for the first that it cannot hold."""
    descriptors = message.DESCRIPTOR.fields_by_name
    for name, value in fields.items():
        if value is None:
            continue
        try:
            if descriptors[name].is_repeated:
                getattr(message, name).extend(_items(value))
            else:
                setattr(message, name, value)
        except (TypeError, ValueError):
            raise InvalidArgument(name, value, "is not what this field holds", _remedy(descriptors[name])) from None
    return message


def choice(kind: type[Choice], name: str, value: object) -> Choice:
    """``value`` as a member of ``kind``, by value or already one. Raises InvalidArgument with what there is."""
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(str(member.value) for member in kind)
        raise InvalidArgument(name, value, "is not one of its choices", f"Send one of: {known}.") from None


def seconds(name: str, value: object) -> float:
    """A finite time above 0. Raises InvalidArgument."""
    if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise InvalidArgument(name, value, "is not above 0", "Send seconds, or None for no deadline.")
    return float(value)


def _items(value: object) -> Iterable[Any]:
    # Text is a sequence of texts, too: one stop string would become one of each of its letters.
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise TypeError
    return list(value)


def _remedy(descriptor: Any) -> str:
    names = {getattr(descriptor, f"TYPE_{kind.upper()}"): kind for kind in _REMEDIES}
    remedy = _REMEDIES[names[descriptor.type]]
    return f"For each entry of a list: {remedy}" if descriptor.is_repeated else remedy
