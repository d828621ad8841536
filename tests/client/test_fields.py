"""What a caller may get wrong is an InvalidArgument that names the field, before anything is sent; sync and async alike."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

import pytest

from forkkv_cluster.api.v1 import sessions_pb2
from forkkv_cluster.client import (
    AsyncForkKVClient,
    AsyncSession,
    BranchInfo,
    BranchSpec,
    ForkKVClient,
    Session,
    SessionInfo,
    Sharing,
    messages,
)
from forkkv_cluster.client.fields import filled
from forkkv_cluster.core.errors import InvalidArgument, NotFound

NOBODY = "127.0.0.1:1"
INFO = SessionInfo(
    "session-1",
    "t",
    "",
    Sharing.EAGER,
    "canonical",
    0.0,
    3,
    ("planner",),
    (BranchInfo("p", "planner", Sharing.EAGER, 3, 0, 0),),
)

MISTAKES: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {
    "sharing of a session": ("sharing", lambda client, session: client.create_session("x", sharing="bogus")),
    "sharing of a prompt": ("sharing", lambda client, session: client.generate("x", sharing="bogus")),
    "sharing of a branch": ("sharing", lambda client, session: session.fork([BranchSpec("a", None, "bogus")])),  # type: ignore[arg-type]
    "what to join": ("what", lambda client, session: session.join("p", what="bogus")),
    "adapters as one text": ("adapters", lambda client, session: client.create_session("x", adapters="planner")),
    "a tenant that is no text": ("tenant", lambda client, session: client.create_session("x", tenant=5)),
    "a time to keep that is no number": ("keep_s", lambda client, session: client.create_session("x", keep_s="long")),
    "a document that is no text": ("document", lambda client, session: client.create_session(5)),
    "a prompt that is no text": ("prompt", lambda client, session: client.generate(5)),
    "half a character": ("prompt", lambda client, session: client.generate("\ud800")),
    "a branch that is no spec": ("branches", lambda client, session: session.fork(["p"])),
    "max_tokens beyond 32 bits": ("max_tokens", lambda client, session: client.generate("x", max_tokens=2**40)),
    "temperature as a word": ("temperature", lambda client, session: client.generate("x", temperature="hot")),
    "half a top_k": ("top_k", lambda client, session: session.branch("p").generate("x", top_k=1.5)),
    "a seed beyond 64 bits": ("seed", lambda client, session: session.branch("p").generate("x", seed=2**64)),
    "stop as one text": ("stop", lambda client, session: client.generate("x", stop="END")),
    "stop tokens as words": ("stop_token_ids", lambda client, session: client.generate("x", stop_token_ids=["END"])),
    "priority by a made-up name": ("priority", lambda client, session: client.generate("x", priority="urgent")),
    "a deadline that is no number": ("timeout_s", lambda client, session: client.generate("x", timeout_s=float("nan"))),
    "a deadline as a word": ("timeout_s", lambda client, session: client.generate("x", timeout_s="soon")),
    "a turn id that is no text": ("turn_id", lambda client, session: session.branch("p").generate("x", turn_id=7)),
    "a fork point beyond 32 bits": (
        "shared_prefix_tokens",
        lambda client, session: client.generate("x", sharing="eager", shared_prefix_tokens=2**40),
    ),
    "an adapter's path that is no text": ("path", lambda client, session: client.load_adapter("a", 5)),
    "a session id that is no text": ("session_id", lambda client, session: client.session(5)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_names_its_field_and_a_remedy(mistake: str) -> None:
    field, call = MISTAKES[mistake]
    with ForkKVClient(NOBODY) as client, pytest.raises(InvalidArgument) as caught:
        call(client, Session(client, INFO))
    assert caught.value.field == field
    assert caught.value.attributes["remedy"].endswith(".")
    assert caught.value.attributes["value"] in str(caught.value)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_async_client_refuses_the_same(mistake: str) -> None:
    field, call = MISTAKES[mistake]

    async def run() -> None:
        async with AsyncForkKVClient(NOBODY) as client:
            result = call(client, AsyncSession(client, INFO))
            if inspect.isawaitable(result):
                await result

    with pytest.raises(InvalidArgument) as caught:
        asyncio.run(run())
    assert caught.value.field == field


def test_a_branch_that_is_not_there_is_not_found() -> None:
    with ForkKVClient(NOBODY) as client, pytest.raises(NotFound, match=r"'q'.* p"):
        Session(client, INFO).branch("q")


def test_what_is_left_out_stays_absent_and_zeros_are_sent() -> None:
    message = filled(sessions_pb2.SamplingParams(), seed=0, max_tokens=None, stop=("a", "bc"))
    assert message.HasField("seed")
    assert not message.HasField("max_tokens")
    assert list(message.stop) == ["a", "bc"]


def test_every_sampling_option_reaches_the_wire() -> None:
    options: messages.GenerateOptions = {"temperature": 0.5, "top_k": 3, "top_p": 0.5, "stop": ["x"], "stop_token_ids": [7]}
    sampling = messages.turn_request("s", "b", "x", None, options).sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 3, 0.5)
    assert (list(sampling.stop), list(sampling.stop_token_ids)) == (["x"], [7])
