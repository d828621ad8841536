"""The linear layer over packed weights, against float64."""

from __future__ import annotations

import pytest
import torch
from forkkv_kernels.ops.linear import PackedWeight, pack_weight, packed_linear
from torch import Tensor


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def packed(weight: Tensor) -> PackedWeight:
    result = pack_weight(weight)
    assert result is not None
    return result


needs_op = pytest.mark.skipif(pack_weight(random(2, 2)) is None, reason="no bfloat16 dot product, no compiler, or AMX")


def check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Summed in fp32 and rounded once, to 8 bits."""
    wanted = x.double() @ weight.double().t() + (bias.double() if bias is not None else 0)
    found = packed_linear(x, packed(weight), bias)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), wanted, rtol=2**-8, atol=1e-4)


@needs_op
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 4, 5, 6, 7, 95, 96, 97, 200])
def test_any_number_of_rows(num_rows: int, has_bias: bool) -> None:
    check(random(num_rows, 50), random(70, 50, seed=1), random(70, seed=2) if has_bias else None)


@needs_op
@pytest.mark.parametrize("out_size", [1, 15, 16, 17, 63, 64, 65, 128, 200])
def test_any_number_of_outputs(out_size: int) -> None:
    check(random(7, 34), random(out_size, 34, seed=1), random(out_size, seed=2))


@needs_op
@pytest.mark.parametrize("in_size", [2, 30, 32, 34, 64, 770])
def test_any_even_number_of_inputs(in_size: int) -> None:
    check(random(7, in_size), random(70, in_size, seed=1), None)


@needs_op
@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_row_has_the_same_bits_in_any_batch(num_threads: int) -> None:
    x, weight, bias = random(200, 130), packed(random(150, 130, seed=1)), random(150, seed=2)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        whole = packed_linear(x, weight, bias)
        for start, end in ((0, 1), (3, 5), (5, 8), (90, 99), (199, 200), (7, 200)):
            assert torch.equal(packed_linear(x[start:end], weight, bias), whole[start:end])
    finally:
        torch.set_num_threads(before)


@needs_op
def test_a_row_that_is_not_a_number_spoils_no_other() -> None:
    x, weight = random(9, 34), packed(random(70, 34, seed=1))
    sound = packed_linear(x, weight, None)
    x[4, 7] = float("nan")
    found = packed_linear(x, weight, None)
    assert found[4].isnan().all()
    assert torch.equal(torch.cat((found[:4], found[5:])), torch.cat((sound[:4], sound[5:])))


@needs_op
def test_weights_rows_and_bias_are_read_through_their_strides() -> None:
    x, weight, bias = random(34, 9).t(), random(34, 70, seed=1).t(), random(70, 2, seed=2)[:, 1]
    for _ in range(20):  # a copy that dies before it is read may still hold its bytes once
        check(x, weight, bias)


@needs_op
@pytest.mark.parametrize(("x", "found"), [(random(3, 32), r"\[3, 32\] torch.bfloat16"), (torch.zeros(3, 34), "torch.float32")])
def test_rows_that_do_not_fit_the_weight_are_refused(x: Tensor, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        packed_linear(x, packed(random(70, 34)), None)


def test_weights_that_it_does_not_serve_are_left_alone() -> None:
    assert pack_weight(random(8, 7)) is None  # an odd number of inputs
    assert pack_weight(random(8, 8).float()) is None
    assert pack_weight(random(8, 8).half()) is None
