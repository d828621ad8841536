"""Prompts in lists, prompts echoed, prompts scored: /v1/completions and its neighbours over fake workers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from forkkv_cluster.core.errors import InvalidArgument, Unavailable
from forkkv_cluster.core.request import Guide, GuideKind
from forkkv_cluster.gateway.openai_api import build_http_app
from forkkv_cluster.gateway.openai_types import CompletionRequest
from forkkv_cluster.gateway.tokenization import Tokenization
from tests.gateway.fakes import BOS, ByteTokenizer, FakePool, make_service
from tests.gateway.test_openai_api import CHAT, TEXT, events


@pytest.fixture
def pool() -> FakePool:
    return FakePool()


@pytest.fixture
def client(pool: FakePool) -> Iterator[TestClient]:
    service = make_service(pool)
    with TestClient(build_http_app(lambda: service)) as client:
        yield client


def complete(client: TestClient, **fields: Any) -> Any:
    response = client.post("/v1/completions", json={**TEXT, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def streamed(client: TestClient, **fields: Any) -> dict[int, list[Any]]:
    """The choices' chunks, by index."""
    found: dict[int, list[Any]] = {}
    for event in events(client.post("/v1/completions", json={**TEXT, **fields, "stream": True}).text):
        if event != "[DONE]":
            for choice in event["choices"]:
                found.setdefault(choice["index"], []).append(choice)
    return found


def joined(chunks: list[Any]) -> tuple[str, dict[str, Any]]:
    """Text and log probabilities of one choice's chunks."""
    logprobs: dict[str, Any] = {}
    for part in (chunk["logprobs"] for chunk in chunks if chunk["logprobs"]):
        for name, values in part.items():
            logprobs.setdefault(name, []).extend(values)
    return "".join(chunk["text"] for chunk in chunks), logprobs


@pytest.mark.parametrize("prompt", [["hi", "you"], [[104, 105], [121, 111, 117]]])
def test_each_prompt_of_a_list_has_its_choices(client: TestClient, pool: FakePool, prompt: Any) -> None:
    body = complete(client, prompt=prompt, n=2)
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [(i, "abcd") for i in range(4)]
    has_bos = isinstance(prompt[0], str)
    tails = {tuple(request.tokens.tolist()): [] for request in pool.generated}
    for request in pool.generated:
        tails[tuple(request.tokens.tolist())].append(request.sampling.choice)
    assert tails == {(*[BOS] * has_bos, *b"hi"): [0, 1], (*[BOS] * has_bos, *b"you"): [0, 1]}
    assert body["usage"]["prompt_tokens"] == 5 + 2 * has_bos
    assert body["usage"]["completion_tokens"] == 16
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 4


def test_prompts_of_a_list_stream_side_by_side(client: TestClient) -> None:
    found = streamed(client, prompt=["hi", "you", "all"])
    assert {index: joined(chunks)[0] for index, chunks in found.items()} == {0: "abcd", 1: "abcd", 2: "abcd"}
    assert all(chunks[-1]["finish_reason"] == "length" for chunks in found.values())


def test_one_prompt_that_fails_fails_the_request_and_leaves_nothing_running(client: TestClient, pool: FakePool) -> None:
    pool.errors = [Unavailable("gone")]
    assert client.post("/v1/completions", json={**TEXT, "prompt": ["hi", "you"]}).status_code == 503
    assert pool.num_open == 0


@pytest.mark.parametrize("prompt", ["hi", [104, 105]])
def test_an_echo_stands_before_every_choice(client: TestClient, prompt: Any) -> None:
    body = complete(client, prompt=prompt, echo=True, n=2)
    assert [choice["text"] for choice in body["choices"]] == ["hiabcd", "hiabcd"]
    assert body["usage"]["completion_tokens"] == 8
    found = streamed(client, prompt=prompt, echo=True, n=2)
    assert [joined(found[index])[0] for index in (0, 1)] == ["hiabcd", "hiabcd"]


