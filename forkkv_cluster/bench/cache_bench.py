"""Microbenchmarks of the tree, the allocator and the scheduler, and what sharing costs in bytes. No model, no tensors."""

from __future__ import annotations

import resource
from collections.abc import Callable

import numpy as np

from forkkv_cluster.bench.measurement import Measurement, median_us
from forkkv_cluster.bench.scheduler_bench import scheduler_step
from forkkv_cluster.bench.trace import generate_tokens
from forkkv_cluster.cache.dual_radix_tree import DualRadixTree
from forkkv_cluster.cache.geometry import KVGeometry
from forkkv_cluster.cache.kv_cache_manager import KVCacheManager
from forkkv_cluster.cache.leases import SequenceLease
from forkkv_cluster.cache.tree_nodes import Node, PathRecord, ResidualKey
from forkkv_cluster.core.ids import BlockHash
from forkkv_cluster.core.prefix import PrefixKey, context_seed, hash_blocks, prefix_key

PAGE = 64
CONTEXT_LEN = 32_768
OWN_LEN = 128
NUM_AGENTS = 16
VOCAB_SIZE = 8192
NO_GROWTH = 1.5
"""A ratio of two medians of microseconds: what is above is growth, what is below is the clock and the processor's caches."""

LLAMA_8B = KVGeometry(num_layers=32, num_kv_heads=8, head_dim=128, page_size=PAGE, dtype_bytes=2)
LLAMA_82M = KVGeometry(num_layers=12, num_kv_heads=4, head_dim=64, page_size=PAGE, dtype_bytes=2)


