"""A KVCacheManager, the memory under it, and a runner that writes exactly what a step of the engine would write.

Contents are stated from ``semantics`` alone (who ran which tokens over what), never from hashes or pages. Whatever a
lease's page table reads back must be the content of *its* tokens, writer, adapter, sharing and namespace.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np

from forkkv_cluster.cache.geometry import KVGeometry
from forkkv_cluster.cache.kv_cache_manager import KVCacheManager
from forkkv_cluster.cache.leases import ContextLease, SequenceLease
from forkkv_cluster.cache.merged_keys import MergedKeys
from forkkv_cluster.cache.page_pool import PageClass
from forkkv_cluster.cache.tree_nodes import ResidualKey
from forkkv_cluster.core.events import BaseEvicted, BaseStored, CacheEvent, ResidualEvicted, ResidualStored
from forkkv_cluster.core.prefix import BASE_WRITER, PrefixKey, TokenArray, prefix_key
from tests.cache.physical_memory import Content, PhysicalMemory, WatchedPool, copy_page

RANK_CLASS = {"a": 8, "b": 8, "c": 16, "n": None}
"""Adapters of the tests, by digest; ``n`` has no LoRA on k and v, so it needs no residual."""

SHARED = ("residual", "eager", "base")
MODEL = "model"
Owners: TypeAlias = Counter[tuple[PageClass, int]]


@dataclass(frozen=True)
class Branch:
    """One agent's tokens and all that its pages may depend on."""

    context: tuple[int, ...]
    own: tuple[int, ...]
    adapter: str | None = None
    sharing: str = "eager"
    namespace: str = "tenant"
    writer: str = BASE_WRITER
    owner: str = ""

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.context + self.own

    @property
    def is_shared(self) -> bool:
        return self.adapter is not None and self.sharing in SHARED and bool(self.context)

    @property
    def context_len(self) -> int:
        return len(self.context) if self.is_shared else 0

    @property
    def residual(self) -> ResidualKey | None:
        if not self.is_shared or self.adapter is None or self.sharing == "base":
            return None
        return residual_key(self.adapter, self.sharing)

    def key(self, page_size: int, num_tokens: int | None = None) -> PrefixKey:
        tokens = np.array(self.tokens[:num_tokens], dtype=np.int32)
        key = prefix_key(
            tokens,
            block_size=page_size,
            context_len=self.context_len,
            model_digest=MODEL,
            namespace=self.namespace,
            adapter_digest=self.adapter,
            sharing=self.sharing,
            writer=self.writer,
        )
        return replace(key, owner=self.owner)

    # --- contents -------------------------------------------------------------------------------------------------

    def context_content(self, position: int, residual: ResidualKey | None = None) -> Content:
        """Base KV of shared context or, with ``residual``, the residual of it."""
        made_by = (self.namespace, self.writer, self.tokens[: position + 1])
        if residual is None:
            return ("base", *made_by)
        return ("residual", residual.adapter, residual.semantics, *made_by)

    def own_content(self, position: int, tokens: tuple[int, ...]) -> Content:
        """KV on a page of the branch's own: tokens after the fork point, and the context that shares its first page."""
        seen = tokens[: position + 1]
        if self.adapter is None:
            return ("base", self.namespace, BASE_WRITER, seen)
        if self.sharing == "isolated":
            return ("isolated", self.namespace, self.adapter, seen)
        if position < self.context_len:
            return merged(self.context_content(position), self._residual_content(position))
        return ("own", self.namespace, self.writer, self.context_len, self.adapter, self.sharing, seen)

    def _residual_content(self, position: int) -> Content | None:
        return self.context_content(position, self.residual) if self.residual is not None else None


def residual_key(adapter: str, semantics: str) -> ResidualKey | None:
    rank_class = RANK_CLASS[adapter]
    return ResidualKey(adapter, semantics, rank_class) if rank_class is not None else None


