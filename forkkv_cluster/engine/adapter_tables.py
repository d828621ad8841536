"""Where an adapter's tensors lie, as tables of addresses by layer: made once, read by the ops that serve all adapters of a
step in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from forkkv_kernels.ops.lora import LORA_SEGMENT_FIELDS

from forkkv_cluster.engine.layers.lora import FusedLora, LoraPart

Table = npt.NDArray[np.int64]

RESIDUAL_COLUMNS = ("k_rank", "k_b", "v_rank", "v_b", "norm_column", "change_column")
"""Of ``AdapterTables.residual``: ranks are 0 where k or v is not targeted, columns -1 without ``KeyScale``."""


class LayerFactors(Protocol):
    """What is read of one layer of an adapter."""

    @property
    def k(self) -> LoraPart | None: ...
    @property
    def v(self) -> LoraPart | None: ...
    @property
    def has_key_scale(self) -> bool: ...
    def by_group(self) -> dict[str, FusedLora | None]: ...


class AdapterTables:
    """lora: for each group of modules that some layer has, rows of ``LORA_SEGMENT_FIELDS`` [L, fields] without row bounds, rank
    0 in layers that lack the group. residual [L, ``RESIDUAL_COLUMNS``]. Valid as long as the adapter's tensors live."""

    def __init__(self, layers: Sequence[LayerFactors]) -> None:
        self._parts: list[Table] = []  # what ``parts`` of a row points at
        by_layer = [layer.by_group() for layer in layers]
        self.lora: Mapping[str, Table] = {
            group: np.array([self._segment(layer[group]) for layer in by_layer], dtype=np.int64)
            for group in by_layer[0]
            if any(layer[group] is not None for layer in by_layer)
        }
        self.residual: Table = np.array([_residual(layer) for layer in layers], dtype=np.int64)

    def _segment(self, lora: FusedLora | None) -> list[int]:
        row = dict.fromkeys(LORA_SEGMENT_FIELDS, 0)
        if lora is not None:
            parts = [(p.rank_start, p.rank_end, p.out_start, p.out_end, p.b.data_ptr()) for p in lora.parts.values()]
            self._parts.append(np.array(parts, dtype=np.int64))
            row["rank"], row["a"] = len(lora.a), lora.a.data_ptr()
            row["ones"] = lora.ones.data_ptr() if lora.ones is not None else 0
            row["num_parts"], row["parts"] = len(parts), self._parts[-1].ctypes.data
        return list(row.values())


def _residual(layer: LayerFactors) -> tuple[int, ...]:
    (k_rank, k_b), (v_rank, v_b) = (
        (part.rank, part.shared_b.data_ptr()) if part is not None else (0, 0) for part in (layer.k, layer.v)
    )
    scale = (k_rank, v_rank) if layer.has_key_scale else (-1, -1)
    return (k_rank, k_b, v_rank, v_b, *scale)
