"""A worker's blocks against a request's chain. Shared by the index and its mirrors."""

from __future__ import annotations

from collections.abc import Sequence

from forkkv_cluster.core.ids import AdapterDigest, BlockHash
from forkkv_cluster.core.placement import PrefixMatch
from forkkv_cluster.directory.worker_blocks import WorkerBlocks


def match_worker(
    blocks: WorkerBlocks | None,
    chain: Sequence[BlockHash],
    residual_of: AdapterDigest | None,
    semantics: str,
    adapter: AdapterDigest | None,
) -> PrefixMatch:
    """Leading blocks of ``chain`` in ``blocks`` (None: an unknown worker holds nothing).

    A request that needs no residual (``residual_of`` None) has a residual match equal to its base match, as
    ``semantics`` says; one that needs no adapter always finds it resident.
    """
    if blocks is None:
        return PrefixMatch(is_adapter_resident=adapter is None)
    base = blocks.base_len(chain)
    residual = base if residual_of is None else blocks.residual_len(chain[:base], (residual_of, semantics))
    return PrefixMatch(base, residual, adapter is None or blocks.has_adapter(adapter))