def merged(base: Content, residual: Content | None) -> Content:
    return base if residual is None else ("merged", base, residual)


@dataclass(eq=False)
class Pass:
    """A context pass under way."""

    branch: Branch
    lease: ContextLease
    computed: int


@dataclass(eq=False)
class Turn:
    """A sequence under way. ``tokens`` is its append-only buffer, of which ``num_tokens`` are known."""

    branch: Branch
    lease: SequenceLease
    tokens: TokenArray
    num_tokens: int
    computed: int

    @property
    def known(self) -> tuple[int, ...]:
        return tuple(int(t) for t in self.tokens[: self.num_tokens])

    @property
    def history(self) -> Branch:
        """The branch with all that this turn has generated."""
        return replace(self.branch, own=self.known[len(self.branch.context) :])


@dataclass
class Directory:
    """What somebody who only hears the events believes to be there."""

    base: set[bytes] = field(default_factory=set)
    residuals: set[tuple[str, str, bytes]] = field(default_factory=set)

    def apply(self, events: Sequence[CacheEvent]) -> None:
        for event in events:
            match event:
                case BaseStored(hashes):
                    self.base.update(hashes)
                case BaseEvicted(hashes):
                    assert self.base.issuperset(hashes), "evicted what was never announced"
                    self.base.difference_update(hashes)
                case ResidualStored(adapter, semantics, hashes):
                    self.residuals.update((adapter, semantics, h) for h in hashes)
                case ResidualEvicted(adapter, semantics, hashes):
                    assert self.residuals.issuperset((adapter, semantics, h) for h in hashes)
                    self.residuals.difference_update((adapter, semantics, h) for h in hashes)
                case _:
                    raise AssertionError(f"unexpected event {event}")


