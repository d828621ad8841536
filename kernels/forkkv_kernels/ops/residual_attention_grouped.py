"""Decode rows of agents that share runs of base pages, each run read once for all of them (grouped ResidualAttention).

The formula is that of ``residual_attention_decode``, over a run's tokens alone and for every member at once: base K and V are
loaded once a group, kv head and split. A residual's score is sum_r a_r G_jr, G the query's product with the rotated rows of
B_k, so that no key is rebuilt (``reference.rope_basis`` has the few numbers of a position that this takes); P a_v is kept per
row and meets B_v after the last tile. Results are partial: ``combine_partials`` joins them with other runs and with each
sequence's own tail in the same buffers. Source: the absorbed form of low-rank keys (DeepSeek-V2's MLA), which RoPE forbids for
one matrix and allows for one a position.

A plan comes as ``SharedRuns``: tables of fixed capacity that a step fills. Programs beyond it read one number and end, so that
one captured graph serves every plan. A run shared by more than M sequences is several groups over the same tokens: their base
pages then come from L2 for all but the first. With residuals, 8 members of 4 rows a kv head are the balance, else 16.
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
from forkkv_kernels.reference.rope_basis import BASIS, CHUNK, RopeBasis, padded_half

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
    basis: RopeBasis | None = None,
    num_positions: int | None = None,
) -> None:
    """Writes splits [first_split, first_split + num_splits) of every member's row in ``partials`` [N, Hq, S, D], group by
    group; other splits and rows stay as they are.

    q, planes, partials: as in ``residual_attention_decode``. Of ``rows`` it reads base_pages, of ``residuals`` all but lens
    and adapters, which ``runs`` says instead. members: a power of two of them. basis: of the residuals' cos_sin, in fp16
    (fp32 for fp32 KV); None where no adapter here has a rank on k, which leaves residual keys out. It takes scratch memory
    of members * g * 2 bytes a position, kv head and group, for num_positions: no run reaches further; None: the length of
    the page tables. Raises ValueError for arguments that do not fit together.
    """
    check_arguments(q, k_plane, v_plane, rows, partials, residuals)
    check_shape("runs.groups", runs.groups, len(runs.members), 6)
    check_shape("runs.members", runs.members, None, None)
    check_shape("runs.subgroups", runs.subgroups, None, 4)
    capacity = runs.members.shape[1]
    if capacity & (capacity - 1) or capacity == 0:
        raise ValueError(f"runs.members has {capacity} places a group: it has to be a power of two")
    if rows.page_size & (rows.page_size - 1):
        raise ValueError(f"rows.page_size is {rows.page_size}: for shared runs it has to be a power of two")
    for name in SharedRuns.__slots__:
        table: Tensor = getattr(runs, name)
        check_dtype(f"runs.{name}", table, torch.int32)
        check_device(q.device, **{f"runs.{name}": table})
        if not table.is_contiguous():
            raise ValueError(f"runs.{name} has strides {table.stride()}: it has to be contiguous")
    if not 0 <= num_splits <= partials.num_splits:
        raise ValueError(f"num_splits is {num_splits}, more than the {partials.num_splits} splits of partials")
    if basis is not None:
        _check_basis(q, basis, residuals)
    if not use_triton(q):
        reference.residual_attention_grouped(q, k_plane, v_plane, rows, runs, scale, partials, num_splits, residuals)
        return
    from forkkv_kernels._triton.residual_attention_grouped import grouped  # Here: Triton may be missing.

    grouped(q, k_plane, v_plane, rows, runs, scale, partials, num_splits, residuals, basis, num_positions)


def _check_basis(q: Tensor, basis: RopeBasis, residuals: Residuals | None) -> None:
    if residuals is None:
        raise ValueError("basis is given, residuals are not: it is of their cos_sin")
    num_chunks = -(-len(residuals.cos_sin) // CHUNK)
    check_shape("basis.features", basis.features, num_chunks * CHUNK, basis.near + BASIS)
    check_shape("basis.coefficients", basis.coefficients, num_chunks * BASIS, 2 * padded_half(q.shape[2]))
    check_device(q.device, **{"basis.features": basis.features, "basis.coefficients": basis.coefficients})
    dtype = torch.float32 if q.dtype == torch.float32 else torch.float16
    check_dtype("basis.features", basis.features, dtype)
    check_dtype("basis.coefficients", basis.coefficients, dtype)
