"""What routing may know of a request: pure conversions from the request that goes down to a worker."""

from __future__ import annotations

from forkkv_cluster.core.ids import AdapterDigest, BlockHash
from forkkv_cluster.core.placement import PlacementRequest
from forkkv_cluster.core.request import ContextRequest, GenerateRequest, Sharing

WorkRequest = GenerateRequest | ContextRequest
"""What has a prompt and so a place where it is cheapest."""

ResidualChain = tuple[AdapterDigest, str, tuple[BlockHash, ...]]
"""(adapter, semantics, blocks): residual KV over these blocks."""

_WITH_RESIDUALS = (Sharing.EAGER, Sharing.RESIDUAL)


def placement_request(request: WorkRequest) -> PlacementRequest:
    """The placement of ``request`` depends on this and on nothing else.

    An adapter needs residuals over shared context under ``eager`` and ``residual``. A context pass under ``eager`` is
    judged by its first declared adapter: the pass writes all of them together.
    """
    needed = [adapter for adapter, _, _ in residual_chains(request)]
    adapter = request.adapter.digest if isinstance(request, GenerateRequest) and request.adapter is not None else None
    if adapter is None:
        residual_of = needed[0] if needed and isinstance(request, ContextRequest) else None
    else:
        residual_of = adapter if adapter in needed else None
    return PlacementRequest(
        request_id=request.request_id,
        context=request.prefix.context,
        own=request.prefix.own,
        adapter=adapter,
        residual_of=residual_of,
        semantics=str(request.sharing),
        num_blocks=-(-request.num_tokens // request.prefix.block_size),
    )


def residual_chains(request: WorkRequest) -> tuple[ResidualChain, ...]:
    """Residuals that will lie over the shared context once ``request`` has run: what routing may speculate on.

    Under ``eager`` one pass projects all declared adapters; under ``residual`` each agent's own pass writes its own. An
    aLoRA has none, and its chain of canonical blocks goes on beyond the context.
    """
    context = request.prefix.context
    if isinstance(request, GenerateRequest) and request.invocation_start is not None:
        context = context[: request.context_len // request.prefix.block_size]
    if request.sharing not in _WITH_RESIDUALS or not context:
        return ()
    adapters = list(request.declared) if request.sharing is Sharing.EAGER else []
    if isinstance(request, GenerateRequest) and request.adapter is not None:
        adapters.append(request.adapter)
    digests = dict.fromkeys(adapter.digest for adapter in adapters if not adapter.invocation_tokens)
    return tuple((digest, str(request.sharing), context) for digest in digests)
