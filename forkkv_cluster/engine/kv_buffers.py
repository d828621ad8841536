"""The KV arena of one worker as tensors. Sizes come from ``cache.geometry``, page ids from the cache's allocator."""

from __future__ import annotations

import torch
from forkkv_kernels.ops.huge_pages import prefer_huge_pages
from torch import Tensor

from forkkv_cluster.cache.geometry import KVGeometry
from forkkv_cluster.cache.merged_keys import MergedRun, whole_key_blocks

_PAGE_BYTES = 4096


class KVBuffers:
    """One tensor [num_layers, 2, num_slabs * slab_elems]; every pool is a view of it.

    A slot is page * page_size + offset. The arena is not cleared, only touched: a slot holds garbage until it is written, and
    a reader touches only slots that were.
    """

    def __init__(self, geometry: KVGeometry, num_slabs: int, dtype: torch.dtype, device: torch.device) -> None:
        self.geometry = geometry
        self.num_slabs = num_slabs
        self.arena = torch.empty(
            (geometry.num_layers, 2, num_slabs * geometry.slab_elems), dtype=dtype, device=device, requires_grad=False
        )
        if device.type == "cpu":
            prefer_huge_pages(self.arena)
            # Memory is handed out on first touch; without this the first requests pay for it: 0.6 s of one
            # step that wrote 400 MB in a virtual machine.
            self.arena.view(-1)[:: _PAGE_BYTES // dtype.itemsize] = 0
        self._base = self.arena.view(geometry.num_layers, 2, -1, geometry.num_kv_heads, geometry.head_dim)
        self._residual = {c: self.arena.view(geometry.num_layers, 2, -1, c) for c in geometry.rank_classes}
        # Views by layer, made once: a step asks for hundreds of them.
        self._base_planes = _planes(self._base)
        self._residual_planes = {rank_class: _planes(pool) for rank_class, pool in self._residual.items()}

    def planes(self, layer: int) -> tuple[Tensor, Tensor]:
        """Plane 0 and 1 of one layer, 1-D: what every pool is a view of."""
        return self.arena[layer, 0], self.arena[layer, 1]

    def base(self, layer: int) -> tuple[Tensor, Tensor]:
        """K (rotated) and V of one layer by slot: [num_slots, Hkv, D] each, views."""
        return self._base_planes[layer]

    def merged_keys(self, layer: int, run: MergedRun) -> Tensor:
        """An adapter's whole K of one layer, in borrowed slabs: [Hkv, num_tokens, D], a contiguous view."""
        geometry = self.geometry
        start = run.first_slab * geometry.slab_elems
        flat = self.arena[layer, run.plane, start : start + run.num_tokens * geometry.base_width]
        return flat.view(geometry.num_kv_heads, run.num_tokens, geometry.head_dim)

    def merged_blocks(self, layer: int, run: MergedRun) -> Tensor:
        """The same memory up to a whole block, for ops that keep K in an order of their own: [Hkv, M, D]."""
        geometry = self.geometry
        num_tokens = whole_key_blocks(run.num_tokens)
        start = run.first_slab * geometry.slab_elems
        flat = self.arena[layer, run.plane, start : start + num_tokens * geometry.base_width]
        return flat.view(geometry.num_kv_heads, num_tokens, geometry.head_dim)

    def residual(self, layer: int, rank_class: int) -> tuple[Tensor, Tensor]:
        """x A_k and x A_v of one layer by slot: [num_slots, rank_class] each, views.

        Columns beyond r_k, r_v hold ``KeyScale`` where there is one (``LayerLora.key_scale_columns``), else nothing.
        """
        return self._residual_planes[rank_class][layer]

    def pages(self, page_class: int | None) -> Tensor:
        """Whole pages of one class, [num_layers, 2, num_pages, elements of a page], a view; None: base pages."""
        width = self.geometry.page_width(page_class) * self.geometry.page_size
        return self.arena.view(self.geometry.num_layers, 2, -1, width)

    def copy_base(self, source_page: int, target_page: int, num_tokens: int) -> None:
        """Copy the first ``num_tokens`` tokens of a base page, all layers."""
        _copy_page(self._base, self.geometry.page_size, source_page, target_page, num_tokens)

    def copy_residual(self, rank_class: int, source_page: int, target_page: int, num_tokens: int) -> None:
        """Copy the first ``num_tokens`` tokens of a residual page of that rank class, all layers."""
        _copy_page(self._residual[rank_class], self.geometry.page_size, source_page, target_page, num_tokens)


def _planes(pool: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(layer[0], layer[1]) for layer in pool]


def _copy_page(view: Tensor, page_size: int, source_page: int, target_page: int, num_tokens: int) -> None:
    source, target = source_page * page_size, target_page * page_size
    view[:, :, target : target + num_tokens] = view[:, :, source : source + num_tokens]
