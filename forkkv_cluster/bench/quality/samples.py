"""Questions about contexts, with their answers, from a JSON lines file. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from forkkv_cluster.core.errors import InvalidArgument

__all__ = ["QualitySample", "length_of", "parse_samples", "read_samples"]


@dataclass(frozen=True, slots=True)
class QualitySample:
    """One question, as text that is tokenised as it stands: whatever layout the adapter was trained on belongs to it.

    context         what is shared, with nothing of a role in it
    question        what the branch appends
    answer          the right answer, without special tokens
    adapter         whose question it is; empty: each adapter answers it
    role            a casebook role scores as that role does; any other name, or none, by equal words
    context_tokens  the length it is listed under; 0: its own, rounded up to a power of two
    """

    context: str
    question: str
    answer: str
    adapter: str = ""
    role: str = ""
    context_tokens: int = 0


_TYPES: dict[str, type[str] | type[int]] = {
    field.name: int if field.name == "context_tokens" else str for field in fields(QualitySample)
}
_REQUIRED = ("context", "question", "answer")


def read_samples(path: Path, adapters: Iterable[str]) -> list[QualitySample]:
    """Raises InvalidArgument that names the file, line and field."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument("--samples", str(path), f"cannot be read ({error})", "Name a JSON lines file.") from None
    return parse_samples(lines, str(path), adapters)


def parse_samples(lines: Iterable[str], name: str, adapters: Iterable[str]) -> list[QualitySample]:
    """One sample of each line that is not blank; ``name`` and the line's number stand in errors. Raises InvalidArgument."""
    known = set(adapters)
    found = [_parse(line, f"{name}:{number}", known) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise InvalidArgument("--samples", name, "holds no sample", "Write one JSON object a line.")
    return found


def _parse(line: str, where: str, adapters: set[str]) -> QualitySample:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InvalidArgument(where, line[:40], f"is not JSON ({error})", "Write one JSON object a line.") from None
    if not isinstance(value, dict):
        raise InvalidArgument(where, line[:40], "is not a JSON object", f"Write one with {', '.join(_REQUIRED)}.")
    for key, entry in value.items():
        _check_field(where, key, entry)
    for key in _REQUIRED:
        if not value.get(key):
            raise InvalidArgument(f"{where} {key}", value.get(key), "is missing or empty", "Add its text.")
    sample = QualitySample(**value)
    if sample.adapter and sample.adapter not in adapters:
        raise InvalidArgument(
            f"{where} adapter",
            sample.adapter,
            "is not among those to be measured",
            f"Name one of {', '.join(sorted(adapters))}.",
        )
    return sample


def _check_field(where: str, key: str, value: Any) -> None:
    if key not in _TYPES:
        raise InvalidArgument(f"{where} {key}", value, "is not a field of a sample", f"Known: {', '.join(_TYPES)}.")
    if type(value) is not _TYPES[key] or (isinstance(value, int) and value < 0):
        raise InvalidArgument(f"{where} {key}", value, f"is not a {_TYPES[key].__name__}, 0 or more", "Mend it.")


def length_of(sample: QualitySample, num_tokens: int) -> int:
    """The length that a sample whose context has ``num_tokens`` tokens is listed under."""
    return sample.context_tokens or 1 << max(0, num_tokens - 1).bit_length()
