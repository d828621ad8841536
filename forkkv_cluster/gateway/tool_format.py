"""chat.completion bodies of answers that may call tools. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from forkkv_cluster.core.ids import new_id
from forkkv_cluster.gateway.commands import TurnDelta, TurnFinished
from forkkv_cluster.gateway.openai_format import ChatFormat, TokenText, finish_reason
from forkkv_cluster.gateway.tool_calls import Dialect, ToolCall, ToolCallStream


class ToolChatFormat(ChatFormat):
    """A call streams as one delta, once it is complete."""

    def __init__(self, response_id: str, model: str, created_s: int, token_text: TokenText, dialect: Dialect) -> None:
        super().__init__(response_id, model, created_s, token_text)
        self._streams: defaultdict[int, ToolCallStream] = defaultdict(lambda: ToolCallStream(dialect))
        self._num_calls: defaultdict[int, int] = defaultdict(int)

    def chunk(self, index: int, delta: TurnDelta) -> dict[str, Any]:
        body = self._delta(index, self._streams[index].push(delta.text))
        return self._chunk(index, {"delta": body, "logprobs": self._logprobs(delta.logprobs)})

    def closing(self, index: int, finished: TurnFinished) -> dict[str, Any]:
        body = self._delta(index, self._streams[index].finish())
        return self._chunk(index, {"delta": body, "finish_reason": self._reason(index, finished)})

    def _choice(self, index: int, deltas: Sequence[TurnDelta], finished: TurnFinished) -> dict[str, Any]:
        stream = self._streams[index]
        items = [*stream.push("".join(delta.text for delta in deltas)), *stream.finish()]
        calls = self._delta(index, items).get("tool_calls", [])
        text = "".join(item for item in items if isinstance(item, str))
        message: dict[str, Any] = {"role": "assistant", "content": text or None, "refusal": None}
        if calls:
            message["tool_calls"] = [{key: value for key, value in call.items() if key != "index"} for call in calls]
        logprobs = self._logprobs([logprob for delta in deltas for logprob in delta.logprobs])
        return {"index": index, "finish_reason": self._reason(index, finished), "logprobs": logprobs, "message": message}

    def _reason(self, index: int, finished: TurnFinished) -> str:
        reason = finish_reason(finished)
        return "tool_calls" if reason == "stop" and self._num_calls[index] else reason

    def _delta(self, index: int, items: Sequence[str | ToolCall]) -> dict[str, Any]:
        text = "".join(item for item in items if isinstance(item, str))
        calls = [self._call(index, item) for item in items if isinstance(item, ToolCall)]
        return {**({"content": text} if text else {}), **({"tool_calls": calls} if calls else {})}

    def _call(self, index: int, call: ToolCall) -> dict[str, Any]:
        number = self._num_calls[index]
        self._num_calls[index] += 1
        function = {"name": call.name, "arguments": call.arguments}
        return {"index": number, "id": new_id("call"), "type": "function", "function": function}
