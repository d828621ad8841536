"""LoRA factors of modules that read the same input, stacked so that one shrink serves all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from forkkv_kernels.ops.lora import lora_expand_, lora_shrink
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LoraFactors:
    """One module's a [r, in] and b [r, out], the scaling folded into b; likewise bias [out] of ``lora_bias``, if any."""

    a: Tensor
    b: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LoraPart:
    """One module in a fused group: its columns of the shrink, its columns of the fused output, its B.

    b [rank, out] with the scaling folded in. A bias is its last row, beside a column of ones in the shrink.
    normed_b is b times the weight of the norm that follows, on k of a model with QK-norm; else None.
    """

    rank_start: int
    rank_end: int
    out_start: int
    out_end: int
    b: Tensor
    normed_b: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.rank_end - self.rank_start

    @property
    def shared_b(self) -> Tensor:
        """[rank, out]: what turns the residual of shared tokens into what is added to their base KV."""
        return self.b if self.normed_b is None else self.normed_b

    @property
    def num_bytes(self) -> int:
        """Of its tensors."""
        return self.b.nbytes + (self.normed_b.nbytes if self.normed_b is not None else 0)

    def to(self, device: torch.device) -> LoraPart:
        """On that device; tensors that are there already are shared."""
        normed_b = self.normed_b.to(device) if self.normed_b is not None else None
        return replace(self, b=self.b.to(device), normed_b=normed_b)

    def with_norm(self, weight: Tensor) -> LoraPart:
        """The same before a norm of this weight [D], over heads of D elements of its output."""
        heads = self.b.float().view(len(self.b), -1, len(weight))
        return replace(self, normed_b=(heads * weight.to(self.b.device).float()).flatten(1).to(self.b.dtype))


@dataclass(frozen=True, slots=True, eq=False)
class FusedLora:
    """a [sum of ranks, in] stacked in the order of ``parts``, which names the modules that the adapter targets.

    ones [sum of ranks] is 1 in the columns of the biases and 0 elsewhere; None without a bias.
    """

    a: Tensor
    parts: Mapping[str, LoraPart]
    ones: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Of all its tensors."""
        own = self.a.nbytes + (self.ones.nbytes if self.ones is not None else 0)
        return own + sum(part.num_bytes for part in self.parts.values())

    def to(self, device: torch.device) -> FusedLora:
        """On that device; tensors that are there already are shared."""
        parts = {name: part.to(device) for name, part in self.parts.items()}
        return FusedLora(self.a.to(device), parts, self.ones.to(device) if self.ones is not None else None)

    def shrink(self, x: Tensor) -> Tensor:
        """x [n, in] -> x A [n, sum of ranks]."""
        return self.shrink_from(x, 0)

    def shrink_from(self, x: Tensor, rank_start: int) -> Tensor:
        """The columns of ``shrink`` from ``rank_start`` on."""
        shrunk: Tensor = lora_shrink(x, self.a[rank_start:], self.ones[rank_start:] if self.ones is not None else None)
        return shrunk

    def expand_(self, out: Tensor, shrunk: Tensor, module: str) -> None:
        """out [n, fused out] += shrunk B on the columns of ``module``, in place; nothing when it is not targeted."""
        part = self.parts.get(module)
        if part is not None:
            lora_expand_(out[:, part.out_start : part.out_end], shrunk[:, part.rank_start : part.rank_end], part.b)

    def apply_(self, out: Tensor, x: Tensor) -> None:
        """out [n, fused out] += x A B on every targeted module, in place."""
        shrunk = self.shrink(x)
        for module in self.parts:
            self.expand_(out, shrunk, module)


def fuse(factors: Mapping[str, LoraFactors], out_sizes: Mapping[str, int]) -> FusedLora | None:
    """Stack factors by module name, in the order of ``out_sizes``; None when no module is targeted."""
    parts: dict[str, LoraPart] = {}
    stacked: list[Tensor] = []
    ones: list[Tensor] = []
    rank_start = out_start = 0
    for module, out_size in out_sizes.items():
        if module in factors:
            a, b, is_one = _with_bias(factors[module])
            parts[module] = LoraPart(rank_start, rank_start + len(b), out_start, out_start + out_size, b)
            stacked.append(a)
            ones.append(is_one)
            rank_start += len(b)
        out_start += out_size
    if not parts:
        return None
    all_ones = torch.cat(ones)
    return FusedLora(torch.cat(stacked).contiguous(), parts, all_ones if bool(all_ones.any()) else None)


def _with_bias(factors: LoraFactors) -> tuple[Tensor, Tensor, Tensor]:
    """a, b and the column marks [rank], with a bias as one rank more."""
    a, b = factors.a, factors.b
    if factors.bias is None:
        return a, b, a.new_zeros(len(a))
    marks = torch.cat((a.new_zeros(len(a)), a.new_ones(1)))
    return torch.cat((a, a.new_zeros(1, a.shape[1]))), torch.cat((b, factors.bias[None])), marks
