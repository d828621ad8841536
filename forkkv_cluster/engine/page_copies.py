"""Whole pages between two arenas of the same layout, the device's and the host's: layer by layer, not page by page."""

from __future__ import annotations

import numpy as np
import torch

from forkkv_cluster.cache.swaps import PageSwap
from forkkv_cluster.engine.batch import PageArray
from forkkv_cluster.engine.kv_buffers import KVBuffers


def copy_out(device: KVBuffers, host: KVBuffers, swap: PageSwap) -> None:
    """Device pages to host pages. The copy is made when this returns."""
    _copy(device, swap.device_pages, host, swap.host_pages, swap.page_class)


def copy_in(device: KVBuffers, host: KVBuffers, swap: PageSwap) -> None:
    """Host pages to device pages. The copy is made when this returns."""
    _copy(host, swap.host_pages, device, swap.device_pages, swap.page_class)


def _copy(
    source: KVBuffers, source_pages: PageArray, target: KVBuffers, target_pages: PageArray, page_class: int | None
) -> None:
    take, put = _indices(source_pages, source), _indices(target_pages, target)
    source_view, target_view = source.pages(page_class), target.pages(page_class)
    for layer in range(source.geometry.num_layers):
        target_view[layer][:, put] = source_view[layer][:, take].to(target.arena.device)


def _indices(pages: PageArray, kv: KVBuffers) -> torch.Tensor | slice:
    """A slice for a run of pages, which is copied without a gather."""
    if len(pages) and pages[-1] - pages[0] == len(pages) - 1 and (np.diff(pages) == 1).all():
        return slice(int(pages[0]), int(pages[-1]) + 1)
    return torch.from_numpy(pages.astype(np.int64)).to(kv.arena.device)
