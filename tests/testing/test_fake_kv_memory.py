"""The fake device's memory: what an engine must never do to it fails, what it may do does not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from forkkv_cluster.cache.geometry import KVGeometry
from forkkv_cluster.cache.merged_keys import MergedRun
from forkkv_cluster.testing.fake_kv_memory import FakeKVMemory, WrongKV

GEOMETRY = KVGeometry(2, 2, 8, 4, 4, rank_classes=(8, 32))
"""A slab holds 8 base tokens, or 16 of rank class 8; whole K takes eight slabs."""

RUN = MergedRun(first_slab=2, plane=1, num_tokens=3)
VALUES = ("x", "y", "z")


@pytest.fixture
def memory() -> FakeKVMemory:
    memory = FakeKVMemory(GEOMETRY)
    memory.write_whole_keys(RUN, VALUES, is_complete=True)
    return memory


def check(memory: FakeKVMemory, run: MergedRun = RUN) -> None:
    for position, value in enumerate(VALUES):
        memory.check_whole_key(run, position, value, needs_all_layers=True)


def test_whole_keys_are_read_where_they_were_written(memory: FakeKVMemory) -> None:
    check(memory)
    memory.write(None, 10 * 8, "page")  # the slab behind the run
    memory.write(None, 2 * 8 - 1, "page")  # the last slot before it
    check(memory)


@pytest.mark.parametrize(("page_class", "slot"), [(None, 16), (None, 79), (8, 32), (8, 159)])
def test_any_page_written_into_a_run_destroys_it(memory: FakeKVMemory, page_class: int | None, slot: int) -> None:
    memory.write(page_class, slot, "page")
    with pytest.raises(WrongKV, match="overwritten"):
        check(memory)


def test_a_run_destroys_the_pages_in_its_slabs_and_no_others(memory: FakeKVMemory) -> None:
    other = replace(RUN, first_slab=20)
    for slot in (19 * 8, 20 * 8):
        memory.write(None, slot, "page")
    memory.write_whole_keys(other, VALUES, is_complete=True)
    assert memory.read(None, 19 * 8) == "page"
    with pytest.raises(WrongKV, match="holds nothing"):
        memory.read(None, 20 * 8)


def test_the_two_planes_of_a_run_do_not_touch_each_other(memory: FakeKVMemory) -> None:
    other = replace(RUN, plane=0)
    memory.write_whole_keys(other, VALUES, is_complete=True)
    check(memory)
    check(memory, other)


def test_whole_keys_of_another_length_in_the_same_place_destroy_those_there(memory: FakeKVMemory) -> None:
    memory.write_whole_keys(replace(RUN, num_tokens=80), VALUES, is_complete=True)
    with pytest.raises(WrongKV):
        check(memory)


def test_what_lacks_the_last_layer_serves_no_step_that_runs_it(memory: FakeKVMemory) -> None:
    memory.write_whole_keys(RUN, VALUES, is_complete=False)
    memory.check_whole_key(RUN, 0, "x", needs_all_layers=False)
    with pytest.raises(WrongKV, match="last layer"):
        memory.check_whole_key(RUN, 0, "x", needs_all_layers=True)


def test_keys_of_another_adapter_or_a_position_that_was_not_written_fail(memory: FakeKVMemory) -> None:
    with pytest.raises(WrongKV, match="belongs to another"):
        memory.check_whole_key(RUN, 0, "y", needs_all_layers=True)
    with pytest.raises(WrongKV, match="never written"):
        memory.check_whole_key(RUN, 3, "w", needs_all_layers=True)


def test_pages_of_two_classes_in_one_slab_destroy_each_other() -> None:
    memory = FakeKVMemory(GEOMETRY)
    memory.write(None, 0, "base")
    memory.write(8, 15, "residual")
    with pytest.raises(WrongKV):
        memory.read(None, 0)
