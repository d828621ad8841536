"""A stateful test of the KVCacheManager: whatever happens, every page table reads the KV of its own tokens and maker.

A small vocabulary makes prefixes collide all the time; tiny pools force eviction and refusal.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import TypeVar

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from forkkv_cluster.cache.tree_nodes import ResidualKey
from forkkv_cluster.core.prefix import BASE_WRITER
from tests.cache.kv_world import RANK_CLASS, SHARED, Branch, World, residual_key

Item = TypeVar("Item")
MAX_CONTEXT, MAX_OWN, MAX_RUNNING = 24, 16, 6
tokens = st.lists(st.integers(0, 1), min_size=1, max_size=6).map(tuple)
adapters = st.sampled_from([*RANK_CLASS, None])
rows = st.sampled_from([1, 2, 3, 5, 100])


def eager_keys(names: set[str]) -> list[ResidualKey]:
    return [key for name in sorted(names) if (key := residual_key(name, "eager")) is not None]


def pick(data: st.DataObject, items: list[Item]) -> Item:
    """One of them, drawn by number: a report of a failure then stays readable."""
    return items[data.draw(st.integers(0, len(items) - 1))]


class KVCacheMachine(RuleBasedStateMachine):
    """``histories``: branches as their last turn left them; the next turn of any of them may come at any time."""

    @initialize(
        page_size=st.integers(1, 8),
        num_slabs=st.integers(3, 24),
        num_host_slabs=st.sampled_from([0, 1, 2, 6, 30]),
        is_slab_wide=st.booleans(),
    )
    def start(self, page_size: int, num_slabs: int, num_host_slabs: int, is_slab_wide: bool) -> None:
        """Whole K, of 64 tokens at least, finds room where slabs are wide: a few hold it then, and not 32 // page_size."""
        self.world = World(page_size, num_slabs, num_host_slabs)
        if is_slab_wide:
            self.world = World(page_size, num_slabs, num_host_slabs, rank_classes=(8, 16, 192))
        self.now_s = 0.0
        self.contexts: list[tuple[int, ...]] = [(0, 1, 0, 0, 1, 0, 1, 1, 0), (0, 1, 0, 0, 1)]
        self.histories: list[Branch] = []

    # --- what clients do --------------------------------------------------------------------------------------------

    @rule(data=st.data(), tail=tokens)
    def join(self, data: st.DataObject, tail: tuple[int, ...]) -> None:
        context = data.draw(st.sampled_from(self.contexts))
        self.contexts.append((*context, *tail)[:MAX_CONTEXT])

    @rule(data=st.data(), cut=st.integers(1, MAX_CONTEXT))
    def share_less(self, data: st.DataObject, cut: int) -> None:
        self.contexts.append(data.draw(st.sampled_from(self.contexts))[:cut])

    @rule(data=st.data())
    def share_something_else_of_the_same_length(self, data: st.DataObject) -> None:
        context = data.draw(st.sampled_from(self.contexts))
        self.contexts.append((*context[:-1], 1 - context[-1]))

    @rule(data=st.data(), own=tokens)
    def run_a_first_turn(self, data: st.DataObject, own: tuple[int, ...]) -> None:
        self._run(self._fork(data, own), data)

    @precondition(lambda self: self.histories)
    @rule(data=st.data(), appended=tokens)
    def run_another_turn(self, data: st.DataObject, appended: tuple[int, ...]) -> None:
        branch = data.draw(st.sampled_from(self.histories))
        self._run(replace(branch, own=(*branch.own, *appended)[:MAX_OWN]), data)

    @precondition(lambda self: self.histories)
    @rule(data=st.data(), adapter=adapters)
    def fork_a_branch_with_another_adapter(self, data: st.DataObject, adapter: str | None) -> None:
        parent = data.draw(st.sampled_from(self.histories))
        self._run(replace(parent, context=parent.tokens[:MAX_CONTEXT], own=(1,), adapter=adapter), data)

    def _fork(self, data: st.DataObject, own: tuple[int, ...]) -> Branch:
        sharing = data.draw(st.sampled_from([*SHARED, "isolated"]))
        return Branch(
            data.draw(st.sampled_from(self.contexts)),
            own,
            data.draw(adapters),
            sharing,
            data.draw(st.sampled_from(["tenant", "tenant", "rival"])),
            data.draw(st.sampled_from([BASE_WRITER, "a", "n"])) if sharing == "residual" else BASE_WRITER,
        )

    def _run(self, branch: Branch, data: st.DataObject) -> None:
        """Start a turn, if its context can be prepared and there is room; perhaps run it to its end at once."""
        optional = eager_keys(data.draw(st.sets(st.sampled_from(["a", "b", "c"]))))
        if len(self.world.turns) == MAX_RUNNING or not self.world.prepare(branch, optional):
            return
        self.world.check()
        leases, pinned = self.world.manager.num_leases, self._pinned()
        turn = self.world.open_turn(branch, room=4)
        if turn is None:
            assert (self.world.manager.num_leases, self._pinned()) == (leases, pinned)
        elif data.draw(st.booleans()):
            self.world.check()
            self.world.step_turn(turn)
            self._end(turn)

    def _pinned(self) -> list[int]:
        return [pool.num_pinned for pool in self.world.manager.pools() if pool.num_pinned]

    def _end(self, turn: object) -> None:
        running = next(t for t in self.world.turns if t is turn)
        self.histories = [*self.histories[-8:], running.history]
        self.world.drop_turn(running)

    @rule(data=st.data(), session=st.sampled_from(["s", "t", "u"]), names=st.sets(st.sampled_from(["a", "b", "c"])),
          keep_s=st.integers(1, 5))  # fmt: skip
    def keep_a_context(self, data: st.DataObject, session: str, names: set[str], keep_s: int) -> None:
        branch = Branch(data.draw(st.sampled_from(self.contexts)), ())
        context = np.array(branch.context, dtype=np.int32)
        key, keys = self.world.context_key(branch), eager_keys(names)
        self.world.manager.keep_context(session, key, context, len(context), keys, self.now_s + keep_s)

    @rule(session=st.sampled_from(["s", "t", "u"]))
    def close_a_session(self, session: str) -> None:
        self.world.manager.release_hint(session)

    @rule(seconds=st.integers(1, 3))
    def time_passes(self, seconds: int) -> None:
        self.now_s += seconds
        self.world.manager.expire_hints(self.now_s)

    # --- what the engine does ---------------------------------------------------------------------------------------

    @rule(data=st.data(), is_room=st.booleans(), are_finished=st.lists(st.booleans(), min_size=1, max_size=3))
    def attend_through_whole_keys(self, data: st.DataObject, is_room: bool, are_finished: list[bool]) -> None:
        """Some turns in one step, in the next perhaps others; a step without logits ends before its last layer's attention.

        Whole K borrows free slabs, and a pool full of cached pages has none: in half of the cases they are evicted before, and
        a turn is opened that can have whole K.
        """
        if is_room:
            while self.world.kv.tree.evict_oldest():
                pass
            adapter, namespace = data.draw(st.sampled_from(["a", "b", "c"])), data.draw(st.sampled_from(["tenant", "rival"]))
            branch = Branch(pick(data, self.contexts), (1,), adapter, namespace=namespace)
            if len(self.world.turns) < MAX_RUNNING and self.world.prepare(branch):
                self.world.open_turn(branch, room=4)
        if not self.world.turns:
            return
        for is_finished in are_finished:
            numbers = data.draw(st.sets(st.integers(0, len(self.world.turns) - 1), min_size=1))
            self.world.attend([self.world.turns[number] for number in sorted(numbers)], is_finished=is_finished)

    @rule(count=st.integers(1, 12))
    def others_need_memory(self, count: int) -> None:
        """So many pages are evicted, to the host where there is one, and what they held is asked for again some time."""
        for _ in range(count):
            self.world.kv.tree.evict_oldest()

    @precondition(lambda self: self.histories)
    @rule(data=st.data(), count=st.integers(2, 5))
    def start_and_drop_several_before_the_next_step(self, data: st.DataObject, count: int) -> None:
        """No copy is made between them: what one evicts, another gets, and a third may want back."""
        for _ in range(count):
            branch = data.draw(st.sampled_from(self.histories))
            if branch.is_shared:
                self.world.restore(branch)
            if len(self.world.turns) < MAX_RUNNING and (not branch.is_shared or self.world.context_is_here(branch)):
                turn = self.world.open_turn(branch, room=4)
                if turn is not None and data.draw(st.booleans()):
                    self.world.drop_turn(turn)
            self.world.manager.check_invariants()

    @precondition(lambda self: self.world.turns)
    @rule(data=st.data(), num_rows=rows, token=st.integers(0, 1))
    def step_a_turn(self, data: st.DataObject, num_rows: int, token: int) -> None:
        turn = pick(data, self.world.turns)
        if turn.computed == turn.num_tokens:
            if turn.num_tokens == len(turn.tokens):
                self._end(turn)
                return
            if not self.world.generate(turn, token):
                return
        self.world.step_turn(turn, num_rows)

    @precondition(lambda self: 0 < len(self.world.turns) < MAX_RUNNING)
    @rule(data=st.data())
    def open_a_twin(self, data: st.DataObject) -> None:
        """Two that compute the same blocks at once."""
        branch = pick(data, self.world.turns).branch
        if self.world.prepare(branch):
            self.world.open_turn(branch, room=4)

    @precondition(lambda self: self.world.turns)
    @rule(data=st.data())
    def end_a_turn(self, data: st.DataObject) -> None:
        """Finished, cancelled or preempted, before or after its first step: its history goes on from what is known."""
        self._end(pick(data, self.world.turns))

    @rule(data=st.data(), names=st.sets(st.sampled_from(["a", "b", "c"])), extra=st.sets(st.sampled_from(["a", "b", "c"])))
    def open_a_pass(self, data: st.DataObject, names: set[str], extra: set[str]) -> None:
        if len(self.world.passes) < MAX_RUNNING:
            namespace = data.draw(st.sampled_from(["tenant", "rival"]))
            branch = Branch(data.draw(st.sampled_from(self.contexts)), (), namespace=namespace)
            self.world.open_pass(branch, eager_keys(names), eager_keys(extra))

    @precondition(lambda self: self.world.passes)
    @rule(data=st.data(), num_rows=rows)
    def step_a_pass(self, data: st.DataObject, num_rows: int) -> None:
        self.world.step_pass(pick(data, self.world.passes), num_rows)

    @precondition(lambda self: self.world.passes)
    @rule(data=st.data())
    def drop_a_pass(self, data: st.DataObject) -> None:
        self.world.drop_pass(pick(data, self.world.passes))

    # --- promises ---------------------------------------------------------------------------------------------------

    @precondition(lambda self: not self.world.turns and not self.world.passes)
    @rule(data=st.data(), own=tokens)
    def a_turn_that_fits_an_empty_pool_is_not_refused_for_ever(self, data: st.DataObject, own: tuple[int, ...]) -> None:
        """With nothing else running, a retry (as the scheduler makes one every step) must get through."""
        branch = self._fork(data, own)
        optional = eager_keys({"a", "b", "c"})
        if self._fits_an_empty_pool(branch):
            assert any(self._attempt(branch, optional) for _ in range(4)), "refused for ever"

    def _attempt(self, branch: Branch, optional: list[ResidualKey]) -> bool:
        if not self.world.prepare(branch, optional):
            return False
        turn = self.world.open_turn(branch)
        if turn is not None:
            self.world.check()
            self.world.drop_turn(turn)
        return turn is not None

    def _fits_an_empty_pool(self, branch: Branch) -> bool:
        """Whole slabs for its base pages and a copied tail, and for each residual that its passes must write."""
        geometry, size = self.world.geometry, self.world.page_size
        num_slabs = ceil((ceil(len(branch.tokens) / size) + 1) / geometry.pages_per_slab(None))
        writer = residual_key(branch.writer, "residual") if branch.writer != BASE_WRITER else None
        for key in {branch.residual, writer}:
            if key is not None:
                num_slabs += ceil(ceil(len(branch.context) / size) / geometry.pages_per_slab(key.rank_class))
        return num_slabs <= self.world.kv.pool.num_slabs

    @invariant()
    def everything_reads_what_it_should(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        for turn in list(self.world.turns):
            self.world.drop_turn(turn)
        for item in list(self.world.passes):
            self.world.drop_pass(item)
        self.world.check()
        self.world.check_idle()


TestKVCache = KVCacheMachine.TestCase
TestKVCache.settings = settings(
    max_examples=250,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
