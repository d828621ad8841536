"""Norm, activation, rotation and KV store in Triton against their references.

Sums run in another order. In half precision both round wherever the other does, so they differ where the last bits of fp32
decide a rounding; a rounded value that is then multiplied and rounded again can be two units apart.
"""

from __future__ import annotations

import math

import pytest
import torch
from forkkv_kernels.ops.rms_norm import add_rms_norm_, rms_norm
from forkkv_kernels.ops.silu_mul import silu_mul
from forkkv_kernels.ops.store_kv import HeadNorms, store_kv
from forkkv_kernels.reference import rms_norm as rms_norm_reference
from forkkv_kernels.reference import silu_mul as silu_mul_reference
from forkkv_kernels.reference import store_kv as store_kv_reference
from torch import Tensor

from tests.kernels.place_sets import REFERENCE, ROW_PLACES
from tests.kernels.places import Place
from tests.kernels.test_rope import table

TOLERANCE = {torch.float32: 3e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}
"""Relative: two units in the last place of a half, some of fp32."""


def random(place: Place, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(place.device, place.dtype)


def assert_same(found: Tensor, wanted: Tensor, atol: float | None = None) -> None:
    rtol = TOLERANCE[found.dtype]
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=min(1e-5, rtol) if atol is None else atol)


@pytest.mark.parametrize("place", ROW_PLACES)
@pytest.mark.parametrize("has_delta", [False, True], ids=["norm", "add"])
@pytest.mark.parametrize("num_rows", [0, 1, 3])
@pytest.mark.parametrize("width", [1, 15, 770])
def test_add_and_norm(place: Place, width: int, num_rows: int, has_delta: bool) -> None:
    hidden, weight = random(place, num_rows, width), random(place, width, seed=1)
    delta = random(place, num_rows, width, seed=2) if has_delta else None
    other = hidden.clone()
    with place.entered():
        found = add_rms_norm_(hidden, delta, weight, 1e-5)
    assert_same(found, rms_norm_reference.add_rms_norm_(other, delta, weight, 1e-5))
    assert torch.equal(hidden, other)  # a sum, rounded once: the same bits


@pytest.mark.gpu
def test_many_rows_have_launch_settings_of_their_own() -> None:
    place = Place("gpu", torch.bfloat16)
    hidden, weight = random(place, 300, 4096), random(place, 4096, seed=1)
    assert_same(rms_norm(hidden, weight, 1e-5), rms_norm_reference.rms_norm(hidden, weight, 1e-5))


@pytest.mark.parametrize("place", ROW_PLACES)
def test_rows_of_the_norm_and_of_what_is_added_may_be_strided(place: Place) -> None:
    wide, weight = random(place, 5, 80), random(place, 40, seed=1)
    hidden = random(place, 5, 40, seed=2)
    with place.entered():
        assert_same(rms_norm(wide[1:4, 20:60], weight, 1e-6), rms_norm_reference.rms_norm(wide[1:4, 20:60], weight, 1e-6))
        assert_same(rms_norm(wide.t()[:40].t(), weight, 1e-6), rms_norm_reference.rms_norm(wide[:, :40], weight, 1e-6))
        wanted = hidden + wide[:, 3:43]
        add_rms_norm_(hidden, wide[:, 3:43], weight, 1e-6)
    assert torch.equal(hidden, wanted)


@pytest.mark.parametrize("place", ROW_PLACES)
def test_eps_keeps_the_norm_of_a_zero_row_finite(place: Place) -> None:
    zeros = torch.zeros(2, 20, dtype=place.dtype, device=place.device)
    with place.entered():
        assert torch.equal(add_rms_norm_(zeros.clone(), None, torch.ones_like(zeros[0]), 1e-6), zeros)


@pytest.mark.parametrize("place", ROW_PLACES)
@pytest.mark.parametrize("num_rows", [0, 1, 3])
@pytest.mark.parametrize("width", [1, 15, 64, 3000])
def test_silu_times_up(place: Place, width: int, num_rows: int) -> None:
    gate_up = 4 * random(place, num_rows, 2 * width)
    with place.entered():
        assert_same(silu_mul(gate_up), silu_mul_reference.silu_mul(gate_up))


@pytest.mark.parametrize("place", ROW_PLACES)
def test_silu_far_out_is_zero_on_one_side_and_the_gate_on_the_other(place: Place) -> None:
    gate = torch.tensor([-3e4, -200.0, -88.0, 88.0, 200.0, 3e4, math.inf], dtype=place.dtype, device=place.device)
    with place.entered():
        found = silu_mul(torch.cat((gate, torch.ones_like(gate)))[None])[0]
    torch.testing.assert_close(found, torch.cat((torch.zeros_like(gate[:3]), gate[3:])))


@pytest.mark.parametrize("place", ROW_PLACES)
def test_gate_and_up_are_read_through_their_strides(place: Place) -> None:
    wide = random(place, 8, 80)
    with place.entered():
        assert_same(silu_mul(wide[2:7, 10:50]), silu_mul_reference.silu_mul(wide[2:7, 10:50]))
        assert_same(silu_mul(wide.t()), silu_mul_reference.silu_mul(wide.t()))


