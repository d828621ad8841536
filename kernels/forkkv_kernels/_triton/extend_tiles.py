"""What ``residual_attention_extend`` adds to ``tiles``: which rows a program has, tiles that lie in one page, the residual of
one sequence as a value, and the running softmax of many rows."""

from __future__ import annotations

import triton
import triton.language as tl

from forkkv_kernels._triton.tiles import load_base_half, load_key_scale, rotated_halves


@triton.jit
def find_sequence(query_starts_ptr, block, num_sequences, ROWS: tl.constexpr):
    """The sequence to which ``block`` belongs, where sequence n owns the blocks from query_starts[n] // ROWS + n on: enough for
    its rows, and known without a sum over the sequences before it (as in vLLM's unified attention)."""
    low = 0
    high = num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_starts_ptr + middle) // ROWS + middle <= block:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def tile_pages(pages_ptr, start, end, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Page numbers of a tile from ``start`` on: one where a tile lies in one page, else [BLOCK_N]; 0 from ``end`` on.

    A loop asks for its next tile's, so that the address of a tile is known when it is to be loaded. Triton's pipeline would
    give page numbers a stage of their own, and load K and V only one tile ahead.
    """
    if PAGE_SIZE % BLOCK_N == 0:
        pages = tl.load(pages_ptr + start // PAGE_SIZE, mask=start < end, other=0)
    else:
        positions = start + tl.arange(0, BLOCK_N)
        pages = tl.load(pages_ptr + positions // PAGE_SIZE, mask=positions < end, other=0)
    return pages


@triton.jit
def tile_slots(pages, start, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Slots of a tile: the first (64-bit) or 0, and [BLOCK_N] relative to it.

    A tile within one page has the same relative slots as any other: no 64-bit arithmetic for each of its rows.
    """
    offsets = tl.arange(0, BLOCK_N)
    if PAGE_SIZE % BLOCK_N == 0:
        first = pages.to(tl.int64) * PAGE_SIZE + start % PAGE_SIZE
        slots = offsets
    else:
        first = 0
        slots = pages.to(tl.int64) * PAGE_SIZE + (start + offsets) % PAGE_SIZE
    return first, slots


@triton.jit
def residual_of(
    adapter, pages_ptr, ranks_ptr, rank_class_ptr, norm_column_ptr, change_column_ptr, HAS_KEY_SCALE: tl.constexpr
):  # fmt: skip
    """What loads of one sequence's residual need, as a tuple."""
    norm_column = 0
    change_column = 0
    if HAS_KEY_SCALE:
        norm_column = tl.load(norm_column_ptr + adapter)
        change_column = tl.load(change_column_ptr + adapter)
    rank_k = tl.load(ranks_ptr + 2 * adapter)
    rank_v = tl.load(ranks_ptr + 2 * adapter + 1)
    rank_class = tl.load(rank_class_ptr + adapter)
    return pages_ptr, rank_class, rank_k, rank_v, norm_column, change_column


@triton.jit
def load_key_scales(k_ptr, v_ptr, slots, has_residual, residual, head, HAS_KEY_SCALE: tl.constexpr):
    """``norm`` and ``change`` of a tile for kv head ``head``: 0 where the adapter leaves k alone (its column is -1)."""
    _, rank_class, _, _, norm_column, change_column = residual
    norm, change = 1.0, 0.0
    if HAS_KEY_SCALE:
        mask = has_residual & (norm_column >= 0)
        norm = load_key_scale(k_ptr, slots, mask, rank_class, norm_column + head)
        change = load_key_scale(v_ptr, slots, mask, rank_class, change_column + head)
    return norm, change


@triton.jit
def load_rotation(cos_sin_ptr, positions, mask, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr):
    """cos and sin of a tile's positions, [BLOCK_N, BLOCK_H] fp32 each."""
    columns = tl.arange(0, BLOCK_H)
    pointers = cos_sin_ptr + positions.to(tl.int64)[:, None] * HEAD_DIM + columns[None, :]
    mask = mask[:, None] & (columns < HEAD_DIM // 2)[None, :]
    return tl.load(pointers, mask=mask, other=0.0), tl.load(pointers + HEAD_DIM // 2, mask=mask, other=0.0)


@triton.jit
def rebuilt_k(
    a_k, b1, b2, cos, sin, norm, change, k_ptr, slots, mask, head,
    WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, HAS_KEY_SCALE: tl.constexpr,
):  # fmt: skip
    """Both halves of K, [BLOCK_N, BLOCK_H] in the base's dtype, rounded once: base + R(a B), with QK-norm (1 + change) base
    + norm R(a B)."""
    r1, r2 = rotated_halves(dot(a_k, b1), dot(a_k, b2), cos, sin)
    base1 = load_base_half(k_ptr, slots, mask, head, WIDTH, HEAD_DIM, BLOCK_H, 0)
    base2 = load_base_half(k_ptr, slots, mask, head, WIDTH, HEAD_DIM, BLOCK_H, 1)
    if HAS_KEY_SCALE:
        k1 = base1.to(tl.float32) * (1.0 + change)[:, None] + r1 * norm[:, None]
        k2 = base2.to(tl.float32) * (1.0 + change)[:, None] + r2 * norm[:, None]
    else:
        k1 = base1.to(tl.float32) + r1
        k2 = base2.to(tl.float32) + r2
    return k1.to(base1.dtype), k2.to(base1.dtype)


@triton.jit
def dot(a, b, acc=None):
    """a b (+ acc) in fp32; fp32 operands as they are, not rounded to tf32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def softmax_step(scores, acc, total, highest, scale, positions, limits, IS_MASKED: tl.constexpr):
    """The running softmax over one more tile. scores [BLOCK_M, BLOCK_N] -> (weights, acc shrunk, by how much, total, highest);
    total and highest [BLOCK_M]: the sum of weights and the highest score so far, in powers of two. Row m sees positions up to
    limits[m]."""
    if IS_MASKED:
        scores = tl.where(positions[None, :] <= limits[:, None], scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, axis=1) * scale)
    weights = tl.exp2(scores * scale - new_highest[:, None])
    shrink = tl.exp2(highest - new_highest)
    total = total * shrink + tl.sum(weights, axis=1)
    return weights, acc * shrink[:, None], shrink, total, new_highest


@triton.jit
def shrunk(before, highest):
    """By how much sums that relate to the highest score ``before`` shrink; 1 where there is none yet, -inf both."""
    return tl.exp2(tl.maximum(before, -1e30) - tl.maximum(highest, -1e30))
