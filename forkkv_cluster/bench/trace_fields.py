"""Reading one JSON line of a trace field by field, with errors that name the line, the field, its value and the remedy."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, TypeVar

from forkkv_cluster.core.errors import InvalidArgument

_REQUIRED: Any = object()
_T = TypeVar("_T", bound=str)


def trace_error(line: int, field: str, value: object, problem: str, remedy: str) -> InvalidArgument:
    """The error of one field of one line."""
    return InvalidArgument(f"trace line {line}, {field}", value, problem, remedy)


class Fields:
    """The object of one line. Every getter marks its field as read; ``finish`` refuses those that nothing read."""

    def __init__(self, line: int, text: str | dict[str, Any], prefix: str = "") -> None:
        self.line = line
        self.is_nested = bool(prefix)
        self._prefix = prefix
        self._values = text if isinstance(text, dict) else self._parse(text)
        self._read: set[str] = set()

    def _parse(self, text: str) -> dict[str, Any]:
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise trace_error(
                self.line, f"column {error.colno}", text, f"is not JSON ({error.msg})", "Write one JSON object a line."
            ) from None
        if not isinstance(values, dict):
            raise trace_error(self.line, "line", values, "is not a JSON object", "Write one JSON object a line.")
        return values

    def error(self, name: str, problem: str, remedy: str) -> InvalidArgument:
        return trace_error(self.line, self._prefix + name, self._values.get(name), problem, remedy)

    def has(self, name: str) -> bool:
        return name in self._values

    def _get(self, name: str, default: Any) -> Any:
        self._read.add(name)
        if name in self._values:
            return self._values[name]
        if default is _REQUIRED:
            raise self.error(name, "is missing", "Add it.")
        return default

    def text(self, name: str, default: str = _REQUIRED) -> str:
        value = self._get(name, default)
        if not isinstance(value, str) or (default is _REQUIRED and not value):
            raise self.error(name, "is not a name", "Write a string that is not empty.")
        return value

    def optional_text(self, name: str) -> str | None:
        """A string, or null; the field must be there."""
        value = self._get(name, _REQUIRED)
        if value is None:
            return None
        return self.text(name)

    def texts(self, name: str, default: Sequence[str] = _REQUIRED) -> tuple[str, ...]:
        value = self._get(name, default)
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) and item for item in value):
            raise self.error(name, "is not a list of names", "Write a list of strings.")
        return tuple(value)

    def integer(self, name: str, minimum: int) -> int:
        value = self._get(name, _REQUIRED)
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value < 2**32:
            raise self.error(name, "is not a whole number in range", f"Write one from {minimum} to 2^32-1.")
        return value

    def integers(self, name: str, limit: int) -> tuple[int, ...]:
        """A list of integers in [0, limit)."""
        value = self._get(name, _REQUIRED)
        if not isinstance(value, list) or not all(
            isinstance(item, int) and not isinstance(item, bool) and 0 <= item < limit for item in value
        ):
            raise self.error(name, f"is not a list of token ids in [0, {limit})", "Write token ids, or num_tokens and seed.")
        return tuple(value)

    def seconds(self, name: str) -> float:
        """A finite number from 0 on; 0 when absent."""
        value = self._get(name, 0.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise self.error(name, "is not a time", "Write seconds, 0 or more.")
        return float(value)

    def choice(self, name: str, options: Sequence[_T], default: _T) -> _T:
        value = self._get(name, default)
        for option in options:
            if value == option:
                return option
        raise self.error(name, "is not known", f"Write one of: {', '.join(options)}.")

    def nested(self, name: str) -> Fields:
        value = self._get(name, _REQUIRED)
        if not isinstance(value, dict):
            raise self.error(name, "is not an object", 'Write {"tokens": [..]} or {"num_tokens": N, "seed": S}.')
        return Fields(self.line, value, prefix=f"{self._prefix}{name}.")

    def finish(self) -> None:
        """Raises for the first field that is not part of the format, so that a slip of the pen is not a silent default."""
        for name in self._values:
            if name not in self._read:
                known = ", ".join(sorted(self._read))
                raise self.error(name, "is not a field of this line", f"Known here: {known}. Remove it.")
