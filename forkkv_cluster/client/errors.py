"""A failed call as the ForkKVError that the server raised."""

from __future__ import annotations

from typing import Any

import grpc

from forkkv_cluster.api.v1 import common_pb2
from forkkv_cluster.core.errors import ForkKVError, error_from

ERROR_METADATA_KEY = "forkkv-error-bin"


def from_rpc_error(error: grpc.RpcError) -> ForkKVError:
    """The server's typed detail when the call carries one; else the status alone (a proxy, or a broken connection)."""
    call: Any = error  # The errors that calls raise are calls, too; the types do not say so.
    for key, value in call.trailing_metadata() or ():
        if key == ERROR_METADATA_KEY:
            detail = common_pb2.ErrorDetail.FromString(value)
            return error_from(detail.code, detail.message, dict(detail.attributes))
    return _from_status(call.code(), call.details())


def _from_status(code: grpc.StatusCode, details: str | None) -> ForkKVError:
    attributes = {"retry_after_s": "1"} if code is grpc.StatusCode.RESOURCE_EXHAUSTED else {}
    # Nobody of ours answered: the usual reasons are a cluster that is not there, and the HTTP port.
    remedy = " Check that the cluster runs and that this is its gRPC port." if code is grpc.StatusCode.UNAVAILABLE else ""
    return error_from(code.name, f"{details or 'no details'} ({code.name}).{remedy}", attributes)
