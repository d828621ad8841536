"""Which dialect of tool calls a model speaks, and what holds an answer to a call that is forced. Pure.

hermes    <tool_call>{"name": ..., "arguments": {...}}</tool_call>, any number           (Hermes, Qwen)
mistral   [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...], or [TOOL_CALLS]name{...} again and again
llama3    the whole answer is {"name": ..., "parameters": {...}}, more of them after ; and maybe <|python_tag|> before
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from forkkv_cluster.core.errors import InvalidArgument, Unsupported
from forkkv_cluster.gateway.tool_parsers import (
    PYTHON_TAG,
    AnswerParser,
    ForcedParser,
    HermesParser,
    ListParser,
    Llama3Parser,
    MistralParser,
    ToolCall,
)

__all__ = ["HERMES", "LLAMA3", "MISTRAL", "REQUIRED", "Dialect", "ToolCall", "dialect_of", "forced_call"]


@dataclass(frozen=True, slots=True)
class Dialect:
    """``parser`` makes what splits one answer. ``is_special``: calls begin with a special token, which has to be shown."""

    parser: Callable[[], AnswerParser]
    is_special: bool = False


HERMES = Dialect(HermesParser)
MISTRAL = Dialect(MistralParser, is_special=True)
LLAMA3 = Dialect(Llama3Parser, is_special=True)
REQUIRED = Dialect(ListParser)


def dialect_of(chat_template: str) -> Dialect:
    """What the template shows the model. Raises Unsupported for a template without tools, or of an unknown dialect."""
    marks = (("<tool_call>", HERMES), ("[TOOL_CALLS]", MISTRAL), (PYTHON_TAG, LLAMA3), ('"parameters"', LLAMA3))
    if "tools" in chat_template:
        for mark, dialect in marks:
            if mark in chat_template:
                return dialect
    problem = "this model's chat template shows no tool calls that are known here (hermes, mistral, llama3)"
    raise Unsupported("tools", "template", problem, "Leave tools out, or name a tool_choice, which needs none of them.")


def forced_call(
    tools: list[dict[str, Any]], choice: str | dict[str, Any], *, is_single: bool = False
) -> tuple[Dialect, dict[str, Any]]:
    """How an answer that must be a call reads, and the JSON schema that holds it to that. ``choice``: "required", or names
    one; ``is_single``: no more than one call. Raises InvalidArgument for a choice that names no tool."""
    functions = {tool["function"]["name"]: tool["function"].get("parameters", {"type": "object"}) for tool in tools}
    if choice == "required":
        calls = [_call_schema(name, schema) for name, schema in functions.items()]
        schema = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
        return REQUIRED, {**schema, "maxItems": 1} if is_single else schema
    name = choice.get("function", {}).get("name") if isinstance(choice, dict) else choice
    if name not in functions:
        known = ", ".join(functions)
        raise InvalidArgument("tool_choice", choice, "names no tool of this request", f"Name one of: {known}.")
    return Dialect(lambda: ForcedParser(str(name))), functions[name]


def _call_schema(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    fields = {"name": {"const": name}, "parameters": parameters}
    return {"type": "object", "properties": fields, "required": [*fields], "additionalProperties": False}
