"""K of shared tokens under QK-norm, from base page, residual and two numbers a head: against the definition in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from forkkv_kernels.ops.qk_norm import KeyScale, inverse_rms, key_scale
from forkkv_kernels.ops.residual_attention import GroupResidual, attend_grouped, reconstruct_k
from forkkv_kernels.ops.rope import apply_rope
from forkkv_kernels.reference import residual_attention as reference
from torch import Tensor

from tests.kernels.test_residual_attention import GROUP, HKV, D, finish, naive
from tests.kernels.test_rope import table

S, RANK, EPS = 70, 5, 1e-6


@dataclass
class Case:
    """S keys before their norm, and one adapter's part of them."""

    k: Tensor
    a: Tensor
    b: Tensor
    gamma: Tensor

    def base_k(self) -> Tensor:
        """What the page holds."""
        return rotated(self.gamma * self.k * inverse_rms(self.k, EPS).unsqueeze(-1))

    def normed_b(self) -> Tensor:
        return self.b * self.gamma

    def scale(self) -> KeyScale:
        return key_scale(self.k, inverse_rms(self.k, EPS), self.a, self.b.flatten(1), EPS)

    def expected(self) -> Tensor:
        """[S, Hkv, D] float64, by the definition."""
        k = self.k.double() + torch.einsum("sr,rhd->shd", self.a.double(), self.b.double())
        return rotated64(self.gamma * k / (k.square().mean(-1, keepdim=True) + EPS).sqrt())


def rotated(x: Tensor) -> Tensor:
    return apply_rope(x, table(S, D))


def rotated64(x: Tensor) -> Tensor:
    c, s = table(S, D).double().unsqueeze(1).chunk(2, dim=-1)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), dim=-1)


def make(seed: int = 0, strength: float = 0.3, size: float = 1.0) -> Case:
    """``size`` multiplies all of k; ``strength`` is the adapter's part of it."""
    generator = torch.Generator().manual_seed(seed)
    k, a, b, gamma = (torch.randn(*shape, generator=generator) for shape in ((S, HKV, D), (S, RANK), (RANK, HKV, D), (D,)))
    return Case(size * k, size * a, strength * b, 1 + 0.5 * gamma)


def of_seed(case: Case, seed: int) -> Case:
    """Another adapter over the same keys."""
    other = make(seed)
    return replace(case, a=other.a, b=other.b)


@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0], ids=["below-eps", "ordinary", "large"])
@pytest.mark.parametrize("strength", [0.0, 0.01, 0.3, 30.0])
def test_reconstruction_equals_the_definition(strength: float, size: float) -> None:
    case = make(strength=strength, size=size)
    actual = reconstruct_k(case.base_k(), case.a, case.normed_b(), table(S, D), case.scale())
    torch.testing.assert_close(actual.double(), case.expected(), atol=2e-5, rtol=2e-5)


def test_without_an_adapter_of_weight_nothing_changes() -> None:
    scale = make(strength=0.0).scale()
    assert scale.change.abs().max() < 1e-6


@pytest.mark.parametrize("limit", [0, 1000], ids=["reconstructed", "folded"])
def test_rows_of_several_adapters_read_keys_of_their_own(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_FOLD_MAX_ROWS", limit)
    one, generator = make(), torch.Generator().manual_seed(9)
    cases = [one, of_seed(one, 1), of_seed(one, 2)]
    bounds = [(0, 2), (3, 5), (5, 8)]  # of 9 rows: 2 and 8 read the base alone
    q, v = torch.randn(9, HKV * GROUP, D, generator=generator), torch.randn(S, HKV, D, generator=generator)
    by_head = (q * D**-0.5).view(9, HKV, GROUP, D).transpose(0, 1)
    residuals = [
        GroupResidual(start, end, case.a, case.normed_b(), None, None, case.scale())
        for case, (start, end) in zip(cases, bounds, strict=True)
    ]
    mask = torch.arange(S)[None, :] > S - 1 - torch.arange(9)[:, None]
    actual = finish([(attend_grouped(by_head, one.base_k(), v, table(S, D), residuals, mask), torch.arange(9))], 9)
    wanted = naive(q, one.base_k().double(), v.double(), mask)
    for case, (start, end) in zip(cases, bounds, strict=True):
        rows = slice(start, end)
        wanted[rows] = naive(q[rows], case.expected(), v.double(), mask[rows])
    torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("strength", [0.01, 0.1, 1.0])
def test_rounded_to_bfloat16_the_two_numbers_err_no_more_than_the_residual_and_than_k(strength: float) -> None:
    """Errors of the scores of random queries; one rounding at a time, everything else exact."""
    case = make(strength=strength)
    q = torch.randn(256, HKV, D, generator=torch.Generator().manual_seed(3)).double()

    def score_error(k: Tensor) -> float:
        return float(torch.einsum("thd,shd->ths", q, k.double() - case.expected()).square().mean().sqrt())

    def rebuilt(a: Tensor, scale: KeyScale) -> Tensor:
        return reconstruct_k(case.base_k(), a, case.normed_b(), table(S, D), scale)

    exact = case.scale()
    of_scale = score_error(rebuilt(case.a, KeyScale(exact.norm.bfloat16(), exact.change.bfloat16())))
    of_ratio = score_error(rebuilt(case.a, KeyScale(exact.norm, (1 + exact.change).bfloat16() - 1)))
    of_residual = score_error(rebuilt(case.a.bfloat16().float(), exact))
    of_k = score_error(case.expected().bfloat16())
    assert of_scale < 1.2 * of_residual
    assert of_scale < 1.2 * of_k
    assert of_scale < 0.3 * of_ratio or strength == 1.0  # why the change is kept and not the ratio
