"""Norms, rotation and activation in C++ against their references.

In fp32 sums run in another order, and 2^x is good to 2 units in the last place. In bf16 both round wherever the other does, so
they differ only where those last bits of fp32 decide a rounding: by one unit in the last place of bf16, and in few elements. A
rounded value that is then multiplied and rounded again can be two apart.
"""

from __future__ import annotations

import math

import pytest
import torch
from forkkv_kernels.ops.rms_norm import add_rms_norm_
from forkkv_kernels.ops.silu_mul import silu_mul
from forkkv_kernels.ops.store_kv import HeadNorms, store_kv
from forkkv_kernels.reference import rms_norm as rms_norm_reference
from forkkv_kernels.reference import silu_mul as silu_mul_reference
from forkkv_kernels.reference import store_kv as store_kv_reference
from torch import Tensor

from tests.kernels.test_rope import table

DTYPES = [torch.float32, torch.bfloat16]
HQ, HKV = 6, 2


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same(found: Tensor, wanted: Tensor, max_units: int = 1) -> None:
    assert found.dtype == wanted.dtype
    if found.dtype == torch.float32:
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=2e-6)
        return
    units = (ordered(found) - ordered(wanted)).abs()
    assert units.max() <= max_units if units.numel() else True
    assert (units > 0).sum() <= max(2, 0.01 * units.numel())


def ordered(x: Tensor) -> Tensor:
    """bf16 -> integers in the same order, neighbours one apart."""
    bits = x.contiguous().view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_delta", [False, True])
@pytest.mark.parametrize("num_rows", [0, 1, 7, 8, 40])
@pytest.mark.parametrize("width", [1, 15, 64, 770])
def test_add_and_norm(width: int, num_rows: int, has_delta: bool, dtype: torch.dtype) -> None:
    hidden, weight = random(num_rows, width, dtype=dtype), random(width, dtype=dtype, seed=1)
    delta = random(num_rows, width, dtype=dtype, seed=2) if has_delta else None
    other = hidden.clone()
    assert_same(add_rms_norm_(hidden, delta, weight, 1e-5), rms_norm_reference.add_rms_norm_(other, delta, weight, 1e-5), 2)
    assert torch.equal(hidden, other)  # a sum, rounded once: the same bits


@pytest.mark.parametrize("dtype", DTYPES)
def test_eps_keeps_the_norm_of_a_zero_row_finite(dtype: torch.dtype) -> None:
    assert torch.equal(
        add_rms_norm_(torch.zeros(2, 20, dtype=dtype), None, torch.ones(20, dtype=dtype), 1e-6), torch.zeros(2, 20)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [0, 1, 3, 4, 40])
@pytest.mark.parametrize("width", [1, 15, 64, 770])
def test_silu_times_up(width: int, num_rows: int, dtype: torch.dtype) -> None:
    gate_up = 4 * random(num_rows, 2 * width, dtype=dtype)
    assert_same(silu_mul(gate_up), silu_mul_reference.silu_mul(gate_up), 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_far_out_is_zero_on_one_side_and_the_gate_on_the_other(dtype: torch.dtype) -> None:
    gate = torch.tensor([-3e4, -200.0, -88.0, 88.0, 200.0, 3e4, math.inf], dtype=dtype)
    found = silu_mul(torch.cat((gate, torch.ones(7, dtype=dtype)))[None])[0]
    torch.testing.assert_close(found, torch.cat((torch.zeros(3, dtype=dtype), gate[3:])))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_and_up_are_read_through_their_strides(dtype: torch.dtype) -> None:
    gate_up = random(600, 40, dtype=dtype).t()
    for _ in range(20):  # a copy that dies before it is read may still hold its bytes once
        assert_same(silu_mul(gate_up), silu_mul_reference.silu_mul(gate_up), 2)


def stored(qkv: Tensor, norms: HeadNorms | None, slots: list[int]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(q, key cache, value cache) of the op and of the reference; caches are 7 where nothing is stored."""
    num_rows, _, head_dim = qkv.shape
    cos_sin = table(num_rows + 9, head_dim)[9:].contiguous()
    results = []
    for function in (store_kv, store_kv_reference.store_kv):
        caches = [torch.full((2 * num_rows + 1, HKV, head_dim), 7.0, dtype=qkv.dtype) for _ in "kv"]
        before = qkv.clone()
        q = function(qkv, cos_sin, norms, torch.tensor(slots, dtype=torch.int64), *caches)
        assert torch.equal(qkv, before)
        results.append((q, *caches))
    return results[0], results[1]


def norms_of(head_dim: int, dtype: torch.dtype) -> HeadNorms:
    return HeadNorms(random(head_dim, dtype=dtype, seed=1), random(head_dim, dtype=dtype, seed=2), 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norms", [False, True], ids=["plain", "qk-norm"])
@pytest.mark.parametrize("num_rows", [0, 1, 9])
@pytest.mark.parametrize("head_dim", [2, 8, 48, 80, 128, 512, 514])
def test_store_kv(head_dim: int, num_rows: int, has_norms: bool, dtype: torch.dtype) -> None:
    qkv = random(num_rows, HQ + 2 * HKV, head_dim, dtype=dtype)
    slots = [2 * (row * 4 % 9) if row % 4 else -1 for row in range(num_rows)]
    found, wanted = stored(qkv, norms_of(head_dim, dtype) if has_norms else None, slots)
    # Under QK-norm what is rotated was rounded before: where two products cancel, one unit of them is many of the difference.
    atol, rtol = (1e-5, 1e-5) if dtype == torch.float32 else (0.06 if has_norms else 1e-6, 2**-7)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=rtol)
        assert (one != other).sum() <= max(4, 0.01 * one.numel()) or dtype == torch.float32
    assert torch.equal(found[2], wanted[2])  # V is copied


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("head_dim", [16, 514])
def test_q_is_contiguous_whoever_rotates_it(head_dim: int, dtype: torch.dtype) -> None:
    """Attention reads it by its address; heads beyond 512 elements and other dtypes are left to the reference."""
    (q, *_), _ = stored(random(3, HQ + 2 * HKV, head_dim, dtype=dtype), None, [0, 1, 2])
    assert q.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_without_a_slot_is_rotated_and_not_kept(dtype: torch.dtype) -> None:
    (q, keys, values), (wanted, *_) = stored(random(3, HQ + 2 * HKV, 16, dtype=dtype), None, [-1, -1, -1])
    assert_same(q, wanted)
    assert (keys == 7).all()
    assert (values == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_is_not_a_number_spoils_no_other(dtype: torch.dtype) -> None:
    sound = random(9, 40, dtype=dtype)
    spoilt = sound.clone()
    spoilt[4, 3] = math.nan
    others = torch.arange(9) != 4
    weight = torch.ones(40, dtype=dtype)
    for function in (silu_mul, lambda x: add_rms_norm_(x.clone(), None, weight, 1e-6)):
        assert torch.equal(function(spoilt)[others], function(sound)[others])
        assert function(spoilt)[4].isnan().any()
