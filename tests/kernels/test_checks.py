"""Checks of an op's arguments name the argument, what it is and what it has to be."""

from __future__ import annotations

import pytest
import torch
from forkkv_kernels.checks import check_device, check_dtype, check_rows, check_shape


@pytest.mark.parametrize("shape", [(2, None), (None, None), (2, 3)])
def test_a_shape_that_fits(shape: tuple[int | None, ...]) -> None:
    check_shape("x", torch.zeros(2, 3), *shape)


@pytest.mark.parametrize(
    ("shape", "wanted"), [((2, 4), "[2, 4]"), ((None, 4), "[any, 4]"), ((2,), "[2]"), ((2, 3, 1), "[2, 3, 1]")]
)
def test_a_shape_that_does_not(shape: tuple[int | None, ...], wanted: str) -> None:
    with pytest.raises(ValueError, match="x is") as caught:
        check_shape("x", torch.zeros(2, 3), *shape)
    assert str(caught.value) == f"x is [2, 3], not {wanted}"


def test_dtypes() -> None:
    check_dtype("x", torch.zeros(1), torch.float16, torch.float32)
    with pytest.raises(ValueError, match=r"x is torch\.float32, not torch\.int32 or torch\.int64"):
        check_dtype("x", torch.zeros(1), torch.int32, torch.int64)


def test_devices() -> None:
    check_device(torch.device("cpu"), x=torch.zeros(1), y=None)
    with pytest.raises(ValueError, match="y is on meta, not on cpu"):
        check_device(torch.device("cpu"), x=torch.zeros(1), y=torch.zeros(1, device="meta"))


def test_rows() -> None:
    check_rows("x", torch.zeros(4, 6)[1:3, 2:4])
    check_rows("x", torch.zeros(4, 6)[:, :1].t().t())
    with pytest.raises(ValueError, match=r"x has strides \(1, 6\)"):
        check_rows("x", torch.zeros(4, 6).t())
