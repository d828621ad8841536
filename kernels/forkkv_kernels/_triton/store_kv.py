"""q and k normalised (where the family does so) and rotated, k and v written to their slots: one program for a row and some of
its query, key or value heads.

A head is held as its two halves apart, so that the rotation moves nothing between threads.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from forkkv_kernels._triton.aot import AotVariant
from forkkv_kernels.reference.store_kv import HeadNorms

_MAX_BLOCK = 2048
"""Elements of a half that a program holds."""
_NUM_WARPS = 4


@triton.jit
def _normed(first, second, weight_ptr, places, is_in_half, half, head_dim, eps):
    """Both halves [HEADS, HALF] in fp32 of heads over their root mean square, rounded where the reference rounds."""
    one, two = first.to(tl.float32), second.to(tl.float32)
    inverse = tl.rsqrt((tl.sum(one * one, axis=1) + tl.sum(two * two, axis=1)) / head_dim + eps)[:, None]
    weight_one = tl.load(weight_ptr + places, mask=is_in_half, other=0.0).to(tl.float32)[None, :]
    weight_two = tl.load(weight_ptr + half + places, mask=is_in_half, other=0.0).to(tl.float32)[None, :]
    one = ((one * inverse).to(first.dtype).to(tl.float32) * weight_one).to(first.dtype)
    two = ((two * inverse).to(first.dtype).to(tl.float32) * weight_two).to(first.dtype)
    return one, two


@triton.jit
def _plus(x, added):
    """The sum in x's dtype."""
    return (x.to(tl.float32) + added.to(tl.float32)).to(x.dtype)


@triton.jit
def _store_kv_kernel(
    qkv_ptr, row_stride, added_ptr, added_stride, cos_sin_ptr, slots_ptr, q_ptr, k_cache_ptr, v_cache_ptr,
    q_norm_ptr, k_norm_ptr, eps, num_heads, num_kv_heads, head_dim,
    HAS_ADDED: tl.constexpr, HAS_NORMS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half = head_dim // 2
    q_pieces, kv_pieces = tl.cdiv(num_heads, HEADS), tl.cdiv(num_kv_heads, HEADS)
    is_q, is_v = piece < q_pieces, piece >= q_pieces + kv_pieces
    # The heads of this program, counted within q, k or v, and where those start in a row of qkv.
    start = tl.where(is_q, 0, tl.where(is_v, num_heads + num_kv_heads, num_heads))
    end = tl.where(is_q, num_heads, num_kv_heads)
    piece = tl.where(is_q, piece, tl.where(is_v, piece - q_pieces - kv_pieces, piece - q_pieces))
    heads = piece * HEADS + tl.arange(0, HEADS)
    places = tl.arange(0, HALF)
    is_in_half = places < half
    inside = (heads < end)[:, None] & is_in_half[None, :]
    offsets = heads[:, None] * head_dim + places[None, :]

    source = qkv_ptr + row * row_stride + start * head_dim
    slot = tl.load(slots_ptr + row).to(tl.int64)
    first = tl.load(source + offsets, mask=inside, other=0.0)
    second = tl.load(source + half + offsets, mask=inside, other=0.0)
    if HAS_ADDED:
        added = added_ptr + row * added_stride + start * head_dim
        first = _plus(first, tl.load(added + offsets, mask=inside, other=0.0))
        second = _plus(second, tl.load(added + half + offsets, mask=inside, other=0.0))
    kept = inside & (slot >= 0)
    place = slot * num_kv_heads * head_dim
    if is_v:
        tl.store(v_cache_ptr + place + offsets, first, mask=kept)
        tl.store(v_cache_ptr + place + half + offsets, second, mask=kept)
    else:
        cos = tl.load(cos_sin_ptr + row * head_dim + places, mask=is_in_half, other=0.0)[None, :]
        sin = tl.load(cos_sin_ptr + row * head_dim + half + places, mask=is_in_half, other=0.0)[None, :]
        if HAS_NORMS:
            norm_ptr = k_norm_ptr
            if is_q:
                norm_ptr = q_norm_ptr
            first, second = _normed(first, second, norm_ptr, places, is_in_half, half, head_dim, eps)
        one, two = first.to(tl.float32), second.to(tl.float32)
        turned_one, turned_two = (one * cos - two * sin).to(first.dtype), (two * cos + one * sin).to(first.dtype)
        if is_q:
            target = q_ptr + row * num_heads * head_dim
            tl.store(target + offsets, turned_one, mask=inside)
            tl.store(target + half + offsets, turned_two, mask=inside)
        else:
            tl.store(k_cache_ptr + place + offsets, turned_one, mask=kept)
            tl.store(k_cache_ptr + place + half + offsets, turned_two, mask=kept)


def store_kv(
    qkv: Tensor, cos_sin: Tensor, norms: HeadNorms | None, slots: Tensor, key_cache: Tensor, value_cache: Tensor,
    added: Tensor | None,
) -> Tensor:  # fmt: skip
    """As the door of the same name; rows of qkv and added may be strided, all else is contiguous."""
    num_rows, num_all_heads, head_dim = qkv.shape
    num_kv_heads = key_cache.shape[1]
    num_heads = num_all_heads - 2 * num_kv_heads
    q = qkv.new_empty(num_rows, num_heads, head_dim)
    if num_rows:
        heads, half = _block(max(num_heads, num_kv_heads), head_dim)
        grid = (num_rows, triton.cdiv(num_heads, heads) + 2 * triton.cdiv(num_kv_heads, heads))
        other = qkv if added is None else added
        q_norm, k_norm, eps = (qkv, qkv, 0.0) if norms is None else (norms.q, norms.k, norms.eps)
        _store_kv_kernel[grid](
            qkv, qkv.stride(0), other, other.stride(0), cos_sin, slots, q, key_cache, value_cache, q_norm, k_norm, eps,
            num_heads, num_kv_heads, head_dim, HAS_ADDED=added is not None, HAS_NORMS=norms is not None,
            HEADS=heads, HALF=half, num_warps=_NUM_WARPS,
        )  # fmt: skip
    return q


def _block(num_heads: int, head_dim: int) -> tuple[int, int]:
    """(heads, elements of a half) of a program, powers of two."""
    half = triton.next_power_of_2(head_dim // 2)
    return max(1, min(triton.next_power_of_2(num_heads), _MAX_BLOCK // half, 16)), half


def aot_variants() -> list[AotVariant]:
    """Llama-3.1-8B, and Qwen3-8B with QK-norm."""
    return [_variant("bf16", False), _variant("bf16", True), _variant("fp16", False)]


def _variant(dtype: str, has_norms: bool) -> AotVariant:
    names = ("qkv_ptr", "added_ptr", "q_ptr", "k_cache_ptr", "v_cache_ptr", "q_norm_ptr", "k_norm_ptr")
    signature = dict.fromkeys(names, f"*{dtype}") | {"cos_sin_ptr": "*fp32", "slots_ptr": "*i64", "eps": "fp32"}
    signature |= dict.fromkeys(("row_stride", "added_stride", "num_heads", "head_dim"), "i32:16") | {"num_kv_heads": "i32"}
    heads, half = _block(32, 128)
    constants = {"HAS_ADDED": True, "HAS_NORMS": has_norms, "HEADS": heads, "HALF": half}
    name = f"store_kv_{dtype}{'_qk_norm' if has_norms else ''}"
    return AotVariant(_store_kv_kernel, signature, constants, _NUM_WARPS, 3, name)
