"""Who calls, and whose pages they are."""

from __future__ import annotations

import pytest

from forkkv_cluster.core.errors import InvalidArgument, Unauthenticated
from forkkv_cluster.gateway.identity import acting_tenant, authenticate, page_namespace

TOKENS = {"secret-a": "tenant-a", "secret-b": "tenant-b"}


def test_an_open_server_trusts_everybody() -> None:
    assert authenticate({}, None) is None
    assert acting_tenant(None, "anybody") == "anybody"
    assert acting_tenant(None, "") == "default"


def test_a_token_stands_for_its_tenant() -> None:
    assert authenticate(TOKENS, "Bearer secret-b") == "tenant-b"
    assert authenticate(TOKENS, "bearer secret-a") == "tenant-a"


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic secret-a", "secret-a"])
def test_without_a_known_token_nobody_comes_in(header: str | None) -> None:
    with pytest.raises(Unauthenticated):
        authenticate(TOKENS, header)


def test_a_caller_cannot_act_for_another_tenant() -> None:
    assert acting_tenant("tenant-a", "tenant-a") == "tenant-a"
    with pytest.raises(InvalidArgument, match="tenant-b"):
        acting_tenant("tenant-a", "tenant-b")


def test_tenants_groups_and_servers_have_namespaces_of_their_own() -> None:
    namespaces = {
        page_namespace("salt", "a"),
        page_namespace("salt", "b"),
        page_namespace("salt", "a", "a"),
        page_namespace("salt", "a", "b"),
        page_namespace("other", "a"),
    }
    assert len(namespaces) == 5


def test_tenants_that_name_one_group_share_its_namespace() -> None:
    assert page_namespace("salt", "a", "team") == page_namespace("salt", "b", "team")