def measure(repeats: int = 200, num_leaves: int = 50_000) -> list[Measurement]:
    """Everything, in order. ``repeats`` of each timing; ``num_leaves`` of the large tree."""
    many, few = TreeBench(num_leaves, depth=1), TreeBench(num_leaves // 50, depth=1)
    shallow, deep = TreeBench(1, depth=10), TreeBench(1, depth=500)
    times = {
        name: (bench.pin_us(repeats), bench.evict_us(repeats))
        for name, bench in (("many", many), ("few", few), ("shallow", shallow), ("deep", deep))
    }
    leaves = f"{num_leaves:,} leaves"
    return [
        Measurement(f"hash {CONTEXT_LEN:,} tokens", hash_us(repeats), "us", at_most=300),
        Measurement(
            f"match and fork {CONTEXT_LEN:,} tokens, hashed", ForkBench(LLAMA_8B, 1).fork_us(repeats), "us", at_most=100
        ),
        Measurement(f"pin and unpin, {leaves}", times["many"][0], "us", at_most=5),
        Measurement(f"evict one, {leaves}", times["many"][1], "us", at_most=5),
        _growth(f"pin and unpin, {leaves} over a fiftieth", times["many"][0], times["few"][0]),
        _growth(f"evict one, {leaves} over a fiftieth", times["many"][1], times["few"][1]),
        _growth("pin and unpin, depth 500 over 10", times["deep"][0], times["shallow"][0]),
        _growth("evict one, depth 500 over 10", times["deep"][1], times["shallow"][1]),
        Measurement("scheduler step, 256 running", scheduler_step(repeats) / 1000, "ms", at_most=1),
        *memory(),
        Measurement("peak process memory", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "MiB"),
    ]


def _growth(name: str, large_us: float, small_us: float) -> Measurement:
    return Measurement(name, large_us / small_us, "x", at_most=NO_GROWTH)


def hash_us(repeats: int) -> float:
    tokens = generate_tokens(1, CONTEXT_LEN, VOCAB_SIZE)
    seed = context_seed("model", "bench")
    return median_us(lambda: hash_blocks(seed, tokens, PAGE), repeats)


class TreeBench:
    """A bare tree of ``num_leaves`` paths of ``depth`` blocks each."""

    def __init__(self, num_leaves: int, depth: int) -> None:
        self._tree = DualRadixTree(lambda node: None, lambda residual: None)
        self._record = PathRecord(np.zeros(depth * PAGE, dtype=np.int32), np.arange(depth, dtype=np.int32))
        self._depth, self._num_inserted = depth, 0
        self._leaf = self._insert_path()
        for _ in range(num_leaves - 1):
            self._leaf = self._insert_path()

    def _insert_path(self) -> Node:
        for index in range(self._depth - 1):
            self._insert(index, BlockHash(index.to_bytes(16, "little")))
        self._num_inserted += 1
        return self._insert(self._depth - 1, BlockHash((self._num_inserted << 32).to_bytes(16, "little")))

    def _insert(self, index: int, block_hash: BlockHash) -> Node:
        parent = BlockHash((index - 1).to_bytes(16, "little")) if index else BlockHash(b"seed")
        end = (index + 1) * PAGE
        return self._tree.insert(block_hash, parent, None, index, index, end, PAGE, self._record)

    def pin_us(self, repeats: int) -> float:
        def pin_and_unpin() -> None:
            self._tree.pin(self._leaf)
            self._tree.unpin(self._leaf)

        return median_us(pin_and_unpin, repeats)

    def evict_us(self, repeats: int) -> float:
        """Evicting the oldest leaf; another takes its place, untimed."""
        return median_us(self._tree.evict_oldest, repeats, reset=self._insert_path)


class ForkBench:
    """A manager that holds a context of ``CONTEXT_LEN`` tokens and the ``eager`` residuals of ``num_agents`` adapters."""

    def __init__(self, geometry: KVGeometry, num_agents: int, rank_class: int = 16) -> None:
        # Room for everything twice over, in bytes that nobody allocates.
        needed = (CONTEXT_LEN + (num_agents + 1) * 2 * OWN_LEN) * geometry.base_bytes_per_token
        needed += num_agents * CONTEXT_LEN * geometry.bytes_per_token(rank_class)
        self.manager = KVCacheManager(geometry, 2 * needed)
        self._context = generate_tokens(1, CONTEXT_LEN, VOCAB_SIZE)
        self._residuals = [ResidualKey(f"adapter-{i}", "eager", rank_class) for i in range(num_agents)]
        lease = self.manager.open_context(self._key(None), self._context, CONTEXT_LEN, self._residuals)
        if lease is None:
            raise RuntimeError("the pool is sized to hold the context")
        self.manager.commit_context(lease, CONTEXT_LEN)
        self.manager.release_context(lease)

    def _tokens(self, agent: int) -> np.ndarray:
        return np.concatenate([self._context, generate_tokens(2 + agent, OWN_LEN, VOCAB_SIZE)])

    def _key(self, agent: int | None) -> PrefixKey:
        return prefix_key(
            self._context if agent is None else self._tokens(agent),
            block_size=PAGE,
            context_len=CONTEXT_LEN,
            model_digest="model",
            namespace="bench",
            adapter_digest=None if agent is None else self._residuals[agent].adapter,
            sharing="eager",
        )

    def opener(self, agent: int) -> Callable[[], SequenceLease | None]:
        """What forks one agent: match the context and its residual, then pages for the agent's own tokens."""
        key, tokens, residual = self._key(agent), self._tokens(agent), self._residuals[agent]

        def fork() -> SequenceLease | None:
            self.manager.match_context(key, tokens, CONTEXT_LEN, residual)
            return self.manager.open_sequence(key, tokens, len(tokens), CONTEXT_LEN, residual)

        return fork

    def fork_us(self, repeats: int) -> float:
        fork, leases = self.opener(0), []

        def run() -> None:
            lease = fork()
            if lease is None:
                raise RuntimeError("the pool is sized to hold every fork")
            leases.append(lease)

        return median_us(run, repeats, reset=lambda: self.manager.release(leases.pop()))

    def bytes_with_all_agents(self) -> int:
        """KV bytes while every agent holds its context and its own tokens."""
        for agent in range(len(self._residuals)):
            if self.opener(agent)() is None:
                raise RuntimeError("the pool is sized to hold every agent")
        return self.manager.base_bytes_held + self.manager.residual_bytes_held


def memory() -> list[Measurement]:
    """KV bytes of ``NUM_AGENTS`` agents of rank 16 over those of one, for two shapes."""
    rows = []
    for name, geometry, target in (("Llama-3.1-8B", LLAMA_8B, 1.35), ("82M shape", LLAMA_82M, None)):
        one = ForkBench(geometry, 1).bytes_with_all_agents()
        many = ForkBench(geometry, NUM_AGENTS).bytes_with_all_agents()
        rows.append(Measurement(f"KV of 1 agent, {name}", one / 2**20, "MiB"))
        rows.append(Measurement(f"KV of {NUM_AGENTS} agents, {name}", many / 2**20, "MiB"))
        rows.append(Measurement(f"KV of {NUM_AGENTS} agents over 1, {name}", many / one, "x", at_most=target))
    return rows
