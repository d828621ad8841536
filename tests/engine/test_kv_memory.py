"""What an engine says and does about its KV memory: hints, holders, the host tier. Over the fake model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from forkkv_cluster.core.status import EngineStatus, Holding
from tests.engine.harness import FakeEngine
from tests.engine.recurrence import expected_tokens

CONTEXT = [(5 * i) % 90 for i in range(24)]
OTHER = [(7 * i + 1) % 90 for i in range(24)]


def held(status: EngineStatus, kind: str) -> dict[str, int]:
    return {holding.name: holding.num_bytes for holding in status.holdings if holding.kind == kind}


def evict(fake: FakeEngine, count: int = 10**6) -> None:
    for _ in range(count):
        if not fake.engine._kv._memory.tree.evict_oldest():
            return


def keep(fake: FakeEngine, keep_s: float = 30.0) -> None:
    fake.run(fake.context_request(CONTEXT, ["a8"], session_id="session-1", keep_s=keep_s, tenant="acme"))


def tokens_run(fake: FakeEngine) -> int:
    return fake.engine.status().counters.prefill_tokens_run


# --- hints -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", ["never", "expired", "closed"])
def test_a_kept_context_outlives_a_younger_one_until_its_hint_ends(ends: str) -> None:
    fake = FakeEngine()
    keep(fake)
    fake.run(fake.context_request(OTHER, ["a8"]))
    if ends == "expired":
        fake.clock.advance(30.0)
        fake.engine.step()
    elif ends == "closed":
        fake.engine.release_hint("session-1")
    evict(fake, 12)  # as many pages as one of both holds: 6 of base, 6 of residual
    ran_before = tokens_run(fake)
    fake.run(fake.context_request(CONTEXT, ["a8"]))
    assert tokens_run(fake) - ran_before == (0 if ends == "never" else len(CONTEXT))


def test_a_hint_that_has_run_out_is_gone_from_the_status_of_an_idle_engine() -> None:
    fake = FakeEngine()
    keep(fake)
    pages = len(CONTEXT) // fake.page_size
    geometry = fake.runner.geometry
    assert held(fake.engine.status(), "session") == {"session-1": pages * (geometry.page_bytes(None) + geometry.page_bytes(8))}
    fake.clock.advance(30.0)
    assert held(fake.engine.status(), "session") == {}


def test_a_later_pass_of_the_session_counts_the_time_anew() -> None:
    fake = FakeEngine()
    keep(fake)
    fake.clock.advance(20.0)
    keep(fake)
    fake.clock.advance(20.0)
    assert set(held(fake.engine.status(), "session")) == {"session-1"}


# --- whose, and what sharing saved -------------------------------------------------------------------------------------


def test_a_status_says_whose_the_memory_is_by_tenant_and_adapter() -> None:
    fake = FakeEngine()
    for tenant, context in (("acme", CONTEXT), ("umbrella", OTHER)):
        fake.run(replace(fake.request(context, [1, 2], "a8", namespace=tenant), tenant=tenant))
    fake.run(replace(fake.request(CONTEXT, [1, 2], "c16", namespace="acme"), tenant="acme"))
    status, page_bytes = fake.engine.status(), fake.runner.geometry.page_bytes
    assert held(status, "adapter") == {"a8": 12 * page_bytes(8), "c16": 6 * page_bytes(16)}
    assert sum(held(status, "tenant").values()) == status.base_bytes_held + status.residual_bytes_held
    assert [holding.name for holding in status.holdings if holding.kind == "tenant"] == ["acme", "umbrella"]
    assert status.sharing_saved_bytes == 6 * (page_bytes(None) - page_bytes(16)) - 12 * page_bytes(8)


def test_pages_of_an_unloaded_adapter_go_by_its_digest() -> None:
    fake = FakeEngine()
    fake.run(fake.request(CONTEXT, [1, 2], "a8"))
    digest = fake.adapters["a8"].digest
    fake.engine.unload_adapter("a8")
    fake.engine.load_adapter("a8", "fake:other:8")
    assert Holding("adapter", digest, 6 * fake.runner.geometry.page_bytes(8)) in fake.engine.status().holdings


# --- host tier ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", ["isolated", "residual", "eager", "base"])
def test_a_turn_on_swapped_kv_answers_as_if_nothing_had_left_and_runs_next_to_nothing(sharing: str) -> None:
    fake = FakeEngine(num_host_slabs=64)
    expected = expected_tokens(CONTEXT, [1, 2], "a8", sharing, 6, vocab_size=97, has_residual=True)
    assert fake.run(fake.request(CONTEXT, [1, 2], "a8", sharing)) == expected
    evict(fake)
    status, ran_before = fake.engine.status(), tokens_run(fake)
    assert (status.base_bytes_held, status.residual_bytes_held) == (0, 0)
    assert status.host_bytes_held > 0
    assert fake.run(fake.request(CONTEXT, [1, 2], "a8", sharing)) == expected
    assert tokens_run(fake) - ran_before <= fake.page_size
    counters = fake.engine.status().counters
    assert 0 < counters.swapped_in_pages <= counters.swapped_out_pages
    assert 0 < counters.swapped_in_bytes <= counters.swapped_out_bytes


def test_copies_wait_for_the_next_batch_when_a_step_runs_nothing() -> None:
    """Nothing is overwritten before a batch runs, so copies can wait until one does."""
    fake = FakeEngine(num_host_slabs=64)
    fake.run(fake.context_request(CONTEXT, ["a8"]))
    evict(fake)
    fake.run(fake.context_request(CONTEXT, ["a8"]))  # swapped in, in bookkeeping: no step runs
    evict(fake, 3)
    assert fake.engine.status().counters.swapped_in_pages == 0
    assert fake.run(fake.request(CONTEXT, [1, 2], "a8")) == expected_tokens(
        CONTEXT, [1, 2], "a8", "eager", 6, vocab_size=97, has_residual=True
    )


def test_without_a_host_tier_nothing_is_swapped() -> None:
    fake = FakeEngine()
    fake.run(fake.request(CONTEXT, [1, 2], "a8"))
    evict(fake)
    fake.run(fake.request(CONTEXT, [1, 2], "a8"))
    status = fake.engine.status()
    assert (status.host_bytes_total, status.host_bytes_held, status.counters.swapped_out_pages) == (0, 0, 0)


def test_rates_are_measured_by_the_engines_own_clock() -> None:
    fake = FakeEngine(num_host_slabs=64)
    run, swap = fake.runner.run, fake.runner.swap
    fake.runner.run = lambda *given: (fake.clock.advance(2.0), run(*given))[1]  # type: ignore[method-assign, func-returns-value]
    fake.runner.swap = lambda batch: (fake.clock.advance(0.5), swap(batch))[1]  # type: ignore[method-assign, func-returns-value]
    fake.run(fake.context_request(CONTEXT[:16], []))  # one step of 16 tokens
    evict(fake)
    fake.run(fake.context_request(OTHER[:16], []))
    estimate = fake.engine._kv.swap_estimate
    assert estimate is not None
    assert estimate.prefilled_tokens.per_second == pytest.approx(8.0)
    assert estimate.copied_bytes.per_second == pytest.approx(4 * fake.runner.geometry.page_bytes(None) / 0.5)
