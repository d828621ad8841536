"""Tool calls in a growing answer, one parser for each dialect. Pure.

What a parser says does not depend on the pieces in which the answer comes. Text that only looks like a call is handed on
as text: nothing that the model said is lost, but whitespace around calls.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Protocol

PYTHON_TAG = "<|python_tag|>"
_DECODER = json.JSONDecoder(strict=False)
"""Models write newlines inside strings as they are; what is handed on is JSON again."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """``arguments`` is JSON text, as OpenAI has it."""

    name: str
    arguments: str


Item = str | ToolCall


class AnswerParser(Protocol):
    """Splits one growing answer into text and calls."""

    def push(self, text: str) -> list[Item]:
        """What became certain: text outside calls, and calls that are complete."""
        ...

    def finish(self) -> list[Item]:
        """What is left when the answer has ended, wherever that was."""
        ...


class ForcedParser:
    """The answer is the arguments of one function; cut short, they are what there is of them."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._held = ""

    def push(self, text: str) -> list[Item]:
        self._held += text
        return []

    def finish(self) -> list[Item]:
        held, self._held = self._held.strip(), ""
        return [ToolCall(self._name, held)] if held else []


class _Parser:
    """Held text, and steps over it: ``_step`` returns what it found, None when more has to come first."""

    def __init__(self) -> None:
        self._held = ""
        self._is_inside = False  # a call has begun

    def push(self, text: str) -> list[Item]:
        self._held += text
        found: list[Item] = []
        while self._held and (items := self._step(is_end=False)) is not None:
            found += items
        return found

    def finish(self) -> list[Item]:
        found: list[Item] = []
        while (self._held or self._is_inside) and (items := self._step(is_end=True)) is not None:
            found += items
        rest, self._held = self._held, ""
        return [*found, *self._text(rest)]

    def _step(self, *, is_end: bool) -> list[Item] | None:
        raise NotImplementedError

    def _text(self, text: str) -> list[Item]:
        return [text] if text else []


class _MarkedParser(_Parser):
    """Calls begin with ``mark``; text before one passes, whitespace between calls does not."""

    mark = ""

    def __init__(self) -> None:
        super().__init__()
        self._is_blank = True  # so far only whitespace and calls
        self._lead = ""  # whitespace before the mark, dropped unless no call follows

    def _step(self, *, is_end: bool) -> list[Item] | None:
        if self._is_inside:
            return self._call(is_end=is_end)
        before, mark, after = self._held.partition(self.mark)
        if mark:
            self._held, self._is_inside = after, True
            return self._outside(before, is_before_call=True)
        certain = self._held if is_end else self._held[: len(self._held) - _overlap(self._held, self.mark)]
        if not certain or (not certain.strip() and self._is_blank and not is_end):
            return None  # whitespace that may turn out to stand before a call
        self._held = self._held[len(certain) :]
        return self._outside(certain, is_before_call=False)

    def _outside(self, text: str, *, is_before_call: bool) -> list[Item]:
        is_dropped = not text.strip() and self._is_blank and is_before_call
        self._lead = text if is_dropped else ""
        self._is_blank = is_before_call or (self._is_blank and not text.strip())
        return [] if is_dropped else self._text(text)

    def _call(self, *, is_end: bool) -> list[Item] | None:
        """What stands after the mark; it leaves ``_is_inside`` when that has ended."""
        raise NotImplementedError


class HermesParser(_MarkedParser):
    """<tool_call>{...}</tool_call>; the last one need not be closed."""

    mark, closing = "<tool_call>", "</tool_call>"

    def _call(self, *, is_end: bool) -> list[Item] | None:
        end = self._held.find(self.closing)
        while end >= 0 and _is_open_string(self._held[:end]):
            end = self._held.find(self.closing, end + 1)  # it stood inside an argument
        if end < 0 and not is_end:
            return None
        is_closed = end >= 0 or self.closing in self._held
        if end < 0:  # the end of the answer, or a string that no mark closes: the first mark counts
            end = self._held.find(self.closing) if is_closed else len(self._held)
        body, self._held = self._held[:end], self._held[end + len(self.closing) * is_closed :]
        self._is_inside = False
        calls = _calls(body)
        if not calls:
            self._is_blank = False
        return calls or [self._lead + self.mark + body + self.closing * is_closed]


