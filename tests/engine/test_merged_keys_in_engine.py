"""Whole K in borrowed slabs, through the engine and against the oracle: forks at several depths, cancelled chunks."""

from __future__ import annotations

import pytest

from forkkv_cluster.testing.tiny_models import TinyKit
from tests.engine.test_engine_exactness import Judge, TinyEngine, own_tokens

DOCUMENT = [(7 * i * i + 3) % 2000 + 10 for i in range(256)]


@pytest.fixture(scope="module")
def judge(tiny_kit: TinyKit) -> Judge:
    return Judge(tiny_kit)


def run(engine: TinyEngine, judge: Judge, forks: list[tuple[int, str]]) -> None:
    """Each (context length, adapter) forks and answers, all at once."""
    asked = []
    for length, adapter in forks:
        own = own_tokens()
        request = engine.request(DOCUMENT[:length], own, adapter, "eager", max_tokens=12, declared=["planner", "critic"])
        asked.append((length, adapter, own, engine.add(request)))
    engine.drain()
    assert engine.errors == {}
    for length, adapter, own, request_id in asked:
        judge.check(DOCUMENT[:length], own, engine.outputs[request_id], adapter, "eager")


@pytest.mark.parametrize("forks", [[(128, "planner"), (256, "critic")], [(256, "planner"), (128, "critic")]], ids=str)
def test_adapters_whose_whole_k_differ_in_length_lie_side_by_side(
    tiny_kit: TinyKit, judge: Judge, forks: list[tuple[int, str]]
) -> None:
    engine = TinyEngine(tiny_kit, 16, num_slabs=400, max_num_batched_tokens=512)
    run(engine, judge, forks)
    assert engine.engine.status().merged_bytes_held > 0


@pytest.mark.parametrize("lengths", [(64, 128), (128, 64)], ids=str)
def test_one_adapter_that_forks_at_two_depths_reads_what_was_written_for_each(
    tiny_kit: TinyKit, judge: Judge, lengths: tuple[int, int]
) -> None:
    engine = TinyEngine(tiny_kit, 16, num_slabs=400, max_num_batched_tokens=512)
    for _ in range(2):  # the second time from what the first has left
        run(engine, judge, [(length, "critic") for length in lengths])
    for length in lengths:
        run(engine, judge, [(length, "critic")])


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_whole_k_that_a_step_without_logits_began_is_not_taken_for_written(
    tiny_kit: TinyKit, judge: Judge, is_cancelled: bool
) -> None:
    """The last layer of such a step stops before its attention; then another request's step has logits."""
    engine = TinyEngine(tiny_kit, 16, num_slabs=400, max_num_batched_tokens=64)
    engine.add(engine.context_request(DOCUMENT[:128], ["critic"]))
    engine.drain()
    long = engine.request(DOCUMENT[:128], own_tokens(200), "critic", "eager", max_tokens=12, declared=["critic"])
    request_id = engine.add(long)
    engine.engine.step()
    if is_cancelled:
        engine.engine.abort(request_id)
    engine.add(engine.request([], own_tokens(), None, "isolated", max_tokens=3))
    engine.drain()
    engine.errors.clear()
    run(engine, judge, [(128, "critic")])
