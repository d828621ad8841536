"""Both ways of attending to base KV and residual, against the definition in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from forkkv_kernels.ops.partial_attention import (
    PartialAttention,
    attend_padded,
    attend_plain,
    empty_partial,
    finish_partial,
    merge_partials_,
)
from forkkv_kernels.ops.residual_attention import (
    GroupResidual,
    attend,
    attend_grouped,
    reconstruct_k,
    reconstruct_v,
)
from forkkv_kernels.reference import partial_attention as partial_reference
from forkkv_kernels.reference import residual_attention as reference
from torch import Tensor

from tests.kernels.test_rope import table

HKV, GROUP, D, RANK = 2, 3, 16, 5


@dataclass
class Case:
    """T rows at the end of S keys, and one adapter's residual over all keys."""

    q: Tensor
    base_k: Tensor
    base_v: Tensor
    a_k: Tensor
    a_v: Tensor
    b_k: Tensor
    b_v: Tensor
    cos_sin: Tensor

    @property
    def grouped_q(self) -> Tensor:
        return (self.q * D**-0.5).view(len(self.q), HKV, GROUP, D).transpose(0, 1)

    @property
    def residual(self) -> GroupResidual:
        return GroupResidual(0, len(self.q), self.a_k, self.b_k, self.a_v, self.b_v)

    def keys(self) -> tuple[Tensor, Tensor]:
        """K and V in float64, by the formula."""
        delta = torch.einsum("sr,rhd->shd", self.a_k.double(), self.b_k.double())
        c, s = self.cos_sin.double().unsqueeze(1).chunk(2, dim=-1)
        d1, d2 = delta.chunk(2, dim=-1)
        rotated = torch.cat((d1 * c - d2 * s, d2 * c + d1 * s), dim=-1)
        return self.base_k.double() + rotated, self.base_v.double() + torch.einsum("sr,rhd->shd", self.a_v, self.b_v).double()


