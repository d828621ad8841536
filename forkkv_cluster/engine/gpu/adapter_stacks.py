"""Adapters side by side in device memory: what kernels look up by slot, so that one launch serves every adapter of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from forkkv_kernels.reference.lora_tiles import LoraStacks
from torch import Tensor

from forkkv_cluster.cache.geometry import KVGeometry
from forkkv_cluster.engine.adapters import AdapterWeights, module_shapes
from forkkv_cluster.engine.layers.lora import FusedLora, LoraPart
from forkkv_cluster.engine.models.config import ModelConfig

MIN_RANK = 16
"""Rows of a stack at least: a matrix product has no smaller side."""

GROUPS: Mapping[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
"""Modules that read the same input, in the order in which their outputs lie side by side."""


@dataclass(frozen=True, slots=True, eq=False)
class ResidualStacks:
    """What attention adds to one layer's base K and V, by slot: b_k, b_v [A, R, Hkv, D], rows beyond a rank zero; ranks [A, 2];
    rank_class, norm_column, change_column [A] (columns -1 without QK-norm). int32 but for the factors. decode_b_k is b_k in
    fp16 where that is bf16: what it makes is fp16 in any case, and a conversion a tile is spared."""

    b_k: Tensor
    decode_b_k: Tensor
    b_v: Tensor
    ranks: Tensor
    rank_class: Tensor
    norm_column: Tensor
    change_column: Tensor


class AdapterStacks:
    """All of it for ``num_slots`` adapters of ranks up to ``rank``, on shared k and v up to ``residual_rank``, which target
    modules of ``groups``, and k where ``has_k``. All grow with what is held.

    ``version`` changes with that: memory has moved, or is looked at that was not; who captured a step must do so again.
    """

    def __init__(self, config: ModelConfig, geometry: KVGeometry, dtype: torch.dtype, device: torch.device) -> None:
        self._config, self._geometry = config, geometry
        self._dtype, self._device = dtype, device
        self._held: dict[int, AdapterWeights] = {}
        self.version = 0
        self.groups: frozenset[str] = frozenset()
        self.has_k = False
        self._has_bias = False
        self._allocate(1, MIN_RANK, MIN_RANK)

    def residual(self, layer: int) -> ResidualStacks:
        return self._residuals[layer]

    def lora(self, layer: int) -> Mapping[str, LoraStacks]:
        """By group."""
        return self._loras[layer]

    def hold(self, slot: int, weights: AdapterWeights) -> None:
        """See to it that ``slot`` holds these weights. Costs nothing when it does."""
        if self._held.get(slot) is weights:
            return
        groups = {name: group for layer in weights.layers for name, group in layer.by_group().items() if group is not None}
        has_bias = self._has_bias or any(group.ones is not None for group in groups.values())
        num_slots, rank = max(slot + 1, self.num_slots), max(_largest_rank(weights), self.rank)
        residual_rank = self.residual_rank
        if self._has_residual(weights):
            residual_rank = max(residual_rank, _largest_residual_rank(weights))
        has_k = self.has_k or any(layer.k is not None for layer in weights.layers)
        if has_k != self.has_k or not groups.keys() <= self.groups:
            self.version += 1
            self.has_k = has_k
            self.groups |= groups.keys()
        grown = num_slots > self.num_slots or rank > self.rank or residual_rank > self.residual_rank
        if grown or has_bias > self._has_bias:
            self.version += 1
            self._has_bias = has_bias
            self._allocate(_power_of_two(num_slots), _power_of_two(rank), _power_of_two(residual_rank))
            for other, held in self._held.items():
                self._write(other, held)
        self._held.pop(slot, None)  # until all of it is there
        self._write(slot, weights)
        self._held[slot] = weights

    def release(self, slot: int) -> None:
        """Forget what an empty slot held: its host memory is not kept alive, and growing does not copy it."""
        self._held.pop(slot, None)

    def _has_residual(self, weights: AdapterWeights) -> bool:
        """One beyond the largest class is served isolated: it has none."""
        return 0 < weights.residual_rank <= self._geometry.rank_classes[-1]

    def _allocate(self, num_slots: int, rank: int, residual_rank: int) -> None:
        # Let go of the old ones first: they can be gigabytes.
        self._residuals: list[ResidualStacks] = []
        self._loras: list[dict[str, LoraStacks]] = []
        self.num_slots, self.rank, self.residual_rank = num_slots, rank, residual_rank
        layers = range(self._config.num_layers)
        rank_class = self._integers(num_slots, fill=self._geometry.rank_classes[0])
        self._residuals = [self._new_residual(rank_class) for _ in layers]
        self._loras = [{group: self._new_lora(modules) for group, modules in GROUPS.items()} for _ in layers]

    def _new_residual(self, rank_class: Tensor) -> ResidualStacks:
        shape = (self.num_slots, self.residual_rank, self._geometry.num_kv_heads, self._geometry.head_dim)
        b_k, b_v = (torch.zeros(shape, dtype=self._dtype, device=self._device) for _ in range(2))
        decode_b_k = b_k.half() if self._dtype == torch.bfloat16 else b_k
        columns = (self._integers(self.num_slots, fill=-1) for _ in range(2))
        return ResidualStacks(b_k, decode_b_k, b_v, self._integers(self.num_slots, 2), rank_class, *columns)

    def _new_lora(self, modules: Sequence[str]) -> LoraStacks:
        sizes = module_shapes(self._config)
        size_in, out_sizes = sizes[modules[0]][0], tuple(sizes[module][1] for module in modules)
        a = torch.zeros(self.num_slots, len(modules), self.rank, size_in, dtype=self._dtype, device=self._device)
        b = torch.zeros(self.num_slots, self.rank, sum(out_sizes), dtype=self._dtype, device=self._device)
        ones = self._integers(self.num_slots, len(modules), fill=-1) if self._has_bias else None
        return LoraStacks(a, b, self._integers(self.num_slots, len(modules)), out_sizes, ones)

    def _integers(self, *shape: int, fill: int = 0) -> Tensor:
        return torch.full(shape, fill, dtype=torch.int32, device=self._device)

    def _write(self, slot: int, weights: AdapterWeights) -> None:
        has_residual = self._has_residual(weights)
        if has_residual:
            self._residuals[0].rank_class[slot] = self._geometry.rank_class(weights.residual_rank)  # one for all layers
        for layer, residual, loras in zip(weights.layers, self._residuals, self._loras, strict=True):
            parts = (layer.k, layer.v) if has_residual else (None, None)
            for plane, (stack, part) in enumerate(zip((residual.b_k, residual.b_v), parts, strict=True)):
                _put(stack[slot].flatten(1), part.shared_b if part is not None else None)
                residual.ranks[slot, plane] = part.rank if part is not None else 0
            residual.decode_b_k[slot].copy_(residual.b_k[slot])
            for column, part in zip((residual.norm_column, residual.change_column), parts, strict=True):
                rank = part.rank if part is not None else 0
                column[slot] = rank if has_residual and layer.has_key_scale else -1
            for group, fused in layer.by_group().items():
                _put_lora(loras[group], slot, GROUPS[group], fused)


def _put_lora(stacks: LoraStacks, slot: int, modules: Sequence[str], fused: FusedLora | None) -> None:
    start = 0
    for index, (module, size) in enumerate(zip(modules, stacks.out_sizes, strict=True)):
        part = fused.parts.get(module) if fused is not None else None
        _put(stacks.a[slot, index], fused.a[part.rank_start : part.rank_end] if fused is not None and part else None)
        _put(stacks.b[slot, :, start : start + size], part.b if part is not None else None)
        stacks.ranks[slot, index] = part.rank if part is not None else 0
        if stacks.ones is not None:
            stacks.ones[slot, index] = _column_of_ones(fused, part)
        start += size


def _column_of_ones(fused: FusedLora | None, part: LoraPart | None) -> int:
    """Where ``lora_bias`` has its column; -1 without one."""
    if fused is None or part is None or fused.ones is None:
        return -1
    at = fused.ones[part.rank_start : part.rank_end].nonzero()
    return int(at[0]) if len(at) else -1


def _put(stack: Tensor, factor: Tensor | None) -> None:
    """stack [R, n] of one slot := factor [r, n], zero beyond."""
    rank = len(factor) if factor is not None else 0
    stack[rank:].zero_()
    if factor is not None:
        stack[:rank].copy_(factor, non_blocking=True)


def _largest_rank(weights: AdapterWeights) -> int:
    groups = (group for layer in weights.layers for group in layer.by_group().values() if group is not None)
    return max((part.rank for group in groups for part in group.parts.values()), default=0)


def _largest_residual_rank(weights: AdapterWeights) -> int:
    parts = (part for layer in weights.layers for part in (layer.k, layer.v) if part is not None)
    return max((part.rank for part in parts), default=0)


def _power_of_two(at_least: int) -> int:
    return 1 << max(at_least - 1, 0).bit_length()
