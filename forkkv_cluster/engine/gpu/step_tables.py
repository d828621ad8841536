"""A batch as the integer tables that kernels read. Numpy and views alone: sizes first, so that memory of a fixed size can be
filled again and again, then the numbers.

Where there is more room than the batch needs, what is left says that there is nothing to do: rows that write nowhere,
sequences without keys, tiles without an adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from forkkv_kernels.ops.lora_tiles import LoraTiles, max_tiles
from forkkv_kernels.ops.residual_attention_grouped import SharedRuns
from torch import Tensor

from forkkv_cluster.engine.batch import AttentionSpan, Batch, IntArray
from forkkv_cluster.engine.gpu.packed_tables import Int32Array
from forkkv_cluster.engine.gpu.shared_runs import SharedRun

NOWHERE = -1
SHORT_TILE, LONG_TILE = 16, 64
"""Rows of a tile of LoRA: of decode rows, and where a segment has more."""


@dataclass(frozen=True, slots=True)
class SpanSizes:
    """Sequences that are attended alike: how many, and the longest rows of their page tables; ``num_residual_pages`` is 0
    where none of them reads a residual."""

    num_sequences: int
    num_pages: int
    num_residual_pages: int

    @classmethod
    def of(cls, spans: Sequence[AttentionSpan]) -> SpanSizes:
        pages = max((len(span.pages) for span in spans), default=0)
        residual = max((len(s.residual.pages) for s in spans if s.residual is not None and s.residual.num_tokens), default=0)
        return cls(len(spans), max(pages, 1), residual)

    def shapes(self, prefix: str) -> dict[str, tuple[int, ...]]:
        n = self.num_sequences
        return {
            f"{prefix}.base_pages": (n, self.num_pages),
            f"{prefix}.residual_pages": (n, self.num_residual_pages),
            f"{prefix}.kv_lens": (n,),
            f"{prefix}.start_pos": (n,),
            f"{prefix}.residual_lens": (n,),
            f"{prefix}.adapters": (n,),
            f"{prefix}.query_starts": (n + 1,),
        }


def fill_spans(tables: Mapping[str, Int32Array], prefix: str, spans: Sequence[AttentionSpan]) -> None:
    """Tables of ``SpanSizes.shapes``. Page tables beyond a sequence's own pages are left as they are: nobody looks there."""

    def table(name: str) -> Int32Array:
        return tables[f"{prefix}.{name}"]

    table("kv_lens")[len(spans) :] = 0
    table("residual_lens")[:] = 0
    table("adapters")[:] = NOWHERE
    row = 0
    for number, span in enumerate(spans):
        table("base_pages")[number, : len(span.pages)] = span.pages
        table("kv_lens")[number] = span.kv_len
        table("start_pos")[number] = span.start_pos
        table("query_starts")[number] = row
        row += span.num_rows
        if span.residual is not None and span.residual.num_tokens:
            table("residual_pages")[number, : len(span.residual.pages)] = span.residual.pages
            table("residual_lens")[number] = span.residual.num_tokens
            table("adapters")[number] = span.residual.adapter_slot
    table("query_starts")[len(spans) :] = row


@dataclass(frozen=True, slots=True)
class RunSizes:
    """Runs of pages that decode rows share: how many, members of each at most (a power of two), subgroups in all, runs on one
    path at most, and the position behind the last one's end."""

    num_groups: int
    num_members: int
    num_subgroups: int
    depth: int
    end: int

    @classmethod
    def of(cls, runs: Sequence[SharedRun]) -> RunSizes:
        return cls(
            len(runs),
            1 << (max(len(run.members) for run in runs) - 1).bit_length(),
            max(sum(len(run.subgroups) for run in runs), 1),
            max(run.depth for run in runs) + 1,
            max(run.end for run in runs),
        )

    def shapes(self, prefix: str) -> dict[str, tuple[int, ...]]:
        return {
            f"{prefix}.groups": (self.num_groups, 6),
            f"{prefix}.members": (self.num_groups, self.num_members),
            f"{prefix}.subgroups": (self.num_subgroups, 4),
        }

    def runs(self, tables: Mapping[str, Tensor], prefix: str) -> SharedRuns:
        return SharedRuns(*(tables[name] for name in self.shapes(prefix)))


