"""Whether what runs now will be in the cache for what waits. Pure: decided by block hashes and tokens."""

from __future__ import annotations

import numpy as np

from forkkv_cluster.core.prefix import TokenArray
from forkkv_cluster.engine.sequence import ContextPass, Runnable, Turn, Waiting


def is_computing_prefix_of(item: Runnable, entry: Waiting) -> bool:
    """Whether a prompt or pass under way has yet to compute tokens that ``entry`` starts with: started beside it, ``entry``
    would run them again. What is computed already is in the cache, and no reason to wait."""
    start = _next_shared(item, entry)
    if start >= item.num_tokens:
        return False
    key = item.request.prefix if isinstance(item, Turn) else item.lease.key
    size = key.block_size
    chain, wanted = key.all_hashes[: item.num_tokens // size], entry.request.prefix.all_hashes
    block = start // size
    if block < min(len(chain), len(wanted)):
        return chain[block] == wanted[block]
    # Less than a block is left of one of them, or tokens that were generated since: compare those.
    known = min(block, len(chain), len(wanted))
    if known and chain[known - 1] != wanted[known - 1]:
        return False
    places = slice(known * size, start + 1)
    tokens = entry.tokens[: entry.num_tokens] if isinstance(entry, Turn) else entry.request.tokens
    return start < len(tokens) and np.array_equal(_tokens(item)[places], tokens[places])


def _next_shared(item: Runnable, entry: Waiting) -> int:
    """The first token that is yet to be computed of what ``entry`` could use: a pass that writes the residuals of others alone
    has nothing for it before base KV that is missing."""
    if not isinstance(item, ContextPass):
        return item.num_computed
    required = entry.needs.required if entry.needs is not None else ()
    if any(target.key in item.targets for target in required):
        return item.num_computed
    return max(item.num_computed, item.lease.base_start)


def _tokens(item: Runnable) -> TokenArray:
    return item.tokens if isinstance(item, Turn) else item.lease.record.tokens
