"""Attention of decode rows over tiles of paged keys, against a plain softmax in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from forkkv_kernels.ops.paged_decode import is_available
from torch import Tensor

from tests.kernels.decode_cases import Adapter, Case, Part, Tile, packed

DTYPES = [torch.float32, torch.bfloat16]
RANKS = [Adapter(0, 17), Adapter(1, 64), Adapter(16, 0), Adapter(64, 1), Adapter(17, 8), Adapter(8, 16)]

pytestmark = pytest.mark.skipif(not is_available(torch.device("cpu"), torch.float32), reason="no C++ compiler")


def check(case: Case) -> None:
    assert_close(case.run(), case.expected(), case.dtype)


def assert_close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """In bf16 weights and a K built from a residual are rounded to 8 bits, as in the references: some parts in a thousand of
    what values of size 1 and more average to."""
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.double(), wanted, atol=tolerance, rtol=tolerance)


def agents(lengths: tuple[int, int] = (257, 65), adapters: int = 3, is_listed: bool = False) -> list[Tile]:
    """A shared tile with residuals on all rows but the last two, then what each row has of its own, residuals on the odd."""
    shared, own = lengths
    num_rows = adapters + 3  # the first adapter has two rows
    parts = [Part(0, 2, 0), *(Part(i + 1, i + 2, i) for i in range(1, adapters))]
    tiles = [Tile(0, shared, range(num_rows), parts, is_listed=is_listed)]
    for row in range(num_rows):
        part = [Part(0, 1, max(row - 1, 0))] if row % 2 and row <= adapters else []
        tiles.append(Tile(shared, own + row, [row], part, is_listed=is_listed == (row % 3 > 0)))
    return tiles


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 16, 24, 64, 80, 96, 128, 256])
def test_any_head_dim(head_dim: int, dtype: torch.dtype) -> None:
    check(Case(agents(), RANKS[3:], 6, head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", range(1, 9))
def test_any_number_of_query_heads_to_a_kv_head(group: int, dtype: torch.dtype) -> None:
    check(Case(agents((70, 3)), RANKS[3:], 6, group=group, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 255, 256, 257, 600])
def test_any_length_of_a_tile(length: int, dtype: torch.dtype) -> None:
    check(Case(agents((length, length)), RANKS[3:], 6, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_listed", [False, True], ids=["consecutive", "listed"])
def test_ranks_of_all_kinds_in_one_call(is_listed: bool, dtype: torch.dtype) -> None:
    check(Case(agents(adapters=len(RANKS), is_listed=is_listed), RANKS, len(RANKS) + 3, head_dim=40, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_k_at_hand_for_some_adapters_and_not_for_others(dtype: torch.dtype) -> None:
    adapters = [replace(a, is_merged=i % 2 == 0 and a.k_rank > 0) for i, a in enumerate(RANKS[1:])]
    check(Case(agents(adapters=5), adapters, 8, head_dim=24, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [0, 1, 45, 63, 64, 65, 255, 257])
@pytest.mark.parametrize("is_merged", [False, True])
def test_a_tile_may_begin_at_any_position(is_merged: bool, first: int, dtype: torch.dtype) -> None:
    adapters = [Adapter(8, 8, is_merged=is_merged), Adapter(16, 5)]
    check(Case([Tile(first, 330, range(3), [Part(0, 1, 0), Part(1, 2, 1)])], adapters, 3, head_dim=24, dtype=dtype))


def test_base_k_is_not_read_where_every_row_has_its_whole_k() -> None:
    tile = Tile(0, 300, range(3), [Part(0, 1, 0), Part(1, 3, 1)])
    case = Case([tile], [Adapter(is_merged=True), Adapter(is_merged=True)], 3)
    wanted = case.expected()
    case.base_k.fill_(math.nan)
    assert_close(case.run(), wanted, case.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [24, 64])
def test_qk_norm_rescales_base_k_and_residual(head_dim: int, dtype: torch.dtype) -> None:
    adapters = [Adapter(8, 8, is_scaled=True), Adapter(17, 0, is_scaled=True), Adapter(16, 4)]
    check(Case(agents(), adapters, 6, head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [0, 100])
def test_rows_of_one_sequence_see_no_later_key(first: int, dtype: torch.dtype) -> None:
    num_keys, num_rows = 270, 7
    limits = range(num_keys - num_rows + 1, num_keys + 1)
    check(Case([Tile(first, num_keys, range(num_rows), [Part(0, num_rows, 0)], limits)], RANKS[5:], num_rows, dtype=dtype))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first", "last"])
def test_a_row_may_see_nothing_of_a_tile_or_of_a_unit_of_one(order: tuple[int, int]) -> None:
    tiles = [Tile(0, 600, range(4), [Part(1, 3, 0)], [0, 0, 1, 256]), Tile(600, 5, range(4), [Part(1, 3, 0)])]
    check(Case([tiles[i] for i in order], RANKS[5:], 4))


def test_hidden_keys_that_are_not_numbers_do_not_show_in_the_scores() -> None:
    case = Case([Tile(0, 70, [0], limits=[66])])
    wanted = case.expected()
    case.base_k[case.slots[0][66:]] = math.nan
    assert_close(case.run(), wanted, case.dtype)


def test_an_empty_tile_adds_nothing() -> None:
    check(Case([Tile(0, 0, [0, 1], [Part(0, 1, 0)]), Tile(0, 9, [0, 1])], RANKS[5:], 2))


def test_a_tile_without_rows_adds_nothing() -> None:
    check(Case([Tile(0, 9, []), Tile(0, 9, [0, 1])], num_rows=2))


def test_no_rows_and_no_tiles_are_no_work() -> None:
    case = Case([Tile(0, 9, [])], num_rows=0)
    assert case.run([]).shape == (0, 4, 16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["k_b", "v_b", "k_a", "v_a", "merged_k"])
def test_factors_that_are_not_finite_spoil_the_rows_of_their_adapter_alone(name: str, value: float, dtype: torch.dtype) -> None:
    adapters = [Adapter(16, 16), Adapter(17, 9, is_merged=name == "merged_k"), Adapter(3, 64)]
    case = Case(agents((70, 9)), adapters, 6, head_dim=24, dtype=dtype)
    wanted = case.expected()
    own = case.parts[0, 1]
    if name.endswith("_a"):
        getattr(case, f"{name[0]}_pool")[own.slots[33], 5] = value
    else:
        getattr(own, name)[1, 1, 7] = value
    own.packed_k = packed(own.merged_k, 0)
    found = case.run()
    sound = torch.tensor([0, 1, 3, 4, 5])
    assert found[2].isnan().any() or not math.isnan(value)  # a key whose score is -inf weighs nothing
    assert_close(found[sound], wanted[sound], dtype)


def test_a_query_that_is_not_a_number_spoils_its_own_head_alone() -> None:
    case = Case(agents((70, 9)), RANKS[3:], 6)
    wanted = case.expected()
    case.q[case.rows[2], 1] = math.nan
    found = case.run()
    assert found[2, 1].isnan().all()
    found[2, 1] = wanted[2, 1] = 0
    assert_close(found, wanted, case.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_far_apart_are_merged_without_overflow(dtype: torch.dtype) -> None:
    case = Case([Tile(0, 300, range(3)), Tile(300, 300, range(3))], num_rows=3, dtype=dtype)
    case.q *= 100
    check(case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_whatever_rows_share_its_tile(dtype: torch.dtype) -> None:
    adapters = [Adapter(16, 17), Adapter(8, 8, is_merged=True), Adapter(3, 0, is_scaled=True)]
    together = Case(agents((300, 9)), adapters, 6, group=3, head_dim=24, dtype=dtype)
    expected = together.run()
    for row in range(6):
        alone = Case(together.tiles, adapters, 6, group=3, head_dim=24, dtype=dtype)
        shared = together.tiles[0]
        index, part = next(((i, p) for i, p in enumerate(shared.parts) if p.start <= row < p.end), (None, None))
        own = [Part(0, 1, part.adapter)] if part is not None else []
        alone.tiles = [Tile(0, shared.num_keys, [row], own), *together.tiles[1:]]
        if index is not None:
            alone.parts[0, 0] = alone.parts[0, index]
        assert torch.equal(alone.run([0, 1 + row])[row], expected[row])


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    case = Case(agents((600, 70)), RANKS[3:], 6, dtype=dtype)
    results = []
    for count in (1, 2, 5):
        with threads(count):
            results.append(case.run())
    assert all(torch.equal(result, results[0]) for result in results)


def test_two_engines_of_one_process_do_not_mix_their_rows() -> None:
    cases = [Case(agents((600 + 40 * i, 9)), RANKS[3:], 6, head_dim=16 + 8 * i, seed=i) for i in range(2)]
    wanted = [case.run() for case in cases]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda case: [case.run() for _ in range(40)], cases))
    for results, expected in zip(found, wanted, strict=True):
        assert all(torch.equal(result, expected) for result in results)
