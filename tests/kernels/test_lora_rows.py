"""The LoRA of many short segments in one call, against the products one by one in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from forkkv_kernels.ops.lora import LORA_PART_FIELDS, LORA_SEGMENT_FIELDS, add_lora_rows_, has_lora_rows
from torch import Tensor

IN = 50
OUT = {"q": (0, 70), "k": (70, 93), "v": (93, 116)}
WIDTH = 120  # the last columns belong to no module
DTYPES = [torch.float32, torch.bfloat16]

pytestmark = pytest.mark.skipif(not has_lora_rows(torch.device("cpu"), torch.float32), reason="no C++ compiler")


@dataclass(eq=False)
class Segment:
    """Rows [start, end) under an adapter that targets modules at these ranks; has_bias: the last rank of each is one."""

    start: int
    end: int
    ranks: Mapping[str, int]
    has_bias: bool = False

    def make(self, generator: torch.Generator, dtype: torch.dtype) -> None:
        rank = sum(self.ranks.values())
        self.a = (torch.randn(rank, IN, generator=generator) / math.sqrt(IN)).to(dtype)
        self.ones = torch.zeros(rank, dtype=dtype)
        ends = np.cumsum(list(self.ranks.values()))
        if self.has_bias:
            self.a[ends - 1], self.ones[ends - 1] = 0, 1
        self.b = {
            module: (torch.randn(r, OUT[module][1] - OUT[module][0], generator=generator) / math.sqrt(max(r, 1))).to(dtype)
            for module, r in self.ranks.items()
        }
        self.columns = {module: (int(end) - r, int(end)) for (module, r), end in zip(self.ranks.items(), ends, strict=True)}
        rows = [(*self.columns[m], *OUT[m], self.b[m].data_ptr()) for m in self.ranks]
        self.parts = np.array(rows, dtype=np.int64).reshape(-1, len(LORA_PART_FIELDS))

    def table_row(self) -> list[int]:
        ones = self.ones.data_ptr() if self.has_bias else 0
        columns = (self.start, self.end, len(self.a), self.a.data_ptr(), ones, len(self.parts), self.parts.ctypes.data)
        assert len(columns) == len(LORA_SEGMENT_FIELDS)
        return list(columns)

    def add_to(self, out: Tensor, x: Tensor) -> None:
        shrunk = x[self.start : self.end].double() @ self.a.double().t() + self.ones.double()
        for module, (first, last) in self.columns.items():
            out[self.start : self.end, slice(*OUT[module])] += shrunk[:, first:last] @ self.b[module].double()


def run(segments: list[Segment], num_rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What the op makes of random rows, and what float64 does."""
    generator = torch.Generator().manual_seed(num_rows)
    x, out = (torch.randn(num_rows, n, generator=generator).to(dtype) for n in (IN, WIDTH))
    wanted = out.double()
    for segment in segments:
        segment.make(generator, dtype)
        segment.add_to(wanted, x)
    rows = np.array([segment.table_row() for segment in segments], dtype=np.int64).reshape(-1, len(LORA_SEGMENT_FIELDS))
    add_lora_rows_(out, x, rows.ctypes.data, len(rows))
    return out, wanted


def check(segments: list[Segment], num_rows: int, dtype: torch.dtype = torch.float32) -> None:
    """The shrink stays in fp32 and the sum is rounded once: half a unit in the last of bf16's 8 bits."""
    found, wanted = run(segments, num_rows, dtype)
    tolerance = 2e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(found.double(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 2, 7, 8, 16, 17, 64])
def test_any_rank(rank: int, dtype: torch.dtype) -> None:
    check([Segment(0, 3, dict.fromkeys(OUT, rank))], 3, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_of_several_ranks_and_targets_over_one_and_more_rows(dtype: torch.dtype) -> None:
    segments = [
        Segment(0, 1, {"q": 5}),
        Segment(1, 4, {"k": 8, "v": 16}),
        Segment(4, 5, {"q": 1, "k": 64, "v": 3}),
        Segment(5, 16, {"v": 2}),
    ]
    check(segments, 16, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_is_added_once(dtype: torch.dtype) -> None:
    check([Segment(0, 2, {"q": 5, "v": 1}, has_bias=True), Segment(2, 3, {"k": 4})], 3, dtype)


def test_rows_and_columns_of_no_segment_keep_their_bits() -> None:
    found, wanted = run([Segment(2, 4, {"q": 3}), Segment(7, 8, {"k": 3})], 10, torch.bfloat16)
    assert torch.equal(found[[0, 1, 4, 5, 6, 8, 9]].double(), wanted[[0, 1, 4, 5, 6, 8, 9]])
    assert torch.equal(found[2:4, 70:].double(), wanted[2:4, 70:])
    assert torch.equal(found[7, :70].double(), wanted[7, :70])


def test_an_adapter_without_these_modules_and_a_segment_without_rows_change_nothing() -> None:
    found, wanted = run([Segment(0, 1, {}), Segment(1, 1, {"q": 3})], 2, torch.float32)
    assert torch.equal(found.double(), wanted)


def test_no_segments_are_no_work() -> None:
    found, wanted = run([], 2, torch.float32)
    assert torch.equal(found.double(), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_is_not_a_number_spoils_no_other(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    segments = [Segment(0, 2, {"q": 3}), Segment(2, 3, {"q": 3})]
    for segment in segments:
        segment.make(generator, dtype)
    segments[1].b["q"][0] = math.inf
    x, out = torch.randn(3, IN, generator=generator).to(dtype), torch.zeros(3, WIDTH, dtype=dtype)
    x[1, 4] = math.nan
    wanted = out.double()
    segments[0].add_to(wanted, x)
    rows = np.array([segment.table_row() for segment in segments], dtype=np.int64)
    add_lora_rows_(out, x, rows.ctypes.data, len(rows))
    torch.testing.assert_close(out[0].double(), wanted[0], atol=1e-2, rtol=1e-2)
    assert out[1, :70].isnan().all()
    assert out[2, :70].isinf().all()
