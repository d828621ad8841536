"""Attention of packed rows of many sequences, each behind what it has cached (chunked prefill), over base KV and residuals
(ResidualAttention, ForkKV, arXiv 2604.06370):

    K_j = Kb_j + R_j(a_k_j B_k)      V_j = Vb_j + a_v_j B_v      o_i = sum_{j <= i} softmax_j(scale q_i . K_j) V_j

for positions j before a sequence's residual ends, K_j = Kb_j and V_j = Vb_j after it. With QK-norm K_j is (1 + change_j) Kb_j +
norm_j R_j(a_k_j B_k) (``qk_norm``). The rows' own K and V, and their residuals, are in their pages already.

On a GPU K of sequences with a residual is rebuilt before, once for all their rows; V too, or P a_v is kept beside P V: that is
cheaper where a sequence has few rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from forkkv_kernels.checks import check_device, check_dtype, check_rows, check_shape
from forkkv_kernels.launch import use_triton
from forkkv_kernels.reference import residual_attention_extend as reference
from forkkv_kernels.reference.residual_attention_extend import ExtendRows
from forkkv_kernels.reference.residuals import Residuals

__all__ = ["ExtendRows", "Residuals", "residual_attention_extend", "workspace_shape"]

_WORKSPACE_BYTES = 1 << 29
"""Of a workspace that the op makes for itself; more is taken where one sequence needs more."""

_FEW_ROWS = 512
"""Rows of a sequence up to which V stays in base pages: Llama-3.1-8B on an H100, by the bytes that rebuilding V moves and the
products that P a_v takes."""


def residual_attention_extend(
    q: Tensor,
    k_plane: Tensor,
    v_plane: Tensor,
    rows: ExtendRows,
    scale: float,
    residuals: Residuals | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """-> [T, Hq, D] in q's dtype, contiguous; rows behind query_starts[N] are not written.

    q [T, Hq, D] rotated, not scaled; rows may lie apart (a view into a fused product), heads may not. k_plane and v_plane: one
    layer's planes, 1-D, in q's dtype, fp32, fp16 or bf16; base slot s holds [Hkv, D] from s * W on, a residual slot of class c
    c columns from s * c on. residuals None: no sequence has an adapter; a sequence that has none is computed bit by bit as
    without the argument. workspace: of ``workspace_shape`` in q's dtype, its contents are lost; None: the op takes one of its
    own. With one for fewer sequences than there are, they are attended in turns.

    The grid follows from shapes alone, nothing waits for the device: fit for a CUDA graph. Raises ValueError for arguments that
    do not fit together.
    """
    check_arguments(q, k_plane, v_plane, rows, residuals, workspace)
    if not use_triton(q):
        return reference.residual_attention_extend(q, k_plane, v_plane, rows, scale, residuals)
    from forkkv_kernels._triton.residual_attention_extend import extend  # Here: Triton may be missing.

    if residuals is not None and workspace is None and len(rows.start_pos):
        workspace = torch.empty(_own_workspace(q, rows), dtype=q.dtype, device=q.device)
    return extend(q, k_plane, v_plane, rows, scale, residuals, workspace)


def workspace_shape(
    rows: ExtendRows, residuals: Residuals, num_sequences: int | None = None, has_v: bool = True
) -> tuple[int, int, int, int, int]:
    """[2 or 1, num_sequences, positions, Hkv, D]: K and V, or K alone, of num_sequences (None: all N) at a time, of as many
    positions as ``base_pages`` has room for. Narrow that table to what the longest sequence needs, and this narrows."""
    num_sequences = len(rows.start_pos) if num_sequences is None else num_sequences
    return (1 + has_v, num_sequences, rows.base_pages.shape[1] * rows.page_size, *residuals.b_k.shape[2:])


def _own_workspace(q: Tensor, rows: ExtendRows) -> tuple[int, int, int, int, int]:
    num_sequences, positions = len(rows.start_pos), rows.base_pages.shape[1] * rows.page_size
    has_v = len(q) > _FEW_ROWS * num_sequences
    num_bytes = (1 + has_v) * positions * rows.num_kv_heads * q.shape[2] * q.dtype.itemsize
    return (
        1 + has_v,
        max(1, min(num_sequences, _WORKSPACE_BYTES // max(1, num_bytes))),
        positions,
        rows.num_kv_heads,
        q.shape[2],
    )


def check_arguments(
    q: Tensor,
    k_plane: Tensor,
    v_plane: Tensor,
    rows: ExtendRows,
    residuals: Residuals | None,
    workspace: Tensor | None,
) -> None:
    check_shape("q", q, None, None, None)
    check_rows("q", q)
    if q.stride(1) != q.shape[2]:
        raise ValueError(f"q has strides {q.stride()}: the heads of a row have to lie side by side")
    if q.shape[1] % rows.num_kv_heads:
        raise ValueError(f"q has {q.shape[1]} heads, not a multiple of num_kv_heads {rows.num_kv_heads}")
    num_sequences = len(rows.start_pos)
    check_shape("query_starts", rows.query_starts, num_sequences + 1)
    check_shape("base_pages", rows.base_pages, num_sequences, None)
    for name, plane in (("k_plane", k_plane), ("v_plane", v_plane)):
        check_shape(name, plane, None)
        check_dtype(name, plane, q.dtype)
        check_rows(name, plane)
    for name in ("query_starts", "start_pos", "base_pages"):
        check_dtype(name, getattr(rows, name), torch.int32)
        check_rows(name, getattr(rows, name))
    check_device(
        q.device,
        k_plane=k_plane,
        v_plane=v_plane,
        query_starts=rows.query_starts,
        start_pos=rows.start_pos,
        base_pages=rows.base_pages,
        workspace=workspace,
    )
    if residuals is not None:
        _check_residuals(q, rows, residuals)
        if workspace is not None:
            check_dtype("workspace", workspace, q.dtype)
            check_shape("workspace", workspace, None, None, *workspace_shape(rows, residuals)[2:])
            if len(workspace) not in (1, 2) or not 0 < workspace.shape[1] <= num_sequences:
                raise ValueError(
                    f"workspace is {[*workspace.shape]}, not of K or K and V (1, 2) of 1 to {num_sequences} sequences"
                )
            if not workspace.is_contiguous():
                raise ValueError(f"workspace has strides {workspace.stride()}: it has to be contiguous")


def _check_residuals(q: Tensor, rows: ExtendRows, residuals: Residuals) -> None:
    num_sequences, (num_adapters, rank) = len(rows.start_pos), residuals.b_k.shape[:2]
    if rank < 16 or rank & (rank - 1):
        raise ValueError(f"b_k has rank {rank}: the stacks' rank is a power of two from 16 on")
    columns = (residuals.norm_column, residuals.change_column)
    if (columns[0] is None) != (columns[1] is None):
        raise ValueError("norm_column and change_column go together: one of them is None")
    check_shape("residual pages", residuals.pages, num_sequences, None)
    tables = {"lens": num_sequences, "adapters": num_sequences, "rank_class": num_adapters}
    tables |= {"norm_column": num_adapters, "change_column": num_adapters} if columns[0] is not None else {}
    for name, size in tables.items():
        check_shape(name, getattr(residuals, name), size)
    check_shape("ranks", residuals.ranks, num_adapters, 2)
    for name in ("b_k", "b_v"):
        factor: Tensor = getattr(residuals, name)
        check_shape(name, factor, num_adapters, rank, rows.num_kv_heads, q.shape[2])
        check_dtype(name, factor, q.dtype)
        if not factor.is_contiguous():
            raise ValueError(f"{name} has strides {factor.stride()}: it has to be contiguous")
    check_shape("cos_sin", residuals.cos_sin, None, q.shape[2])
    check_dtype("cos_sin", residuals.cos_sin, torch.float32)
    for name in ("pages", "ranks", *tables):
        check_dtype(name, getattr(residuals, name), torch.int32)
    names = ("pages", "b_k", "b_v", "ranks", "cos_sin", *tables)
    check_device(q.device, **{name: getattr(residuals, name) for name in names})
