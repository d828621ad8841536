"""How the clients connect: options of the channel, metadata of every call, and the deadline of a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from forkkv_cluster.api.v1 import adapters_pb2_grpc, cluster_pb2_grpc, sessions_pb2_grpc

CHANNEL_OPTIONS: Sequence[tuple[str, int]] = (
    # A context of some 100k token ids, or a listing with tokens, is larger than gRPC's 4 MiB.
    ("grpc.max_receive_message_length", 64 * 2**20),
    ("grpc.max_send_message_length", 64 * 2**20),
)

DEADLINE_GRACE_S = 5.0
"""The server ends a late request itself and says so; the call's own deadline comes this much later, as a backstop."""


def call_metadata(token: str | None, app_name: str | None) -> tuple[tuple[str, str], ...]:
    """``app_name`` is needed only where one Serve instance runs several applications."""
    authorization = (("authorization", f"Bearer {token}"),) if token else ()
    application = (("application", app_name),) if app_name else ()
    return (*authorization, *application)


def call_timeout(timeout_s: float | None) -> float | None:
    return None if timeout_s is None else timeout_s + DEADLINE_GRACE_S


@dataclass(frozen=True, slots=True)
class Stubs:
    """The generated stubs, which have no types, over one channel of either kind."""

    sessions: Any
    adapters: Any
    cluster: Any


def make_stubs(channel: Any) -> Stubs:
    session_stub: Any = sessions_pb2_grpc.SessionServiceStub
    adapter_stub: Any = adapters_pb2_grpc.AdapterServiceStub
    cluster_stub: Any = cluster_pb2_grpc.ClusterServiceStub
    return Stubs(session_stub(channel), adapter_stub(channel), cluster_stub(channel))
