"""The two clients are one: same methods, same parameters."""

from __future__ import annotations

import inspect

import pytest

from forkkv_cluster.client import AsyncBranch, AsyncForkKVClient, AsyncSession, Branch, ForkKVClient, Session, messages
from forkkv_cluster.core.errors import InvalidArgument


def surface(cls: type) -> dict[str, list[tuple[str, object, object]]]:
    methods = inspect.getmembers(cls, inspect.isfunction)
    return {
        name: [(p.name, p.kind, p.default) for p in inspect.signature(method).parameters.values()]
        for name, method in methods
        if not name.startswith("_")
    }


@pytest.mark.parametrize(
    ("sync", "asynchronous"), [(ForkKVClient, AsyncForkKVClient), (Session, AsyncSession), (Branch, AsyncBranch)]
)
def test_sync_and_async_offer_the_same(sync: type, asynchronous: type) -> None:
    assert surface(sync) == surface(asynchronous)


def test_an_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="max_token"):
        messages.turn_request("s", "b", "x", None, {"max_token": 5})  # type: ignore[typeddict-unknown-key]


def test_text_and_tokens_exclude_each_other() -> None:
    with pytest.raises(InvalidArgument, match="token_ids"):
        messages.turn_request("s", "b", "x", [1], {})


def test_malformed_tokens_are_refused_before_they_are_sent() -> None:
    with pytest.raises(InvalidArgument, match="token_ids"):
        messages.turn_request("s", "b", None, [1, -5], {})
    with pytest.raises(InvalidArgument, match="token_ids"):
        messages.turn_request("s", "b", None, [0.5], {})  # type: ignore[list-item]


def test_a_deadline_in_the_past_is_refused_before_it_is_sent() -> None:
    with pytest.raises(InvalidArgument, match="timeout_s"):
        messages.turn_request("s", "b", "x", None, {"timeout_s": 0.0})