def test_an_echo_with_logprobs_scores_the_prompt_first(client: TestClient, pool: FakePool) -> None:
    fields = {"prompt": [104, 105, 106], "echo": True, "logprobs": 1, "n": 2}
    expected = {
        "tokens": ["h", "i", "j", "a", "b", "c", "d"],
        "token_logprobs": [None, -1.0, -2.0, -0.5, -0.5, -0.5, -0.5],
        "top_logprobs": [None, {"z": -0.25}, {"z": -0.25}, {"a": -0.5}, {"b": -0.5}, {"c": -0.5}, {"d": -0.5}],
        "text_offset": [0, 1, 2, 3, 4, 5, 6],
    }
    for choice in complete(client, **fields)["choices"]:
        assert choice["logprobs"] == expected
    assert [request.sampling.prompt_logprobs for request in pool.generated] == [1, None]  # scored once for both
    for chunks in streamed(client, **fields).values():
        assert joined(chunks) == ("hijabcd", expected)


def test_an_echo_without_an_answer_scores_the_prompt_alone(client: TestClient, pool: FakePool) -> None:
    fields = {"prompt": [[104, 105], [106]], "echo": True, "logprobs": 0, "max_tokens": 0}
    body = complete(client, **fields)
    assert [choice["text"] for choice in body["choices"]] == ["hi", "j"]
    assert body["choices"][0]["logprobs"]["token_logprobs"] == [None, -1.0]
    assert body["choices"][0]["logprobs"]["top_logprobs"] == [None, {}]
    assert body["choices"][1]["logprobs"]["token_logprobs"] == [None]
    assert {choice["finish_reason"] for choice in body["choices"]} == {"length"}
    assert body["usage"]["completion_tokens"] == 0
    assert {request.sampling.max_tokens for request in pool.generated} == {1}
    assert {index: joined(chunks)[0] for index, chunks in streamed(client, **fields).items()} == {0: "hi", 1: "j"}


def test_prompt_logprobs_are_in_vllms_form(client: TestClient) -> None:
    (choice,) = complete(client, prompt=[104, 105, 122], prompt_logprobs=2)["choices"]
    z, other = {"logprob": -0.25, "rank": 1, "decoded_token": "z"}, {"logprob": -3.0, "rank": 2, "decoded_token": "\x07"}
    assert choice["prompt_logprobs"] == [
        None,
        {"105": {"logprob": -1.0, "rank": 2, "decoded_token": "i"}, "122": z, "7": other},
        {"122": {"logprob": -2.0, "rank": 2, "decoded_token": "z"}, "7": other},
    ]
    assert choice["text"] == "abcd"


def test_those_of_a_chat_stand_beside_its_choices(client: TestClient) -> None:
    body = client.post("/v1/chat/completions", json={**CHAT, "prompt_logprobs": 0}).json()
    assert len(body["prompt_logprobs"]) == body["usage"]["prompt_tokens"]
    assert body["prompt_logprobs"][0] is None
    assert "prompt_logprobs" not in client.post("/v1/chat/completions", json=CHAT).json()


def test_over_a_shared_prefix_only_what_the_request_runs_is_scored(client: TestClient) -> None:
    fields = {"model": "planner", "sharing": "eager", "shared_prefix_tokens": 2, "prompt": [104, 105, 106, 107]}
    (choice,) = complete(client, **fields, prompt_logprobs=0)["choices"]
    assert [entry is None for entry in choice["prompt_logprobs"]] == [True, True, True, False]
    (choice,) = complete(client, **fields, echo=True, logprobs=0)["choices"]
    assert choice["logprobs"]["tokens"] == ["h", "i", "j", "k", "a", "b", "c", "d"]
    assert choice["logprobs"]["token_logprobs"][:4] == [None, None, None, -3.0]


def test_a_worker_lost_before_the_first_token_leaves_the_prompt_scored_once(client: TestClient, pool: FakePool) -> None:
    pool.die_after = [0]
    (choice,) = complete(client, prompt=[104, 105, 106, 107], echo=True, logprobs=0)["choices"]
    assert len(pool.generated) == 2
    assert choice["logprobs"]["tokens"] == ["h", "i", "j", "k", "a", "b", "c", "d"]


