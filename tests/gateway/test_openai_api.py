"""The HTTP API over fake workers, as a client sees it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from forkkv_cluster.core.agreement import Agreement
from forkkv_cluster.core.errors import DeadlineExceeded, ResourceExhausted, Unavailable
from forkkv_cluster.core.request import Guide, GuideKind, Sharing
from forkkv_cluster.core.session import BranchSpec
from forkkv_cluster.core.verdict import PolicyAgreement, SharingVerdict, VerdictState
from forkkv_cluster.gateway.commands import CreateSessionCommand, TextOrTokens
from forkkv_cluster.gateway.openai_api import build_http_app
from forkkv_cluster.gateway.service import GatewayService
from tests.gateway.fakes import BOS, FakePool, make_service

TEXT = {"model": "tiny", "prompt": "hi", "max_tokens": 4, "temperature": 0}
CHAT = {"model": "planner", "messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 4}


@pytest.fixture
def pool() -> FakePool:
    return FakePool()


@pytest.fixture
def client(pool: FakePool) -> Iterator[TestClient]:
    service = make_service(pool)
    with TestClient(build_http_app(lambda: service)) as client:
        yield client


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_a_completion_has_text_reason_and_usage(client: TestClient) -> None:
    body = client.post("/v1/completions", json=TEXT).json()
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "finish_reason": "length", "logprobs": None, "text": "abcd"}]
    assert body["usage"]["prompt_tokens"] == 3
    assert body["usage"]["completion_tokens"] == 4
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    assert body["usage"]["forkkv"]["worker_ids"] == ["worker-1"]


@pytest.mark.parametrize("prompt", ["hi", ["hi"], [104, 105], [[104, 105]]])
def test_a_prompt_is_text_or_tokens(client: TestClient, pool: FakePool, prompt: Any) -> None:
    assert client.post("/v1/completions", json={**TEXT, "prompt": prompt}).status_code == 200
    assert pool.generated[0].tokens.tolist()[-2:] == [104, 105]


def test_a_chat_goes_through_the_template(client: TestClient, pool: FakePool) -> None:
    body = client.post("/v1/chat/completions", json=CHAT).json()
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "abcd", "refusal": None}
    assert pool.generated[0].tokens.tolist() == [BOS, *b"<user>hi<assistant>"]
    assert pool.generated[0].adapter is not None
    assert pool.generated[0].adapter.name == "planner"


def test_openai_defaults_hold(client: TestClient, pool: FakePool) -> None:
    client.post("/v1/completions", json={"model": "tiny", "prompt": "hi"})
    client.post("/v1/chat/completions", json={"model": "tiny", "messages": CHAT["messages"]})
    text, chat = (request.sampling for request in pool.generated)
    assert (text.temperature, text.top_p, text.max_tokens) == (1.0, 1.0, 16)
    assert chat.max_tokens == 128


def test_a_stream_ends_with_a_reason_usage_and_done(client: TestClient) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    found = events(client.post("/v1/chat/completions", json={**CHAT, **options}).text)
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in found[:-2]) == "abcd"
    assert found[-3]["choices"][0]["finish_reason"] == "length"
    assert found[-2]["choices"] == []
    assert found[-2]["usage"]["completion_tokens"] == 4
    assert found[-1] == "[DONE]"


def test_usage_streams_only_when_asked_for(client: TestClient) -> None:
    found = events(client.post("/v1/completions", json={**TEXT, "stream": True}).text)
    assert all("usage" not in event for event in found[:-1])


def test_stop_ends_the_text_before_it(client: TestClient) -> None:
    choice = client.post("/v1/completions", json={**TEXT, "stop": ["c"]}).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "stop")


def test_chat_logprobs_come_with_alternatives(client: TestClient) -> None:
    body = client.post("/v1/chat/completions", json={**CHAT, "logprobs": True, "top_logprobs": 2}).json()
    content = body["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["a", "b", "c", "d"]
    assert content[0]["bytes"] == [97]
    assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-0.5, -1.5]


def test_completion_logprobs_have_offsets(client: TestClient) -> None:
    logprobs = client.post("/v1/completions", json={**TEXT, "logprobs": 1}).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "c", "d"]
    assert logprobs["text_offset"] == [0, 1, 2, 3]
    assert logprobs["top_logprobs"][0] == {"a": -0.5}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"n": 0}, "n"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"presence_penalty": -3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"min_p": 1.5}, "min_p"),
        ({"min_tokens": 5}, "min_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 100000}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"nonsense": 1}, "nonsense"),
        ({"prompt": ["a"] * 1025}, "prompt"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"allowed_token_ids": [1]}, "allowed_token_ids"),
        ({"bad_words": ["x"]}, "bad_words"),
        ({"guided_grammar": "x"}, "guided_grammar"),
        ({"truncate_prompt_tokens": 3}, "truncate_prompt_tokens"),
        ({"priority": 1}, "priority"),
        ({"prompt": ""}, None),
        ({"prompt": [5, -1]}, "prompt[1]"),
        ({"prompt": None}, "prompt"),
        ({"sharing": "eager"}, "sharing"),
        ({"sharing": "sometimes"}, "sharing"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"logprobs": 99}, "logprobs"),
    ],
)
def test_a_bad_field_is_refused_by_name(client: TestClient, pool: FakePool, change: dict[str, Any], param: str | None) -> None:
    response = client.post("/v1/completions", json={**TEXT, **change})
    if param is None:  # An empty text still has its BOS token.
        assert response.status_code == 200
        return
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"].startswith(param)
    assert error["type"] == "invalid_request_error"
    assert pool.generated == []


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ('{"model": ', "body", "is not JSON"),
        ("\N{SNOWMAN}", "body", "is not JSON"),
        ("", "body", "is missing"),
        ("[1]", "body", "valid dictionary"),
        ('{"prompt": "x"}', "model", "is missing"),
        ('{"model": "tiny"}', "prompt", "is missing"),
        ('{"model": "tiny", "prompt": 5}', "prompt", "is neither text nor a list of token ids"),
        ('{"model": "tiny", "prompt": [1.5]}', "prompt", "is not a flat list of integers"),
        ('{"model": "tiny", "prompt": [1, "a"]}', "prompt", "is not a flat list of integers"),
        ('{"model": "tiny", "prompt": [null]}', "prompt", "is not a flat list of integers"),
        ('{"model": "tiny", "prompt": "\\ud800"}', "text", "UTF-8"),
        ('{"model": "tiny", "prompt": "x", "guided_json": 5}', "guided_json", "valid dictionary"),
        ('{"model": "tiny", "prompt": "x", "logit_bias": {"a": 1}}', "logit_bias.a", "valid integer"),
    ],
)
def test_a_malformed_body_is_refused_with_the_field_that_was_sent(
    client: TestClient, body: str, param: str, message: str
) -> None:
    response = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert message in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_unexpected_error_is_told_in_openais_words(pool: FakePool, stream: bool) -> None:
    pool.errors = [RuntimeError("a bug")]
    service = make_service(pool)
    with TestClient(build_http_app(lambda: service), raise_server_exceptions=False) as client:
        response = client.post("/v1/completions", json={**TEXT, "stream": stream})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal"
    assert "RuntimeError: a bug" in response.json()["error"]["message"]


def test_an_unexpected_error_in_the_middle_of_a_stream_is_its_last_event(client: TestClient, pool: FakePool) -> None:
    pool.break_after = 2
    found = events(client.post("/v1/completions", json={**TEXT, "stream": True}).text)
    assert found[-1]["error"]["code"] == "internal"
    assert "[DONE]" not in found


def test_penalties_and_bias_reach_the_worker(client: TestClient, pool: FakePool) -> None:
    fields = {"min_p": 0.1, "presence_penalty": 0.5, "frequency_penalty": -1, "repetition_penalty": 1.2, "min_tokens": 2}
    assert client.post("/v1/completions", json={**TEXT, **fields, "logit_bias": {"9": -3, "5": 1}}).status_code == 200
    sampling = pool.generated[0].sampling
    assert {name: getattr(sampling, name) for name in fields} == fields
    assert sampling.logit_bias == ((5, 1.0), (9, -3.0))


def test_choices_are_numbered_and_the_prompt_counts_once(client: TestClient, pool: FakePool) -> None:
    body = client.post("/v1/completions", json={**TEXT, "n": 3}).json()
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [(0, "abcd"), (1, "abcd"), (2, "abcd")]
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (3, 12)
    assert body["usage"]["forkkv"]["prefill_tokens_run"] == 3
    assert [request.sampling.choice for request in pool.generated] == [0, 1, 2]
    assert len({request.sampling.seed for request in pool.generated}) == 1
    assert len({request.request_id for request in pool.generated}) == 3


def test_streamed_choices_each_add_up_and_end(client: TestClient) -> None:
    options = {"n": 2, "stream": True, "stream_options": {"include_usage": True}}
    found = events(client.post("/v1/chat/completions", json={**CHAT, **options}).text)
    assert found[-1] == "[DONE]"
    assert found[-2]["usage"]["completion_tokens"] == 8
    chunks = [event["choices"][0] for event in found[:-2]]
    for index in range(2):
        own = [chunk for chunk in chunks if chunk["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert "".join(chunk["delta"].get("content", "") for chunk in own) == "abcd"
        assert [chunk["finish_reason"] for chunk in own if chunk["finish_reason"]] == ["length"]


def test_one_choice_that_fails_ends_them_all(client: TestClient, pool: FakePool) -> None:
    pool.die_after = [9, 0, 0, 0, 0, 0, 0, 0]
    assert client.post("/v1/completions", json={**TEXT, "n": 2}).status_code == 503
    assert pool.num_open == 0


def test_adapters_load_and_unload_with_vllms_names(client: TestClient) -> None:
    loaded = client.post("/v1/load_lora_adapter", json={"lora_name": "late", "lora_path": "/adapters/late"})
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'late' added successfully.")
    assert client.post("/v1/completions", json={**TEXT, "model": "late"}).status_code == 200
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "late"}).status_code == 200
    assert client.post("/v1/completions", json={**TEXT, "model": "late"}).status_code == 404
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "late"}).status_code == 404
    assert client.post("/v1/load_lora_adapter", json={"lora_name": "late"}).json()["error"]["param"] == "lora_path"


def test_an_adapter_may_be_loaded_to_be_measured(client: TestClient, pool: FakePool) -> None:
    body = {"lora_name": "late", "lora_path": "/adapters/late"}
    assert client.post("/v1/load_lora_adapter", json={**body, "sharing": "auto"}).status_code == 200
    assert pool.adapters["late"].sharing is Sharing.AUTO
    refused = client.post("/v1/load_lora_adapter", json={**body, "sharing": "some"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "sharing")


def test_the_list_of_models_and_usage_say_how_auto_is_served(client: TestClient, pool: FakePool) -> None:
    measured = (PolicyAgreement(Sharing.EAGER, Agreement(2000, 4, 1.0)),)
    verdict = SharingVerdict(Sharing.EAGER, VerdictState.MEASURED, Sharing.ISOLATED, "because", 0.02, measured, "some", 3.0)
    pool.adapters["planner"] = replace(pool.adapters["planner"], verdict=verdict)
    listed = {entry["id"]: entry for entry in client.get("/v1/models").json()["data"]}
    said = listed["planner"]["forkkv"]["verdict"]
    assert (said["sharing"], said["state"], said["reason"]) == ("eager", "measured", "because")
    assert said["measured"]["eager"]["disagreement"] == 0.002
    assert listed["critic"]["forkkv"]["verdict"] is None
    request = {**TEXT, "model": "planner", "sharing": "auto", "shared_prefix_tokens": 2}
    assert client.post("/v1/completions", json=request).json()["usage"]["forkkv"]["sharing"] == "eager"


@pytest.mark.parametrize(
    ("field", "guide"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Guide(GuideKind.JSON_SCHEMA, '{"type": "object"}')),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "string"}}}},
            Guide(GuideKind.JSON_SCHEMA, '{"type": "string"}'),
        ),
        ({"guided_json": {"type": "string"}}, Guide(GuideKind.JSON_SCHEMA, '{"type": "string"}')),
        ({"guided_regex": "[a-z]+"}, Guide(GuideKind.REGEX, "[a-z]+")),
    ],
)
def test_a_guide_reaches_the_worker(client: TestClient, pool: FakePool, field: dict[str, Any], guide: Guide | None) -> None:
    assert client.post("/v1/chat/completions", json={**CHAT, **field}).status_code == 200
    assert pool.generated[0].sampling.guide == guide


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
    ],
)
def test_a_bad_guide_is_refused_by_name(client: TestClient, field: dict[str, Any], param: str) -> None:
    response = client.post("/v1/chat/completions", json={**CHAT, **field})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_harmless_fields_are_taken(client: TestClient) -> None:
    extra = {"n": 1, "user": "me", "presence_penalty": 0, "logit_bias": {}, "best_of": None}
    assert client.post("/v1/completions", json={**TEXT, **extra}).status_code == 200


def test_images_are_refused_by_name(client: TestClient) -> None:
    message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    response = client.post("/v1/chat/completions", json={**CHAT, "messages": [message]})
    assert response.status_code == 400
    assert "image_url" in response.json()["error"]["message"]


def test_an_unknown_model_is_not_found(client: TestClient) -> None:
    response = client.post("/v1/completions", json={**TEXT, "model": "nobody"})
    assert response.status_code == 404
    assert "planner" in response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ResourceExhausted("full", 2.0), 429),
        (Unavailable("no worker"), 503),
        (DeadlineExceeded("late"), 504),
    ],
)
def test_a_workers_refusal_has_its_status(
    client: TestClient, pool: FakePool, error: Exception, status: int, stream: bool
) -> None:
    pool.errors = [error]
    response = client.post("/v1/completions", json={**TEXT, "stream": stream})
    assert response.status_code == status
    assert response.headers.get("Retry-After") == ("2" if status == 429 else None)


def test_an_error_in_the_middle_of_a_stream_is_its_last_event(client: TestClient, pool: FakePool) -> None:
    pool.die_after = [2, 0, 0, 0]
    found = events(client.post("/v1/completions", json={**TEXT, "stream": True}).text)
    assert found[-1]["error"]["code"] == "unavailable"
    assert "[DONE]" not in found


def test_models_are_the_base_and_its_adapters(client: TestClient) -> None:
    data = client.get("/v1/models").json()["data"]
    assert [(model["id"], model["parent"]) for model in data] == [("tiny", None), ("critic", "tiny"), ("planner", "tiny")]


def test_tokens_and_text_turn_into_each_other(client: TestClient) -> None:
    body = client.post("/tokenize", json={"prompt": "hé"}).json()
    assert body == {"count": 4, "max_model_len": 512, "tokens": [BOS, *"hé".encode()]}
    assert client.post("/detokenize", json={"tokens": body["tokens"][1:]}).json() == {"prompt": "hé"}
    assert client.post("/tokenize", json={}).status_code == 400


def test_health_version_and_metrics_answer(client: TestClient) -> None:
    assert client.get("/health").status_code == 200
    assert client.get("/version").json() == {"version": "1.2.3"}
    text = client.get("/metrics").text
    assert "forkkv_workers 1.0" in text


def test_a_token_is_needed_where_the_server_names_some(pool: FakePool) -> None:
    config = {"gateway": {"session_store": "memory:", "api_tokens": {"secret": "tenant"}}}
    service = make_service(pool, config=config)
    client = TestClient(build_http_app(lambda: service))
    assert client.post("/v1/completions", json=TEXT).status_code == 401
    assert client.get("/health").status_code == 200
    headers = {"Authorization": "Bearer secret"}
    assert client.post("/v1/completions", json=TEXT, headers=headers).status_code == 200
    assert pool.generated[0].tenant == "tenant"


async def _forked(service: GatewayService) -> str:
    session = await service.create_session(None, CreateSessionCommand(TextOrTokens(text="doc"), ("planner",)))
    await service.fork(None, session.session_id, (BranchSpec("p", "planner"),), None)
    return session.session_id


def test_a_branch_runs_the_request_as_a_turn(pool: FakePool) -> None:
    service = make_service(pool)
    with TestClient(build_http_app(lambda: service)) as client:
        session_id = client.portal.call(_forked, service)  # type: ignore[union-attr]
        body = {**CHAT, "branch": {"session": session_id, "branch": "p"}}
        first, second = (client.post("/v1/chat/completions", json=body).json() for _ in range(2))
        assert pool.generated[0].tokens.tolist() == [BOS, *b"doc<user>hi<assistant>"]
        assert second["usage"]["prompt_tokens"] == 2 * first["usage"]["prompt_tokens"] + 4 - len("doc") - 1
        other = client.post("/v1/chat/completions", json={**body, "model": "tiny"})
        assert (other.status_code, other.json()["error"]["param"]) == (400, "model")
        twice = client.post("/v1/chat/completions", json={**body, "n": 2})
        assert (twice.status_code, twice.json()["error"]["param"]) == (400, "n")
        shared = client.post("/v1/chat/completions", json={**body, "sharing": "eager"})
        assert (shared.status_code, shared.json()["error"]["param"]) == (400, "sharing")
