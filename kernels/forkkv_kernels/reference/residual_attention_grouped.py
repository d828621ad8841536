"""Rows of many sequences over runs of base pages that they share, row by row in float64."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from forkkv_kernels.reference.combine_partials import Partials
from forkkv_kernels.reference.residual_attention_decode import (
    DecodeRows,
    add_residual_,
    attend_row_,
    base_kv,
)
from forkkv_kernels.reference.residuals import Residuals


@dataclass(frozen=True, slots=True, eq=False)
class SharedRuns:
    """Runs of base pages and who reads them, int32; capacities G, M and U are fixed, so that a captured graph serves any plan.

    groups [G, 6]: first position; tokens (0: no group here, all else is garbage), both whole pages; a sequence in whose
    base_pages the run lies; the first of the splits that its rows' results go to; its subgroups [first, end) in ``subgroups``.
    members [G, M]: sequences that read the run, -1 for none.
    subgroups [U, 4]: adapter; its members [first, end), places in the group's row of ``members``; a sequence in whose residual
    pages its residual lies. It covers every token of the run. A member in no subgroup reads base KV alone.
    """

    groups: Tensor
    members: Tensor
    subgroups: Tensor


def residual_attention_grouped(
    q: Tensor,
    k_plane: Tensor,
    v_plane: Tensor,
    rows: DecodeRows,
    runs: SharedRuns,
    scale: float,
    partials: Partials,
    num_splits: int,
    residuals: Residuals | None = None,
) -> None:
    """All of a run into the first of its splits; the others are left without a key."""
    subgroups = runs.subgroups.tolist()
    for group, (start, length, pages_of, first_split, first, end) in enumerate(runs.groups.tolist()):
        if length == 0:
            continue
        pages = rows.base_pages[pages_of]
        for place, n in enumerate(runs.members[group].tolist()):
            if n < 0:
                continue
            k, v = base_kv(k_plane, v_plane, pages, start, start + length, rows.page_size, rows.num_kv_heads, q.shape[2])
            for adapter, place_first, place_end, residual_of in subgroups[first:end] if residuals is not None else []:
                if residuals is not None and place_first <= place < place_end:
                    add_residual_(
                        k, v, k_plane, v_plane, residuals, residuals.pages[residual_of], adapter, start, start + length,
                        rows.page_size,
                    )  # fmt: skip
            partials.lse[n, :, first_split : first_split + num_splits] = float("-inf")
            attend_row_(partials, n, first_split, q[n], k, v, scale)