def test_offsets_go_on_from_chunk_to_chunk(client: TestClient) -> None:
    assert joined(streamed(client, logprobs=0)[0])[1]["text_offset"] == [0, 1, 2, 3]


@pytest.mark.parametrize(("is_included", "text"), [(False, "a"), (True, "abc")])
def test_a_stop_string_is_in_the_text_where_that_is_asked_for(client: TestClient, is_included: bool, text: str) -> None:
    (choice,) = complete(client, stop="bc", include_stop_str_in_output=is_included)["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text, "stop")


def test_stop_strings_wait_for_min_tokens(client: TestClient) -> None:
    (choice,) = complete(client, stop=["a", "d"], min_tokens=2)["choices"]
    assert choice["text"] == "abc"


def test_tokens_can_stand_for_themselves(client: TestClient) -> None:
    (choice,) = complete(client, logprobs=1, return_tokens_as_token_ids=True)["choices"]
    assert choice["logprobs"]["tokens"][:2] == ["token_id:97", "token_id:98"]


def test_special_tokens_are_left_away_where_that_is_asked_for(client: TestClient, pool: FakePool) -> None:
    complete(client, add_special_tokens=False)
    assert pool.generated[0].tokens.tolist() == [104, 105]
    complete(client, skip_special_tokens=False)
    assert not pool.generated[1].sampling.skip_special_tokens


@pytest.mark.parametrize(
    ("fields", "guide"),
    [
        ({"guided_choice": ["a.b", "c"]}, Guide(GuideKind.REGEX, r"(?:a\.b)|(?:c)")),
        ({"structured_outputs": {"choice": ["yes"]}}, Guide(GuideKind.REGEX, "(?:yes)")),
        ({"structured_outputs": {"regex": "a+", "json": None}}, Guide(GuideKind.REGEX, "a+")),
        ({"structured_outputs": {"json": '{"type": "null"}'}}, Guide(GuideKind.JSON_SCHEMA, '{"type": "null"}')),
        ({"structured_outputs": {"json_object": True}}, Guide(GuideKind.JSON_SCHEMA, '{"type": "object"}')),
        ({"structured_outputs": {}}, None),
    ],
)
def test_vllms_names_of_a_guide_reach_the_worker(
    client: TestClient, pool: FakePool, fields: dict[str, Any], guide: Guide | None
) -> None:
    complete(client, **fields)
    assert pool.generated[0].sampling.guide == guide


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_choice": []}, "guided_choice"),
        ({"structured_outputs": {"grammar": "x"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"regex": "x", "choice": ["a"]}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "x"}, "guided_regex": "y"}, "structured_outputs"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(client: TestClient, fields: dict[str, Any], param: str) -> None:
    response = client.post("/v1/completions", json={**TEXT, **fields})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_a_chat_template_reads_what_it_is_given(client: TestClient, pool: FakePool) -> None:
    client.post("/v1/chat/completions", json={**CHAT, "chat_template_kwargs": {"mood": "calm"}})
    assert bytes(pool.generated[0].tokens.tolist()[1:]).startswith(b"calm<user>")
    refused = client.post("/v1/chat/completions", json={**CHAT, "chat_template_kwargs": {"tokenize": True}})
    assert refused.json()["error"]["param"] == "chat_template_kwargs.tokenize"


def test_fields_that_change_no_answer_are_taken(client: TestClient) -> None:
    ignored = {"user": "u", "request_id": "r", "prompt_cache_key": "k", "safety_identifier": "s", "priority": 0}
    complete(client, **ignored, best_of=1, use_beam_search=False, spaces_between_special_tokens=True)


@pytest.mark.parametrize(("fields", "field"), [({"echo": True}, "echo"), ({"prompt": ["a", "b"]}, "prompt")])
def test_a_branch_has_one_prompt_and_no_echo(fields: dict[str, Any], field: str) -> None:
    body = CompletionRequest(**{**TEXT, "branch": {"session": "s", "branch": "b"}, **fields})
    with pytest.raises(InvalidArgument, match=field):
        body.commands(None, Tokenization(ByteTokenizer()))
