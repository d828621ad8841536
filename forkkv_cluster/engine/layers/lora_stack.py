"""Many adapters in one product: the LoRA of a decode step, whose segments have a row or two each.

The A of all segments are stacked, every row is shrunk by all of them, and what belongs to another row's adapter is set to
zero before the B, stacked likewise, expand it:

    y += mask(x [A_1; A_2; ...]) [B_1; B_2; ...]

That wastes arithmetic and saves calls: 8 adapters of rank 16 on q, k and v of a 768-wide layer take 0.25 ms instead of 0.6.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from forkkv_cluster.engine.layers.linear import Linear
from forkkv_cluster.engine.layers.lora import FusedLora

MAX_WASTE = 1024
"""Rows times segments up to which a step's LoRA is stacked, as the waste grows with both. 256 was measured to pay; the limit
itself is an estimate."""

MAX_SETS = 4
"""Sets of adapters whose stacks are kept; each costs as many bytes as its adapters."""


@dataclass(frozen=True, slots=True, eq=False)
class _StackedPart:
    """One module: columns [rank_start, rank_end) of the shrink, b [rank_end - rank_start, out] onto columns of the output."""

    rank_start: int
    rank_end: int
    out_start: int
    out_end: int
    b: Tensor


class LoraStack:
    """The fused LoRA of several segments in one layer; ``owners`` [R] says which segment each column of the shrink is of."""

    def __init__(self, fused: Sequence[FusedLora | None]) -> None:
        modules = list(dict.fromkeys(name for lora in fused if lora is not None for name in lora.parts))
        a: list[Tensor] = []
        ones: list[Tensor] = []
        owners: list[int] = []
        self._parts: list[_StackedPart] = []
        for module in modules:
            targeted = [(n, lora) for n, lora in enumerate(fused) if lora is not None and module in lora.parts]
            with_part = [(n, lora, lora.parts[module]) for n, lora in targeted]
            first = len(owners)
            for number, lora, part in with_part:
                columns = slice(part.rank_start, part.rank_end)
                a.append(lora.a[columns])
                ones.append(lora.ones[columns] if lora.ones is not None else lora.a.new_zeros(part.rank))
                owners += [number] * part.rank
            _, _, lead = with_part[0]
            b = torch.cat([part.b for _, _, part in with_part])
            self._parts.append(_StackedPart(first, len(owners), lead.out_start, lead.out_end, b))
        self.owners = tuple(owners)
        bias = torch.cat(ones)
        self._shrink = Linear(torch.cat(a), bias if bool(bias.any()) else None)

    def apply_(self, out: Tensor, x: Tensor, is_foreign: Tensor) -> None:
        """out [T, fused out] += the LoRA of each row's own segment, in place; is_foreign [T, R] bool: another segment's."""
        # Zero by choice, not by product: an adapter that overflows would turn 0 * inf into NaN in the rows of others.
        shrunk = self._shrink(x).masked_fill_(is_foreign, 0.0)
        for part in self._parts:
            out[:, part.out_start : part.out_end].addmm_(shrunk[:, part.rank_start : part.rank_end], part.b)


class StackedRows:
    """Which rows of a step belong to which segment. row_segments [T] int64: a segment's number, -1 for the base model."""

    def __init__(self, row_segments: Tensor) -> None:
        self._row_segments = row_segments.unsqueeze(1)
        self._foreign: dict[tuple[int, ...], Tensor] = {}

    def foreign(self, stack: LoraStack) -> Tensor:
        """[T, R] bool for ``LoraStack.apply_``; layers of equal ranks share one."""
        if stack.owners not in self._foreign:
            owners = torch.tensor(stack.owners, dtype=torch.int64, device=self._row_segments.device)
            self._foreign[stack.owners] = owners.unsqueeze(0) != self._row_segments
        return self._foreign[stack.owners]


LayerStacks = Mapping[str, LoraStack]
"""The stacks of one layer by group of modules that read the same input; a group that nobody targets is missing."""

Segments = Sequence[Sequence[Mapping[str, FusedLora | None]]]
"""[segment][layer]: fused LoRA by group."""


class StackCache:
    """Stacks of the sets of adapters that ran last. A set is stacked when it is asked for twice: most live for many steps,
    and one that does not is not worth the copies."""

    def __init__(self) -> None:
        self._stacks: OrderedDict[tuple[Hashable, ...], list[LayerStacks] | None] = OrderedDict()

    def drop(self, member: Hashable) -> None:
        """Forget every set that ``member`` belongs to: its weights leave the device, and so do their copies."""
        for members in [members for members in self._stacks if member in members]:
            del self._stacks[members]

    def get(self, members: tuple[Hashable, ...], segments: Callable[[], Segments]) -> list[LayerStacks] | None:
        """Stacks by layer, or None the first time. ``members`` is what the set is known by, in the order of ``segments``."""
        if members not in self._stacks:
            self._stacks[members] = None
            while len(self._stacks) > MAX_SETS:
                self._stacks.popitem(last=False)
            return None
        self._stacks.move_to_end(members)
        stacks = self._stacks[members]
        if stacks is None:
            stacks = self._stacks[members] = [_stack_layer(layer) for layer in zip(*segments(), strict=True)]
        return stacks


def _stack_layer(segments: Sequence[Mapping[str, FusedLora | None]]) -> LayerStacks:
    by_group = {group: [segment[group] for segment in segments] for group in segments[0]}
    return {group: LoraStack(loras) for group, loras in by_group.items() if any(lora is not None for lora in loras)}
