"""Rows behind cached positions, over base pages and residual pages, in Triton: against a plain softmax in float64."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from forkkv_kernels.ops import residual_attention_extend as ops
from forkkv_kernels.ops.residual_attention import attend
from forkkv_kernels.ops.residual_attention_extend import residual_attention_extend, workspace_shape
from forkkv_kernels.reference import residual_attention_extend as reference
from torch import Tensor

from tests.kernels.extend_cases import Batch, Seq, Shape, make_batch
from tests.kernels.places import ALL_PLACES, TRITON_PLACES, Place

WAYS = ["k", "kv"]
"""What is rebuilt before: K alone, V by P a_v; K and V."""

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2.5e-2}
"""Of the norm of what is wanted; float16 and bfloat16 round K, V, the weights and the output."""

MIXED = (Seq(20, 9, 29, 0), Seq(0, 13), Seq(37, 1, 22, 1), Seq(5, 40, 45, 0), Seq(0, 3, 3, 1))
"""Residuals over all positions, over some, over none; a cached prefix and none."""


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes as long for a small block as for a large one."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        config = import_module("forkkv_kernels._triton.extend_configs").ExtendConfig(64, 32, 4, 1)
        monkeypatch.setattr(launch(), "extend_config", lambda *_: config)


def run(batch: Batch, place: Place, way: str, num_sequences: int | None = None) -> Tensor:
    """way "plain": no residual anywhere."""
    workspace, residuals = None, None if way == "plain" else batch.residuals
    if residuals is not None:
        shape = workspace_shape(batch.rows, residuals, num_sequences, has_v=way == "kv")
        workspace = torch.full(shape, float("nan"), dtype=batch.q.dtype, device=batch.q.device)
    with place.entered():
        return residual_attention_extend(batch.q, batch.k_plane, batch.v_plane, batch.rows, batch.scale, residuals, workspace)


def wanted(batch: Batch) -> Tensor:
    return reference.residual_attention_extend(batch.q, batch.k_plane, batch.v_plane, batch.rows, batch.scale, batch.residuals)


def assert_right(batch: Batch, place: Place, way: str) -> None:
    assert_close(run(batch, place, way), wanted(batch))


def assert_close(found: Tensor, right: Tensor) -> None:
    difference = torch.linalg.norm(found.double() - right.double()) / torch.linalg.norm(right.double())
    assert difference <= TOLERANCE[found.dtype], f"off by {difference:.2e}"


def batch_at(place: Place, seqs: Sequence[Seq], **shape: object) -> Batch:
    return make_batch(seqs, Shape(dtype=place.dtype, device=place.device.type, **shape))


def launch() -> ModuleType:
    return import_module("forkkv_kernels._triton.residual_attention_extend")  # Here: Triton may be missing.


places = pytest.mark.parametrize("place", [p for p in TRITON_PLACES if p.id != "gpu-float32"])
few_places = pytest.mark.parametrize("place", [p for p in TRITON_PLACES if p.id in ("interpreter-float32", "gpu-bfloat16")])
interpreted_alone = pytest.mark.parametrize("place", [p for p in TRITON_PLACES if p.id == "interpreter-float32"])
"""The interpreter takes a second for a case, a GPU's compiler some seconds for each shape and dtype: there a few are taken."""
ways = pytest.mark.parametrize("way", WAYS)


@interpreted_alone
@ways
@pytest.mark.parametrize("rank", [0, 1, 8, 16, 17, 64, 128])
def test_every_rank(place: Place, way: str, rank: int) -> None:
    seqs = (Seq(20, 9, 29, 0), Seq(37, 1, 22, 1))
    stack_rank = 16 if rank <= 16 else max(64, rank)
    assert_right(batch_at(place, seqs, ranks=((rank, rank), (rank, 5)), stack_rank=stack_rank), place, way)


@places
@ways
def test_ranks_and_sequences_with_and_without_residuals_side_by_side(place: Place, way: str) -> None:
    assert_right(batch_at(place, MIXED, ranks=((17, 3), (8, 0)), stack_rank=32), place, way)


@interpreted_alone
@ways
@pytest.mark.parametrize("ranks", [(0, 9), (9, 0)])
def test_an_adapter_that_leaves_k_or_v_alone(place: Place, way: str, ranks: tuple[int, int]) -> None:
    assert_right(batch_at(place, [Seq(20, 9, 25, 0)], ranks=(ranks,)), place, way)


