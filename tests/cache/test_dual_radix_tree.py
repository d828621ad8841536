"""DualRadixTree: the rules one by one, and all of them against plain dictionaries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from forkkv_cluster.cache.dual_radix_tree import MAX_TAIL_CANDIDATES, DualRadixTree
from forkkv_cluster.cache.tree_nodes import Node, PathRecord, Residual, ResidualKey
from forkkv_cluster.core.ids import BlockHash
from forkkv_cluster.core.prefix import TokenArray, hash_blocks, partial_hash

P = 2  # tokens of a block
ROOT = BlockHash(b"root")
A, B = ResidualKey("a", "eager", 8), ResidualKey("b", "eager", 8)


class Grove:
    """A tree whose blocks are named by their tokens; pages are numbered as they come."""

    def __init__(self) -> None:
        self.evicted: list[Node | Residual] = []
        self.tree = DualRadixTree(self.evicted.append, self.evicted.append)
        self.num_pages = 0
        self.records: dict[tuple[int, ...], PathRecord] = {}

    def chain(self, tokens: Sequence[int], seed: BlockHash = ROOT) -> list[BlockHash]:
        return hash_blocks(seed, array(tokens), P)

    def path(self, tokens: Sequence[int]) -> list[Node]:
        """Insert every whole block of ``tokens``; the nodes from the root down."""
        record = PathRecord(array(tokens), np.zeros(len(tokens) // P, dtype=np.int32))
        nodes = []
        parent = ROOT
        for depth, block_hash in enumerate(self.chain(tokens)):
            before = len(self.tree)
            node = self.tree.insert(block_hash, parent, None, self.num_pages, depth, (depth + 1) * P, P, record)
            self.num_pages += len(self.tree) - before
            assert node.page is not None
            record.pages[depth] = node.page
            nodes.append(node)
            parent = block_hash
        return nodes

    def tail(self, tokens: Sequence[int]) -> Node:
        """Insert a partly filled last block under its whole ones."""
        whole = len(tokens) // P * P
        above = self.path(tokens[:whole])
        parent = above[-1].hash if above else ROOT
        record = PathRecord(array(tokens), np.array([*(n.page for n in above), self.num_pages], dtype=np.int32))
        block_hash = partial_hash(parent, array(tokens[whole:]))
        node = self.tree.insert(block_hash, parent, None, self.num_pages, len(above), len(tokens), len(tokens) - whole, record)
        self.num_pages += 1
        return node

    def residual(self, nodes: Sequence[Node], key: ResidualKey) -> list[Residual]:
        known = [node.residuals.get(key) for node in nodes]
        pages = array([entry.page if entry is not None else self.num_pages + i for i, entry in enumerate(known)])
        self.num_pages += len(nodes)
        return [self.tree.add_residual(node, key, int(pages[i]), pages) for i, node in enumerate(nodes)]

    def evict_all(self) -> list[Node | Residual]:
        first = len(self.evicted)
        while self.tree.evict_oldest():
            pass
        return self.evicted[first:]


def array(tokens: Sequence[int]) -> TokenArray:
    return np.array(tokens, dtype=np.int32)


@pytest.fixture
def grove() -> Grove:
    return Grove()


# --- matching ---------------------------------------------------------------------------------------------------------


def test_the_deepest_block_that_is_there_matches(grove: Grove) -> None:
    nodes = grove.path([1, 2, 3, 4])
    wanted = [1, 2, 3, 4, 5, 6]
    assert grove.tree.match(grove.chain(wanted), array(wanted)) is nodes[-1]
    wanted = [1, 2, 9, 9, 5, 6]
    assert grove.tree.match(grove.chain(wanted), array(wanted)) is nodes[0]


def test_nothing_matches_an_empty_tree_or_an_empty_chain(grove: Grove) -> None:
    assert grove.tree.match(grove.chain([1, 2]), array([1, 2])) is None
    grove.path([1, 2])
    assert grove.tree.match([], array([1, 2])) is None


def test_a_forged_hash_serves_no_other_tokens(grove: Grove) -> None:
    grove.path([1, 2, 3, 4])
    forged = grove.chain([1, 2, 3, 4])
    assert grove.tree.match(forged, array([1, 2, 3, 5])) is None
    assert grove.tree.match(forged, array([9, 2, 3, 4])) is None  # the last block alone would do: the path does not
    assert grove.tree.find(forged[-1], array([9, 2, 3, 4])) is None
    assert forged[-1] in grove.tree


def test_tokens_shorter_than_the_block_do_not_match(grove: Grove) -> None:
    grove.path([1, 2, 3, 4])
    assert grove.tree.find(grove.chain([1, 2, 3, 4])[-1], array([1, 2, 3])) is None


def test_a_node_is_asked_for_by_hash_only_when_it_is_there(grove: Grove) -> None:
    (node,) = grove.path([1, 2])
    assert grove.tree.node(node.hash) is node
    with pytest.raises(KeyError):
        grove.tree.node(BlockHash(b"nowhere"))


def test_a_residual_match_ends_where_that_adapters_pages_end(grove: Grove) -> None:
    nodes = grove.path([1, 2, 3, 4, 5, 6])
    grove.residual(nodes, B)
    entries = grove.residual(nodes[:2], A)
    chain = grove.chain([1, 2, 3, 4, 5, 6])
    assert grove.tree.match_residual(chain, 3, A) is entries[1]
    assert grove.tree.match_residual(chain, 1, A) is entries[0]
    assert grove.tree.match_residual(chain, 3, A._replace(semantics="residual")) is None


def test_a_tail_match_is_the_child_with_the_longest_common_prefix(grove: Grove) -> None:
    tree = DualRadixTree(lambda _: None, lambda _: None)
    for page, block in enumerate([(1, 2, 9, 9), (1, 2, 3, 9), (1, 8, 8, 8)]):
        record = PathRecord(array(block), array([page]))
        tree.insert(hash_blocks(ROOT, array(block), 4)[0], ROOT, None, page, 0, 4, 4, record)
    found = tree.match_tail(ROOT, array([1, 2, 3, 4]), 4)
    assert found is not None
    assert (found[0].page, found[1]) == (1, 3)
    found = tree.match_tail(ROOT, array([1, 2, 3, 4]), 2)
    assert found is not None
    assert found[1] == 2


def test_a_tail_match_needs_a_common_token_and_a_known_parent(grove: Grove) -> None:
    grove.path([1, 2])
    assert grove.tree.match_tail(ROOT, array([7, 2]), 2) is None
    assert grove.tree.match_tail(ROOT, array([1, 2]), 0) is None
    assert grove.tree.match_tail(BlockHash(b"nowhere"), array([1, 2]), 2) is None


def test_a_tail_match_looks_at_a_bounded_number_of_newest_children(grove: Grove) -> None:
    grove.path([1, 2])
    for first in range(10, 10 + MAX_TAIL_CANDIDATES):
        grove.path([first, 2])
    assert grove.tree.match_tail(ROOT, array([1, 2]), 2) is None
    assert grove.tree.match_tail(ROOT, array([10, 2]), 2) is not None


# --- growing ----------------------------------------------------------------------------------------------------------


def test_inserting_a_known_block_returns_it(grove: Grove) -> None:
    nodes = grove.path([1, 2, 3, 4])
    assert grove.path([1, 2, 3, 4]) == nodes
    assert len(grove.tree) == 2


def test_adding_a_known_residual_returns_it(grove: Grove) -> None:
    nodes = grove.path([1, 2])
    assert grove.residual(nodes, A) == grove.residual(nodes, A)


def test_a_residual_needs_one_on_the_block_above(grove: Grove) -> None:
    nodes = grove.path([1, 2, 3, 4])
    with pytest.raises(ValueError, match="without one at block 0"):
        grove.tree.add_residual(nodes[1], A, 0, array([0, 0]))


def test_a_forks_blocks_protect_the_context_below_which_they_hang(grove: Grove) -> None:
    (context,) = grove.path([1, 2])
    seed = BlockHash(b"fork")
    record = PathRecord(array([1, 2, 3, 4]), array([0, 7]))
    block = grove.tree.insert(grove.chain([3, 4], seed)[0], seed, context.hash, 7, 1, 4, 2, record)
    assert not context.is_evictable
    with pytest.raises(ValueError, match="has children"):
        grove.tree.evict_base(context)
    assert grove.evict_all() == [block, context]
    assert list(grove.tree.seeds()) == []


def test_a_match_inside_a_block_of_context_never_finds_a_forks_block(grove: Grove) -> None:
    (context,) = grove.path([1, 2])
    seed = BlockHash(b"fork")
    record = PathRecord(array([1, 2, 3, 4]), array([0, 7]))
    grove.tree.insert(grove.chain([3, 4], seed)[0], seed, context.hash, 7, 1, 4, 2, record)
    assert grove.tree.match_tail(context.hash, array([3, 4]), 2) is None
    assert grove.tree.match_tail(seed, array([3, 4]), 2) is not None


# --- eviction ---------------------------------------------------------------------------------------------------------


def test_leaves_go_before_their_parents_and_residuals_with_their_base(grove: Grove) -> None:
    nodes = grove.path([1, 2, 3, 4])
    grove.residual(nodes, A)
    grove.tree.evict_base(nodes[1])
    assert [type(e) for e in grove.evicted] == [Residual, Node]
    assert grove.tree.match_residual([nodes[0].hash], 1, A) is not None


def test_the_least_recently_used_path_goes_first(grove: Grove) -> None:
    old, new = grove.path([1, 2, 3, 4]), grove.path([5, 6, 7, 8])
    grove.tree.pin(old[-1])
    grove.tree.unpin(old[-1])
    assert grove.evict_all() == [new[1], new[0], old[1], old[0]]


def test_a_parent_that_was_used_since_outlives_its_leaf(grove: Grove) -> None:
    nodes, other = grove.path([1, 2, 3, 4]), grove.path([5, 6])
    grove.tree.pin(nodes[0])
    grove.tree.unpin(nodes[0])
    assert grove.evict_all() == [nodes[1], other[0], nodes[0]]


def test_what_is_pinned_stays_with_all_above_it(grove: Grove) -> None:
    nodes, other = grove.path([1, 2, 3, 4]), grove.path([5, 6])
    grove.tree.pin(nodes[1])
    assert grove.evict_all() == other
    grove.tree.unpin(nodes[1])
    assert grove.evict_all() == [nodes[1], nodes[0]]


def test_a_pinned_residual_stays_while_others_of_its_block_go(grove: Grove) -> None:
    nodes = grove.path([1, 2])
    (mine,), (other,) = grove.residual(nodes, A), grove.residual(nodes, B)
    grove.tree.pin(nodes[0])
    grove.tree.pin(mine)
    assert grove.evict_all() == [other]
    with pytest.raises(ValueError, match="pinned"):
        grove.tree.evict_residual(mine)


def test_residuals_go_from_their_end(grove: Grove) -> None:
    nodes = grove.path([1, 2, 3, 4])
    entries = grove.residual(nodes, A)
    grove.tree.pin(nodes[1])
    with pytest.raises(ValueError, match="residuals below"):
        grove.tree.evict_residual(entries[0])
    assert grove.evict_all() == [entries[1], entries[0]]


def test_half_a_residual_does_not_outlive_its_other_half(grove: Grove) -> None:
    nodes = grove.path([1, 2, 3, 4])
    old, new = grove.residual(nodes, A), grove.residual(nodes, B)
    grove.tree.pin(nodes[1])
    assert grove.evict_all() == [old[1], old[0], new[1], new[0]]


def test_unpinning_what_is_not_pinned_is_an_error(grove: Grove) -> None:
    (node,) = grove.path([1, 2])
    with pytest.raises(ValueError, match="unpin without pin"):
        grove.tree.unpin(node)


def test_pins_count(grove: Grove) -> None:
    (node,) = grove.path([1, 2])
    grove.tree.pin(node)
    grove.tree.pin(node)
    grove.tree.unpin(node)
    assert not grove.tree.evict_oldest()
    grove.tree.unpin(node)
    assert grove.tree.evict_oldest()


def test_an_empty_tree_has_nothing_to_evict(grove: Grove) -> None:
    assert not grove.tree.evict_oldest()
    assert grove.tree.num_evictable == 0


# --- against dictionaries ---------------------------------------------------------------------------------------------

Path = tuple[int, ...]
paths = st.lists(st.integers(0, 1), min_size=1, max_size=9).map(tuple)


class TreeMachine(RuleBasedStateMachine):
    """``base``: path -> page; ``residuals``: (path, key) -> page; ``pins``: how often each is pinned."""

    @initialize()
    def start(self) -> None:
        self.base: dict[Path, int] = {}
        self.residuals: dict[tuple[Path, ResidualKey], int] = {}
        self.pins: list[tuple[Path, ResidualKey | None]] = []
        self.tokens_of: dict[BlockHash, Path] = {}
        self.grove = Grove()
        self.tree = DualRadixTree(self._base_gone, self._residual_gone)
        self.grove.tree = self.tree

    def _base_gone(self, node: Node) -> None:
        path = self.tokens_of[node.hash]
        assert not any(is_above(path, other) for other in self.base)
        assert not any(p == path for p, _ in self.residuals), "a residual outlives its base"
        assert (path, None) not in self.pins
        assert self.base.pop(path) == node.page

    def _residual_gone(self, entry: Residual) -> None:
        path = self.tokens_of[entry.node.hash]
        assert (path, entry.key) not in self.pins
        assert not any(key == entry.key and is_above(path, other) for other, key in self.residuals)
        assert self.residuals.pop((path, entry.key)) == entry.page

    def _node(self, path: Path) -> Node:
        whole = len(path) // P * P
        chain = self.grove.chain(path)
        parent = chain[-1] if chain else ROOT
        block_hash = partial_hash(parent, array(path[whole:])) if whole < len(path) else parent
        found = self.tree.find(block_hash, array(path))
        assert found is not None
        return found

    @rule(path=paths)
    def file_blocks(self, path: Path) -> None:
        nodes = self.grove.path(path)
        if len(path) % P and path not in self.base:
            nodes.append(self.grove.tail(path))
        for node in nodes:
            assert node.page is not None
            self.tokens_of[node.hash] = path[: node.end]
            self.base.setdefault(path[: node.end], node.page)

    @precondition(lambda self: self.base)
    @rule(data=st.data(), key=st.sampled_from([A, B]))
    def file_residuals(self, data: st.DataObject, key: ResidualKey) -> None:
        path = data.draw(st.sampled_from(sorted(self.base)))
        ends = [*range(P, len(path) + 1, P), *([len(path)] if len(path) % P else [])]
        for entry, end in zip(self.grove.residual([self._node(path[:e]) for e in ends], key), ends, strict=True):
            self.residuals.setdefault((path[:end], key), entry.page)

    @precondition(lambda self: self.base)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        """Some block and, as leases do, perhaps a residual of it."""
        path = data.draw(st.sampled_from(sorted(self.base)))
        node = self._node(path)
        for key in (None, *data.draw(st.sets(st.sampled_from([A, B])))):
            if key is None or key in node.residuals:
                self.tree.pin(node if key is None else node.residuals[key])
                self.pins.append((path, key))

    @precondition(lambda self: self.pins)
    @rule()
    def unpin_all(self) -> None:
        """Residuals before their blocks, as leases do."""
        pins, self.pins = self.pins, []
        for path, key in sorted(pins, key=lambda pin: pin[1] is None):
            node = self._node(path)
            self.tree.unpin(node if key is None else node.residuals[key])

    @rule(num=st.integers(1, 4))
    def evict(self, num: int) -> None:
        for _ in range(num):
            is_free = any(not self._is_protected(path) for path in self.base)
            is_free = is_free or any(entry not in self._protected_residuals() for entry in self.residuals)
            assert self.tree.evict_oldest() == is_free

    def _is_protected(self, path: Path) -> bool:
        return any(pinned == path or is_above(path, pinned) for pinned, _ in self.pins)

    def _protected_residuals(self) -> set[tuple[Path, ResidualKey]]:
        return {
            (path, key)
            for path, key in self.residuals
            if any(k == key and (pinned == path or is_above(path, pinned)) for pinned, k in self.pins)
        }

    @rule(wanted=paths, key=st.sampled_from([A, B]))
    def match(self, wanted: Path, key: ResidualKey) -> None:
        blocks = [wanted[:end] for end in range(P, len(wanted) + 1, P)]
        expected = [path for path in blocks if path in self.base]
        chain = self.grove.chain(wanted)
        node = self.tree.match(chain, array(wanted))
        if not expected:
            assert node is None
            return
        assert node is not None
        assert node.record is not None
        assert node.record.pages[: node.depth + 1].tolist() == [self.base[path] for path in expected]
        with_residual = [path for path in expected if (path, key) in self.residuals]
        entry = self.tree.match_residual(chain, len(expected), key)
        found = entry.pages[: entry.node.depth + 1].tolist() if entry is not None else []
        assert found == [self.residuals[path, key] for path in with_residual]

    @rule(wanted=paths, limit=st.integers(0, P))
    def match_tail(self, wanted: Path, limit: int) -> None:
        whole = (len(wanted) - 1) // P * P
        above, rest = wanted[:whole], wanted[whole:]
        children = [p[whole:] for p in self.base if p[:whole] == above and whole < len(p) <= whole + P]
        expected = max((common(child, rest[:limit]) for child in children), default=0)
        chain = self.grove.chain(above)
        found = self.tree.match_tail(chain[-1] if chain else ROOT, array(rest), limit)
        assert (found[1] if found is not None else 0) == expected

    @invariant()
    def both_know_the_same(self) -> None:
        if not hasattr(self, "tree"):
            return
        assert {self.tokens_of[n.hash]: n.page for n in self.tree.nodes()} == self.base
        assert {
            (self.tokens_of[n.hash], key): r.page for n in self.tree.nodes() for key, r in n.residuals.items()
        } == self.residuals


def is_above(one: Path, other: Path) -> bool:
    """Whether ``other`` hangs somewhere below ``one``. Nothing hangs below a partly filled block."""
    return len(one) % P == 0 and len(one) < len(other) and other[: len(one)] == one


def common(one: Path, other: Path) -> int:
    """Length of their common prefix."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


TestTree = TreeMachine.TestCase
TestTree.settings = settings(max_examples=200, stateful_step_count=30, deadline=None, derandomize=True)
