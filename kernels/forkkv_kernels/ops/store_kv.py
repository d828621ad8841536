"""See the reference of the same name for the formula and symbols.

qkv, the norms' weights, q and the caches have one dtype (fp32, fp16, bf16). Rotation runs in fp32; under QK-norm a normalised
head is rounded before it is rotated. Base slot s is elements [s Hkv D, (s + 1) Hkv D) of a layer's plane: a cache
[slots, Hkv, D] is a view of it. Source: RoPE with halves apart (arXiv 2104.09864, the layout of Llama's checkpoints).
"""

from __future__ import annotations

import ctypes

from torch import Tensor

from forkkv_kernels._cpu.library import functions_for
from forkkv_kernels._cpu.structs import RopeStore, num_threads
from forkkv_kernels.launch import use_triton
from forkkv_kernels.reference import store_kv as reference
from forkkv_kernels.reference.store_kv import HeadNorms

__all__ = ["HeadNorms", "store_kv"]

_MAX_HEAD_DIM = 512


def store_kv(
    qkv: Tensor, cos_sin: Tensor, norms: HeadNorms | None, slots: Tensor, key_cache: Tensor, value_cache: Tensor,
    added: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """qkv [T, Hq + 2 Hkv, D] contiguous, cos_sin [T, D] fp32, slots [T] int64 (-1: not kept), caches [slots, Hkv, D]
    contiguous -> q [T, Hq, D] rotated, contiguous.

    added, shaped as qkv, contiguous: what is to be added to qkv first, such as the LoRA of the linear that gave it.
    """
    if use_triton(qkv):
        from forkkv_kernels._triton import store_kv as kernels

        return kernels.store_kv(qkv, cos_sin, norms, slots, key_cache, value_cache, added)
    if added is not None:
        qkv = qkv + added
    functions = functions_for(qkv)
    num_rows, num_all_heads, head_dim = qkv.shape
    if functions is None or head_dim > _MAX_HEAD_DIM:
        q = reference.store_kv(qkv, cos_sin, norms, slots, key_cache, value_cache)
        return q.contiguous()  # ``attend_tiles`` reads it by its address
    num_kv_heads = key_cache.shape[1]
    num_heads = num_all_heads - 2 * num_kv_heads
    q = qkv.new_empty(num_rows, num_heads, head_dim)
    call = RopeStore(
        num_rows, num_heads, num_kv_heads, head_dim, qkv.data_ptr(), cos_sin.data_ptr(),
        norms.q.data_ptr() if norms is not None else 0, norms.k.data_ptr() if norms is not None else 0,
        norms.eps if norms is not None else 0.0, q.data_ptr(), slots.data_ptr(), key_cache.data_ptr(), value_cache.data_ptr(),
        num_threads(),
    )  # fmt: skip
    functions.rope_store(ctypes.byref(call))
    return q
