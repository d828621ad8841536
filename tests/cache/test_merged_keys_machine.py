"""A stateful test of borrowed whole K: what is said to be written is there, whatever pages came and went in between."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from forkkv_cluster.cache.geometry import KVGeometry
from forkkv_cluster.cache.kv_memory import KVMemory
from forkkv_cluster.cache.merged_keys import IDLE_STEPS, MergedIdentity, MergedUse
from forkkv_cluster.cache.tree_nodes import ResidualKey
from forkkv_cluster.core.ids import BlockHash
from tests.cache.physical_memory import Content, PhysicalMemory

GEOMETRY = KVGeometry(num_layers=1, num_kv_heads=2, head_dim=4, page_size=32, dtype_bytes=2, rank_classes=(8,))
"""A slab holds one page; whole K takes two slabs, or four for more than 64 tokens."""

wanted = st.tuples(st.sampled_from("abcd"), st.sampled_from([32, 64, 96]))


class MergedKeysMachine(RuleBasedStateMachine):
    """``pages``: base pages that somebody holds, and what they hold."""

    @initialize(num_slabs=st.integers(4, 24), share=st.sampled_from([0.5, 1.0]))
    def start(self, num_slabs: int, share: float) -> None:
        self.memory = KVMemory(GEOMETRY, num_slabs * GEOMETRY.slab_bytes, merged_share=share)
        self.physical = PhysicalMemory(GEOMETRY)
        self.pages: dict[int, Content] = {}
        self.num_written = 0

    @rule(num_pages=st.integers(1, 12))
    def allocate(self, num_pages: int) -> None:
        num_unheld = self.memory.pool.num_slabs - len(self.pages)
        found = self.memory.allocate(None, num_pages)
        assert (found is not None) == (num_pages <= num_unheld), "borrowed memory is anybody's who needs it"
        for page in found or []:
            self.num_written += 1
            self.pages[page] = ("page", self.num_written)
            for offset in range(GEOMETRY.page_size):
                self.physical.write(None, page, offset, self.pages[page])

    @precondition(lambda self: self.pages)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        pages = sorted(data.draw(st.sets(st.sampled_from(sorted(self.pages)), min_size=1)))
        self.memory.free(None, pages)
        for page in pages:
            del self.pages[page]

    @rule(asked=st.lists(wanted, min_size=1, max_size=5), is_finished=st.booleans(), is_worth=st.booleans())
    def step(self, asked: list[tuple[str, int]], is_finished: bool, is_worth: bool) -> None:
        self.memory.merged.start_step()
        uses = [(self._use(*one, is_worth), _content(*one)) for one in asked]
        for use, content in uses:
            if use is not None and not use.is_written:
                self.physical.write_whole_keys(use.run, content if is_finished else [("half", *c) for c in content])
        for use, content in uses:
            if use is not None and (is_finished or use.is_written):
                assert self.physical.read_whole_keys(use.run) == content
        if is_finished:
            self.memory.merged.note_written()

    def _use(self, name: str, num_tokens: int, is_worth: bool) -> MergedUse | None:
        identity = MergedIdentity(ResidualKey(name, "eager", 8), BlockHash(str(num_tokens).encode()))
        return self.memory.merged.use(identity, num_tokens, is_worth)

    @rule(num_steps=st.sampled_from([1, IDLE_STEPS // 2, IDLE_STEPS]))
    def steps_without_any(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.memory.merged.start_step()

    @invariant()
    def pages_hold_what_was_written(self) -> None:
        if not hasattr(self, "memory"):
            return
        assert self.memory.merged.is_consistent()
        for page, content in self.pages.items():
            assert all(self.physical.read(None, page, offset) == content for offset in (0, GEOMETRY.page_size - 1))


def _content(name: str, num_tokens: int) -> tuple[Content, ...]:
    return tuple(("whole", name, num_tokens, position) for position in range(num_tokens))


TestMergedKeys = MergedKeysMachine.TestCase
TestMergedKeys.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, derandomize=True)
