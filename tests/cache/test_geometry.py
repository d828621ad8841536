"""Sizes of pages and slabs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkkv_cluster.cache.geometry import RANK_CLASSES, KVGeometry
from forkkv_cluster.core.errors import InvalidArgument

LLAMA_8B = KVGeometry(num_layers=32, num_kv_heads=8, head_dim=128, page_size=64, dtype_bytes=2)

geometries = st.builds(
    KVGeometry,
    num_layers=st.integers(1, 40),
    num_kv_heads=st.integers(1, 9),
    head_dim=st.sampled_from([2, 32, 64, 80, 96, 128]),
    page_size=st.sampled_from([1, 4, 16, 64]),
    dtype_bytes=st.sampled_from([2, 4]),
)


def test_a_fork_of_llama_8b_costs_a_64th() -> None:
    assert LLAMA_8B.base_bytes_per_token == 128 * 1024
    assert LLAMA_8B.bytes_per_token(16) == 2 * 1024


@given(geometries, st.sampled_from([None, *RANK_CLASSES]))
def test_whole_pages_fill_a_slab(geometry: KVGeometry, rank_class: int | None) -> None:
    assert geometry.pages_per_slab(rank_class) * geometry.page_bytes(rank_class) == geometry.slab_bytes


@given(st.integers(1, 128))
def test_the_rank_class_is_the_smallest_that_fits(rank: int) -> None:
    found = LLAMA_8B.rank_class(rank)
    assert found >= rank
    assert all(c < rank for c in RANK_CLASSES if c < found)


@pytest.mark.parametrize("rank", [0, -1, 129])
def test_a_rank_without_a_class_is_refused(rank: int) -> None:
    with pytest.raises(InvalidArgument, match="lora_rank"):
        LLAMA_8B.rank_class(rank)


def test_a_number_that_is_no_class_has_no_page() -> None:
    with pytest.raises(InvalidArgument, match="rank_class=12"):
        LLAMA_8B.page_bytes(12)


def test_memory_is_cut_into_whole_slabs() -> None:
    assert LLAMA_8B.num_slabs(3 * LLAMA_8B.slab_bytes + 1) == 3


def test_memory_below_one_slab_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="kv_bytes"):
        LLAMA_8B.num_slabs(LLAMA_8B.slab_bytes - 1)


@pytest.mark.parametrize("field", ["num_layers", "num_kv_heads", "head_dim", "page_size", "dtype_bytes"])
def test_sizes_below_one_are_refused_by_name(field: str) -> None:
    sizes = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 8, "page_size": 4, "dtype_bytes": 4, field: 0}
    with pytest.raises(InvalidArgument, match=field):
        KVGeometry(**sizes)


def test_rank_classes_must_ascend() -> None:
    with pytest.raises(InvalidArgument, match="rank_classes"):
        KVGeometry(1, 1, 8, 4, 4, rank_classes=(16, 8))
