"""Few numbers of a position in place of all its cosines and sines."""

from __future__ import annotations

import pytest
import torch
from forkkv_kernels.reference.rope_basis import BASIS, CHUNK, rope_basis
from torch import Tensor


def table(theta: float, head_dim: int, num_positions: int, factor: float = 1.0) -> Tensor:
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.outer(torch.arange(num_positions, dtype=torch.float64), frequency)
    return factor * torch.cat((angle.cos(), angle.sin()), dim=-1).float()


def put_together(cos_sin: Tensor, dtype: torch.dtype) -> Tensor:
    """The table again, from what stands for it, in float64."""
    basis = rope_basis(cos_sin, dtype)
    num_positions, head_dim = cos_sin.shape
    half, fast = head_dim // 2, basis.near // 2
    features = basis.features.double()[:num_positions]
    coefficients = basis.coefficients.double().view(-1, BASIS, 2, basis.coefficients.shape[1] // 2)[..., :half]
    chunk = torch.arange(num_positions) // CHUNK
    slow = torch.einsum("jm,jmpf->jpf", features[:, basis.near :], coefficients[chunk])
    kept = min(fast, half)
    slow[:, 0, :kept] += features[:, :kept]
    slow[:, 1, :kept] += features[:, fast : fast + kept]
    return slow.flatten(1)


@pytest.mark.parametrize(
    ("theta", "head_dim"),
    [(5e5, 128), (1e4, 128), (1e6, 64), (1e4, 80), (1.5, 80), (1e4, 16), (1e4, 8), (1e4, 256)],  # 1.5: none is slow
)
def test_cosines_and_sines_come_back_as_exactly_as_fp16_holds_them(theta: float, head_dim: int) -> None:
    cos_sin = table(theta, head_dim, 2_000)
    assert (put_together(cos_sin, torch.float32) - cos_sin).abs().max() < 3e-4
    assert (put_together(cos_sin, torch.float16) - cos_sin).abs().max() < 3e-3


def test_positions_beyond_64k_are_as_exact_as_the_first() -> None:
    cos_sin = table(5e5, 128, 70_000)
    assert (put_together(cos_sin, torch.float32)[66_000:] - cos_sin[66_000:]).abs().max() < 3e-4


def test_an_attention_factor_is_in_all_of_them() -> None:
    cos_sin = table(5e5, 64, 600, factor=1.25)
    assert (put_together(cos_sin, torch.float32) - cos_sin).abs().max() < 3e-4


def test_llama_3_needs_48_numbers_a_position() -> None:
    assert rope_basis(table(5e5, 128, 64), torch.float16).features.shape == (CHUNK, 48)


def test_a_table_shorter_than_a_chunk_is_enough() -> None:
    cos_sin = table(1e4, 64, 3)
    assert (put_together(cos_sin, torch.float32) - cos_sin).abs().max() < 3e-4
