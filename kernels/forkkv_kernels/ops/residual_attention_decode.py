"""Decode attention, one query row a sequence, over base KV and residuals (ResidualAttention, ForkKV, arXiv 2604.06370):

    K_j = Kb_j + R_j(a_k_j B_k)      V_j = Vb_j + a_v_j B_v      o = sum_j softmax_j(scale q . K_j) V_j

for positions j before the end of a sequence's residual, K_j = Kb_j and V_j = Vb_j after it. With QK-norm K_j is (1 + change_j)
Kb_j + norm_j R_j(a_k_j B_k) (``qk_norm``). The row's own K and V, and its residual, are in their pages already.

Keys are split among programs (flash decoding); ``combine_partials`` merges. ``residual_attention_grouped`` puts what sequences
share into other splits of the same buffers, and this op then takes what is left of each, from ``kv_starts`` on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from forkkv_kernels.checks import check_device, check_dtype, check_rows, check_shape
from forkkv_kernels.launch import use_triton
from forkkv_kernels.ops.combine_partials import check_partials
from forkkv_kernels.reference import residual_attention_decode as reference
from forkkv_kernels.reference.combine_partials import Partials
from forkkv_kernels.reference.residual_attention_decode import DecodeRows
from forkkv_kernels.reference.residuals import Residuals

__all__ = ["DecodeRows", "Residuals", "residual_attention_decode", "suggested_splits"]

_PROGRAMS_OF_A_MULTIPROCESSOR = 4
"""Two run at once. On an H100, 16 sequences of 32k at rank 16: 0.814 ms with four a multiprocessor, 0.830 with eight, 0.850
with sixteen; without adapters 0.72 with any."""


def residual_attention_decode(
    q: Tensor,
    k_plane: Tensor,
    v_plane: Tensor,
    rows: DecodeRows,
    scale: float,
    partials: Partials,
    splits: range,
    residuals: Residuals | None = None,
) -> None:
    """Writes ``splits`` of every row of ``partials`` [N, Hq, S, D]: a split without a key gets lse -inf and no ``out``.

    q [N, Hq, D] rotated, not scaled; rows may lie apart (a view into a fused product), heads may not. k_plane and v_plane: one
    layer's planes, 1-D, in q's dtype, fp32, fp16 or bf16; base slot s holds [Hkv, D] from s * Hkv * D on, a residual slot of
    class c c columns from s * c on. residuals None: no sequence has an adapter; a sequence that has none is computed bit by bit
    as without the argument; its b_k may be fp16 beside bf16 KV, which spares a conversion a tile. splits: consecutive.

    The grid follows from shapes alone, nothing waits for the device: fit for a CUDA graph. Raises ValueError for arguments that
    do not fit together.
    """
    check_arguments(q, k_plane, v_plane, rows, partials, residuals)
    if splits.step != 1 or splits.start < 0 or splits.stop > partials.num_splits:
        raise ValueError(f"splits is {splits}, not consecutive numbers below the {partials.num_splits} splits of partials")
    if not use_triton(q):
        reference.residual_attention_decode(q, k_plane, v_plane, rows, scale, partials, splits, residuals)
        return
    from forkkv_kernels._triton.residual_attention_decode import decode  # Here: Triton may be missing.

    decode(q, k_plane, v_plane, rows, scale, partials, splits, residuals)


def suggested_splits(num_sequences: int, num_kv_heads: int, max_kv_len: int, device: torch.device) -> int:
    """So many that the card's multiprocessors have work, not so many that a split has less than 256 keys."""
    if device.type != "cuda":
        return 2
    wanted = _PROGRAMS_OF_A_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(wanted // max(1, num_sequences * num_kv_heads), max_kv_len // 256, 64))


def check_arguments(
    q: Tensor,
    k_plane: Tensor,
    v_plane: Tensor,
    rows: DecodeRows,
    partials: Partials,
    residuals: Residuals | None,
) -> None:
    check_shape("q", q, None, None, None)
    check_rows("q", q)
    num_sequences, num_heads, head_dim = q.shape
    if q.stride(1) != head_dim:
        raise ValueError(f"q has strides {q.stride()}: the heads of a row have to lie side by side")
    if num_heads % rows.num_kv_heads:
        raise ValueError(f"q has {num_heads} heads, not a multiple of num_kv_heads {rows.num_kv_heads}")
    check_partials(partials)
    check_shape("partials.out", partials.out, num_sequences, num_heads, None, head_dim)
    for name, plane in (("k_plane", k_plane), ("v_plane", v_plane)):
        check_shape(name, plane, None)
        check_dtype(name, plane, q.dtype)
        check_rows(name, plane)
    check_shape("base_pages", rows.base_pages, num_sequences, None)
    tables = {"base_pages": rows.base_pages, "kv_lens": rows.kv_lens}
    if rows.kv_starts is not None:
        tables["kv_starts"] = rows.kv_starts
    for name, table in tables.items():
        check_shape(name, table, *((num_sequences,) if name != "base_pages" else (num_sequences, None)))
        check_dtype(name, table, torch.int32)
        check_rows(name, table)
    check_device(q.device, k_plane=k_plane, v_plane=v_plane, partials=partials.out, **tables)
    if residuals is not None:
        _check_residuals(q, rows, residuals)


def _check_residuals(q: Tensor, rows: DecodeRows, residuals: Residuals) -> None:
    num_adapters, rank = residuals.b_k.shape[:2]
    if rank < 16 or rank & (rank - 1):
        raise ValueError(f"b_k has rank {rank}: the stacks' rank is a power of two from 16 on")
    if (residuals.norm_column is None) != (residuals.change_column is None):
        raise ValueError("norm_column and change_column go together: one of them is None")
    shapes: dict[str, tuple[int | None, ...]] = {
        "pages": (len(q), None),
        "lens": (len(q),),
        "adapters": (len(q),),
        "ranks": (num_adapters, 2),
        "rank_class": (num_adapters,),
    }
    if residuals.norm_column is not None:
        shapes |= {"norm_column": (num_adapters,), "change_column": (num_adapters,)}
    for name, shape in shapes.items():
        table: Tensor = getattr(residuals, name)
        check_shape(f"residuals.{name}", table, *shape)
        check_dtype(f"residuals.{name}", table, torch.int32)
        check_rows(f"residuals.{name}", table)
    for name in ("b_k", "b_v"):
        factor: Tensor = getattr(residuals, name)
        check_shape(f"residuals.{name}", factor, num_adapters, rank, rows.num_kv_heads, q.shape[2])
        check_dtype(f"residuals.{name}", factor, q.dtype, *((torch.float16,) if name == "b_k" else ()))
        if not factor.is_contiguous():
            raise ValueError(f"residuals.{name} has strides {factor.stride()}: it has to be contiguous")
    check_shape("residuals.cos_sin", residuals.cos_sin, None, q.shape[2])
    check_dtype("residuals.cos_sin", residuals.cos_sin, torch.float32)
    names = ("b_k", "b_v", "cos_sin", *shapes)
    check_device(q.device, **{f"residuals.{name}": getattr(residuals, name) for name in names})