class World:
    """Runs passes and turns over one manager, checking every read and every write."""

    def __init__(
        self, page_size: int = 4, num_slabs: int = 64, num_host_slabs: int = 0, rank_classes: tuple[int, ...] = (8, 16)
    ) -> None:
        # 24 elements a base row and classes 8 and 16: a slab holds 2 base pages, or 6, or 3 residual pages.
        self.geometry = KVGeometry(1, 2, 12, page_size, 4, rank_classes=rank_classes)
        self.page_size = page_size
        slab_bytes = self.geometry.slab_bytes
        self.manager = KVCacheManager(self.geometry, num_slabs * slab_bytes, num_host_slabs * slab_bytes)
        self.physical = PhysicalMemory(self.geometry)
        self.host_physical = PhysicalMemory(self.geometry)
        self.kv = self.manager._memory
        self.pool = WatchedPool(self.geometry, num_slabs, self.physical, is_lazy=num_host_slabs > 0)
        self.kv.pool = self.pool
        self.kv.merged = MergedKeys(self.geometry, self.pool, max_share=1.0)
        self.host_pool = WatchedPool(self.geometry, num_host_slabs, self.host_physical, is_lazy=True)
        if self.kv.host is not None:
            self.kv.host.pool = self.host_pool
        self.passes: list[Pass] = []
        self.turns: list[Turn] = []
        self.num_whole_keys_read = 0  # runs that were read where an earlier step had written them
        self.directory = Directory()

    # --- checks -----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Everything that must hold between two steps."""
        self.manager.check_invariants()
        self.swap()
        self.manager.check_invariants()
        for item in self.passes:
            self._check_pass(item)
        for turn in self.turns:
            self._check_turn(turn)
        self.directory.apply(self.manager.take_events())
        truth = Directory()
        truth.apply(self.manager.snapshot_events())
        assert self.directory == truth
        for pool in self.manager.pools():
            assert pool.num_free + pool.num_cached + pool.num_pinned == pool.num_total
            assert min(pool.num_free, pool.num_cached, pool.num_pinned) >= 0

    def check_idle(self) -> None:
        """Nothing runs: nothing is pinned, and all that is left can be evicted down to an empty pool."""
        assert self.manager.num_leases == 0
        assert sum(pool.num_pinned for pool in self.manager.pools()) == 0
        while self.kv.tree.evict_oldest():
            pass
        while self.kv.merged.give_back():
            pass
        self.check()
        if self.kv.host is not None:
            self._check_host_is_a_whole()
        assert len(self.kv.tree) == 0
        assert list(self.kv.tree.seeds()) == []
        assert self.kv.pool.num_used_slabs == 0

    def swap(self) -> None:
        """What the device does before a step, in its order; pages that changed hands in between are wiped before it reads."""
        self.host_pool.wipe()
        plan = self.manager.take_swaps()
        for out in plan.outs:
            for pages in zip(out.device_pages.tolist(), out.host_pages.tolist(), strict=True):
                copy_page(self.physical, self.host_physical, out.page_class, pages, self.page_size)
        self.pool.wipe()
        for back in plan.ins:
            for pages in zip(back.host_pages.tolist(), back.device_pages.tolist(), strict=True):
                copy_page(self.host_physical, self.physical, back.page_class, pages, self.page_size)
        self.host_pool.wipe()

    def _check_host_is_a_whole(self) -> None:
        """With an empty device, all that is on the host can be given up: leaf by leaf, down to an empty pool."""
        host = self.kv.host
        assert host is not None
        while (oldest := host._lru.oldest()) is not None:
            host._drop(oldest)
            self.manager.check_invariants()
        assert len(host) == 0
        assert host.pool.num_used_slabs == 0

    def _read(self, page_class: PageClass, pages: Sequence[int] | TokenArray, position: int) -> Content:
        page = int(pages[position // self.page_size])
        return self.physical.read(page_class, page, position % self.page_size)

    def _check_pass(self, item: Pass) -> None:
        lease = item.lease
        for position in range(max(item.computed, lease.base_start)):
            assert self._read(None, lease.pages, position) == item.branch.context_content(position)
        for plan in lease.residuals:
            for position in range(max(item.computed, plan.start)):
                found = self._read(plan.key.rank_class, plan.pages, position)
                assert found == item.branch.context_content(position, plan.key)

    def _check_turn(self, turn: Turn) -> None:
        lease, branch = turn.lease, turn.branch
        written = turn.computed - (lease.tail.num_tokens if lease.tail is not None else 0)
        shared = lease.key.own_start if branch.is_shared else 0
        residual = branch.residual
        if residual is not None:
            assert len(lease.residual_pages) * self.page_size == shared
        for position in range(written):
            found = self._read(None, lease.pages, position)
            if position >= shared:
                assert found == branch.own_content(position, turn.known)
                continue
            assert found == branch.context_content(position)
            if residual is not None:
                found = self._read(residual.rank_class, lease.residual_pages, position)
                assert found == branch.context_content(position, residual)
        for offset in range(lease.tail.num_tokens if lease.tail is not None else 0):
            position = written + offset
            assert self._tail_content(turn, offset) == branch.own_content(position, turn.known)

    def _tail_content(self, turn: Turn, offset: int) -> Content:
        tail = turn.lease.tail
        assert tail is not None
        assert tail.node.page is not None
        base = self.physical.read(None, tail.node.page, offset)
        if not tail.is_context or tail.residual is None:
            return base
        return merged(base, self.physical.read(tail.residual.key.rank_class, tail.residual.page, offset))

    def _tables(self) -> Iterator[tuple[PageClass, TokenArray]]:
        for item in self.passes:
            yield None, item.lease.pages
            for plan in item.lease.residuals:
                yield plan.key.rank_class, plan.pages[: plan.num_pages]
        for turn in self.turns:
            yield None, turn.lease.pages
            if turn.branch.residual is not None:
                yield turn.branch.residual.rank_class, turn.lease.residual_pages
            if turn.lease.tail is not None:
                yield None, np.array([turn.lease.tail.node.page], dtype=np.int32)

    def _owners(self) -> Owners:
        """How many can read each page: leases, and the tree on behalf of whoever comes next."""
        owners: Owners = Counter()
        for page_class, table in self._tables():
            owners.update((page_class, int(page)) for page in table)
        for node in self.kv.tree.nodes():
            if node.page is not None:
                owners[None, node.page] += 1
            owners.update((r.key.rank_class, r.page) for r in node.residuals.values())
        return owners

    def _write(
        self, owners: Counter[tuple[PageClass, int]], page_class: PageClass, page: int, offset: int, to: Content
    ) -> None:
        assert owners[page_class, page] == 1, f"page {page} of class {page_class} is written while shared"
        self.physical.write(page_class, page, offset, to)

    # --- context passes ---------------------------------------------------------------------------------------------

    def open_pass(
        self, branch: Branch, required: Sequence[ResidualKey] = (), optional: Sequence[ResidualKey] = ()
    ) -> Pass | None:
        """A pass over the branch's context; ``branch`` carries namespace and writer."""
        tokens = np.array(branch.context, dtype=np.int32)
        lease = self.manager.open_context(self.context_key(branch), tokens, len(tokens), required, optional)
        if lease is None:
            return None
        item = Pass(branch, lease, lease.run_start)
        self.passes.append(item)
        return item

    def context_key(self, branch: Branch) -> PrefixKey:
        """Any adapter's key of that context serves: only its chain of context blocks counts."""
        return replace(branch, own=(), adapter="a", sharing="eager").key(self.page_size)

    def context_tokens(self, branch: Branch) -> TokenArray:
        return np.array(branch.context, dtype=np.int32)

    def step_pass(self, item: Pass, num_rows: int = 10**6) -> None:
        """Run the next rows; the pass is released when it has run all."""
        self.swap()
        lease, owners = item.lease, self._owners()
        end = min(item.computed + num_rows, lease.num_tokens)
        for position in range(item.computed, end):
            block, offset = divmod(position, self.page_size)
            if position >= lease.base_start:
                self._write(owners, None, int(lease.pages[block]), offset, item.branch.context_content(position))
            for plan in lease.residuals:
                if position >= plan.start:
                    content = item.branch.context_content(position, plan.key)
                    self._write(owners, plan.key.rank_class, int(plan.pages[block]), offset, content)
        item.computed = end
        self.manager.commit_context(lease, end)
        if end == lease.num_tokens:
            self.drop_pass(item)

    def drop_pass(self, item: Pass) -> None:
        self.passes.remove(item)
        self.manager.release_context(item.lease)

    def context_is_here(self, branch: Branch) -> bool:
        """Base and residual, in full."""
        tokens = self.context_tokens(branch)
        found = self.manager.match_context(self.context_key(branch), tokens, len(tokens), branch.residual)
        return found.base_len == found.residual_len == len(tokens)

    def restore(self, branch: Branch) -> None:
        """As the engine does before it looks at what is missing of a context."""
        tokens = self.context_tokens(branch)
        wanted = (branch.residual,) if branch.residual is not None else ()
        for residuals in ((), wanted) if branch.sharing == "residual" else (wanted,):
            self.manager.restore_context(self.context_key(branch), tokens, len(tokens), residuals)

    def prepare(self, branch: Branch, optional: Sequence[ResidualKey] = ()) -> bool:
        """Run the passes that the branch's context lacks, as the engine plans them; False when there is no room."""
        if branch.is_shared:
            self.restore(branch)
        if not branch.is_shared or self.context_is_here(branch):
            return True
        own = (branch.residual,) if branch.residual is not None else ()
        steps: list[tuple[Sequence[ResidualKey], Sequence[ResidualKey]]] = [(own, optional)]
        if branch.sharing == "residual":  # base first, then the agent's own pass over it
            first_writer = residual_key(branch.writer, "residual") if branch.writer != BASE_WRITER else None
            steps = [((first_writer,) if first_writer is not None else (), ()), (own, ())]
        for required, extra in steps:
            item = self.open_pass(branch, required, extra)
            if item is None:
                return False
            self.step_pass(item)
        return self.context_is_here(branch)

    # --- turns ------------------------------------------------------------------------------------------------------

    def open_turn(self, branch: Branch, room: int = 0) -> Turn | None:
        """Its context must be here. ``room``: tokens that it may generate."""
        num_tokens = len(branch.tokens)
        tokens = np.zeros(num_tokens + room, dtype=np.int32)
        tokens[:num_tokens] = branch.tokens
        lease = self.manager.open_sequence(branch.key(self.page_size), tokens, num_tokens, branch.context_len, branch.residual)
        if lease is None:
            return None
        assert branch.context_len <= lease.num_computed < num_tokens
        assert len(lease.pages) * self.page_size >= num_tokens
        turn = Turn(branch, lease, tokens, num_tokens, lease.num_computed)
        self.turns.append(turn)
        return turn

    def step_turn(self, turn: Turn, num_rows: int = 10**6) -> None:
        """Copy the tail, run the next rows, commit."""
        self.swap()
        lease, owners = turn.lease, self._owners()
        if lease.tail is not None:
            target = int(lease.pages[lease.num_blocks_in_tree])
            for offset in range(lease.tail.num_tokens):
                self._write(owners, None, target, offset, self._tail_content(turn, offset))
        end = min(turn.computed + num_rows, turn.num_tokens)
        for position in range(turn.computed, end):
            block, offset = divmod(position, self.page_size)
            content = turn.branch.own_content(position, turn.known)
            self._write(owners, None, int(lease.pages[block]), offset, content)
        turn.computed = end
        self.manager.commit(lease, end)

    def attend(self, turns: Sequence[Turn], *, is_finished: bool = True) -> None:
        """A step in which these turns attend, through whole K where there is any or memory for it. What is said to be written
        must be there; the rest is written, but for the last layer of a step that is not ``is_finished``."""
        self.manager.start_merged_step()
        for turn in turns:
            self.manager.use_merged_keys(turn.lease, is_worth_making=True)
        self.swap()
        for turn in turns:
            use, expected = turn.lease.merged_keys, self._whole_keys(turn)
            if use is None:
                continue
            assert use.run.num_tokens == len(expected)
            if use.is_written:
                self.num_whole_keys_read += 1
            else:
                self.physical.write_whole_keys(use.run, expected if is_finished else [("half", c) for c in expected])
            if is_finished:
                assert self.physical.read_whole_keys(use.run) == expected
        if is_finished:
            self.manager.note_merged_keys_written()

    def _whole_keys(self, turn: Turn) -> tuple[Content, ...]:
        """What whole K of the turn's adapter is made of, by position, from the semantics alone."""
        branch, num_tokens = turn.branch, len(turn.lease.residual_pages) * self.page_size
        return tuple(
            merged(branch.context_content(position), branch.context_content(position, branch.residual))
            for position in range(num_tokens)
        )

    def generate(self, turn: Turn, token: int) -> bool:
        """One more token; False, and the turn is preempted, when there is no page for it."""
        turn.tokens[turn.num_tokens] = token
        turn.num_tokens += 1
        if self.manager.grow(turn.lease, turn.num_tokens):
            return True
        self.drop_turn(turn)
        return False

    def drop_turn(self, turn: Turn) -> None:
        self.turns.remove(turn)
        self.manager.release(turn.lease)

    def run(self, branch: Branch, generated: Sequence[int] = ()) -> int:
        """A whole turn with its passes; returns the tokens of it that were cached. There must be room."""
        assert self.prepare(branch)
        turn = self.open_turn(branch, len(generated))
        assert turn is not None
        found = turn.computed
        self.step_turn(turn)
        for token in generated:
            assert self.generate(turn, token)
            self.step_turn(turn)
        self.check()
        self.drop_turn(turn)
        self.check()
        return found
