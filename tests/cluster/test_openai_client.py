"""The official ``openai`` client against the HTTP API."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from forkkv_cluster.app import RunningCluster
from forkkv_cluster.client import BranchSpec, ForkKVClient
from tests.cluster.helpers import is_idle, opened, wait_until_idle

pytestmark = pytest.mark.cluster


@pytest.fixture
def http(serve_cluster: RunningCluster, client: ForkKVClient) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{serve_cluster.http_url}/v1", api_key="none", max_retries=0, timeout=60.0) as http:
        yield http


def test_models_are_listed(http: openai.OpenAI, serve_cluster: RunningCluster) -> None:
    ids = [model.id for model in http.models.list()]
    assert ids[0] == serve_cluster.config.model.name
    assert set(ids[1:]) >= {"planner", "critic", "coder", "tester"}


def test_a_completion_is_that_of_the_sdk(http: openai.OpenAI, client: ForkKVClient) -> None:
    found = http.completions.create(model="planner", prompt="Once upon", max_tokens=12, temperature=0)
    assert found.choices[0].text == client.generate("Once upon", adapter="planner", max_tokens=12).text
    assert found.usage is not None
    assert found.usage.completion_tokens == 12


def test_a_stream_adds_up_to_the_whole(http: openai.OpenAI) -> None:
    ask = {"model": "critic", "messages": [{"role": "user", "content": "Why?"}], "max_completion_tokens": 12, "temperature": 0}
    whole = http.chat.completions.create(**ask)  # type: ignore[call-overload]
    chunks = list(http.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))  # type: ignore[call-overload]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 12
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"


def test_the_second_prompt_finds_the_first_in_the_cache(http: openai.OpenAI, client: ForkKVClient) -> None:
    prompt = "A prompt of its own for this one test. " * 10
    for _ in range(2):
        found = http.completions.create(model="tester", prompt=prompt, max_tokens=1)
        wait_until_idle(client)
    assert found.usage is not None
    assert found.usage.prompt_tokens_details is not None
    assert (found.usage.prompt_tokens_details.cached_tokens or 0) >= found.usage.prompt_tokens - 17


def test_logprobs_are_probabilities(http: openai.OpenAI) -> None:
    found = http.chat.completions.create(
        model="planner",
        messages=[{"role": "user", "content": "Hi"}],
        max_tokens=3,
        logprobs=True,
        top_logprobs=2,
        temperature=0,
    )
    logprobs = found.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 3
    for entry in logprobs.content:
        assert entry.logprob <= 0
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob)


def test_an_echoed_prompt_has_the_probabilities_of_its_prompt_logprobs(http: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "planner", "prompt": [[5, 6, 7, 8], [9, 10]], "temperature": 0}
    echoed = http.completions.create(**fields, max_tokens=0, echo=True, logprobs=1)
    scored = http.completions.create(**fields, max_tokens=1, extra_body={"prompt_logprobs": 1})
    for one, other in zip(echoed.choices, scored.choices, strict=True):
        assert one.logprobs is not None
        assert one.logprobs.token_logprobs is not None
        first, *rest = other.model_extra["prompt_logprobs"]  # type: ignore[index]
        assert first is None
        assert one.logprobs.token_logprobs[0] is None
        assert one.logprobs.token_logprobs[1:] == pytest.approx([next(iter(entry.values()))["logprob"] for entry in rest])
    assert echoed.usage is not None
    assert echoed.usage.completion_tokens == 0


def test_prompts_of_one_request_do_not_wait_for_each_other_for_ever(http: openai.OpenAI) -> None:
    prompts = [[5 + number, 6, 7] for number in range(4)]
    for _ in range(10):
        found = http.completions.create(model="critic", prompt=prompts, max_tokens=2, n=2, temperature=0)
        assert [choice.index for choice in found.choices] == list(range(8))


def test_stop_and_seed_do_what_they_say(http: openai.OpenAI) -> None:
    ask = {"model": "planner", "prompt": "Once", "max_tokens": 24, "temperature": 1.0, "seed": 5}
    first, again = (http.completions.create(**ask).choices[0].text for _ in range(2))  # type: ignore[call-overload]
    assert first == again
    stop = first[len(first) // 2 : len(first) // 2 + 2]
    cut = http.completions.create(**ask, stop=[stop]).choices[0]  # type: ignore[call-overload]
    assert cut.text == first[: first.index(stop)]
    assert cut.finish_reason == "stop"


def test_a_branch_runs_the_turn(http: openai.OpenAI, client: ForkKVClient) -> None:
    with opened(client) as session:
        session.fork([BranchSpec("p", "planner")])
        found = http.chat.completions.create(
            model="planner",
            messages=[{"role": "user", "content": "And then?"}],
            max_completion_tokens=4,
            extra_body={"branch": {"session": session.session_id, "branch": "p"}},
        )
        assert found.usage is not None
        assert found.usage.prompt_tokens > session.info.num_context_tokens
        (branch,) = session.refresh().branches
        assert branch.num_turns == 1


def test_mistakes_have_the_exceptions_of_openai(http: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="nobody"):
        http.completions.create(model="nobody", prompt="x")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        http.completions.create(model="planner", prompt="x", temperature=-1)
    with pytest.raises(openai.BadRequestError, match="n=0"):
        http.completions.create(model="planner", prompt="x", n=0)
    with pytest.raises(openai.APIStatusError) as caught:
        http.completions.create(model="planner", prompt="x", max_tokens=4000, extra_body={"timeout_s": 0.2})
    assert caught.value.status_code == 504


def test_a_stream_that_is_closed_frees_what_it_held(http: openai.OpenAI, client: ForkKVClient) -> None:
    stream = http.completions.create(
        model="planner", prompt="Once", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert not is_idle(client)
    stream.close()
    wait_until_idle(client)


def test_the_operators_pages_answer(serve_cluster: RunningCluster, client: ForkKVClient) -> None:
    with httpx.Client(base_url=serve_cluster.http_url, timeout=30.0) as http:
        assert http.get("/health").json() == {"status": "ok"}
        assert http.get("/version").json()["version"]
        metrics = http.get("/metrics").text
        assert "forkkv_workers 2.0" in metrics
        tokens = http.post("/tokenize", json={"prompt": "Hello", "add_special_tokens": False}).json()["tokens"]
        assert http.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": "Hello"}
