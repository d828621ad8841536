"""Tiles of a run of pages that the members of a group share, as device functions: base pages once, residual rows of all
members side by side.

Addresses are made page by page: what a thread adds to a page's address is known before the loop over tiles. A run is whole
pages, so that what lies beside it within a tile is clamped to a page of it that was written. Columns of scores run over
(head / 2, member, head % 2): of a warpgroup's product a thread has two neighbours of every eight, here two heads of a member.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def owners_of(subgroups_ptr, first, end, member):
    """Of each of ``member`` (places in a group, any shape): its adapter, -1 for none, and the row of its residual's pages."""
    adapter = member * 0 - 1
    owner = member * 0
    for subgroup in tl.range(first, end, num_stages=1):
        entry = subgroups_ptr + subgroup * 4
        is_own = (member >= tl.load(entry + 1)) & (member < tl.load(entry + 2))
        adapter = tl.where(is_own, tl.load(entry), adapter)
        owner = tl.where(is_own, tl.load(entry + 3), owner)
    return adapter, owner


@triton.jit
def tile_slots(pages_ptr, tile, first_page, last_page, offsets, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """int64 slots of a tile's positions [BLOCK_N], by a row of a page table; beyond the run's pages those of its ends again."""
    first = tile // PAGE_SIZE
    page = tl.load(pages_ptr + tl.minimum(tl.maximum(first, first_page), last_page)).to(tl.int64)
    slots = page * PAGE_SIZE + tile % PAGE_SIZE + offsets
    for i in tl.static_range(1, BLOCK_N // PAGE_SIZE):
        page = tl.load(pages_ptr + tl.minimum(tl.maximum(first + i, first_page), last_page)).to(tl.int64)
        slots = tl.where(offsets >= i * PAGE_SIZE, (page - i) * PAGE_SIZE + offsets, slots)
    return slots


@triton.jit
def member_starts(
    own_pages, has_adapter, width, tile, first_page, last_page, offsets, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    MEMBERS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Where in a plane a tile's residual rows begin, by tables of all members, own_pages [MEMBERS]: int64 [BLOCK_N, MEMBERS,
    RANK], the same RANK times."""
    wide = width[None, :, None]
    within = tl.broadcast_to(offsets[:, None, None] * wide, (BLOCK_N, MEMBERS, RANK))
    first = tile // PAGE_SIZE
    place = tl.minimum(tl.maximum(first, first_page), last_page)
    page = tl.load(own_pages + place, mask=has_adapter, other=0).to(tl.int64)
    start = (page * PAGE_SIZE + tile % PAGE_SIZE) * width
    starts = start[None, :, None] + within
    for i in tl.static_range(1, BLOCK_N // PAGE_SIZE):
        page = tl.load(own_pages + tl.minimum(tl.maximum(first + i, first_page), last_page), mask=has_adapter, other=0).to(
            tl.int64
        )
        start = (page - i) * PAGE_SIZE * width
        starts = tl.where((offsets >= i * PAGE_SIZE)[:, None, None], start[None, :, None] + within, starts)
    return starts


@triton.jit
def stacked_rows(plane_ptr, starts, width, BLOCK_N: tl.constexpr, MEMBERS: tl.constexpr, RANK: tl.constexpr):
    """A tile's residual rows of all members side by side: [BLOCK_N, MEMBERS * RANK], zero for members without one (width 0),
    garbage from a rank on."""
    # Reshaping loses what the compiler knew, that rows are aligned and their columns neighbours; said behind a call it is lost.
    starts = tl.max_constancy(tl.multiple_of(tl.reshape(starts, (BLOCK_N, MEMBERS * RANK)), (1, 8)), (1, RANK))
    columns = tl.arange(0, MEMBERS * RANK) % RANK
    widths = tl.reshape(tl.broadcast_to(tl.expand_dims(width, 1), (MEMBERS, RANK)), (MEMBERS * RANK,))
    is_there = tl.max_constancy(columns < widths, 8)
    return tl.load(plane_ptr + starts + columns[None, :], mask=is_there[None, :], other=0.0)


@triton.jit
def by_members(values, BLOCK_N: tl.constexpr, MEMBERS: tl.constexpr, RANK: tl.constexpr):
    """[BLOCK_N, MEMBERS] -> [BLOCK_N, MEMBERS * RANK], each RANK times."""
    wide = tl.broadcast_to(tl.expand_dims(values, 2), (BLOCK_N, MEMBERS, RANK))
    return tl.reshape(wide, (BLOCK_N, MEMBERS * RANK))


@triton.jit
def by_columns(values, BLOCK_N: tl.constexpr, MEMBERS: tl.constexpr, BLOCK_G: tl.constexpr):
    """[BLOCK_N, MEMBERS] -> [BLOCK_N, MEMBERS * BLOCK_G] in the order of scores."""
    if BLOCK_G == 1:
        return values
    wide = tl.broadcast_to(values[:, None, :, None], (BLOCK_N, BLOCK_G // 2, MEMBERS, 2))
    return tl.reshape(wide, (BLOCK_N, MEMBERS * BLOCK_G))


@triton.jit
def key_scales(
    plane_ptr, own_pages, width, column, is_scaled, tile, first_page, last_page, offsets, other, head, PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    """``norm`` or ``change`` of members under QK-norm, [BLOCK_N, MEMBERS] fp32; ``other`` where not ``is_scaled`` [MEMBERS]."""
    starts = member_starts(own_pages, is_scaled, width, tile, first_page, last_page, offsets, PAGE_SIZE, BLOCK_N, MEMBERS, 1)
    return tl.load(
        plane_ptr + tl.reshape(starts, (BLOCK_N, MEMBERS)) + (column + head)[None, :], mask=is_scaled[None, :], other=other
    ).to(tl.float32)
