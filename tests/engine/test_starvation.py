"""Requests that each fit the pool all end well, however many of them share it: what they evict of each other, they wait for."""

from __future__ import annotations

import pytest

from forkkv_cluster.core.errors import InvalidArgument
from tests.engine.harness import FakeEngine
from tests.engine.recurrence import expected_tokens

CONTEXT = [(7 * i + 3) % 97 for i in range(30)]


@pytest.mark.parametrize("num_slabs", [20, 22, 24, 28])
@pytest.mark.parametrize("sharing", ["eager", "residual"])
def test_branches_that_evict_each_others_context_all_end(sharing: str, num_slabs: int) -> None:
    fake = FakeEngine(num_slabs=num_slabs, max_num_batched_tokens=64, max_num_seqs=16)
    turns = [(adapter, [i]) for i in range(3) for adapter in ("a8", "b8")]
    ids = [fake.add(fake.request(CONTEXT, own, adapter, sharing, max_tokens=24)) for adapter, own in turns]
    fake.drain()
    assert fake.errors == {}
    for request_id, (adapter, own) in zip(ids, turns, strict=True):
        assert fake.outputs[request_id] == expected_tokens(CONTEXT, own, adapter, sharing, 24, vocab_size=97)


@pytest.mark.parametrize("num_slabs", range(40, 64, 3))
def test_the_residual_of_a_first_writer_counts_when_a_request_is_admitted(num_slabs: int) -> None:
    """It has to fit beside the base KV of the context, else the request would wait for ever and keep all others waiting."""
    fake = FakeEngine(page_size=1, num_slabs=num_slabs, max_num_batched_tokens=64)
    context = [*CONTEXT, 5, 6, 7, 8]
    try:
        written = fake.add(fake.request(context, [1], "n0", "residual", max_tokens=2, writer="b8"))
    except InvalidArgument:
        assert num_slabs < 57  # 34 base pages, 17 slabs of its residual and what admission keeps open
        return
    fake.drain(max_steps=200)
    assert fake.outputs[written] == expected_tokens(
        context, [1], "n0", "residual", 2, vocab_size=97, has_residual=False, writer="b8"
    )
