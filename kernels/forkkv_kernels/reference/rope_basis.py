"""RoPE as a short sum: what folded attention multiplies instead of all D cosines and sines of a position."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 512
"""Positions over which one set of coefficients of the slow frequencies is good."""
BASIS = 16
"""Functions that stand for the slow frequencies: the least depth of a matrix product."""
MAX_ERROR = 2e-4
"""Of a cosine or sine put together from them; fp16 rounds those near 1 by as much."""


@dataclass(frozen=True, slots=True, eq=False)
class RopeBasis:
    """cos and sin of position j = 512 c + d and frequency f, of a table [positions, D]:

        f < near / 2     as they are:                              features[j, f], features[j, near / 2 + f]
        others           sum over m of features[j, near + m] * coefficients[16 c + m, f]        (cos; sin: half + f)

    features [512 * chunks, near + 16], zero beyond the table and where f >= D / 2; coefficients [16 * chunks, 2 * half], half
    = ``padded_half(D)``, zero where f < near / 2 or f >= D / 2.

    Within 512 positions the slow frequencies turn by so little that their cosines and sines, seen as functions of d, are
    spanned by 16 functions (a band of w radians a position has about 512 w / pi dimensions and a few more): for Llama-3.1,
    theta 5e5 and D 128, near is 32 and the error 2e-8. A position then needs 48 numbers for its scores where it needed 128.
    """

    features: Tensor
    coefficients: Tensor
    near: int


def padded_half(head_dim: int) -> int:
    """Frequencies with the padding: the power of two from D / 2 on, and 8 at least, those of the least product's depth."""
    return max(8, 1 << max(head_dim // 2 - 1, 0).bit_length())


def rope_basis(cos_sin: Tensor, dtype: torch.dtype) -> RopeBasis:
    """Of a table [positions, D] fp32 (cos in the first half, sin in the second, attention factor included), in ``dtype``.

    The angles of a table have to be position times frequency, which is what every rotation known to the loader has.
    """
    num_positions, head_dim = cos_sin.shape
    half = head_dim // 2
    table = cos_sin.double().cpu()
    cos, sin = table.split(half, dim=1)
    angles = torch.atan2(sin[1:2], cos[1:2]).flatten() if num_positions > 1 else torch.zeros(half, dtype=torch.double)
    near, basis = _split(angles)
    fast = near // 2
    num_chunks = -(-num_positions // CHUNK)
    features = torch.zeros(num_chunks * CHUNK, near + BASIS, dtype=torch.double)
    kept = min(fast, half)
    features[:num_positions, :kept] = cos[:, :fast]
    features[:num_positions, fast : fast + kept] = sin[:, :fast]
    features[:, near:] = basis.repeat(num_chunks, 1)
    coefficients = _coefficients(cos[::CHUNK], sin[::CHUNK], angles, fast, basis)
    return RopeBasis(features.to(cos_sin.device, dtype), coefficients.to(cos_sin.device, dtype), near)


def _split(angles: Tensor) -> tuple[int, Tensor]:
    """(near, basis [512, 16]): as few frequencies kept as the basis allows."""
    near = 16
    while True:
        functions = _functions(angles[near // 2 :])
        if functions.shape[1] == 0:
            return near, torch.zeros(CHUNK, BASIS, dtype=torch.double)
        basis = torch.linalg.svd(functions, full_matrices=False)[0][:, :BASIS]
        if float((functions - basis @ (basis.T @ functions)).abs().max()) <= MAX_ERROR:
            missing = BASIS - basis.shape[1]
            return near, torch.nn.functional.pad(basis, (0, missing)) * CHUNK**0.5
        near *= 2


def _functions(angles: Tensor) -> Tensor:
    """cos and sin over a chunk, [512, 2 n]."""
    turned = torch.outer(torch.arange(CHUNK, dtype=torch.double), angles)
    return torch.cat((turned.cos(), turned.sin()), dim=1)


def _coefficients(cos: Tensor, sin: Tensor, angles: Tensor, fast: int, basis: Tensor) -> Tensor:
    """cos, sin [chunks, D/2]: of each chunk's first position. By cos(p + d) = cos p cos d - sin p sin d."""
    half = len(angles)
    padded = padded_half(2 * half)
    within = basis.T @ _functions(angles) / CHUNK
    of_cos, of_sin = within[None, :, :half], within[None, :, half:]
    cos, sin = cos[:, None, :], sin[:, None, :]
    found = torch.zeros(len(cos), BASIS, 2, padded, dtype=torch.double)
    found[:, :, 0, fast:half] = (cos * of_cos - sin * of_sin)[:, :, fast:]
    found[:, :, 1, fast:half] = (sin * of_cos + cos * of_sin)[:, :, fast:]
    return found.flatten(0, 1).flatten(1)
