"""Who runs when: slots for adapters, overtaking and its bound, tenants, chunks beside decodes. Over a fake model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from forkkv_cluster.core.errors import FailedPrecondition, ResourceExhausted
from forkkv_cluster.core.request import AdapterRef, GenerateRequest, Priority
from forkkv_cluster.engine.batch import Batch
from tests.engine.harness import FakeEngine
from tests.engine.recurrence import expected_tokens

CONTEXT = [(7 * i + 3) % 97 for i in range(30)]


def prompt(fake: FakeEngine, adapter: str | None, number: int, **options: object) -> GenerateRequest:
    """A request that shares nothing with those of other numbers."""
    return fake.request([], [number % 97, number // 97, 5], adapter, "isolated", **options)  # type: ignore[arg-type]


def load_more(fake: FakeEngine, names: list[str]) -> None:
    """Adapters of rank 8 besides the four."""
    for name in names:
        info = fake.engine.load_adapter(name, f"fake:{name}:8")
        fake.adapters[name] = AdapterRef(name, info.digest)


def rows_of_steps(fake: FakeEngine) -> list[int]:
    """Filled with the rows of every step from now on."""
    rows: list[int] = []
    run = fake.runner.run

    def counting(batch: Batch, sampling: object) -> object:
        rows.append(batch.num_rows)
        return run(batch, sampling)  # type: ignore[arg-type]

    fake.runner.run = counting  # type: ignore[assignment]
    return rows


# --- slots ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("sharing", ["isolated", "residual", "eager", "base"])
def test_more_adapters_than_slots_change_no_token(slots: int, sharing: str) -> None:
    fake = FakeEngine(max_device_adapters=slots, host_bytes=0, load_delay=2, num_slabs=200)
    branches = [(adapter, [i]) for i in range(3) for adapter in ("a8", "b8", "c16")]
    ids = [fake.add(fake.request(CONTEXT, own, adapter, sharing, declared=["a8", "b8", "c16"])) for adapter, own in branches]
    fake.drain()
    for request_id, (adapter, own) in zip(ids, branches, strict=True):
        assert fake.outputs[request_id] == expected_tokens(CONTEXT, own, adapter, sharing, 6, vocab_size=97)
    assert fake.runner.num_adapters <= slots


def test_others_run_while_weights_are_on_their_way() -> None:
    fake = FakeEngine(max_device_adapters=2, host_bytes=0, load_delay=4)
    loading, ready = fake.add(prompt(fake, "c16", 1)), fake.add(prompt(fake, "a8", 2, max_tokens=3))
    for _ in range(4):
        fake.step()
    assert ready in fake.last
    assert fake.outputs[loading] == []
    fake.drain()
    assert loading in fake.last


def test_a_cancelled_request_gives_back_the_slot_that_it_waited_in() -> None:
    fake = FakeEngine(max_device_adapters=1, host_bytes=0, load_delay=5)
    request_id = fake.add(prompt(fake, "c16", 1))
    fake.step()
    fake.engine.abort(request_id)
    fake.drain()
    assert fake.engine.status().adapter_memory.num_pinned == 0


def test_a_request_fails_by_name_when_its_adapters_files_have_changed_and_others_do_not() -> None:
    fake = FakeEngine(max_device_adapters=2, host_bytes=0)
    fake.runner.changed_files["fake:c16:16"] = "fake:other:16"
    bad, good = fake.add(prompt(fake, "c16", 1)), fake.add(prompt(fake, "a8", 2))
    fake.drain()
    assert isinstance(fake.errors[bad], FailedPrecondition)
    assert "'c16'" in fake.errors[bad].message
    assert good in fake.last


def test_a_restored_file_is_read_again_for_the_next_request() -> None:
    fake = FakeEngine(max_device_adapters=2, host_bytes=0)
    fake.runner.changed_files["fake:c16:16"] = "gone"
    with pytest.raises(FailedPrecondition, match="cannot be read again"):
        fake.run(prompt(fake, "c16", 1))
    fake.runner.changed_files.clear()
    assert len(fake.run(prompt(fake, "c16", 1))) == 6


def test_a_declared_adapter_that_cannot_be_read_concerns_its_own_branches_alone() -> None:
    fake = FakeEngine(max_device_adapters=2, host_bytes=0)
    fake.runner.changed_files["fake:c16:16"] = "fake:other:16"
    fake.run(fake.context_request(CONTEXT, ["a8", "b8", "c16"]))
    output = fake.run(fake.request(CONTEXT, [1], "a8", declared=["a8", "b8", "c16"]))
    assert output == expected_tokens(CONTEXT, [1], "a8", "eager", 6, vocab_size=97)
    with pytest.raises(FailedPrecondition):
        fake.run(fake.request(CONTEXT, [1], "c16"))


def test_an_adapter_of_two_names_is_read_from_the_directory_of_the_one_that_is_left() -> None:
    engine = FakeEngine(max_device_adapters=1, host_bytes=0)
    engine.adapters["p"] = engine.engine.load_adapter("p", "fake:same:8").ref
    engine.engine.load_adapter("q", "fake:same:8:")  # the same content in another directory
    engine.engine.unload_adapter("q")
    engine.runner.changed_files["fake:same:8:"] = "gone"
    engine.add(engine.request([], [5, 6, 7], "p", "isolated"))
    engine.drain()
    assert engine.errors == {}


def test_an_adapter_unloaded_while_its_request_waits_for_a_slot_is_used_to_the_end() -> None:
    fake = FakeEngine(max_device_adapters=1, host_bytes=0)
    fake.add(prompt(fake, "a8", 1))
    fake.step()
    waiting = fake.add(fake.request(CONTEXT, [1], "c16", "isolated"))
    fake.step()
    fake.engine.unload_adapter("c16")
    fake.drain()
    assert fake.outputs[waiting] == expected_tokens(CONTEXT, [1], "c16", "isolated", 6, vocab_size=97)
    assert fake.engine.status().adapter_memory.num_registered == len(fake.adapters) - 1


def test_a_context_pass_over_more_adapters_than_slots_takes_as_many_as_fit_each_time() -> None:
    fake = FakeEngine(max_device_adapters=2, host_bytes=0, num_slabs=400, max_num_batched_tokens=64)
    names = [f"x{i}" for i in range(20)]
    load_more(fake, names)
    fake.run(fake.context_request(CONTEXT, names))
    assert fake.engine.status().counters.prefill_tokens_run == 10 * len(CONTEXT)
    before = fake.engine.status().counters.prefill_tokens_run
    fake.run(fake.request(CONTEXT, [1], names[0]))
    assert fake.engine.status().counters.prefill_tokens_run - before == 1


def test_a_pass_beside_busy_slots_waits_for_half_of_them() -> None:
    fake = FakeEngine(max_device_adapters=4, num_slabs=400, max_num_batched_tokens=64)
    for number, adapter in enumerate(("a8", "b8", "c16")):
        fake.add(prompt(fake, adapter, number, max_tokens=4 + 4 * number))
    fake.step()
    names = ["x0", "x1"]
    load_more(fake, names)
    before = fake.engine.status().counters.prefill_tokens_run
    fake.run(fake.context_request(CONTEXT, names))
    assert fake.engine.status().counters.prefill_tokens_run - before == len(CONTEXT), "one pass, not one for each adapter"


def test_slots_claimed_for_a_pass_that_another_request_ran_first_are_given_back() -> None:
    fake = FakeEngine(max_device_adapters=2, host_bytes=0, load_delay=4, num_slabs=200, max_num_batched_tokens=64)
    load_more(fake, ["x0", "x1"])
    fake.add(prompt(fake, "x0", 1, max_tokens=20))
    fake.step()
    fake.step()
    late = fake.add(fake.request(CONTEXT, [1], "x0", declared=["x0", "x1"], max_tokens=20))  # waits for x1 as well
    fake.step()
    assert fake.engine.status().adapter_memory.num_loading == 2
    demand = replace(fake.context_request(CONTEXT, ["x0"]), priority=Priority.HIGH)
    fake.add(demand)
    while not fake.outputs[late]:
        fake.step()  # checks that nobody holds more pins than are accounted for
    assert demand.request_id in fake.last
    assert fake.engine.status().adapter_memory.num_pinned == 1


# --- fairness -----------------------------------------------------------------------------------------------------------


def keep_busy(fake: FakeEngine, adapter: str, tenant: str = "") -> Iterator[str]:
    """Two requests of ``adapter`` overlap at any time, so that its slot is never empty by itself."""
    live: list[str] = []
    for number in range(1000):
        live = [request_id for request_id in live if request_id not in fake.last]
        while len(live) < 2:
            live.append(fake.add(prompt(fake, adapter, 10 + 2 * number + len(live), tenant=tenant, max_tokens=4 + len(live))))
        fake.step()
        yield live[-1]


@pytest.mark.parametrize("overtakes", [0, 3, 12])
def test_a_stream_of_one_adapter_does_not_keep_another_from_the_only_slot(overtakes: int) -> None:
    fake = FakeEngine(max_device_adapters=1, max_overtakes=overtakes, num_slabs=200)
    busy = keep_busy(fake, "a8")
    next(busy)
    starved = fake.add(prompt(fake, "c16", 1))
    num_ended = len(fake.last)
    while not fake.outputs[starved]:
        next(busy)
    # Those that took the slot before it, and those that had it when it came; a few came in the steps that are left.
    assert len(fake.last) - num_ended <= overtakes + 3


def test_requests_whose_adapter_has_a_slot_overtake_one_that_waits_for_a_slot() -> None:
    fake = FakeEngine(max_device_adapters=1, max_overtakes=100, max_num_seqs=2)
    fake.add(prompt(fake, "a8", 1, max_tokens=3))
    fake.step()
    waiting = fake.add(prompt(fake, "b8", 2))
    same = fake.add(prompt(fake, "a8", 3))
    fake.step()
    assert (len(fake.outputs[same]), len(fake.outputs[waiting])) == (1, 0)


def test_base_model_requests_need_no_slot() -> None:
    fake = FakeEngine(max_device_adapters=1)
    fake.add(prompt(fake, "a8", 1, max_tokens=20))
    fake.step()
    fake.add(prompt(fake, "b8", 2))
    base = fake.add(prompt(fake, None, 3))
    fake.step()
    assert len(fake.outputs[base]) == 1


def test_a_tenant_with_one_request_does_not_wait_behind_all_of_another() -> None:
    fake = FakeEngine(max_num_seqs=1)
    many = [fake.add(prompt(fake, None, number, tenant="many")) for number in range(10)]
    few = fake.add(prompt(fake, None, 50, tenant="few"))
    while few not in fake.last:
        fake.step()
    assert sum(request_id in fake.last for request_id in many) <= 2


def test_a_higher_priority_starts_first_whatever_its_tenant_has_had() -> None:
    fake = FakeEngine(max_num_seqs=1)
    fake.add(prompt(fake, None, 1, tenant="one"))
    fake.step()
    normal = fake.add(prompt(fake, None, 2, tenant="two"))
    high = fake.add(prompt(fake, None, 3, tenant="one", priority=Priority.HIGH))
    while high not in fake.last:
        fake.step()
    assert fake.outputs[normal] == []


def test_what_a_request_waits_for_memory_nobody_overtakes() -> None:
    fake = FakeEngine(num_slabs=16)
    first = fake.add(fake.request([], list(range(40)), None, "isolated", max_tokens=8))
    fake.step()
    large = fake.add(fake.request([], list(range(41, 81)), None, "isolated", max_tokens=8))
    small = fake.add(prompt(fake, None, 3))
    while first not in fake.last:
        fake.step()
        assert fake.outputs[small] == [] or fake.outputs[large]
    fake.drain()
    assert {large, small} <= set(fake.last)


# --- steps ------------------------------------------------------------------------------------------------------------------


def test_a_prompt_beside_a_running_decode_runs_in_the_chunks_of_its_bound() -> None:
    fake = FakeEngine(max_num_batched_tokens=16, max_prefill_tokens_beside_decodes=5)
    fake.add(prompt(fake, None, 1, max_tokens=30))
    fake.step()
    rows = rows_of_steps(fake)
    fake.add(fake.request([], list(range(20)), None, "isolated", max_tokens=1))
    for _ in range(4):
        fake.step()
    assert rows == [6, 6, 6, 6]


def test_a_request_that_waits_behind_a_prompt_finds_its_prefix_in_the_cache() -> None:
    """It would run the same tokens again if it were started beside it."""
    engine = FakeEngine(num_slabs=400, max_num_batched_tokens=16)
    shared = [(3 * i) % engine.vocab_size for i in range(64)]
    engine.add(engine.request([], [*shared, 1], None, "isolated", max_tokens=1))
    engine.engine.step()
    engine.add(engine.request([], [*shared, 2], None, "isolated", max_tokens=1))
    engine.drain()
    assert engine.engine.status().counters.prefill_tokens_run < len(shared) + 20


def test_of_two_prompts_under_way_the_one_of_higher_priority_goes_on_first() -> None:
    engine = FakeEngine(num_slabs=400, max_num_batched_tokens=16)
    low = engine.request([], [1] * 64, None, "isolated", max_tokens=1, tenant="bulk", priority=Priority.LOW)
    high = engine.request([], [2] * 64, None, "isolated", max_tokens=1, tenant="chat", priority=Priority.HIGH)
    ids = [engine.add(low), engine.add(high)]
    ends = []
    while len(ends) < 2:
        ends += [chunk.request_id for chunk in engine.engine.step().chunks if chunk.finish_reason is not None]
    assert ends == ids[::-1]


def busy_with_a_low_prompt(tokens: list[int], num_steps: int = 1) -> FakeEngine:
    """16 tokens a step; a prompt of low priority has had ``num_steps`` of them."""
    fake = FakeEngine(num_slabs=400, max_num_batched_tokens=16)
    fake.add(fake.request([], tokens, None, "isolated", max_tokens=1, tenant="bulk", priority=Priority.LOW))
    for _ in range(num_steps):
        fake.step()
    return fake


def prefill_run(fake: FakeEngine) -> int:
    return fake.engine.status().counters.prefill_tokens_run


def test_a_higher_priority_that_waits_goes_before_the_chunks_of_a_lower_one() -> None:
    fake = busy_with_a_low_prompt(list(range(90)))
    high = fake.add(fake.request([], [91, 92, 93], None, "isolated", max_tokens=1, tenant="chat", priority=Priority.HIGH))
    rows = rows_of_steps(fake)
    fake.step()
    assert high in fake.last
    assert rows == [16], "the lower one has what is left of the step"


def test_the_same_priority_waits_for_the_prompt_under_way() -> None:
    fake = busy_with_a_low_prompt(list(range(90)))
    same = fake.add(fake.request([], [91, 92, 93], None, "isolated", max_tokens=1, priority=Priority.LOW))
    fake.step()
    assert same not in fake.last


@pytest.mark.parametrize("num_shared", [24, 62, 64])
def test_a_higher_priority_waits_for_a_prompt_that_computes_its_prefix(num_shared: int) -> None:
    tokens = [(3 * i) % 97 for i in range(64)]
    fake = busy_with_a_low_prompt([*tokens, 1])
    high = fake.add(fake.request([], [*tokens[:num_shared], 2], None, "isolated", max_tokens=1, priority=Priority.HIGH))
    fake.step()
    assert high not in fake.last
    fake.drain()
    # Of what they share, less than a page of 4 runs again.
    assert prefill_run(fake) <= len(tokens) + 1 + 4


@pytest.mark.parametrize("num_shared", [12, 16])
def test_a_higher_priority_whose_shared_prefix_is_in_the_cache_does_not_wait(num_shared: int) -> None:
    tokens = [(3 * i) % 97 for i in range(64)]
    fake = busy_with_a_low_prompt(tokens)
    high = fake.add(fake.request([], [*tokens[:num_shared], 2], None, "isolated", max_tokens=1, priority=Priority.HIGH))
    fake.step()
    assert high in fake.last
    fake.drain()
    assert prefill_run(fake) == len(tokens) + 1


@pytest.mark.parametrize("sharing", ["eager", "residual", "base"])
@pytest.mark.parametrize("is_deeper", [False, True])
def test_forks_of_a_higher_priority_run_no_token_again_that_a_lower_one_is_computing(sharing: str, is_deeper: bool) -> None:
    """They wait for the pass over their context, or over the first part of it; a stranger does not."""
    context = [(3 * i) % 97 for i in range(64)]
    runs = []
    for priority in (Priority.LOW, Priority.HIGH):
        fake = FakeEngine(num_slabs=400, max_num_batched_tokens=16)
        fake.add(fake.request(context, [1], "a8", sharing, max_tokens=2, declared=["a8", "b8", "c16"], priority=Priority.LOW))
        fake.step()
        stranger = None if is_deeper else fake.add(prompt(fake, None, 90, max_tokens=1, priority=Priority.HIGH))
        tokens = [*context, 5, 5, 5, 5] if is_deeper else context
        for name in ("a8", "b8", "c16"):
            fake.add(fake.request(tokens, [2], name, sharing, declared=["a8", "b8", "c16"], priority=priority))
        fake.step()
        assert stranger is None or stranger in fake.last
        fake.drain()
        runs.append(prefill_run(fake))
    assert runs[1] == runs[0], "as when they had come with no better priority"
    if sharing != "residual":  # whose agents each run the context for their own residual
        assert runs[1] == len(context) + (4 + 4 if is_deeper else 4 + 3)


def test_a_pass_for_the_residual_of_another_adapter_holds_up_no_higher_priority() -> None:
    context = [(3 * i) % 97 for i in range(64)]
    fake = FakeEngine(num_slabs=400, max_num_batched_tokens=16)
    fake.run(fake.context_request(context, ["a8"]))
    fake.add(fake.request(context, [1], "c16", max_tokens=1, priority=Priority.LOW))  # its residual takes a pass of 4 steps
    fake.step()
    high = fake.add(fake.request(context, [2], "a8", max_tokens=1, priority=Priority.HIGH))
    fake.step()
    assert high in fake.last


def test_a_stream_of_lower_priorities_and_one_high_keeps_the_bound_beside_decodes() -> None:
    fake = FakeEngine(max_num_batched_tokens=16, max_prefill_tokens_beside_decodes=5)
    fake.add(prompt(fake, None, 1, max_tokens=30))
    fake.step()
    fake.add(fake.request([], list(range(20)), None, "isolated", max_tokens=1, priority=Priority.LOW))
    fake.step()
    rows = rows_of_steps(fake)
    fake.add(fake.request([], list(range(50, 62)), None, "isolated", max_tokens=1, priority=Priority.HIGH))
    for _ in range(3):
        fake.step()
    assert rows == [6, 6, 6]


def test_without_a_decode_a_prompt_has_the_whole_step() -> None:
    fake = FakeEngine(max_num_batched_tokens=16, max_prefill_tokens_beside_decodes=5)
    rows = rows_of_steps(fake)
    fake.add(fake.request([], list(range(20)), None, "isolated", max_tokens=1))
    fake.drain()
    assert rows == [16, 4]


def test_refused_requests_are_told_longer_times_the_slower_places_come_free() -> None:
    fake = FakeEngine(max_num_waiting=2, max_num_seqs=1, retry_after_s=1)
    for number in range(8):  # each takes 6 steps of 2 s
        while fake.engine.status().num_waiting == 2:
            fake.clock.advance(2.0)
            fake.step()
        fake.add(prompt(fake, None, number))
    hints = []
    for number in range(3):
        with pytest.raises(ResourceExhausted) as refused:
            fake.add(prompt(fake, None, 50 + number))
        hints.append(refused.value.retry_after_s)
    assert hints == pytest.approx([12.0, 24.0, 36.0], rel=0.2)


def test_a_hint_is_never_less_than_the_configured_one() -> None:
    fake = FakeEngine(max_num_waiting=1, retry_after_s=3)
    fake.add(prompt(fake, None, 1))
    with pytest.raises(ResourceExhausted) as refused:
        fake.add(prompt(fake, None, 2))
    assert refused.value.retry_after_s == 3.0
