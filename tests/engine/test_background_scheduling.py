"""The engine's own requests never hold up a client's: they run behind, make way, and leave nothing that lasts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from forkkv_cluster.core.errors import ResourceExhausted
from forkkv_cluster.core.request import GenerateRequest
from tests.engine.harness import FakeEngine
from tests.engine.recurrence import expected_tokens
from tests.engine.test_scheduler import rows_of_steps

CONTEXT = [(7 * i + 3) % 97 for i in range(30)]


def background(fake: FakeEngine, length: int, adapter: str | None = "a8", **options: object) -> GenerateRequest:
    tokens = [(5 * i + 1) % 97 for i in range(length)]
    request = fake.request([], tokens, adapter, "isolated", namespace="own", **options)  # type: ignore[arg-type]
    return replace(request, is_background=True)


def client(fake: FakeEngine, length: int, adapter: str | None = None, **options: object) -> GenerateRequest:
    tokens = [(11 * i + 2) % 97 for i in range(length)]
    return fake.request([], tokens, adapter, "isolated", **options)  # type: ignore[arg-type]


def test_without_clients_it_has_the_whole_step() -> None:
    fake = FakeEngine(max_background_tokens=2)
    rows = rows_of_steps(fake)
    fake.add(background(fake, 30))
    fake.step()
    assert rows == [16]


def test_beside_a_running_client_it_has_few_tokens_of_a_step() -> None:
    fake = FakeEngine(max_background_tokens=3)
    fake.add(client(fake, 4, max_tokens=20))
    fake.step()
    fake.add(background(fake, 30))
    rows = rows_of_steps(fake)
    for _ in range(4):
        fake.step()
    assert rows == [4, 4, 4, 4]  # one decode, three of the background prompt


def test_its_decodes_do_not_cut_a_clients_prompt() -> None:
    fake = FakeEngine(max_background_tokens=2, max_prefill_tokens_beside_decodes=4, max_num_batched_tokens=16)
    fake.add(background(fake, 3, max_tokens=30))
    fake.step()
    fake.add(client(fake, 16))
    rows = rows_of_steps(fake)
    fake.step()
    assert rows == [16]


def test_a_client_that_comes_later_goes_first() -> None:
    fake = FakeEngine()
    fake.add(background(fake, 60))
    asked = fake.add(client(fake, 16, max_tokens=1))
    fake.step()
    assert asked in fake.last


@pytest.mark.parametrize("scheduler", [{"max_num_seqs": 1}, {"num_slabs": 16}])
def test_it_is_preempted_for_a_client_without_a_place_or_room_and_goes_on_afterwards(scheduler: dict[str, int]) -> None:
    fake = FakeEngine(**scheduler)  # type: ignore[arg-type]
    own = background(fake, 40, max_tokens=12)
    fake.add(own)
    for _ in range(5):
        fake.step()
    assert fake.outputs[own.request_id]  # it decodes
    asked = fake.add(client(fake, 40, max_tokens=2))
    fake.drain()
    assert list(fake.last) == [asked, own.request_id]
    assert fake.engine.status().counters.preemptions > 0
    assert fake.outputs[own.request_id] == expected_tokens([], own.tokens.tolist(), "a8", "isolated", 12, vocab_size=97)


def test_it_is_preempted_for_a_client_without_a_slot() -> None:
    fake = FakeEngine(max_device_adapters=1)
    own = fake.add(background(fake, 4, max_tokens=30))
    fake.step()
    asked = fake.add(client(fake, 4, "b8", max_tokens=2))
    fake.drain()
    assert list(fake.last) == [asked, own]


def test_it_does_not_overtake_a_client_that_waits_for_memory() -> None:
    fake = FakeEngine(num_slabs=20)
    first = fake.add(client(fake, 60, max_tokens=10))
    fake.step()
    fake.add(fake.request([], [5] * 60, "b8", "isolated", max_tokens=2))
    own = fake.add(background(fake, 4, max_tokens=1))
    while first not in fake.last:
        fake.step()
        assert own not in fake.last  # though there is room for it
    fake.drain()
    assert own in fake.last


def test_it_does_not_fill_the_queue_for_clients_and_is_refused_where_they_fill_it() -> None:
    fake = FakeEngine(max_num_waiting=1)
    fake.add(background(fake, 4))
    fake.add(client(fake, 4))
    with pytest.raises(ResourceExhausted):
        fake.engine.add_request(background(fake, 4))
    with pytest.raises(ResourceExhausted):
        fake.engine.add_request(client(fake, 4))
    fake.drain()


def test_a_pass_that_a_client_joins_goes_first_from_then_on() -> None:
    fake = FakeEngine(max_num_batched_tokens=8, max_background_tokens=1)
    fake.add(client(fake, 2, max_tokens=40))
    fake.step()
    own = replace(fake.request(CONTEXT, [1], "a8", "eager"), is_background=True)
    fake.add(own)
    fake.step()
    asked = fake.add(fake.request(CONTEXT, [2], "a8", "eager", max_tokens=1))
    steps = 0
    while asked not in fake.last:
        fake.step()
        steps += 1
    assert steps < 10  # the context alone would take 30 steps of one token
    fake.drain()
    assert fake.outputs[asked] == expected_tokens(CONTEXT, [2], "a8", "eager", 1, vocab_size=97)


def test_it_counts_as_work_and_not_as_a_request_nor_as_load() -> None:
    fake = FakeEngine()
    fake.add(background(fake, 30, max_tokens=3))
    fake.step()
    assert (fake.engine.load().num_active, fake.engine.load().queued_prefill_blocks) == (0, 0.0)
    fake.drain()
    counters = fake.engine.status().counters
    assert (counters.num_finished, counters.output_tokens, counters.prefill_tokens_run) == (0, 0, 30)


def test_what_it_leaves_in_the_cache_is_evicted_before_what_clients_left_earlier() -> None:
    fake = FakeEngine(num_slabs=26)
    kept = client(fake, 24, max_tokens=1)
    fake.run(kept)
    fake.run(replace(fake.request(CONTEXT, [3, 4], "a8", "eager", namespace="own"), is_background=True))
    before = fake.engine.status().counters.evictions
    fake.run(fake.request([], [6] * 60, "b8", "isolated", max_tokens=1))
    assert fake.engine.status().counters.evictions > before  # so much that something had to go
    again = fake.add(client(fake, 24, max_tokens=1))
    fake.drain()
    usage = fake.last[again].usage
    assert usage is not None
    assert usage.useful_hit_tokens == 23


def test_what_is_private_leaves_nothing_at_all() -> None:
    fake = FakeEngine()
    fake.run(replace(background(fake, 30), is_private=True))
    assert fake.engine.status().base_bytes_held == 0
    fake.run(replace(background(fake, 30), is_private=True))
    assert fake.engine.status().counters.prefill_tokens_run == 60


def test_a_prompt_is_scored_from_where_it_is_wanted_and_the_rest_comes_from_the_cache() -> None:
    fake = FakeEngine()
    fake.run(client(fake, 30))
    request = replace(client(fake, 30, prompt_logprobs=0, max_tokens=1), scored_from=26)
    fake.engine.add_request(request)
    parts = []
    while fake.engine.has_work:
        parts += [chunk.prompt_logprobs for chunk in fake.engine.step().chunks if chunk.prompt_logprobs is not None]
    assert [(part.first, part.token_ids.tolist()) for part in parts] == [(26, request.tokens[26:].tolist())]
    assert fake.engine.status().counters.prefill_tokens_run == 30 + 5
