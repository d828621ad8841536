"""The arena and its views."""

from __future__ import annotations

import pytest
import torch

from forkkv_cluster.cache.geometry import KVGeometry
from forkkv_cluster.engine.kv_buffers import KVBuffers

GEOMETRY = KVGeometry(num_layers=2, num_kv_heads=3, head_dim=8, page_size=4, dtype_bytes=4, rank_classes=(8, 16))
NUM_SLABS = 3


@pytest.fixture
def kv() -> KVBuffers:
    buffers = KVBuffers(GEOMETRY, NUM_SLABS, torch.float32, torch.device("cpu"))
    buffers.arena.zero_()
    return buffers


def test_the_arena_has_the_bytes_that_the_geometry_says(kv: KVBuffers) -> None:
    assert kv.arena.nbytes == NUM_SLABS * GEOMETRY.slab_bytes


def test_views_hold_all_slots_of_their_class(kv: KVBuffers) -> None:
    keys, _ = kv.base(0)
    assert keys.shape == (NUM_SLABS * GEOMETRY.pages_per_slab(None) * 4, 3, 8)
    down, _ = kv.residual(1, 16)
    assert down.shape == (NUM_SLABS * GEOMETRY.pages_per_slab(16) * 4, 16)


@pytest.mark.parametrize("rank_class", [8, 16])
def test_pages_of_one_slab_stay_inside_it(kv: KVBuffers, rank_class: int) -> None:
    """Filling every residual page of slab 1 changes no base page of slabs 0 and 2."""
    slots_per_slab = GEOMETRY.pages_per_slab(rank_class) * GEOMETRY.page_size
    for pool in kv.residual(1, rank_class):
        pool[slots_per_slab : 2 * slots_per_slab] = 1.0
    base_slots = GEOMETRY.pages_per_slab(None) * GEOMETRY.page_size
    for pool in kv.base(1):
        assert (pool[base_slots : 2 * base_slots] == 1).all()
        assert (pool[:base_slots] == 0).all()
        assert (pool[2 * base_slots :] == 0).all()
    assert (kv.arena[0] == 0).all()


def test_keys_and_values_lie_in_planes_of_their_own(kv: KVBuffers) -> None:
    keys, values = kv.base(1)
    keys[5] = 2.0
    assert (values == 0).all()
    assert kv.arena[1, 0].sum() == 2 * 3 * 8


def test_a_page_copy_takes_only_the_first_tokens_of_all_layers(kv: KVBuffers) -> None:
    for layer in range(2):
        for plane, pool in enumerate(kv.base(layer)):
            pool[4:8] = torch.arange(1.0, 5.0)[:, None, None] + 10 * layer + 100 * plane
    kv.copy_base(source_page=1, target_page=3, num_tokens=3)
    for layer in range(2):
        for pool in kv.base(layer):
            assert torch.equal(pool[12:15], pool[4:7])
            assert (pool[15] == 0).all()


def test_a_residual_copy_stays_in_its_class(kv: KVBuffers) -> None:
    down, _ = kv.residual(0, 8)
    down[0:4] = 3.0
    kv.copy_residual(8, source_page=0, target_page=5, num_tokens=2)
    assert down.sum() == 3.0 * 8 * 6
    assert (down[20:22] == 3).all()
