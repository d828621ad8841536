"""Requests for tests, as a gateway would build them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forkkv_cluster.core.ids import AdapterDigest, RequestId, WorkerId, new_id
from forkkv_cluster.core.prefix import prefix_key
from forkkv_cluster.core.request import AdapterRef, ContextRequest, GenerateRequest, SamplingParams, Sharing

MODEL_DIGEST = "0" * 32


def adapter_ref(name: str) -> AdapterRef:
    """The reference that ``FakeEngine.load_adapter(name, ...)`` answers to."""
    return AdapterRef(name, AdapterDigest(name.encode().hex().ljust(32, "0")[:32]))


def generate_request(
    tokens: Sequence[int],
    *,
    context_len: int = 0,
    adapter: AdapterRef | None = None,
    declared: tuple[AdapterRef, ...] = (),
    sharing: Sharing = Sharing.EAGER,
    max_tokens: int = 4,
    num_resumed: int = 0,
    block_size: int = 4,
    request_id: str | None = None,
    deadline_s: float | None = None,
    excluded_workers: tuple[WorkerId, ...] = (),
) -> GenerateRequest:
    """A turn over ``tokens`` of which the first ``context_len`` are shared context."""
    array = np.asarray(tokens, dtype=np.int32)
    prefix = prefix_key(
        array,
        block_size=block_size,
        context_len=context_len,
        model_digest=MODEL_DIGEST,
        namespace="tests",
        adapter_digest=adapter.digest if adapter is not None else None,
        sharing=str(sharing),
    )
    return GenerateRequest(
        request_id=RequestId(request_id or new_id("request")),
        tokens=array,
        context_len=context_len,
        num_resumed=num_resumed,
        adapter=adapter,
        declared=declared,
        sharing=sharing,
        writer=None,
        namespace="tests",
        sampling=SamplingParams(max_tokens=max_tokens),
        prefix=prefix,
        deadline_s=deadline_s,
        excluded_workers=excluded_workers,
    )


def context_request(
    tokens: Sequence[int],
    *,
    declared: tuple[AdapterRef, ...] = (),
    sharing: Sharing = Sharing.EAGER,
    block_size: int = 4,
    request_id: str | None = None,
) -> ContextRequest:
    """A pass over ``tokens`` as shared context."""
    array = np.asarray(tokens, dtype=np.int32)
    prefix = prefix_key(
        array,
        block_size=block_size,
        context_len=len(array),
        model_digest=MODEL_DIGEST,
        namespace="tests",
        adapter_digest=None,
        sharing=str(sharing),
    )
    return ContextRequest(RequestId(request_id or new_id("context")), array, declared, sharing, "tests", prefix)
