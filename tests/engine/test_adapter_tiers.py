"""Adapters between disk, host memory and device slots: who has a slot, who waits, what is counted, what is let go."""

from __future__ import annotations

import pytest

from forkkv_cluster.cache.geometry import KVGeometry
from forkkv_cluster.core.config import AdapterMemoryConfig
from forkkv_cluster.core.errors import FailedPrecondition, Internal
from forkkv_cluster.core.events import AdapterLoaded, AdapterUnloaded
from forkkv_cluster.engine.adapter_tiers import AdapterTiers, LoadedAdapter
from forkkv_cluster.testing.fake_model_runner import FakeModelRunner
from forkkv_cluster.testing.manual_loader import ManualLoader


class Tiers:
    """Four adapters of 100 bytes each, registered in order: the first ones are on the device."""

    def __init__(self, *, slots: int = 2, host_bytes: int = 200, delay: int = 0) -> None:
        self.runner = FakeModelRunner(KVGeometry(1, 1, 8, 4, 4, rank_classes=(8,)))
        self.loader = ManualLoader(self.runner.read_adapter, delay)
        config = AdapterMemoryConfig(max_device_adapters=slots, host_bytes=host_bytes)
        self.tiers = AdapterTiers(self.runner, config, self.loader)
        self.a, self.b, self.c, self.d = (self.add(name) for name in "abcd")

    def add(self, name: str) -> LoadedAdapter:
        adapter = self.tiers.add(self.runner.read_adapter(name, f"fake:{name}:8"))
        adapter.names.add(name)
        return adapter

    def pin(self, *adapters: LoadedAdapter) -> tuple[LoadedAdapter, ...]:
        pinned = self.tiers.pin(adapters)
        assert pinned is not None
        return pinned


def is_here(adapter: LoadedAdapter) -> bool:
    return adapter.device_slot is not None


def test_registration_fills_free_slots_and_evicts_nobody() -> None:
    bench = Tiers()
    assert [is_here(x) for x in (bench.a, bench.b, bench.c, bench.d)] == [True, True, False, False]
    assert bench.tiers.take_events() == [AdapterLoaded(bench.a.info.digest), AdapterLoaded(bench.b.info.digest)]


def test_the_host_tier_keeps_the_most_recent_bytes() -> None:
    status = Tiers().tiers.status()
    assert (status.num_on_host, status.host_bytes, status.device_bytes) == (2, 200, 200)


def test_weights_larger_than_the_host_tier_are_not_kept_there() -> None:
    bench = Tiers(host_bytes=99)
    assert bench.tiers.status().host_bytes == 0


def test_a_pinned_adapter_from_host_memory_is_on_the_device_at_once() -> None:
    bench = Tiers()
    bench.pin(bench.d)
    assert is_here(bench.d)
    assert bench.loader.num_submitted == 0


def test_the_least_recently_pinned_slot_is_evicted_first() -> None:
    bench = Tiers()
    bench.tiers.unpin(bench.pin(bench.a))
    bench.pin(bench.d)
    assert (is_here(bench.a), is_here(bench.b)) == (True, False)


def test_an_adapter_that_live_requests_name_is_evicted_after_those_that_none_names() -> None:
    bench = Tiers()
    bench.a.num_users = 1
    bench.pin(bench.d)
    assert (is_here(bench.a), is_here(bench.b)) == (True, False)


def test_a_pinned_slot_is_never_evicted() -> None:
    bench = Tiers()
    bench.pin(bench.a, bench.b)
    assert not bench.tiers.can_pin(bench.c)
    assert bench.tiers.pin([bench.c]) is None
    assert is_here(bench.a)
    assert is_here(bench.b)


def test_slots_are_pinned_for_all_or_for_nobody() -> None:
    bench = Tiers()
    bench.pin(bench.a)
    assert bench.tiers.pin([bench.c, bench.d]) is None
    assert (bench.c.num_pins, bench.d.num_pins, is_here(bench.b)) == (0, 0, True)


def test_with_a_least_number_as_many_as_fit_are_pinned() -> None:
    bench = Tiers()
    pinned = bench.tiers.pin([bench.c, bench.d, bench.a], least=1)
    assert pinned == (bench.c, bench.d)