@interpreted_alone
@ways
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_every_head_size(place: Place, way: str, head_dim: int) -> None:
    assert_right(batch_at(place, [Seq(41, 9, 45, 0), Seq(0, 5)], head_dim=head_dim, num_kv_heads=1), place, way)


@interpreted_alone
@ways
@pytest.mark.parametrize(("num_kv_heads", "group"), [(3, 1), (1, 2), (2, 3), (1, 4), (1, 5), (1, 6), (1, 7), (1, 8)])
def test_every_number_of_heads(place: Place, way: str, num_kv_heads: int, group: int) -> None:
    assert_right(batch_at(place, [Seq(20, 11, 26, 0), Seq(0, 3)], num_kv_heads=num_kv_heads, group=group), place, way)


@interpreted_alone
@ways
@pytest.mark.parametrize("page_size", [8, 16, 64, 128])
def test_every_page_size(place: Place, way: str, page_size: int) -> None:
    assert_right(batch_at(place, [Seq(150, 9, 140, 0), Seq(3, 5, 8, 0)], page_size=page_size), place, way)


@interpreted_alone
@ways
def test_a_residual_that_ends_before_at_and_behind_the_border_of_a_tile(place: Place, way: str) -> None:
    seqs = [Seq(180, 7, length, 0) for length in (1, 31, 32, 33, 64, 128, 129, 187)]
    assert_right(batch_at(place, seqs, num_kv_heads=1, page_size=64), place, way)


@pytest.mark.parametrize("place", [p for p in TRITON_PLACES if p.id == "gpu-bfloat16"])
@pytest.mark.parametrize(("head_dim", "page_size"), [(128, 16), (128, 64), (64, 64), (256, 16)])
@ways
def test_the_blocks_of_a_large_batch(place: Place, way: str, head_dim: int, page_size: int) -> None:
    seqs = [Seq(700, 900, 1600, 0), Seq(0, 300, 100, 1), Seq(33, 500)]
    batch = batch_at(place, seqs, ranks=((16, 16), (8, 3)), num_kv_heads=2, group=4, head_dim=head_dim, page_size=page_size)
    assert len(batch.q) * 8 > 12_800  # from there on blocks are large
    assert_right(batch, place, way)


@few_places
@ways
def test_qk_norm_rescales_k(place: Place, way: str) -> None:
    batch = batch_at(place, MIXED, ranks=((6, 4), (0, 8)), is_normed=True)
    assert_right(batch, place, way)


