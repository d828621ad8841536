"""Decode rows of agents that share runs of base pages, each run read once for all of them (grouped ResidualAttention).

The formula is that of ``residual_attention_decode``, over a run's tokens alone and for every member at once: base K and V are
loaded once a group, kv head and split; the rotated residual R(a B_k) is built once for each adapter among the members, not for
each member; P a_v is kept per row and meets B_v after the last tile. Results are partial: ``combine_partials`` joins them with
other runs and with each sequence's own tail in the same buffers.

A plan comes as ``SharedRuns``: tables of fixed capacity that a step fills. Programs beyond it read one number and end, so that
one captured graph serves every plan. A run shared by more than M sequences is several groups over the same tokens: their base
pages then come from L2 for all but the first. With adapters on k, 8 members of 4 rows a kv head are the balance, else 16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from forkkv_kernels.checks import check_device, check_dtype, check_shape
from forkkv_kernels.launch import use_triton
from forkkv_kernels.ops.residual_attention_decode import check_arguments
from forkkv_kernels.reference import residual_attention_grouped as reference
from forkkv_kernels.reference.combine_partials import Partials
from forkkv_kernels.reference.residual_attention_decode import DecodeRows
from forkkv_kernels.reference.residual_attention_grouped import SharedRuns
from forkkv_kernels.reference.residuals import Residuals

__all__ = ["SharedRuns", "residual_attention_grouped"]


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
    has_k: bool = True,
) -> None:
    """Writes splits [first_split, first_split + num_splits) of every member's row in ``partials`` [N, Hq, S, D], group by
    group; other splits and rows stay as they are.

    q, planes, partials: as in ``residual_attention_decode``. Of ``rows`` it reads base_pages, of ``residuals`` all but lens and
    adapters, which ``runs`` says instead. members: a power of two of them. has_k False: no adapter here has a rank on k, which
    leaves all of R(a B_k) out. Raises ValueError for arguments that do not fit together.
    """
    check_arguments(q, k_plane, v_plane, rows, partials, residuals)
    check_shape("runs.groups", runs.groups, len(runs.members), 6)
    check_shape("runs.members", runs.members, None, None)
    check_shape("runs.subgroups", runs.subgroups, None, 4)
    capacity = runs.members.shape[1]
    if capacity & (capacity - 1) or capacity == 0:
        raise ValueError(f"runs.members has {capacity} places a group: it has to be a power of two")
    for name in SharedRuns.__slots__:
        table: Tensor = getattr(runs, name)
        check_dtype(f"runs.{name}", table, torch.int32)
        check_device(q.device, **{f"runs.{name}": table})
        if not table.is_contiguous():
            raise ValueError(f"runs.{name} has strides {table.stride()}: it has to be contiguous")
    if not 0 <= num_splits <= partials.num_splits:
        raise ValueError(f"num_splits is {num_splits}, more than the {partials.num_splits} splits of partials")
    if not use_triton(q):
        reference.residual_attention_grouped(q, k_plane, v_plane, rows, runs, scale, partials, num_splits, residuals, has_k)
        return
    from forkkv_kernels._triton.residual_attention_grouped import grouped  # Here: Triton may be missing.

    grouped(q, k_plane, v_plane, rows, runs, scale, partials, num_splits, residuals, has_k)
