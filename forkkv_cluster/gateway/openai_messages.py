"""Messages and tools of a chat request, and what chat templates want of them."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from forkkv_cluster.core.errors import InvalidArgument, Unsupported


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    def plain(self) -> dict[str, Any]:
        """Role, text and what concerns tools, as chat templates want them. Raises Unsupported for images, audio and files."""
        return {"role": self.role, "content": self._text(), **self._tool_fields()}

    def _tool_fields(self) -> dict[str, Any]:
        """Templates want the arguments of earlier calls as values, where OpenAI has JSON text."""
        fields = {name: getattr(self, name) for name in ("tool_call_id", "name") if getattr(self, name) is not None}
        if not self.tool_calls:
            return fields
        try:
            return {**fields, "tool_calls": [_with_values(call) for call in self.tool_calls]}
        except (ValueError, KeyError, TypeError):
            problem = "is not a list of calls with a function's name and JSON arguments"
            raise InvalidArgument("messages.tool_calls", self.tool_calls, problem, "Send them as they came.") from None

    def _text(self) -> str:
        if isinstance(self.content, list):
            for part in self.content:
                if part.get("type") != "text":
                    raise Unsupported(
                        "messages.content", part.get("type"), "multimodal input is not supported", "Send text parts."
                    )
            return "".join(str(part.get("text", "")) for part in self.content)
        return self.content or ""


def _with_values(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.loads(function["arguments"] or "{}")}}


class FunctionSpec(BaseModel):
    """``parameters`` is a JSON schema of the arguments."""

    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolSpec(BaseModel):
    type: Literal["function"] = "function"
    function: FunctionSpec
