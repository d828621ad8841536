"""Which pass over shared context must run next for a request, if any. Pure decisions over what the cache has."""

from __future__ import annotations

from dataclasses import dataclass

from forkkv_cluster.cache.kv_cache_manager import KVCacheManager
from forkkv_cluster.cache.leases import ContextMatch
from forkkv_cluster.engine.adapter_tiers import LoadedAdapter
from forkkv_cluster.engine.sequence import ContextNeeds, PassKind, ResidualTarget


@dataclass(frozen=True, slots=True, eq=False)
class PassPlan:
    """One pass: who runs it and whose residuals it writes. ``flight`` names it, so that equal passes run once."""

    kind: PassKind
    adapter: LoadedAdapter | None
    required: tuple[ResidualTarget, ...]
    optional: tuple[ResidualTarget, ...]
    flight: tuple[object, ...]


def restore_needs(kv: KVCacheManager, needs: ContextNeeds) -> None:
    """Bring back from the host what of ``needs`` is cheaper to copy than to run. An agent's own pass runs after the base's."""
    if needs.own is not None or not needs.required:
        kv.restore_context(needs.key, needs.tokens, needs.context_len)
    if needs.required:
        kv.restore_context(needs.key, needs.tokens, needs.context_len, [target.key for target in needs.required])


def match_needs(kv: KVCacheManager, needs: ContextNeeds) -> tuple[ContextMatch, tuple[ResidualTarget, ...]]:
    """What is there (base, least residual of those required), and the required residuals that are incomplete."""
    base_len = residual_len = kv.match_context(needs.key, needs.tokens, needs.context_len, None).base_len
    missing = []
    for target in needs.required:
        found = kv.match_context(needs.key, needs.tokens, needs.context_len, target.key).residual_len
        residual_len = min(residual_len, found)
        if found < needs.context_len:
            missing.append(target)
    return ContextMatch(base_len, residual_len), tuple(missing)


def next_pass(needs: ContextNeeds, match: ContextMatch, missing: tuple[ResidualTarget, ...]) -> PassPlan | None:
    """The pass to run before the request may, or None when its context is complete.

    Base KV comes first: under ``residual`` an agent's own pass attends to shared base KV that must be there. Under
    ``eager`` one pass of the base model writes whatever is missing of both.
    """
    is_base_here = match.base_len == needs.context_len
    if is_base_here and not missing:
        return None
    if needs.writer_adapter is not None and not is_base_here:
        return _plan(needs, PassKind.FIRST_WRITER, needs.writer_adapter, (needs.writer,) if needs.writer else (), ())
    if needs.own is not None:
        if is_base_here:
            return _plan(needs, PassKind.OWN_RESIDUAL, needs.own, missing, ())
        return _plan(needs, PassKind.BASE, None, (), ())
    return _plan(needs, PassKind.BASE, None, missing, needs.optional)


def _plan(
    needs: ContextNeeds,
    kind: PassKind,
    adapter: LoadedAdapter | None,
    required: tuple[ResidualTarget, ...],
    optional: tuple[ResidualTarget, ...],
) -> PassPlan:
    # The chain of an aLoRA goes on, beyond the shared context, to where the adapter is invoked.
    num_blocks = needs.context_len // needs.key.block_size
    parent = needs.key.context[num_blocks - 1] if num_blocks else needs.key.context_seed
    tail = needs.tokens[num_blocks * needs.key.block_size : needs.context_len].tobytes()
    digest = adapter.info.digest if adapter is not None else None
    return PassPlan(kind, adapter, required, optional, (kind, parent, tail, digest))