def fill_shared_runs(
    tables: Mapping[str, Int32Array], prefix: str, runs: Sequence[SharedRun], first_split: int, splits_of_run: int
) -> None:
    """Tables of ``RunSizes.shapes``. The results of a run at depth d go to splits from first_split + d * splits_of_run on."""
    groups, members, subgroups = (tables[f"{prefix}.{name}"] for name in ("groups", "members", "subgroups"))
    groups[:] = 0
    members[:] = NOWHERE
    used = 0
    for number, run in enumerate(runs):
        end = used + len(run.subgroups)
        split = first_split + run.depth * splits_of_run
        groups[number] = (run.start, run.end - run.start, run.members[0], split, used, end)
        members[number, : len(run.members)] = run.members
        for subgroup in run.subgroups:
            subgroups[used] = (subgroup.adapter_slot, subgroup.first, subgroup.end, subgroup.sequence)
            used += 1


@dataclass(frozen=True, slots=True)
class TileSizes:
    """LoRA over runs of entries: how many entries, tiles and rows of a tile."""

    num_entries: int
    num_tiles: int
    height: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> TileSizes:
        """For runs of so many entries each."""
        height = SHORT_TILE if max(lengths, default=0) <= SHORT_TILE else LONG_TILE
        return cls(sum(lengths), sum(-(-length // height) for length in lengths), height)

    @classmethod
    def up_to(cls, num_entries: int, num_runs: int) -> TileSizes:
        """Room for any runs of decode rows."""
        return cls(num_entries, max_tiles(num_entries, num_runs, SHORT_TILE), SHORT_TILE)

    def shapes(self, prefix: str) -> dict[str, tuple[int, ...]]:
        return {
            f"{prefix}.tiles": (self.num_tiles, 3),
            f"{prefix}.rows": (self.num_entries,),
            f"{prefix}.limits": (self.num_entries,),
            f"{prefix}.slots": (self.num_entries,),
        }

    def tiles(self, tables: Mapping[str, Tensor], prefix: str, *, has_limits: bool = False) -> LoraTiles:
        limits = tables[f"{prefix}.limits"] if has_limits else None
        return LoraTiles(tables[f"{prefix}.tiles"], tables[f"{prefix}.rows"], self.height, limits)


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Consecutive entries of one adapter: rows [n] of the batch; limits [n]: how many of q, k, v they change; slots [n]: where
    their residual goes."""

    adapter_slot: int
    rows: IntArray
    limits: IntArray | int = 0
    slots: IntArray | int = NOWHERE


def fill_runs(tables: Mapping[str, Int32Array], prefix: str, runs: Sequence[Run], height: int) -> None:
    """Tables of ``TileSizes.shapes``."""
    tiles = tables[f"{prefix}.tiles"]
    tiles[:] = (NOWHERE, 0, 0)
    tables[f"{prefix}.slots"][:] = NOWHERE
    entry = tile = 0
    for run in runs:
        end = entry + len(run.rows)
        tables[f"{prefix}.rows"][entry:end] = run.rows
        tables[f"{prefix}.limits"][entry:end] = run.limits
        tables[f"{prefix}.slots"][entry:end] = run.slots
        for first in range(entry, end, height):
            tiles[tile] = (run.adapter_slot, first, min(height, end - first))
            tile += 1
        entry = end


def lora_runs(batch: Batch) -> list[Run]:
    """Rows that run with an adapter. Of k and v only rows change whose merged K and V are kept: the others' are the base's, or
    stand beside it as a residual."""
    is_merged = np.zeros(batch.num_rows, dtype=bool)
    is_merged[batch.base_rows] = True
    is_merged[batch.plain_rows] = False
    runs = []
    for segment in batch.lora_segments:
        rows = np.arange(segment.row_start, segment.row_end, dtype=np.int64)
        limits = np.where(is_merged[segment.row_start : segment.row_end], 3, 1)
        runs.append(Run(segment.adapter_slot, rows, limits))
    return runs


def write_runs(batch: Batch) -> list[Run]:
    """Rows whose residual is written, adapter by adapter."""
    return [Run(write.adapter_slot, write.rows, slots=write.slots) for write in batch.residual_writes if len(write.rows)]


def fill_rows(tables: Mapping[str, Int32Array], batch: Batch) -> None:
    """token_ids, positions and base_slots [T]; rows beyond the batch's are token 0 at position 0, and are kept nowhere."""
    num_rows = batch.num_rows
    for name, values in (("token_ids", batch.token_ids), ("positions", batch.positions)):
        tables[name][:num_rows] = values
        tables[name][num_rows:] = 0
    tables["base_slots"][:] = NOWHERE
    tables["base_slots"][batch.base_rows] = batch.base_slots