class MistralParser(_MarkedParser):
    """[TOOL_CALLS] and a list of calls, or the name of a function, maybe [ARGS], and its arguments."""

    mark = "[TOOL_CALLS]"

    def _call(self, *, is_end: bool) -> list[Item] | None:
        begun = self._held.lstrip()
        if not is_end and self.mark.startswith(begun):
            return None  # nothing yet, or what may be a list or another mark
        start = 0 if begun[:1] in ("[", "{") else begun.find("{")
        head = begun[:start] if start >= 0 else begun
        if _NOT_IN_HEAD.search(head):
            return self._give_up()
        value, end = _scan(begun, start) if start >= 0 else (None, None)
        if end is None:
            return self._give_up() if is_end or value is _MALFORMED else None
        calls = _calls_of(value) if not head else self._named(head, value)
        if not calls:
            return self._give_up()
        self._held, self._is_inside = begun[end:], False
        return calls

    def _named(self, head: str, value: Any) -> list[Item]:
        name = _HEAD.fullmatch(head)
        return [ToolCall(name[1], _dumped(value))] if name else []

    def _give_up(self) -> list[Item]:
        """No call: the mark is text, and what follows it is read as if it had not been there."""
        self._is_inside, self._is_blank = False, False
        return [self._lead + self.mark]


_HEAD = re.compile(r"([\w.-]+)\s*(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*")
"""What stands before the arguments of a named call."""
_NOT_IN_HEAD = re.compile(r"[^\w.\-\[\]\s]")


class Llama3Parser(_Parser):
    """Bare calls, if the answer begins like one; else all of it is text."""

    def __init__(self) -> None:
        super().__init__()
        self._is_text = False
        self._has_calls = False

    def _step(self, *, is_end: bool) -> list[Item] | None:
        if self._is_text:
            text, self._held = self._held, ""
            return self._text(text)
        begun = self._held.lstrip("; \n\t\r") if self._has_calls else self._held.lstrip()
        if not begun and not is_end:
            return None
        if not begun and self._has_calls:
            self._held = ""
            return None
        body = begun.removeprefix(PYTHON_TAG).lstrip()
        if (not body or PYTHON_TAG.startswith(begun)) and not is_end:
            return None
        value, end = _scan(body, 0) if body[:1] in ("{", "[") else (_MALFORMED, None)
        if end is None and value is not _MALFORMED and not is_end:
            return None
        calls = _calls_of(value, needs_arguments=True) if end is not None else []
        if not calls:
            self._is_text = True
            return []
        self._held, self._has_calls = body[end:], True
        return calls


class ListParser(_Parser):
    """The answer is a list of calls, each told as soon as it is complete; cut short, the last one is left as text."""

    _BETWEEN = "[], \n\t\r"

    def _step(self, *, is_end: bool) -> list[Item] | None:
        begun = self._held.lstrip(self._BETWEEN)
        value, end = _scan(begun, 0) if begun[:1] == "{" else (None, None)
        calls = _calls_of(value) if end is not None else []
        if not calls:
            return None
        self._held = begun[end:]
        return calls

    def _text(self, text: str) -> list[Item]:
        return super()._text(text) if text.strip(self._BETWEEN) else []


class _Malformed:
    """No JSON value, however the text goes on."""


_MALFORMED = _Malformed()


def _scan(text: str, start: int) -> tuple[Any, int | None]:
    """The JSON value that begins at ``start`` and its end; the end is None when it is not complete, or ``_MALFORMED``."""
    try:
        return _DECODER.raw_decode(text, start)
    except RecursionError:
        return _MALFORMED, None
    except json.JSONDecodeError as error:
        # What breaks off at the very end may go on; so may a string, an escape, and a number, word or name cut in two.
        rest = text[error.pos :]
        is_cut = not rest.strip() or error.msg.startswith(("Unterminated string", "Invalid \\")) or rest in _BEGUN
        return (None if is_cut else _MALFORMED), None


_BEGUN = frozenset(
    word[:n]
    for word in ("true", "false", "null", "-Infinity", "Infinity", "NaN", ".0", "e+0", "e-0", "E+0", "E-0")
    for n in range(1, len(word))
)
"""Tails that a number or a word leaves when it is cut."""


def _is_open_string(text: str) -> bool:
    """Whether JSON text breaks off inside a string."""
    try:
        _DECODER.raw_decode(text.lstrip())
    except json.JSONDecodeError as error:
        return error.msg.startswith("Unterminated string")
    except RecursionError:
        return False
    return False


def _calls(body: str) -> list[Item]:
    """The calls that ``body`` holds; none when it is not JSON of their form."""
    try:
        return _calls_of(_DECODER.decode(body))
    except (ValueError, RecursionError):
        return []


def _calls_of(value: Any, *, needs_arguments: bool = False) -> list[Item]:
    """All entries of a list, or one value, as calls; none when one of them is not."""
    calls = [_call(entry, needs_arguments) for entry in (value if isinstance(value, list) else [value])]
    return [call for call in calls if call is not None] if None not in calls else []


def _call(entry: Any, needs_arguments: bool) -> ToolCall | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        return None
    if needs_arguments and not entry.keys() & {"arguments", "parameters"}:
        return None
    return ToolCall(entry["name"], _dumped(entry.get("arguments", entry.get("parameters", {}))))


def _dumped(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _overlap(text: str, mark: str) -> int:
    """Length of the longest tail of ``text`` that begins ``mark``."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-n:])), 0)
