"""What identifies a page: equal hashes if, and only if, the KV was made in the same way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from forkkv_cluster.core.prefix import (
    BASE_WRITER,
    PrefixKey,
    context_seed,
    fork_seed,
    hash_blocks,
    isolated_seed,
    partial_hash,
    prefix_key,
)

TOKENS = tuple(range(12))


@dataclass(frozen=True)
class Origin:
    """All that a page's KV may depend on."""

    tokens: tuple[int, ...] = TOKENS
    context_len: int = 6
    model: str = "model"
    namespace: str = "tenant"
    adapter: str | None = "a"
    sharing: str = "eager"
    writer: str = BASE_WRITER

    def key(self, block_size: int = 4) -> PrefixKey:
        return prefix_key(
            np.array(self.tokens, dtype=np.int32),
            block_size=block_size,
            context_len=self.context_len,
            model_digest=self.model,
            namespace=self.namespace,
            adapter_digest=self.adapter,
            sharing=self.sharing,
            writer=self.writer,
        )


AGENT = Origin()
OWN_DIFFERS = {
    "adapter": replace(AGENT, adapter="b"),
    "sharing residual": replace(AGENT, sharing="residual"),
    "sharing base": replace(AGENT, sharing="base"),
    "isolated": replace(AGENT, sharing="isolated", context_len=0),
    "base model": replace(AGENT, adapter=None),
    "fork length in the same page": replace(AGENT, context_len=5),
    "fork length in the page before": replace(AGENT, context_len=3),
    "namespace": replace(AGENT, namespace="rival"),
    "writer": replace(AGENT, writer="a"),
    "model": replace(AGENT, model="other"),
    "context": replace(AGENT, tokens=(99, *TOKENS[1:])),
}


@pytest.mark.parametrize("other", OWN_DIFFERS.values(), ids=OWN_DIFFERS)
def test_own_pages_differ_in_everything_that_made_them(other: Origin) -> None:
    assert not set(AGENT.key().own) & set(other.key().all_hashes)


def test_no_two_of_these_origins_share_an_own_page() -> None:
    for one, other in combinations([AGENT, *OWN_DIFFERS.values()], 2):
        if one.adapter is not None and other.adapter is not None:
            assert not set(one.key().own) & set(other.key().own), (one, other)


@pytest.mark.parametrize("name", ["adapter", "sharing residual", "sharing base", "base model", "fork length in the same page"])
def test_shared_context_is_the_same_page_for_all_who_share_it(name: str) -> None:
    assert AGENT.key().context[0] == OWN_DIFFERS[name].key().all_hashes[0]


@pytest.mark.parametrize("name", ["isolated", "namespace", "writer", "model", "context"])
def test_shared_context_differs_by_tenant_writer_model_and_tokens(name: str) -> None:
    assert not set(AGENT.key().context) & set(OWN_DIFFERS[name].key().all_hashes)


def test_a_branch_matches_itself_over_turns() -> None:
    longer = replace(AGENT, tokens=(*TOKENS, *range(50, 60)))
    assert longer.key().own[: len(AGENT.key().own)] == AGENT.key().own


def test_the_base_model_writes_canonical_pages_whoever_writes_for_the_adapters() -> None:
    """Else its own tokens would be filed as written by the first adapter, and served to it."""
    base = replace(AGENT, adapter=None, sharing="residual")
    assert replace(base, writer="a").key() == base.key()
    assert not set(replace(base, writer="a").key().all_hashes) & set(replace(AGENT, writer="a").key().all_hashes)


def test_the_base_model_goes_on_in_the_chain_of_the_context() -> None:
    key = replace(AGENT, adapter=None).key()
    assert key.own == ()
    assert len(key.context) == 3
    assert key.own_seed == key.context[-1]


def test_the_base_model_without_a_whole_block_starts_at_the_context_seed() -> None:
    key = Origin(tokens=(1, 2), adapter=None).key()
    assert key.own_seed == key.context_seed == key.context_parent


def test_own_pages_begin_with_the_page_that_holds_the_fork_point() -> None:
    key = AGENT.key()
    assert (key.own_start, len(key.context), len(key.own)) == (4, 1, 2)
    assert key.context_parent == key.context[-1]
    assert key.own_parent == key.own[-1]


def test_a_context_shorter_than_a_block_forks_from_the_context_seed() -> None:
    key = replace(AGENT, context_len=3).key()
    assert key.context == ()
    assert key.own_seed == fork_seed(key.context_seed, 3, "a", "eager")
    assert key.own_parent == key.own[-1]
    assert replace(AGENT, tokens=(1, 2, 3), context_len=2).key().own_parent == fork_seed(key.context_seed, 2, "a", "eager")


def test_an_isolated_sequence_is_its_adapters_from_token_0() -> None:
    key = replace(AGENT, sharing="isolated", context_len=6).key()
    assert key.context == ()
    assert key.own_seed == isolated_seed("model", "tenant", "a")
    assert len(key.own) == 3


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (context_seed("ab", "c"), context_seed("a", "bc")),
        (context_seed("m", "n", "a"), isolated_seed("m", "n", "a")),
        (context_seed("m", "n"), context_seed("m", "n", "")),
        (isolated_seed("m", "na", "b"), isolated_seed("m", "n", "ab")),
        (fork_seed(context_seed("m", "n"), 1, "1a", "eager"), fork_seed(context_seed("m", "n"), 11, "a", "eager")),
        (fork_seed(context_seed("m", "n"), 1, "a", "eager"), fork_seed(context_seed("m", "o"), 1, "a", "eager")),
    ],
)
def test_seeds_keep_their_parts_apart(one: bytes, other: bytes) -> None:
    assert one != other


@settings(deadline=None, derandomize=True, max_examples=60)
@given(tokens=st.lists(st.integers(0, 2**31 - 1), max_size=40), block_size=st.integers(1, 9))
def test_hashes_chain_over_whole_blocks(tokens: list[int], block_size: int) -> None:
    array = np.array(tokens, dtype=np.int32)
    parent: bytes = b"seed"
    expected = []
    for start in range(0, len(tokens) - len(tokens) % block_size, block_size):
        block = array[start : start + block_size]
        parent = xxhash.xxh3_128_digest(parent + block.astype("<i4").tobytes())
        expected.append(parent)
    assert hash_blocks(b"seed", array, block_size) == expected  # type: ignore[arg-type]


def test_hashes_do_not_depend_on_how_the_tokens_lie_in_memory() -> None:
    wide = np.arange(24, dtype=np.int64)
    strided = np.arange(48, dtype=np.int32)[::2] // 2
    seed = context_seed("m", "n")
    assert hash_blocks(seed, wide, 4) == hash_blocks(seed, strided, 4) == hash_blocks(seed, np.arange(24, dtype=np.int32), 4)  # type: ignore[arg-type]


def test_hashes_are_stable_over_processes_and_releases() -> None:
    """A cluster's workers and gateways compare them: changing one is a change of protocol."""
    assert context_seed("model", "tenant").hex() == "44927529a1aab955adad998b931b8e2f"
    assert AGENT.key().own[-1].hex() == "dd3f6a1cd9278eb40e478c6c14a7b976"


def test_a_partial_hash_continues_the_chain_and_depends_on_its_length() -> None:
    seed = context_seed("m", "n")
    tokens = np.arange(4, dtype=np.int32)
    hashes = {partial_hash(seed, tokens[:n]) for n in range(1, 4)} | set(hash_blocks(seed, tokens, 4))
    assert len(hashes) == 4
