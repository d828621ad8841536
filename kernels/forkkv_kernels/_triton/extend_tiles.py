"""What ``residual_attention_extend`` adds to ``tiles``: which rows a program has, tiles that lie in one page, and the running
softmax of many rows."""

from __future__ import annotations

import triton
import triton.language as tl


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
