"""The kernel of ``residual_attention_extend``. See ``ops`` for the contract.

A program has one kv head and BLOCK_M // g consecutive rows of one sequence, the g query heads of each side by side, so that a
tile of K and V is loaded once for all of them. Keys that every row sees come first, unmasked; those around the diagonal last.

K with its residual has been rebuilt before, once for all rows (``rebuild_kv``): as many bytes read and written as K has. In the
loop every block of rows would do it again, and it costs more there than the tile's own products (some ten operations for each
element of K, K by way of registers, and a cos|sin row as large as K and V of a head): 8,192 rows took an H100 3.8 ms that way
and 1.1 without a residual, 128 rows over 32k 2.1 and 0.5. V may be rebuilt, too, or stay in base pages, shared and in cache,
with P a_v beside P V: at rank 16 an eighth more of that product, and half the bytes before.
"""

from __future__ import annotations

import triton
import triton.language as tl

from forkkv_kernels._triton.extend_tiles import dot, find_sequence, softmax_step, tile_pages, tile_slots
from forkkv_kernels._triton.tiles import load_base, load_factor, load_residual


@triton.jit
def _attend_tiles(
    state, acc_r, q, limits, k_ptr, k_pages_ptr, v_ptr, v_pages_ptr, residual, scale, low, high, head,
    WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, HAS_RECALL: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Positions [low, high). HAS_RECALL: V lies in pages of its own, and acc_r = P a_v is kept beside acc = P V."""
    acc, total, highest = state
    a_v_ptr, own_pages_ptr, residual_len, rank_class, rank = residual
    pages = tile_pages(k_pages_ptr, low, high, PAGE_SIZE, BLOCK_N)
    if HAS_RECALL:
        v_pages = tile_pages(v_pages_ptr, low, high, PAGE_SIZE, BLOCK_N)
        own_end = tl.minimum(residual_len, high)
        own_pages = tile_pages(own_pages_ptr, low, own_end, PAGE_SIZE, BLOCK_N)
    for start in tl.range(low, high, BLOCK_N):
        positions = start + tl.arange(0, BLOCK_N)
        mask = tl.full([BLOCK_N], True, tl.int1)
        if IS_MASKED:
            mask = positions < high
        first, slots = tile_slots(pages, start, PAGE_SIZE, BLOCK_N)
        pages = tile_pages(k_pages_ptr, start + BLOCK_N, high, PAGE_SIZE, BLOCK_N)
        k = load_base(k_ptr + first * WIDTH, slots, mask, head, WIDTH, HEAD_DIM, acc.shape[1])
        scores = dot(q, tl.trans(k))
        weights, acc, shrink, total, highest = softmax_step(scores, acc, total, highest, scale, positions, limits, IS_MASKED)
        if HAS_RECALL:
            first, slots = tile_slots(v_pages, start, PAGE_SIZE, BLOCK_N)
            v_pages = tile_pages(v_pages_ptr, start + BLOCK_N, high, PAGE_SIZE, BLOCK_N)
        v = load_base(v_ptr + first * WIDTH, slots, mask, head, WIDTH, HEAD_DIM, acc.shape[1])
        weights = weights.to(v.dtype)
        acc = dot(weights, v, acc)
        if HAS_RECALL:
            own_first, own_slots = tile_slots(own_pages, start, PAGE_SIZE, BLOCK_N)
            own_pages = tile_pages(own_pages_ptr, start + BLOCK_N, own_end, PAGE_SIZE, BLOCK_N)
            a_v = load_residual(a_v_ptr, own_first + own_slots, positions < own_end, rank_class, rank, acc_r.shape[1])
            acc_r = dot(weights, a_v, acc_r * shrink[:, None])
    return (acc, total, highest), acc_r


@triton.jit(do_not_specialize=["num_sequences", "base_pages_stride", "residual_pages_stride", "rebuilt_tokens"])
def extend_kernel(
    out_ptr, q_ptr, k_ptr, v_ptr, rebuilt_k_ptr, rebuilt_v_ptr, rebuilt_pages_ptr, query_starts_ptr, start_pos_ptr,
    base_pages_ptr, residual_pages_ptr, residual_lens_ptr, adapters_ptr, b_v_ptr, ranks_ptr, rank_class_ptr,
    scale_log2, num_sequences, q_stride, base_pages_stride, residual_pages_stride, rebuilt_tokens,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE_SIZE: tl.constexpr,
    RANK: tl.constexpr, REBUILT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """REBUILT: what sequences with a residual read in rebuilt form: "" (there are none), "k" or "kv"."""
    WIDTH: tl.constexpr = NUM_KV_HEADS * HEAD_DIM
    ROWS: tl.constexpr = BLOCK_M // GROUP
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # late rows see the most keys: they start first
    block += tl.load(query_starts_ptr) // ROWS
    head = tl.program_id(1)
    sequence = find_sequence(query_starts_ptr, block, num_sequences, ROWS)
    first_row = tl.load(query_starts_ptr + sequence)
    num_rows = tl.load(query_starts_ptr + sequence + 1) - first_row
    row = (block - first_row // ROWS - sequence) * ROWS
    if row >= num_rows:
        return

    lanes = tl.arange(0, BLOCK_M)
    rows = row + lanes // GROUP
    is_row = (rows < num_rows) & (lanes < ROWS * GROUP)
    rows = tl.minimum(rows, num_rows - 1)  # a lane without a row computes another's and stores nothing
    start_pos = tl.load(start_pos_ptr + sequence)
    limits = start_pos + rows
    end = start_pos + tl.minimum(row + ROWS, num_rows)
    unmasked_end = (start_pos + row + 1) // BLOCK_N * BLOCK_N
    row_numbers = (first_row + rows).to(tl.int64)
    heads = head * GROUP + lanes % GROUP
    columns = tl.arange(0, BLOCK_D)
    in_head = is_row[:, None] & (columns < HEAD_DIM)[None, :]
    q_rows_ptr = q_ptr + row_numbers * q_stride + heads * HEAD_DIM
    q = tl.load(q_rows_ptr[:, None] + columns[None, :], mask=in_head, other=0.0)

    # Where K and V lie is settled once for a program: a choice in the loop costs the overlap of its products.
    base_pages_ptr += sequence.to(tl.int64) * base_pages_stride
    k_pages_ptr, v_pages_ptr = base_pages_ptr, base_pages_ptr
    residual = None, None, 0, 0, 0
    if REBUILT != "":
        adapter = tl.load(adapters_ptr + sequence)
        residual_len = tl.where(adapter >= 0, tl.load(residual_lens_ptr + sequence), 0)
        run = sequence.to(tl.int64) * rebuilt_tokens * WIDTH
        is_rebuilt = residual_len > 0
        k_ptr = tl.where(is_rebuilt, rebuilt_k_ptr + run, k_ptr)
        k_pages_ptr = tl.where(is_rebuilt, rebuilt_pages_ptr, base_pages_ptr)
    if REBUILT == "kv":
        v_ptr = tl.where(is_rebuilt, rebuilt_v_ptr + run, v_ptr)
    if REBUILT == "k":
        adapter = tl.maximum(adapter, 0)
        own_pages_ptr = residual_pages_ptr + sequence.to(tl.int64) * residual_pages_stride
        rank_class = tl.load(rank_class_ptr + adapter)
        residual = v_ptr, own_pages_ptr, residual_len, rank_class, tl.load(ranks_ptr + 2 * adapter + 1)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc_r = tl.zeros([BLOCK_M, RANK], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    state = acc, total, highest
    for IS_MASKED in tl.static_range(2):
        low, high = (unmasked_end, end) if IS_MASKED else (0, unmasked_end)
        state, acc_r = _attend_tiles(
            state, acc_r, q, limits, k_ptr, k_pages_ptr, v_ptr, v_pages_ptr, residual, scale_log2, low, high, head,
            WIDTH, HEAD_DIM, PAGE_SIZE, REBUILT == "k", BLOCK_N, IS_MASKED,
        )  # fmt: skip

    acc, total, highest = state
    out = acc / total[:, None]
    if REBUILT == "k":
        b_v = load_factor(b_v_ptr, adapter, head, RANK, NUM_KV_HEADS, HEAD_DIM, RANK, BLOCK_D)
        out = dot((acc_r / total[:, None]).to(b_v.dtype), b_v, out)
    out_rows_ptr = out_ptr + row_numbers * (NUM_KV_HEADS * GROUP * HEAD_DIM) + heads * HEAD_DIM
    tl.store(out_rows_ptr[:, None] + columns[None, :], out.to(out_ptr.dtype.element_ty), mask=in_head)
