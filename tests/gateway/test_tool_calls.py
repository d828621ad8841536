"""Tool calls, as the official client sees them, and the splitting of answers in any pieces."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from forkkv_cluster.core.errors import Unsupported
from forkkv_cluster.gateway.openai_api import build_http_app
from forkkv_cluster.gateway.tokenization import Tokenization
from forkkv_cluster.gateway.tool_calls import HERMES, LLAMA3, MISTRAL, Dialect, ToolCall, ToolCallStream, dialect_of
from tests.gateway.fakes import ByteTokenizer, FakePool, make_service

CALL = '{"name": "look_up", "arguments": {"word": "caf\u00e9"}}'
LOOK_UP = ToolCall("look_up", '{"word": "caf\u00e9"}')
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {"word": {}}}}}
]
ANSWERS = [
    (HERMES, f"Let me see.<tool_call>{CALL}</tool_call><tool_call>\n{CALL}\n</tool_call>", ["Let me see.", LOOK_UP, LOOK_UP]),
    (HERMES, "a < b <tool", ["a < b <tool"]),
    (HERMES, "<tool_call>not JSON</tool_call> after", ["<tool_call>not JSON</tool_call> after"]),
    (HERMES, f"<tool_call>{CALL}", [LOOK_UP]),
    (MISTRAL, f"[TOOL_CALLS][{CALL}, {CALL}]", [LOOK_UP, LOOK_UP]),
    (MISTRAL, "[TOOL_CALLS] [1]", ["[TOOL_CALLS] [1]"]),
    (LLAMA3, CALL.replace("arguments", "parameters"), [LOOK_UP]),
    (LLAMA3, "<|python_tag|>" + CALL, [LOOK_UP]),
    (LLAMA3, "{no call}", ["{no call}"]),
]


class HermesTokenizer(ByteTokenizer):
    """Its template shows tools before the conversation."""

    chat_template = "{{ tools }} <tool_call>"

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> str:
        names = [tool["function"]["name"] for tool in kwargs.get("tools") or []]
        calls = [call["function"]["arguments"] for message in conversation for call in message.get("tool_calls", [])]
        return f"{names}{calls}" + super().apply_chat_template(conversation)


def ask(answer: str, tokenizer: Any = None, **fields: Any) -> tuple[openai.OpenAI, FakePool, dict[str, Any]]:
    pool = FakePool(answer=answer.encode())
    service = make_service(pool)
    service.tokenization = Tokenization(tokenizer or HermesTokenizer())
    http = TestClient(build_http_app(lambda: service))
    client = openai.OpenAI(base_url="http://testserver/v1", api_key="none", max_retries=0, http_client=http)
    messages = [{"role": "user", "content": "hi"}]
    return client, pool, {"model": "planner", "messages": messages, "max_completion_tokens": 200, "tools": TOOLS, **fields}


def joined(items: list[str | ToolCall]) -> list[str | ToolCall]:
    """Neighbouring pieces of text as one."""
    result: list[str | ToolCall] = []
    for item in items:
        if isinstance(item, str) and result and isinstance(result[-1], str):
            result[-1] += item
        else:
            result.append(item)
    return result


@pytest.mark.parametrize(("dialect", "answer", "expected"), ANSWERS)
@given(data=st.data())
def test_an_answer_splits_alike_in_whatever_pieces_it_comes(
    data: st.DataObject, dialect: Dialect, answer: str, expected: list[str | ToolCall]
) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(answer)), max_size=8)))
    stream = ToolCallStream(dialect)
    pieces = [answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    assert joined([item for piece in pieces for item in stream.push(piece)] + stream.finish()) == expected


def test_a_call_comes_with_its_arguments_and_reason() -> None:
    client, pool, fields = ask(f"Well. <tool_call>{CALL}</tool_call>")
    choice = client.chat.completions.create(**fields).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Well. ")
    (call,) = choice.message.tool_calls or []
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == (
        "function",
        "look_up",
        {"word": "caf\u00e9"},
    )
    assert b"look_up" in bytes(pool.generated[0].tokens.tolist()[:20])
    assert pool.generated[0].sampling.guide is None


def test_a_streamed_call_adds_up() -> None:
    client, _, fields = ask(f"Well.<tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>")
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**fields, stream=True)]
    calls = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "Well."
    assert [(call.index, call.function.name) for call in calls] == [(0, "look_up"), (1, "look_up")]
    assert len({call.id for call in calls}) == 2
    assert chunks[-1].finish_reason == "tool_calls"


@pytest.mark.parametrize(
    ("choice", "answer"),
    [
        ("required", '[{"name": "look_up", "parameters": {"word": "x"}}]'),
        ({"type": "function", "function": {"name": "look_up"}}, '{"word": "x"}'),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_call_is_guided_and_read(choice: Any, answer: str, stream: bool) -> None:
    client, pool, fields = ask(answer, ByteTokenizer() if stream else None, tool_choice=choice)
    found = client.chat.completions.create(**fields, stream=stream)
    calls: Any = (
        [c for chunk in found for c in chunk.choices[0].delta.tool_calls or []]
        if stream
        else found.choices[0].message.tool_calls
    )
    assert [(call.function.name, call.function.arguments) for call in calls] == [("look_up", '{"word": "x"}')]
    guide = pool.generated[0].sampling.guide
    assert guide is not None
    schema = json.loads(guide.text)
    assert schema["type"] == ("array" if choice == "required" else "object")


def test_tool_choice_none_shows_no_tools() -> None:
    client, pool, fields = ask(f"<tool_call>{CALL}</tool_call>", tool_choice="none")
    choice = client.chat.completions.create(**fields).choices[0]
    assert (choice.finish_reason, choice.message.tool_calls) == ("stop", None)
    assert b"look_up" not in bytes(t for t in pool.generated[0].tokens.tolist() if t < 256)


def test_results_of_tools_reach_the_template() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": '{"word": "x"}'}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "y"},
    ]
    client, pool, fields = ask("fine", messages=messages)
    assert client.chat.completions.create(**fields).choices[0].message.content == "fine"
    assert b"{'word': 'x'}" in bytes(t for t in pool.generated[0].tokens.tolist() if t < 256)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name"),
    ],
)
def test_a_bad_choice_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    client, _, asked = ask("x", **fields)
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**asked)
    assert refused.value.param == param


def test_a_template_without_tools_is_refused_by_name() -> None:
    client, _, fields = ask("x", ByteTokenizer())
    with pytest.raises(openai.BadRequestError, match="chat template"):
        client.chat.completions.create(**fields)
    with pytest.raises(Unsupported):
        dialect_of("{{ tools }} in prose")
