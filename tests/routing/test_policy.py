from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from forkkv_cluster.core.config import RoutingConfig
from forkkv_cluster.core.ids import AdapterDigest, BlockHash, WorkerId
from forkkv_cluster.core.placement import Candidate, PlacementRequest, PrefixMatch, WorkerLoad
from forkkv_cluster.routing.policy import (
    SAVED_BY_BASE,
    RoundRobin,
    cost_terms,
    make_policy,
    prefill_blocks,
    rank,
    rendezvous,
    useful_blocks,
)

PLANNER = AdapterDigest("planner")
CONFIG = RoutingConfig()


def placement(
    num_context: int = 8, num_own: int = 2, residual_of: AdapterDigest | None = PLANNER, root: int = 0
) -> PlacementRequest:
    hashes = [BlockHash((root * 1000 + i).to_bytes(16, "big")) for i in range(num_context + num_own)]
    return PlacementRequest(
        "r0",
        tuple(hashes[:num_context]),
        tuple(hashes[num_context:]),
        residual_of,
        residual_of,
        "eager",
        num_context + num_own + 1,
    )


def worker(name: str, *, base: int = 0, residual: int = 0, resident: bool = True, **load: float) -> Candidate:
    return Candidate(WorkerId(name), WorkerLoad(**load), PrefixMatch(base, residual, resident))


def order(request: PlacementRequest, *candidates: Candidate, config: RoutingConfig = CONFIG, block_bytes: int = 0) -> list[str]:
    return [str(ranked.worker_id) for ranked in rank(request, candidates, config, block_bytes)]


def test_useful_is_the_smaller_match_within_the_context() -> None:
    assert useful_blocks(placement(), PrefixMatch(8, 5)) == 5
    assert useful_blocks(placement(), PrefixMatch(4, 4)) == 4


def test_own_blocks_need_no_residual() -> None:
    assert useful_blocks(placement(), PrefixMatch(10, 8)) == 10


def test_without_a_residual_the_base_match_is_useful() -> None:
    assert useful_blocks(placement(residual_of=None), PrefixMatch(6, 0)) == 6


def test_base_kv_without_residual_saves_a_little_of_the_prefill() -> None:
    assert prefill_blocks(placement(), PrefixMatch(8, 3)) == 11 - 3 - SAVED_BY_BASE * 5
    assert prefill_blocks(placement(), PrefixMatch(0, 0)) == 11


def test_the_worker_with_the_prefix_comes_first() -> None:
    assert order(placement(), worker("cold"), worker("warm", base=8, residual=8)) == ["warm", "cold"]


def test_residuals_decide_between_equal_base_matches() -> None:
    assert order(placement(), worker("base_only", base=8), worker("both", base=8, residual=8)) == ["both", "base_only"]


def test_base_kv_decides_between_workers_without_the_residual() -> None:
    for root in range(8):
        assert order(placement(root=root), worker("cold"), worker("base_only", base=8)) == ["base_only", "cold"]


def test_a_busy_worker_loses_its_prefix_advantage() -> None:
    warm = worker("warm", base=8, residual=8, queued_prefill_blocks=20)
    assert order(placement(), warm, worker("idle")) == ["idle", "warm"]


def test_decode_blocks_and_active_requests_weigh_less_than_prefill() -> None:
    terms = cost_terms(placement(), worker("w", decode_blocks=10, num_active=3, queued_prefill_blocks=5), CONFIG, 0)
    assert (terms["queued"], terms["decode"], terms["active"]) == (20.0, 10.0, 3.0)


def test_an_adapter_that_must_be_loaded_costs() -> None:
    assert order(placement(), worker("a", resident=False), worker("b")) == ["b", "a"]


def test_a_worker_short_of_memory_costs_more() -> None:
    tight, roomy = worker("a", free_bytes=1000, total_bytes=10**6), worker("b", free_bytes=10**6, total_bytes=10**6)
    assert order(placement(), tight, roomy, block_bytes=1000) == ["b", "a"]


def test_the_memory_term_is_bounded_when_nothing_is_free() -> None:
    terms = cost_terms(placement(), worker("w", free_bytes=0, total_bytes=10**6), CONFIG, 1000)
    assert terms["memory"] == CONFIG.memory_weight


def test_present_blocks_need_no_new_memory() -> None:
    terms = cost_terms(placement(), worker("w", base=11, residual=8, free_bytes=0, total_bytes=10**6), CONFIG, 1000)
    assert terms["memory"] == 0.0


def test_a_cold_request_goes_where_rendezvous_says_whatever_the_order() -> None:
    candidates = [worker(f"w{i}") for i in range(4)]
    orders = {tuple(order(placement(), *permuted)) for permuted in itertools.permutations(candidates)}
    assert len(orders) == 1
    weights = {c.worker_id: rendezvous(placement().root, c.worker_id) for c in candidates}
    assert orders.pop()[0] == max(weights, key=lambda worker_id: weights[worker_id])


def test_rendezvous_spreads_contexts_and_moves_only_what_a_lost_worker_had() -> None:
    names = [f"w{i}" for i in range(4)]
    homes = {root: order(placement(root=root), *(worker(n) for n in names))[0] for root in range(400)}
    assert all(60 < sum(home == name for home in homes.values()) < 140 for name in names)
    for root, home in homes.items():
        after = order(placement(root=root), *(worker(n) for n in names if n != "w0"))[0]
        assert home == "w0" or after == home


def test_a_worker_too_far_behind_the_least_loaded_is_spilled() -> None:
    config = RoutingConfig(spill_blocks=16, prefill_scale=0.0)
    warm = worker("warm", base=8, residual=8, queued_prefill_blocks=17)
    busy = worker("busy", queued_prefill_blocks=16, decode_blocks=50)
    assert order(placement(), warm, busy, worker("idle", decode_blocks=99), config=config) == ["busy", "idle", "warm"]


def test_the_terms_explain_the_cost() -> None:
    ranked = rank(placement(), [worker("w", queued_prefill_blocks=2, num_active=1)], CONFIG)[0]
    assert ranked.cost == sum(ranked.terms.values()) > 0


def test_no_candidates_give_no_ranks() -> None:
    assert rank(placement(), [], CONFIG) == []
    assert RoundRobin().rank(placement(), [], 0) == []


def test_round_robin_takes_turns_whatever_workers_hold() -> None:
    policy = make_policy(RoutingConfig(policy="round_robin"))
    candidates = [worker("b", base=8, residual=8), worker("a"), worker("c", num_active=99)]
    assert [policy.rank(placement(), candidates, 0)[0].worker_id for _ in range(4)] == ["a", "b", "c", "a"]
    assert sorted(ranked.worker_id for ranked in policy.rank(placement(), candidates, 0)) == ["a", "b", "c"]


@given(
    base=st.integers(0, 10),
    less=st.integers(0, 10),
    load=st.floats(0, 100),
    more=st.floats(0.01, 100),
)
def test_more_cached_never_costs_more_and_more_load_never_costs_less(base: int, less: int, load: float, more: float) -> None:
    def cost(match: int, queued: float) -> float:
        return rank(placement(), [worker("w", base=match, residual=match, queued_prefill_blocks=queued)], CONFIG)[0].cost

    assert cost(base, load) <= cost(min(base, less), load)
    assert cost(base, load + more) >= cost(base, load)