@few_places
def test_positions_beyond_64k(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    if place.name == "interpreter":  # long tiles: it takes a moment for each
        configs = import_module("forkkv_kernels._triton.extend_configs")
        monkeypatch.setattr(launch(), "extend_config", lambda *_: configs.ExtendConfig(16, 1024, 4, 1))
        monkeypatch.setattr(launch(), "rebuild_config", lambda *_: configs.RebuildConfig(1024, 1, 4, 1))
    batch = batch_at(place, [Seq(65_700, 2, 65_701, 0)], num_kv_heads=1, group=1, page_size=128)
    keys = reference._slots(batch.rows.base_pages[0], torch.arange(65_500, 65_702, device=place.device), 128)
    batch.k_plane[: 16 * (int(keys.max()) + 1)].view(-1, 16)[keys] *= 4  # the last keys decide, and so do their angles
    assert_right(batch, place, "kv")


@few_places
@ways
def test_how_rows_are_cut_into_chunks_changes_nothing(place: Place, way: str) -> None:
    batch = batch_at(place, [Seq(30, 45, 60, 0)], ranks=((7, 7),))
    whole = run(batch, place, way)
    for cuts in ((0, 1, 45), (0, 17, 34, 45)):
        parts = []
        for first, end in pairwise(cuts):
            bounds = torch.tensor([0, end - first], dtype=torch.int32, device=place.device)
            rows = replace(batch.rows, query_starts=bounds, start_pos=batch.rows.start_pos + first)
            parts.append(run(replace(batch, q=batch.q[first:end], rows=rows), place, way))
        assert_close(torch.cat(parts), whole)


@places
@ways
def test_rows_of_the_base_model_are_bit_equal_to_those_of_the_plain_kernel(place: Place, way: str) -> None:
    batch = batch_at(place, MIXED, ranks=((8, 8), (4, 4)))
    plain = run(batch, place, "plain")
    assert torch.equal(run(batch.only_base(), place, way), plain)
    assert torch.equal(run(batch, place, way)[9:22], plain[9:22])


@interpreted_alone
@ways
@pytest.mark.parametrize("num_sequences", [1, 2])
def test_room_for_some_sequences_at_a_time_changes_no_bit(place: Place, way: str, num_sequences: int) -> None:
    batch = batch_at(place, MIXED, ranks=((8, 8), (4, 4)))
    assert torch.equal(run(batch, place, way, num_sequences), run(batch, place, way))


@interpreted_alone
def test_room_of_its_own(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_at(place, MIXED, ranks=((8, 8), (4, 4)))
    for num_bytes, few_rows in ((1 << 29, 512), (1, 1)):
        monkeypatch.setattr(ops, "_WORKSPACE_BYTES", num_bytes)
        monkeypatch.setattr(ops, "_FEW_ROWS", few_rows)
        with place.entered():
            out = residual_attention_extend(batch.q, batch.k_plane, batch.v_plane, batch.rows, batch.scale, batch.residuals)
        assert_close(out, wanted(batch))


@few_places
@ways
def test_a_page_shared_and_a_copy_of_it_give_the_same_bits(place: Place, way: str) -> None:
    batch = batch_at(place, [Seq(32, 5, 37, 0), Seq(32, 5, 37, 0)], num_kv_heads=1)
    size = 16 * 16  # elements of a base page
    base_pages = batch.rows.base_pages
    for page in range(2):
        ours, theirs = (int(base_pages[n, page]) * size for n in range(2))
        for plane in (batch.k_plane, batch.v_plane):
            plane[theirs : theirs + size] = plane[ours : ours + size]
    shared = base_pages.clone()
    shared[1, :2] = base_pages[0, :2]
    assert torch.equal(run(batch, place, way), run(replace(batch, rows=replace(batch.rows, base_pages=shared)), place, way))


@interpreted_alone
def test_without_cache_and_residual_it_is_causal_attention(place: Place) -> None:
    batch = batch_at(place, [Seq(0, 50)])
    slots = reference._slots(batch.rows.base_pages[0], torch.arange(50, device=place.device), 16)
    k, v = (plane[: len(plane) // 32 * 32].view(-1, 2, 16)[slots] for plane in (batch.k_plane, batch.v_plane))
    right = attend(batch.q.float(), k.float(), v.float())
    assert_close(run(batch, place, "plain"), right)


@few_places
def test_sequences_without_rows_and_rows_of_nobody_are_left_out(place: Place) -> None:
    batch = batch_at(place, [Seq(9, 0), Seq(4, 6, 10, 0), Seq(12, 0, 12, 0), Seq(0, 2), Seq(1, 0)])
    padded = torch.cat((batch.q, torch.full_like(batch.q, float("nan"))))
    for way in (*WAYS, "plain"):
        right = wanted(batch.only_base() if way == "plain" else batch)
        assert_close(run(replace(batch, q=padded), place, way)[:8], right)


@interpreted_alone
def test_q_may_be_part_of_a_fused_product(place: Place) -> None:
    batch = batch_at(place, MIXED, ranks=((4, 4), (3, 2)))
    fused = torch.full((len(batch.q), 8, 16), float("nan"), dtype=place.dtype, device=place.device)
    fused[:, 1:5] = batch.q
    assert torch.equal(run(replace(batch, q=fused[:, 1:5]), place, "plain"), run(batch, place, "plain"))


@pytest.mark.parametrize("place", ALL_PLACES[:1])
def test_arguments_that_do_not_fit_are_named(place: Place) -> None:
    batch = batch_at(place, MIXED, ranks=((4, 4), (3, 2)))
    with pytest.raises(ValueError, match="heads of a row"):
        run(replace(batch, q=batch.q.transpose(0, 1).contiguous().transpose(0, 1)), place, "k")
    with pytest.raises(ValueError, match="num_kv_heads 3"):
        run(replace(batch, rows=replace(batch.rows, num_kv_heads=3)), place, "k")
    with pytest.raises(ValueError, match="power of two"):
        run(replace(batch, residuals=replace(batch.residuals, b_k=batch.residuals.b_k[:, :9])), place, "k")
    with pytest.raises(ValueError, match="workspace is"), place.entered():
        residual_attention_extend(
            batch.q, batch.k_plane, batch.v_plane, batch.rows, 1.0, batch.residuals, torch.zeros(2, 6, 96, 2, 16)
        )
