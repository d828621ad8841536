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
from forkkv_cluster.gateway.tool_calls import HERMES, LLAMA3, MISTRAL, REQUIRED, Dialect, ToolCall, dialect_of, forced_call
from tests.gateway.fakes import ByteTokenizer, FakePool, make_service

CALL = '{"name": "look_up", "arguments": {"word": "caf\u00e9"}}'
LOOK_UP = ToolCall("look_up", '{"word": "caf\u00e9"}')
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {"word": {}}}}}
]
BARE = CALL.replace("arguments", "parameters")
TRICKY_CALL = '{"name": "look_up", "arguments": {"word": "a </tool_call> {b\\" [TOOL_CALLS]", "n": [-1.5e-3, true, null]}}'
TRICKY = ToolCall("look_up", '{"word": "a </tool_call> {b\\" [TOOL_CALLS]", "n": [-0.0015, true, null]}')
NAMED = forced_call(TOOLS, {"type": "function", "function": {"name": "look_up"}})[0]
ANSWERS = [
    (HERMES, f"Let me see.<tool_call>{CALL}</tool_call><tool_call>\n{CALL}\n</tool_call>", ["Let me see.", LOOK_UP, LOOK_UP]),
    (HERMES, f"\n<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", [LOOK_UP, LOOK_UP]),
    (HERMES, f"a\n<tool_call>{CALL}</tool_call> and <tool_call>{CALL}</tool_call>", ["a\n", LOOK_UP, " and ", LOOK_UP]),
    (HERMES, f"<tool_call>{TRICKY_CALL}</tool_call>", [TRICKY]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": "two\nlines"}}</tool_call>', [ToolCall("f", '{"a": "two\\nlines"}')]),
    (HERMES, "a < b <tool", ["a < b <tool"]),
    (HERMES, "<tool_call>not JSON</tool_call> after", ["<tool_call>not JSON</tool_call> after"]),
    (HERMES, '<tool_call>{"name": "f</tool_call>', ['<tool_call>{"name": "f</tool_call>']),
    (HERMES, f"<tool_call>[1]</tool_call><tool_call>{CALL}</tool_call>", ["<tool_call>[1]</tool_call>", LOOK_UP]),
    (HERMES, f"<tool_call>{CALL}", [LOOK_UP]),
    (HERMES, f"<tool_call>{CALL[:-9]}", [f"<tool_call>{CALL[:-9]}"]),
    (HERMES, "  \n ", ["  \n "]),
    (MISTRAL, f"[TOOL_CALLS][{CALL}, {CALL}]", [LOOK_UP, LOOK_UP]),
    (MISTRAL, f"[TOOL_CALLS] [{TRICKY_CALL}]", [TRICKY]),
    (MISTRAL, '[TOOL_CALLS]look_up{"word": "caf\u00e9"}[TOOL_CALLS]f[ARGS]{}', [LOOK_UP, ToolCall("f", "{}")]),
    (MISTRAL, f"Well. [TOOL_CALLS][{CALL}]", ["Well. ", LOOK_UP]),
    (MISTRAL, "[TOOL_CALLS] [1]", ["[TOOL_CALLS] [1]"]),
    (MISTRAL, " [TOOL_CALLS]", [" [TOOL_CALLS]"]),
    (HERMES, "\n<tool_call>no</tool_call>", ["\n<tool_call>no</tool_call>"]),
    (MISTRAL, "[TOOL_CALLS][{name: no}]", ["[TOOL_CALLS][{name: no}]"]),
    (LLAMA3, BARE, [LOOK_UP]),
    (LLAMA3, f" {BARE}; {BARE}", [LOOK_UP, LOOK_UP]),
    (LLAMA3, "<|python_tag|>" + CALL, [LOOK_UP]),
    (LLAMA3, "<|python_tag|>search(x)", ["<|python_tag|>search(x)"]),
    (LLAMA3, TRICKY_CALL, [TRICKY]),
    (LLAMA3, "{no call}", ["{no call}"]),
    (LLAMA3, '{"name": "Bob", "age": 3}', ['{"name": "Bob", "age": 3}']),
    (LLAMA3, BARE[:-4], [BARE[:-4]]),
    (LLAMA3, f"I would call {BARE}", [f"I would call {BARE}"]),
    (REQUIRED, f"[{BARE}, {BARE}]", [LOOK_UP, LOOK_UP]),
    (REQUIRED, f"[{BARE}, {BARE[:-5]}", [LOOK_UP, f", {BARE[:-5]}"]),
    (NAMED, '{"word": "x"}', [ToolCall("look_up", '{"word": "x"}')]),
    (NAMED, '{"word": "x', [ToolCall("look_up", '{"word": "x')]),
    (NAMED, "", []),
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
def test_an_answer_splits_alike_letter_by_letter_and_at_every_single_border(
    dialect: Dialect, answer: str, expected: list[str | ToolCall]
) -> None:
    for pieces in [[*answer], *([answer[:cut], answer[cut:]] for cut in range(len(answer)))]:
        stream = dialect.parser()
        assert joined([item for piece in pieces for item in stream.push(piece)] + stream.finish()) == expected


FRAGMENTS = [
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "<|python_tag|>",
    CALL,
    BARE,
    "{",
    "}",
    "[",
    "]",
    '"',
    ";",
    " ",
    "x",
    ",",
]


@pytest.mark.parametrize("dialect", [HERMES, MISTRAL, LLAMA3, REQUIRED])
@given(answer=st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join), sizes=st.lists(st.integers(1, 9), min_size=1))
def test_whatever_a_model_writes_it_splits_alike_in_any_pieces(dialect: Dialect, answer: str, sizes: list[int]) -> None:
    whole, pieces = dialect.parser(), dialect.parser()
    expected = joined(whole.push(answer) + whole.finish())
    found, start, number = [], 0, 0
    while start < len(answer):
        found += pieces.push(answer[start : start + sizes[number % len(sizes)]])
        start, number = start + sizes[number % len(sizes)], number + 1
    assert joined(found + pieces.finish()) == expected
    text = "".join(item for item in expected if isinstance(item, str))
    if not any(isinstance(item, ToolCall) for item in expected) and dialect is not REQUIRED:
        assert text == answer, "something that the model said was lost"


def test_an_answer_without_calls_is_not_held_back() -> None:
    for dialect in (HERMES, MISTRAL, LLAMA3):
        parser = dialect.parser()
        assert joined([item for word in ("The ", "river ", "rose.") for item in parser.push(word)]) == ["The river rose."]


def test_arguments_nested_without_end_are_text() -> None:
    for dialect in (HERMES, MISTRAL, LLAMA3, REQUIRED):
        parser = dialect.parser()
        answer = "<tool_call>" * (dialect is HERMES) + "[TOOL_CALLS]" * (dialect is MISTRAL) + '{"a":' * 100_000
        assert joined(parser.push(answer) + parser.finish()) == [answer]


def test_one_call_of_many_is_handed_on_where_calls_are_not_parallel() -> None:
    answer = f"<tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>"
    for stream in (False, True):
        client, _, fields = ask(answer, parallel_tool_calls=False)
        found: Any = client.chat.completions.create(**fields, stream=stream)
        calls = (
            [c for chunk in found for c in chunk.choices[0].delta.tool_calls or []]
            if stream
            else found.choices[0].message.tool_calls
        )
        assert [call.function.name for call in calls] == ["look_up"]
    client, pool, fields = ask("[]", tool_choice="required", parallel_tool_calls=False)
    client.chat.completions.create(**fields)
    assert pool.generated[0].sampling.guide is not None
    assert json.loads(pool.generated[0].sampling.guide.text)["maxItems"] == 1


@pytest.mark.parametrize(
    ("choice", "answer", "limit", "arguments"),
    [
        ({"type": "function", "function": {"name": "look_up"}}, '{"word": "x"}', 8, ['{"word":']),
        ("required", f"[{BARE}, {BARE}]", len(BARE.encode()) + 9, [LOOK_UP.arguments]),
    ],
)
def test_a_forced_call_that_is_cut_by_max_tokens_says_length_and_what_there_is(
    choice: Any, answer: str, limit: int, arguments: list[str]
) -> None:
    client, _, fields = ask(answer, tool_choice=choice)
    found = client.chat.completions.create(**{**fields, "max_completion_tokens": limit}).choices[0]
    assert found.finish_reason == "length"
    assert [call.function.arguments for call in found.message.tool_calls or []] == arguments  # type: ignore[union-attr]


def test_a_stop_string_ends_a_call_where_it_stands() -> None:
    client, _, fields = ask(f"Well.<tool_call>{CALL}</tool_call>", stop=["arguments"])
    choice = client.chat.completions.create(**fields).choices[0]
    assert (choice.finish_reason, choice.message.tool_calls) == ("stop", None)
    assert choice.message.content == 'Well.<tool_call>{"name": "look_up", "'


def test_chunks_of_a_call_that_is_not_complete_are_not_sent() -> None:
    client, _, fields = ask(f"<tool_call>{CALL}</tool_call>")
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**fields, stream=True)]
    assert len(chunks) == 3  # the role, the call, the end


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