@pytest.mark.parametrize("place", ROW_PLACES)
def test_a_row_that_is_not_a_number_spoils_no_other(place: Place) -> None:
    sound = random(place, 9, 40)
    spoilt = sound.clone()
    spoilt[4, 3] = math.nan
    others = torch.arange(9) != 4
    weight = torch.ones(40, dtype=place.dtype, device=place.device)
    with place.entered():
        for function in (silu_mul, lambda x: add_rms_norm_(x.clone(), None, weight, 1e-6)):
            assert torch.equal(function(spoilt)[others], function(sound)[others])
            assert function(spoilt)[4].isnan().any()


def stored(place: Place, qkv: Tensor, num_kv_heads: int, norms: HeadNorms | None, slots: Tensor) -> tuple[list[Tensor], ...]:
    """(q, key cache, value cache) of the op and of the reference; caches are NaN where nothing is stored."""
    num_rows, _, head_dim = qkv.shape
    cos_sin = table(num_rows + 9, head_dim)[9:].contiguous().to(place.device)
    results = []
    with place.entered():
        for function in (store_kv, store_kv_reference.store_kv):
            shape = (19, num_kv_heads, head_dim)
            caches = [torch.full(shape, math.nan, dtype=place.dtype, device=place.device) for _ in "kv"]
            before = qkv.clone()
            results.append([function(qkv, cos_sin, norms, slots, *caches), *caches])
            assert torch.equal(qkv, before)
    return results[0], results[1]


def norms_of(place: Place, head_dim: int) -> HeadNorms:
    return HeadNorms(random(place, head_dim, seed=1), random(place, head_dim, seed=2), 1e-6)


@pytest.mark.parametrize("place", ROW_PLACES)
@pytest.mark.parametrize("has_norms", [False, True], ids=["plain", "qk-norm"])
@pytest.mark.parametrize(
    ("num_rows", "heads", "head_dim"),
    [(0, (6, 2), 64), (1, (40, 8), 128), (9, (6, 2), 80), (3, (3, 3), 2), (3, (7, 1), 256), (3, (1, 1), 64)],
)
def test_store_kv(place: Place, num_rows: int, heads: tuple[int, int], head_dim: int, has_norms: bool) -> None:
    num_heads, num_kv_heads = heads
    qkv = random(place, num_rows, num_heads + 2 * num_kv_heads, head_dim)
    slots = torch.tensor([2 * (row * 4 % 9) if row % 4 else -1 for row in range(num_rows)], device=place.device).long()
    found, wanted = stored(place, qkv, num_kv_heads, norms_of(place, head_dim) if has_norms else None, slots)
    # What is rotated was rounded before: where two products cancel, one unit of them is many of the difference.
    atol = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 6e-2}[place.dtype]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE[place.dtype], atol=atol, equal_nan=True)
    assert torch.equal(found[2].nan_to_num(7), wanted[2].nan_to_num(7))  # V is copied
    assert found[0].is_contiguous()


@pytest.mark.parametrize("place", ROW_PLACES)
@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64])
def test_a_row_without_a_slot_is_rotated_and_not_kept(place: Place, slot_dtype: torch.dtype) -> None:
    slots = torch.tensor([-1, 5, -1], dtype=slot_dtype, device=place.device)
    found, wanted = stored(place, random(place, 3, 10, 16), 2, None, slots.long())
    assert_same(found[0], wanted[0])
    for cache in found[1:]:
        is_kept = torch.arange(len(cache), device=place.device) == 5
        assert cache[~is_kept].isnan().all()
        assert not cache[is_kept].isnan().any()


@pytest.mark.parametrize("place", [REFERENCE, *ROW_PLACES])
def test_each_takes_a_second_summand_of_what_it_reads(place: Place) -> None:
    """As if the LoRA that a stream of its own computed had been added to the linear's output in place."""
    wide, added = random(place, 5, 160), random(place, 5, 160, seed=1)
    both = wide + added
    hidden, weight = random(place, 5, 160, seed=2), random(place, 160, seed=3)
    other = hidden.clone()
    with place.entered():
        assert torch.equal(silu_mul(wide, added), silu_mul(both))
        assert torch.equal(add_rms_norm_(hidden, wide, weight, 1e-5, added), add_rms_norm_(other, both, weight, 1e-5))
        assert torch.equal(hidden, other)
        slots = torch.tensor([3, -1, 0, 1, 4], device=place.device)
        cos_sin = table(5, 16).to(place.device)
        for norms in (None, norms_of(place, 16)):
            caches = torch.zeros(2, 2, 5, 2, 16, dtype=place.dtype, device=place.device)
            found = store_kv(wide.view(5, 10, 16), cos_sin, norms, slots, *caches[0], added.view(5, 10, 16))
            assert torch.equal(found, store_kv(both.view(5, 10, 16), cos_sin, norms, slots, *caches[1]))
            assert torch.equal(caches[0], caches[1])
            assert caches[0].any()
