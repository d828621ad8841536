"""KV that went to the host and came back answers as KV that stayed: fp32, device and host memory full of NaN where unused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from forkkv_cluster.cache.geometry import KVGeometry
from forkkv_cluster.cache.swaps import PageSwap, SwapPlan, group_by_class
from forkkv_cluster.core.errors import FailedPrecondition, InvalidArgument
from forkkv_cluster.engine.batch import Batch
from forkkv_cluster.engine.batch_builder import build_batch
from forkkv_cluster.engine.kv_buffers import KVBuffers
from forkkv_cluster.engine.page_copies import copy_in, copy_out
from forkkv_cluster.engine.torch_runner import TorchRunner
from forkkv_cluster.testing.tiny_models import TinyKit
from tests.engine.test_engine_exactness import CONTEXT, Judge, TinyEngine, own_tokens

SHARINGS = ["isolated", "eager", "residual", "base"]
OTHER_CONTEXT = [t + 1 for t in CONTEXT]


class PoisoningRunner(TorchRunner):
    """Pages that were copied to the host are NaN on the device before anything else is written there."""

    def swap(self, batch: Batch) -> None:
        super().swap(replace(batch, swap_ins=()))
        for out in batch.swap_outs:
            self.kv.pages(out.page_class)[:, :, torch.from_numpy(out.device_pages.astype("int64"))] = float("nan")
        super().swap(replace(batch, swap_outs=()))


@pytest.fixture(scope="module")
def judge(tiny_kit: TinyKit) -> Judge:
    return Judge(tiny_kit)


def swapping_engine(kit: TinyKit, page_size: int, *, num_slabs: int = 400, **scheduler: int) -> TinyEngine:
    engine = TinyEngine(kit, page_size, num_slabs=num_slabs, num_host_slabs=400, runner_type=PoisoningRunner, **scheduler)
    engine.runner.host_kv.arena.fill_(float("nan"))  # type: ignore[attr-defined]
    return engine


def evict_everything(engine: TinyEngine) -> None:
    while engine.engine._kv._memory.tree.evict_oldest():
        pass


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("page_size", [4, 16])
def test_evicted_kv_comes_back_and_answers_as_the_oracle(tiny_kit: TinyKit, judge: Judge, sharing: str, page_size: int) -> None:
    engine, names, own = swapping_engine(tiny_kit, page_size), ("planner", "critic"), own_tokens(20)
    for turn in range(3):
        ran_before = engine.engine.status().counters.prefill_tokens_run
        requests = [engine.add(engine.request(CONTEXT, own, name, sharing, max_tokens=8, declared=names)) for name in names]
        engine.drain()
        assert engine.errors == {}
        for request, name in zip(requests, names, strict=True):
            judge.check(CONTEXT, own, engine.outputs[request], name, sharing)
        if turn:  # all but what is left of a page was swapped in
            run = engine.engine.status().counters.prefill_tokens_run - ran_before
            assert run <= len(names) * (page_size + len(own) % page_size)
        evict_everything(engine)
    assert engine.engine._kv.host.num_swapped_in > 0


@pytest.mark.parametrize(("sharing", "num_slabs"), [("isolated", 62), ("eager", 60), ("residual", 50), ("base", 46)])
def test_a_preempted_turn_resumes_from_the_host_as_it_would_have_gone_on(
    tiny_kit: TinyKit, judge: Judge, sharing: str, num_slabs: int
) -> None:
    engine = swapping_engine(tiny_kit, 4, num_slabs=num_slabs)
    turns = [(name, own_tokens(), context) for context in (CONTEXT, OTHER_CONTEXT) for name in ("planner", "critic", None)]
    requests = [
        engine.add(engine.request(context, own, name, sharing, max_tokens=40, declared=["planner", "critic"]))
        for name, own, context in turns
    ]
    engine.drain()
    assert engine.errors == {}
    for request, (name, own, context) in zip(requests, turns, strict=True):
        judge.check(context, own, engine.outputs[request], name, sharing)
    status = engine.engine.status()
    assert status.counters.preemptions > 0
    assert engine.engine._kv.host.num_swapped_in > 0


def test_what_is_cheaper_to_run_again_is_not_swapped_in(tiny_kit: TinyKit, judge: Judge) -> None:
    engine, own = swapping_engine(tiny_kit, 16), own_tokens()
    estimate = engine.engine._kv.swap_estimate
    assert estimate is not None
    for _ in range(2):
        request = engine.add(engine.request(CONTEXT, own, "critic", "eager", max_tokens=8, declared=["critic"]))
        engine.drain()
        judge.check(CONTEXT, own, engine.outputs[request], "critic", "eager")
        evict_everything(engine)
        estimate.copied_bytes.note(1, 1e6)
        estimate.prefilled_tokens.note(1e6, 1)
    assert engine.engine._kv.host.num_swapped_in == 0


# --- copies ------------------------------------------------------------------------------------------------------------

GEOMETRY = KVGeometry(num_layers=2, num_kv_heads=3, head_dim=8, page_size=4, dtype_bytes=4, rank_classes=(8, 16))


@pytest.mark.parametrize("page_class", [None, 8, 16])
@pytest.mark.parametrize("pages", [[(0, 3), (1, 4)], [(4, 0), (1, 5), (2, 1)], [(3, 3)]])
def test_pages_come_back_bit_by_bit_and_nothing_else_changes(page_class: int | None, pages: list[tuple[int, int]]) -> None:
    device, host = (KVBuffers(GEOMETRY, 4, torch.float32, torch.device("cpu")) for _ in range(2))
    device.arena.normal_()
    host.arena.fill_(float("nan"))
    before = device.arena.clone()
    (swap,) = group_by_class((page_class, device_page, host_page) for device_page, host_page in pages)
    copy_out(device, host, swap)
    for device_page, host_page in pages:
        assert torch.equal(host.pages(page_class)[:, :, host_page], device.pages(page_class)[:, :, device_page])
    num_filled = int((~host.arena.isnan()).sum())
    assert num_filled == len(pages) * GEOMETRY.page_bytes(page_class) // GEOMETRY.dtype_bytes
    for device_page, _ in pages:
        device.pages(page_class)[:, :, device_page] = float("nan")
    copy_in(device, host, PageSwap(swap.page_class, swap.device_pages, swap.host_pages))
    assert torch.equal(device.arena, before)


def test_a_swap_without_a_host_tier_is_refused(tiny_kit: TinyKit) -> None:
    runner = TinyEngine(tiny_kit, 16).runner
    with pytest.raises(FailedPrecondition, match="host_bytes"):
        _ = runner.host_kv  # type: ignore[attr-defined]


def test_a_host_tier_smaller_than_a_slab_is_refused_by_name(tiny_kit: TinyKit) -> None:
    runner = TinyEngine(tiny_kit, 16).runner
    with pytest.raises(InvalidArgument) as caught:
        runner.allocate(2**24, 100)
    assert caught.value.field == "cache.host_bytes"


def test_a_page_is_read_out_before_another_is_read_into_it(tiny_kit: TinyKit) -> None:
    runner = TinyEngine(tiny_kit, 16, num_host_slabs=4).runner
    device, host = runner.kv.pages(None), runner.host_kv.pages(None)  # type: ignore[attr-defined]
    device[:, :, 0], host[:, :, 1] = 1.0, 2.0
    plan = SwapPlan(outs=group_by_class([(None, 0, 0)]), ins=group_by_class([(None, 0, 1)]))
    runner.swap(build_batch([], 16, plan))
    assert (host[:, :, 0] == 1.0).all()
    assert (device[:, :, 0] == 2.0).all()