def make(num_rows: int, num_keys: int, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return Case(
        rand(num_rows, HKV * GROUP, D), rand(num_keys, HKV, D), rand(num_keys, HKV, D), rand(num_keys, RANK),
        rand(num_keys, RANK), rand(RANK, HKV, D) * 0.3, rand(RANK, HKV, D) * 0.3, table(num_keys, D),
    )  # fmt: skip


def naive(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None) -> Tensor:
    k, v = k.repeat_interleave(GROUP, dim=1), v.repeat_interleave(GROUP, dim=1)
    scores = torch.einsum("thd,shd->hts", q.double(), k) * D**-0.5
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    return torch.einsum("hts,shd->thd", scores.softmax(-1), v).float()


def finish(partials: list[tuple[PartialAttention, Tensor]], num_rows: int) -> Tensor:
    state = empty_partial(HKV, num_rows, GROUP, D, torch.device("cpu"))
    for partial, rows in partials:
        merge_partials_(state, partial, rows)
    return finish_partial(state)


def test_reconstruction_equals_the_formula() -> None:
    case = make(1, 37)
    k, v = case.keys()
    torch.testing.assert_close(reconstruct_k(case.base_k, case.a_k, case.b_k, case.cos_sin).double(), k, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(reconstruct_v(case.base_v, case.a_v, case.b_v).double(), v, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("num_rows", "num_keys"), [(1, 1), (1, 37), (5, 64), (40, 41)])
def test_grouped_attention_equals_the_definition(num_rows: int, num_keys: int) -> None:
    case = make(num_rows, num_keys)
    partial = attend_grouped(case.grouped_q, case.base_k, case.base_v, case.cos_sin, [case.residual])
    actual = finish([(partial, torch.arange(num_rows))], num_rows)
    torch.testing.assert_close(actual, naive(case.q, *case.keys()), atol=1e-5, rtol=1e-5)


def folded(cases: list[Case]) -> Tensor:
    q = torch.stack([case.grouped_q for case in cases])
    a_k = torch.stack([case.a_k for case in cases], dim=1)
    return reference.folded_scores(q, a_k, torch.stack([case.b_k for case in cases]), cases[0].cos_sin)


@pytest.mark.parametrize("num_rows", [1, 4])
def test_folded_scores_equal_reconstructed_scores(num_rows: int) -> None:
    cases = [make(num_rows, 50, seed) for seed in range(3)]
    for case, actual in zip(cases, folded(cases), strict=True):
        expected = reference.reconstructed_scores(case.grouped_q, case.a_k, case.b_k, cases[0].cos_sin)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_folding_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [make(2, 50)]
    whole = folded(cases)
    monkeypatch.setattr(reference, "_FOLD_MAX_ELEMS", 7 * 2 * HKV * GROUP * RANK)
    torch.testing.assert_close(whole, folded(cases), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("limit", [0, 1000])
def test_both_ways_to_the_residuals_scores_give_the_same_attention(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(5, 64)
    monkeypatch.setattr(reference, "_FOLD_MAX_ROWS", limit)
    partial = attend_grouped(case.grouped_q, case.base_k, case.base_v, case.cos_sin, [case.residual])
    actual = finish([(partial, torch.arange(5))], 5)
    torch.testing.assert_close(actual, naive(case.q, *case.keys()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("flash_max_keys", [0, 1024])
def test_plain_attention_equals_grouped_attention_without_residuals(
    dtype: torch.dtype, is_masked: bool, flash_max_keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial_reference, "FLASH_MAX_KEYS", flash_max_keys)
    case = make(4, 33)
    mask = torch.arange(33) > 29 + torch.arange(4)[:, None] if is_masked else None
    q, k, v = (x.to(dtype) for x in (case.grouped_q, case.base_k, case.base_v))
    plain = finish([(attend_plain(q, k, v, mask), torch.arange(4))], 4)
    grouped = finish([(attend_grouped(q, k, v, case.cos_sin, (), mask), torch.arange(4))], 4)
    torch.testing.assert_close(plain, grouped, atol=2e-3 if dtype == torch.float16 else 1e-5, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_padded_attention_equals_plain_attention_row_by_row(dtype: torch.dtype) -> None:
    lengths = [1, 7, 20]
    cases = [make(1, n, seed=n) for n in lengths]
    q = torch.cat([case.grouped_q for case in cases], dim=1).to(dtype)
    k, v = torch.randn(3, 20, HKV, D).to(dtype), torch.randn(3, 20, HKV, D).to(dtype)
    for n, (length, case) in enumerate(zip(lengths, cases, strict=True)):
        k[n, :length], v[n, :length] = case.base_k.to(dtype), case.base_v.to(dtype)
    actual = finish([(attend_padded(q, k, v, torch.arange(20) >= torch.tensor(lengths)[:, None]), torch.arange(3))], 3)
    for n, case in enumerate(cases):
        expected = naive(case.q, case.base_k.double(), case.base_v.double())[0]
        torch.testing.assert_close(actual[n], expected, atol=5e-3 if dtype == torch.float16 else 1e-5, rtol=1e-2)


def test_rows_of_different_adapters_read_their_own_residual() -> None:
    one, two = make(3, 20, seed=1), make(3, 20, seed=2)
    q = torch.cat((one.grouped_q, two.grouped_q), dim=1)
    residuals = [
        GroupResidual(0, 2, one.a_k, one.b_k, one.a_v, one.b_v),
        GroupResidual(4, 6, two.a_k, two.b_k, None, None),
    ]
    partial = attend_grouped(q, one.base_k, one.base_v, one.cos_sin, residuals)
    actual = finish([(partial, torch.arange(6))], 6)
    k, v = one.keys()
    base = (one.base_k.double(), one.base_v.double())
    two.base_k = one.base_k
    torch.testing.assert_close(actual[:2], naive(one.q, k, v)[:2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(actual[2], naive(one.q, *base)[2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(actual[4:], naive(two.q, two.keys()[0], base[1])[1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("splits", [[37], [1, 36], [5, 6, 26], [36, 1]], ids=str)
def test_split_keys_merge_to_the_same_answer(splits: list[int]) -> None:
    case, partials, start = make(4, 37), [], 0
    hidden = torch.arange(37)[None, :] > torch.arange(33, 37)[:, None]
    for size in splits:
        keys = slice(start, start + size)
        residual = GroupResidual(0, 4, case.a_k[keys], case.b_k, case.a_v[keys], case.b_v)
        partial = attend_grouped(
            case.grouped_q, case.base_k[keys], case.base_v[keys], case.cos_sin[keys], [residual], hidden[:, keys]
        )
        partials.append((partial, torch.arange(4)))
        start += size
    torch.testing.assert_close(finish(partials, 4), naive(case.q, *case.keys(), hidden), atol=1e-5, rtol=1e-5)


def test_the_order_of_merging_does_not_matter_to_a_row_that_a_tile_hides() -> None:
    case = make(2, 8)
    hidden = torch.tensor([[True] * 4, [False] * 4])
    q = case.grouped_q
    visible = (attend_grouped(q, case.base_k[:4], case.base_v[:4], case.cos_sin[:4]), torch.arange(2))
    masked = (attend_grouped(q, case.base_k[4:], case.base_v[4:], case.cos_sin[4:], (), hidden), torch.arange(2))
    wanted = naive(case.q, case.base_k[:4].double(), case.base_v[:4].double())[0]
    for order in ([visible, masked], [masked, visible]):
        torch.testing.assert_close(finish(order, 2)[0], wanted, atol=1e-5, rtol=1e-5)


def test_merging_touches_only_the_rows_it_names() -> None:
    case = make(2, 8)
    partial = attend_grouped(case.grouped_q, case.base_k, case.base_v, case.cos_sin)
    state = empty_partial(HKV, 4, GROUP, D, torch.device("cpu"))
    merge_partials_(state, partial, torch.tensor([3, 1]))
    assert (state.lse[:, [0, 2]] < -1e30).all()
    assert state.output[:, [0, 2]].abs().sum() == 0
    torch.testing.assert_close(state.output[:, [3, 1]], partial.output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_rows", "num_keys"), [(6, 20), (20, 20), (1, 20)])
@pytest.mark.parametrize("max_elems", [1 << 24, 4 * HKV * GROUP * 20], ids=["whole", "in-pieces"])
def test_dense_attention_masks_the_future(
    dtype: torch.dtype, num_rows: int, num_keys: int, max_elems: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_SCORES_MAX_ELEMS", max_elems)
    case = make(num_rows, num_keys)
    hidden = torch.arange(num_keys)[None, :] > torch.arange(num_keys - num_rows, num_keys)[:, None]
    q, k, v = (x.to(dtype) for x in (case.q, case.base_k, case.base_v))
    wanted = naive(q, k.double(), v.double(), hidden)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(attend(q, k, v).float(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("num_rows", [1, 40])
def test_bfloat16_stays_within_its_precision(num_rows: int) -> None:
    case = make(num_rows, 64)
    low = [t.bfloat16() for t in (case.grouped_q, case.base_k, case.base_v, case.cos_sin)]
    factors = [t.bfloat16() for t in (case.a_k, case.b_k, case.a_v, case.b_v)]
    partial = attend_grouped(*low, [GroupResidual(0, num_rows, *factors)])
    actual = finish([(partial, torch.arange(num_rows))], num_rows)
    torch.testing.assert_close(actual, naive(case.q, *case.keys()), atol=6e-2, rtol=6e-2)
