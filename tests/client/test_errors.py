"""Failed calls as typed errors."""

from __future__ import annotations

import grpc
import pytest

from forkkv_cluster.api.v1 import common_pb2
from forkkv_cluster.client.errors import ERROR_METADATA_KEY, from_rpc_error
from forkkv_cluster.core.errors import (
    Aborted,
    DeadlineExceeded,
    ForkKVError,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from forkkv_cluster.gateway import codec, servicer


class FailedCall(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, details: str, metadata: tuple[tuple[str, bytes], ...] = ()) -> None:
        self._answer = (code, details, metadata)

    def code(self) -> grpc.StatusCode:
        return self._answer[0]

    def details(self) -> str:
        return self._answer[1]

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        return self._answer[2]


@pytest.mark.parametrize(
    "error",
    [
        InvalidArgument("top_p", 2, "is too large", "Send 1."),
        Unsupported("sharing", "auto", "is not there", "Name another."),
        Unauthenticated("who are you"),
        NotFound("session", "s", "Create one."),
        Aborted("lost a race"),
        ResourceExhausted("full", 2.5),
        DeadlineExceeded("late"),
    ],
)
def test_an_error_arrives_as_it_was_raised(error: ForkKVError) -> None:
    detail = codec.write_error(error).SerializeToString()
    read = from_rpc_error(FailedCall(grpc.StatusCode[error.code], error.message, ((ERROR_METADATA_KEY, detail),)))
    assert type(read) is type(error)
    assert str(read) == str(error)
    if isinstance(error, ResourceExhausted):
        assert isinstance(read, ResourceExhausted)
        assert read.retry_after_s == 2.5
    if isinstance(error, InvalidArgument):
        assert isinstance(read, InvalidArgument)
        assert read.field == error.field


def test_a_status_without_detail_is_told_by_its_code() -> None:
    away = from_rpc_error(FailedCall(grpc.StatusCode.UNAVAILABLE, "connection refused"))
    assert isinstance(away, Unavailable)
    assert "connection refused" in away.message
    assert "gRPC port" in away.message
    full = from_rpc_error(FailedCall(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue"))
    assert isinstance(full, ResourceExhausted)
    assert full.retry_after_s > 0


def test_an_unknown_code_is_internal() -> None:
    detail = common_pb2.ErrorDetail(code="NEW_CODE", message="?").SerializeToString()
    assert isinstance(from_rpc_error(FailedCall(grpc.StatusCode.UNKNOWN, "?", ((ERROR_METADATA_KEY, detail),))), Internal)


def test_client_and_server_agree_on_the_metadata_key() -> None:
    assert ERROR_METADATA_KEY == servicer.ERROR_METADATA_KEY
