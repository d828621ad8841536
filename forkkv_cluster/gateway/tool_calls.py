"""Tool calls in generated text, by the dialect that a model's chat template teaches it. Pure.

    hermes    <tool_call>{"name": ..., "arguments": {...}}</tool_call>, any number   (Hermes, Qwen)
    mistral   [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...] to the end
    llama3    the whole answer is {"name": ..., "parameters": {...}}, maybe after <|python_tag|>

Text that only looks like a call is handed on as text: nothing that the model said is lost.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from forkkv_cluster.core.errors import InvalidArgument, Unsupported


@dataclass(frozen=True, slots=True)
class ToolCall:
    """``arguments`` is JSON text, as OpenAI has it."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Dialect:
    """``opening`` begins a call and ``closing`` ends it; None: the end of the answer. An empty opening: all is a call.

    ``forced`` is the function whose bare arguments the answer is. ``is_special``: the opening is a special token.
    """

    opening: str
    closing: str | None = None
    forced: str | None = None
    is_special: bool = False


HERMES = Dialect("<tool_call>", "</tool_call>")
MISTRAL = Dialect("[TOOL_CALLS]", is_special=True)
LLAMA3 = Dialect("", is_special=True)
REQUIRED = Dialect("")
_PYTHON_TAG = "<|python_tag|>"


def dialect_of(chat_template: str) -> Dialect:
    """What the template shows the model. Raises Unsupported for a template without tools, or of an unknown dialect."""
    marks = (("<tool_call>", HERMES), ("[TOOL_CALLS]", MISTRAL), (_PYTHON_TAG, LLAMA3), ('"parameters"', LLAMA3))
    if "tools" in chat_template:
        for mark, dialect in marks:
            if mark in chat_template:
                return dialect
    problem = "this model's chat template shows no tool calls that are known here (hermes, mistral, llama3)"
    raise Unsupported("tools", "template", problem, "Leave tools out, or name a tool_choice, which needs none of them.")


class ToolCallStream:
    """Splits a growing answer into text and calls."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._held = ""
        self._is_inside = False

    def push(self, text: str) -> list[str | ToolCall]:
        """What became certain: text outside calls, and calls that are complete."""
        self._held += text
        found: list[str | ToolCall] = []
        while (item := self._next()) is not None:
            found += item
        return found

    def finish(self) -> list[str | ToolCall]:
        """What is left when the answer has ended."""
        rest, self._held = self._held, ""
        if not rest:
            return []
        if not self._is_inside and self._dialect.opening:
            return [rest]
        return self._calls(rest) or [self._dialect.opening * self._is_inside + rest]

    def _next(self) -> list[str | ToolCall] | None:
        """One step over the held text; None when more has to come first."""
        dialect = self._dialect
        if not dialect.opening:
            return None
        if self._is_inside:
            if dialect.closing is None or dialect.closing not in self._held:
                return None
            body, _, self._held = self._held.partition(dialect.closing)
            self._is_inside = False
            return self._calls(body) or [dialect.opening + body + dialect.closing]
        before, mark, after = self._held.partition(dialect.opening)
        if mark:
            self._held, self._is_inside = after, True
            return [before] if before.strip() else []
        certain = len(self._held) - _overlap(self._held, dialect.opening)
        text, self._held = self._held[:certain], self._held[certain:]
        return [text] if text else None

    def _calls(self, body: str) -> list[str | ToolCall]:
        """The calls that ``body`` holds; none when it is not JSON of their form."""
        try:
            value = json.loads(body.strip().removeprefix(_PYTHON_TAG))
        except ValueError:
            return []
        if self._dialect.forced is not None:
            return [ToolCall(self._dialect.forced, json.dumps(value, ensure_ascii=False))]
        calls = [_call(entry) for entry in (value if isinstance(value, list) else [value])]
        return [call for call in calls if call is not None] if None not in calls else []


def _call(entry: Any) -> ToolCall | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        return None
    arguments = entry.get("arguments", entry.get("parameters", {}))
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(entry["name"], text)


def _overlap(text: str, mark: str) -> int:
    """Length of the longest tail of ``text`` that begins ``mark``."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-n:])), 0)


def forced_call(tools: list[dict[str, Any]], choice: str | dict[str, Any]) -> tuple[Dialect, dict[str, Any]]:
    """How an answer that must be a call reads, and the JSON schema that holds it to that. ``choice``: "required", or names
    one. Raises InvalidArgument for a choice that names no tool."""
    functions = {tool["function"]["name"]: tool["function"].get("parameters", {"type": "object"}) for tool in tools}
    if choice == "required":
        calls = [_call_schema(name, schema) for name, schema in functions.items()]
        return REQUIRED, {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    name = choice.get("function", {}).get("name") if isinstance(choice, dict) else choice
    if name not in functions:
        known = ", ".join(functions)
        raise InvalidArgument("tool_choice", choice, "names no tool of this request", f"Name one of: {known}.")
    return Dialect("", forced=str(name)), functions[name]


def _call_schema(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    fields = {"name": {"const": name}, "parameters": parameters}
    return {"type": "object", "properties": fields, "required": [*fields], "additionalProperties": False}
