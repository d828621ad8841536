"""K or V of one sequence head by head, against the token-by-token reconstruction in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from forkkv_kernels.ops.paged_decode import gather_heads, is_available
from forkkv_kernels.ops.qk_norm import KeyScale
from forkkv_kernels.ops.residual_attention import reconstruct_k, reconstruct_v
from torch import Tensor

from tests.kernels.decode_cases import product, rotated
from tests.kernels.test_rope import table

HKV, STRIDE = 3, 70
DTYPES = [torch.float32, torch.bfloat16]

pytestmark = pytest.mark.skipif(not is_available(torch.device("cpu"), torch.float32), reason="no C++ compiler")


class Sequence:
    """S tokens of a base pool whose first ``num_residual`` have a residual, in pools that are NaN elsewhere."""

    def __init__(self, num_tokens: int, num_residual: int, rank: int, head_dim: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(num_tokens + rank)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.slots, self.own_slots = (torch.randperm(2 * n, generator=generator)[:n] for n in (num_tokens, num_residual))
        self.pool = torch.full((2 * num_tokens, HKV, head_dim), math.nan, dtype=dtype)
        self.own_pool = torch.full((2 * num_residual, STRIDE), math.nan, dtype=dtype)
        self.base, self.b = random(num_tokens, HKV, head_dim), random(rank, HKV, head_dim)
        self.a = (random(num_residual, rank) / math.sqrt(max(rank, 1))).to(dtype)
        self.scale = KeyScale(1 + 0.2 * random(num_residual, HKV), 0.2 * random(num_residual, HKV))
        self.pool[self.slots] = self.base
        self.own_pool[self.own_slots, :rank] = self.a
        self.own_pool[self.own_slots, STRIDE - 2 * HKV :] = torch.cat((self.scale.norm, self.scale.change), dim=1)
        self.cos_sin = table(max(num_tokens, 1), head_dim)[:num_tokens]

    def gather(self, plane: str, is_scaled: bool = False, out: Tensor | None = None) -> Tensor:
        num_tokens, _, head_dim = self.base.shape
        out = self.base.new_full((HKV, num_tokens, head_dim), math.nan) if out is None else out
        slots, own_slots = (np.array(x.tolist(), dtype=np.int64) for x in (self.slots, self.own_slots))
        fields = {
            "num_residual": len(self.a),
            "residual_first": 0, "residual_listed": own_slots.ctypes.data, "a": self.own_pool.data_ptr(), "stride": STRIDE,
            "rank": len(self.b), "b": self.b.data_ptr(),
        }  # fmt: skip
        if is_scaled:
            first = self.own_pool.data_ptr() + (STRIDE - 2 * HKV) * self.own_pool.itemsize
            fields |= {"norm": first, "change": first + HKV * self.own_pool.itemsize, "change_stride": STRIDE}
        cos_sin = self.cos_sin if plane == "k" else None
        gather_heads(self.pool, out, (0, slots.ctypes.data), num_tokens, fields, cos_sin)
        return out

    def expected(self, plane: str, is_scaled: bool = False) -> Tensor:
        """[HKV, S, D] float64."""
        added, with_residual = product(self.a, self.b), self.base[: len(self.a)].double()
        if plane == "k":
            added = rotated(added, self.cos_sin[: len(self.a)])
        if is_scaled:
            added = added * self.scale.norm.double()[..., None]
            with_residual = with_residual * (1 + self.scale.change.double())[..., None]
        return torch.cat((with_residual + added, self.base[len(self.a) :].double())).transpose(0, 1)


def assert_close(found: Tensor, wanted: Tensor) -> None:
    """In bf16 the result is rounded once: half a unit in the last of 8 bits."""
    tolerance = 2e-6 if found.dtype == torch.float32 else 2**-8
    torch.testing.assert_close(found.double(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plane", ["k", "v"])
@pytest.mark.parametrize("rank", [0, 1, 8, 16, 17, 64])
@pytest.mark.parametrize("head_dim", [8, 24, 80, 128])
def test_any_rank_and_head_dim(head_dim: int, rank: int, plane: str, dtype: torch.dtype) -> None:
    sequence = Sequence(130, 67, rank, head_dim, dtype)
    assert_close(sequence.gather(plane), sequence.expected(plane))


@pytest.mark.parametrize("num_tokens", [1, 63, 64, 65, 256, 257, 600])
@pytest.mark.parametrize("covered", ["none", "one", "all-but-one", "all"])
def test_a_residual_over_any_part_of_the_tokens(num_tokens: int, covered: str) -> None:
    num_residual = {"none": 0, "one": 1, "all-but-one": num_tokens - 1, "all": num_tokens}[covered]
    sequence = Sequence(num_tokens, num_residual, 9, 24, torch.float32)
    assert_close(sequence.gather("k"), sequence.expected("k"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 48])
def test_qk_norm_rescales_what_the_residual_covers(head_dim: int, dtype: torch.dtype) -> None:
    sequence = Sequence(130, 67, 8, head_dim, dtype)
    assert_close(sequence.gather("k", is_scaled=True), sequence.expected("k", is_scaled=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_without_a_residual_keep_their_bits(dtype: torch.dtype) -> None:
    sequence = Sequence(130, 67, 8, 24, dtype)
    assert torch.equal(sequence.gather("v")[:, 67:], sequence.base[67:].transpose(0, 1))


def test_it_agrees_with_the_reference_that_other_devices_run() -> None:
    sequence = Sequence(70, 70, 17, 80, torch.float32)
    k = reconstruct_k(sequence.base, sequence.a, sequence.b, sequence.cos_sin, sequence.scale)
    v = reconstruct_v(sequence.base, sequence.a, sequence.b)
    torch.testing.assert_close(sequence.gather("k", is_scaled=True), k.transpose(0, 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sequence.gather("v"), v.transpose(0, 1), atol=1e-5, rtol=1e-5)


def test_it_writes_a_stretch_of_a_longer_memory_and_nothing_beside_it() -> None:
    sequence = Sequence(70, 70, 8, 24, torch.float32)
    whole = torch.full((HKV, 100, 24), 7.0)
    sequence.gather("k", out=whole[:, 20:90])
    assert_close(whole[:, 20:90], sequence.expected("k"))
    assert (whole[:, :20] == 7).all()
    assert (whole[:, 90:] == 7).all()


def test_no_tokens_are_no_work() -> None:
    assert Sequence(0, 0, 8, 24, torch.float32).gather("k").shape == (HKV, 0, 24)


def test_a_token_that_is_not_a_number_spoils_no_other() -> None:
    sequence = Sequence(70, 70, 8, 24, torch.bfloat16)
    wanted = sequence.expected("k")
    sequence.own_pool[sequence.own_slots[33], 3] = math.nan
    found = sequence.gather("k")
    assert found[:, 33].isnan().all()
    found[:, 33], wanted[:, 33] = 0, 0
    assert_close(found, wanted)