def test_optional_adapters_take_only_what_the_required_ones_leave() -> None:
    bench = Tiers()
    assert bench.tiers.pin([bench.c], [bench.a, bench.b]) == (bench.c, bench.a)


def test_what_is_on_disk_alone_holds_its_slot_while_it_is_read() -> None:
    bench = Tiers(host_bytes=0, delay=1)
    bench.pin(bench.c)
    assert not is_here(bench.c)
    assert bench.tiers.pin([bench.a, bench.b]) is None
    assert bench.tiers.settle() == []
    assert not is_here(bench.c)
    bench.tiers.settle()
    assert is_here(bench.c)


def test_one_read_serves_all_who_wait_for_it() -> None:
    bench = Tiers(host_bytes=0)
    bench.pin(bench.c)
    bench.pin(bench.c)
    bench.tiers.settle()
    assert (bench.loader.num_submitted, bench.c.num_pins) == (1, 2)


def test_weights_that_nobody_waits_for_any_more_stay_until_their_slot_is_wanted() -> None:
    bench = Tiers(host_bytes=0)
    bench.tiers.unpin(bench.pin(bench.c))
    bench.tiers.settle()
    assert is_here(bench.c)
    bench.pin(bench.a, bench.b)
    assert not is_here(bench.c)


def test_an_adapter_unloaded_while_it_is_read_leaves_nothing() -> None:
    bench = Tiers(host_bytes=0)
    pinned = bench.pin(bench.c)
    bench.c.names.clear()
    bench.tiers.unpin(pinned)
    assert bench.tiers.settle() == []
    status = bench.tiers.status()
    assert (status.num_registered, status.num_loading, status.num_on_device) == (3, 0, 1)
    assert bench.runner.num_adapters == 1
    bench.tiers.check_invariants([])


def test_an_unloaded_adapter_stays_as_long_as_somebody_runs_with_it() -> None:
    bench = Tiers()
    pinned = bench.pin(bench.a)
    bench.a.names.clear()
    bench.tiers.drop_if_unused(bench.a)
    assert is_here(bench.a)
    bench.tiers.take_events()
    bench.tiers.unpin(pinned)
    assert bench.tiers.find(bench.a.info.digest) is None
    assert bench.tiers.take_events() == [AdapterUnloaded(bench.a.info.digest)]


def test_files_that_changed_since_registration_give_an_error_and_free_the_slot() -> None:
    bench = Tiers(host_bytes=0)
    bench.runner.changed_files["fake:c:8"] = "fake:other:8"
    pinned = bench.pin(bench.c)
    ((adapter, error),) = bench.tiers.settle()
    assert adapter is bench.c
    assert isinstance(error, FailedPrecondition)
    assert "have changed since it was loaded" in error.message
    bench.tiers.unpin(pinned)
    bench.pin(bench.a, bench.d)


def test_a_slot_that_is_closed_takes_nobody_new_until_it_is_reopened() -> None:
    bench = Tiers()
    bench.pin(bench.a)
    bench.pin(bench.b)
    bench.pin(bench.b)
    assert bench.tiers.close_slot(None) is bench.a, "the slot with the fewest pins"
    assert not bench.tiers.can_pin(bench.a)
    assert bench.tiers.pin([bench.a]) is None
    bench.tiers.reopen()
    assert bench.tiers.can_pin(bench.a)


def test_two_that_wait_have_two_slots_emptied() -> None:
    bench = Tiers()
    bench.pin(bench.a)
    bench.pin(bench.b)
    assert {bench.tiers.close_slot(None), bench.tiers.close_slot(None)} == {bench.a, bench.b}
    assert bench.tiers.close_slot(None) is None


def test_nothing_can_run_with_an_adapter_that_is_not_on_the_device() -> None:
    with pytest.raises(Internal, match="not on the device"):
        _ = Tiers().c.slot


def test_invariants_notice_a_pin_that_nobody_holds() -> None:
    bench = Tiers()
    bench.pin(bench.a)
    bench.tiers.check_invariants([bench.a])
    with pytest.raises(Internal, match="1 pins, 0 are held"):
        bench.tiers.check_invariants([])
