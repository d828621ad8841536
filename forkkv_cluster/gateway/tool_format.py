"""chat.completion bodies of answers that may call tools. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from forkkv_cluster.core.ids import new_id
from forkkv_cluster.gateway.commands import TurnDelta, TurnFinished
from forkkv_cluster.gateway.openai_format import ChatFormat, finish_reason
from forkkv_cluster.gateway.tool_calls import Dialect, ToolCall
from forkkv_cluster.gateway.tool_parsers import AnswerParser


class ToolChatFormat(ChatFormat):
    """A call streams as one delta, once it is complete. ``is_single``: of several calls only the first is handed on."""

    def __init__(self, *head: Any, dialect: Dialect, is_single: bool = False, **options: Any) -> None:
        super().__init__(*head, **options)
        self._is_single = is_single
        self._parsers: defaultdict[int, AnswerParser] = defaultdict(dialect.parser)
        self._num_calls: defaultdict[int, int] = defaultdict(int)

    def chunks(self, index: int, delta: TurnDelta) -> list[dict[str, Any]]:
        body = self._delta(index, self._parsers[index].push(delta.text))
        logprobs = self._logprobs(delta.logprobs)
        return [self._chunk(index, {"delta": body, "logprobs": logprobs})] if body or logprobs else []

    def closing(self, index: int, finished: TurnFinished) -> list[dict[str, Any]]:
        body = self._delta(index, self._parsers[index].finish())
        return [self._chunk(index, {"delta": body, "finish_reason": self._reason(index, finished)})]

    def _choice(self, index: int, deltas: Sequence[TurnDelta], finished: TurnFinished) -> dict[str, Any]:
        parser = self._parsers[index]
        items = [*parser.push("".join(delta.text for delta in deltas)), *parser.finish()]
        body = self._delta(index, items)
        message: dict[str, Any] = {"role": "assistant", "content": body.get("content"), "refusal": None}
        if calls := body.get("tool_calls"):
            message["tool_calls"] = [{key: value for key, value in call.items() if key != "index"} for call in calls]
        logprobs = self._logprobs([logprob for delta in deltas for logprob in delta.logprobs])
        return {"index": index, "finish_reason": self._reason(index, finished), "logprobs": logprobs, "message": message}

    def _reason(self, index: int, finished: TurnFinished) -> str:
        reason = finish_reason(finished)
        return "tool_calls" if reason == "stop" and self._num_calls[index] else reason

    def _delta(self, index: int, items: Sequence[str | ToolCall]) -> dict[str, Any]:
        text = "".join(item for item in items if isinstance(item, str))
        found = [item for item in items if isinstance(item, ToolCall)]
        if self._is_single:
            found = found[: 1 - self._num_calls[index]]
        calls = [self._call(index, item) for item in found]
        return {**({"content": text} if text else {}), **({"tool_calls": calls} if calls else {})}

    def _call(self, index: int, call: ToolCall) -> dict[str, Any]:
        number = self._num_calls[index]
        self._num_calls[index] += 1
        function = {"name": call.name, "arguments": call.arguments}
        return {"index": number, "id": new_id("call"), "type": "function", "function": function}
