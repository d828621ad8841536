"""The LoRA of many segments in one product, against segment by segment."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from forkkv_cluster.engine.adapters import AdapterSlots, AdapterWeights, LayerLora
from forkkv_cluster.engine.layers.lora import FusedLora, LoraFactors, fuse
from forkkv_cluster.engine.layers.lora_stack import MAX_SETS, LoraStack, StackCache, StackedRows
from tests.gateway.fakes import adapter_info

IN, OUT = 24, {"q_proj": 32, "k_proj": 8, "v_proj": 8}
SEGMENTS = [(1, 3), (3, 4), (4, 6), (8, 9)]
"""Rows of four adapters; rows 0, 6 and 7 are the base model's."""


def adapter(seed: int, ranks: dict[str, int], has_bias: bool = False) -> FusedLora | None:
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    factors = {
        name: LoraFactors(rand(rank, IN), rand(rank, OUT[name]), rand(OUT[name]) if has_bias else None)
        for name, rank in ranks.items()
    }
    return fuse(factors, OUT)


def adapters() -> list[FusedLora | None]:
    return [
        adapter(1, {"q_proj": 4, "k_proj": 4, "v_proj": 4}),
        adapter(2, {"q_proj": 16, "v_proj": 3}, has_bias=True),
        None,
        adapter(4, {"k_proj": 5}),
    ]


def rows() -> StackedRows:
    owners = torch.full((9,), -1)
    for number, (start, end) in enumerate(SEGMENTS):
        owners[start:end] = number
    return StackedRows(owners)


def by_segment(out: Tensor, x: Tensor, fused: list[FusedLora | None]) -> Tensor:
    for (start, end), lora in zip(SEGMENTS, fused, strict=True):
        if lora is not None:
            lora.apply_(out[start:end], x[start:end])
    return out


def stacked(out: Tensor, x: Tensor, fused: list[FusedLora | None]) -> Tensor:
    stack = LoraStack(fused)
    stack.apply_(out, x, rows().foreign(stack))
    return out


def test_mixed_ranks_modules_and_biases_give_what_each_segment_gives_alone() -> None:
    x, out = torch.randn(9, IN), torch.randn(9, sum(OUT.values()))
    torch.testing.assert_close(
        stacked(out.clone(), x, adapters()), by_segment(out.clone(), x, adapters()), rtol=1e-5, atol=1e-5
    )


def test_rows_of_the_base_model_stay_bit_for_bit() -> None:
    x, out = torch.randn(9, IN), torch.randn(9, sum(OUT.values()))
    changed = stacked(out.clone(), x, adapters())
    assert torch.equal(changed[[0, 6, 7]], out[[0, 6, 7]])


def test_an_adapter_that_overflows_harms_no_row_but_its_own() -> None:
    fused = adapters()
    loud = adapter(1, {"q_proj": 4})
    assert loud is not None
    fused[0] = FusedLora(loud.a * 3e38, loud.parts, loud.ones)
    x = torch.randn(9, IN)
    out = stacked(torch.zeros(9, sum(OUT.values())), x, fused)
    assert not torch.isfinite(out[1:3]).all()
    assert torch.isfinite(out[[0, 3, 4, 5, 6, 7, 8]]).all()


def test_a_set_is_stacked_when_it_comes_a_second_time() -> None:
    cache, asked = StackCache(), []

    def segments() -> list[list[dict[str, FusedLora | None]]]:
        asked.append(1)
        return [[{"qkv": lora, "o": None}] for lora in adapters()]

    assert cache.get(("a", "b"), segments) is None
    second = cache.get(("a", "b"), segments)
    assert second is not None
    assert [list(layer) for layer in second] == [["qkv"]]
    assert cache.get(("a", "b"), segments) is second
    assert len(asked) == 1


@pytest.mark.parametrize("is_used_again", [False, True])
def test_the_set_that_ran_longest_ago_is_forgotten(is_used_again: bool) -> None:
    cache = StackCache()
    cache.get((0,), list)
    for name in range(1, MAX_SETS):
        cache.get((name,), list)
    if is_used_again:
        cache.get((0,), lambda: [[{"qkv": None}]])
    cache.get((MAX_SETS,), list)
    assert (cache.get((0,), lambda: [[{"qkv": None}]]) is not None) == is_used_again


def test_stacks_go_when_an_adapter_leaves_its_slot() -> None:
    """A stack is a copy of its adapters: it must not keep bytes on the device that nobody counts."""
    cache = StackCache()
    for _ in range(2):
        cache.get(("a", "b"), lambda: [[{"qkv": lora}] for lora in adapters()[:2]])
    cache.get(("c", "d"), list)
    cache.drop("b")
    assert cache.get(("a", "b"), list) is None
    assert cache.get(("c", "d"), lambda: [[{"qkv": None}]]) is not None


def test_a_slot_that_is_emptied_takes_its_stacks_along() -> None:
    slots = AdapterSlots()
    weights = AdapterWeights(adapter_info("a"), (LayerLora(None, None, None, None),), 0)
    slot = slots.add(weights)
    slots.stacks.get((weights,), list)
    slots.remove(slot)
    assert slots.stacks.get((weights,), list) is None
