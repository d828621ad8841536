"""The engine over a fake model whose tokens depend on every KV value read: tokens against a recurrence without pages."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from forkkv_cluster.core.errors import Cancelled, DeadlineExceeded, InvalidArgument, NotFound, ResourceExhausted
from forkkv_cluster.core.request import FinishReason
from forkkv_cluster.engine.batch import Batch
from forkkv_cluster.engine.runner import StepResult
from forkkv_cluster.engine.sampling_row import SamplingRow
from tests.engine.harness import FakeEngine
from tests.engine.recurrence import expected_tokens

CONTEXT = [(7 * i + 3) % 97 for i in range(30)]  # 7 whole pages of 4, and a tail of 2
SHARINGS = ("isolated", "residual", "eager", "base")


@pytest.fixture
def fake() -> FakeEngine:
    return FakeEngine()


@pytest.mark.parametrize("page_size", [1, 3, 4, 16])
@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("adapter", ["a8", "c16", "n0", None])
def test_tokens_follow_the_semantics_of_the_sharing_mode(page_size: int, sharing: str, adapter: str | None) -> None:
    fake = FakeEngine(page_size=page_size, num_slabs=400)
    output = fake.run(fake.request(CONTEXT, [1, 2, 3], adapter, sharing))
    has_residual = adapter != "n0"
    assert output == expected_tokens(CONTEXT, [1, 2, 3], adapter, sharing, 6, vocab_size=97, has_residual=has_residual)


def test_the_recurrence_tells_the_sharing_modes_and_adapters_apart() -> None:
    outputs = {
        (adapter, sharing): tuple(expected_tokens(CONTEXT, [1], adapter, sharing, 6, vocab_size=97))
        for adapter in ("a8", "b8")
        for sharing in SHARINGS
    }
    assert len(set(outputs.values())) == len(outputs)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_concurrent_branches_answer_as_if_each_were_alone(fake: FakeEngine, sharing: str) -> None:
    branches = [("a8", [1]), ("b8", [2, 3]), ("c16", [4]), ("a8", [5]), (None, [6])]
    ids = [fake.add(fake.request(CONTEXT, own, adapter, sharing, declared=["a8", "b8", "c16"])) for adapter, own in branches]
    fake.drain()
    for request_id, (adapter, own) in zip(ids, branches, strict=True):
        assert fake.outputs[request_id] == expected_tokens(CONTEXT, own, adapter, sharing, 6, vocab_size=97)


@pytest.mark.parametrize("writer", ["a8", "b8"])
def test_the_first_writer_writes_the_base_and_others_add_their_residual(fake: FakeEngine, writer: str) -> None:
    for adapter in ("a8", "b8", "c16"):
        output = fake.run(fake.request(CONTEXT, [1], adapter, "residual", writer=writer))
        assert output == expected_tokens(CONTEXT, [1], adapter, "residual", 6, vocab_size=97, writer=writer)


def test_a_context_pass_leaves_nothing_of_the_context_for_declared_adapters_to_run(fake: FakeEngine) -> None:
    fake.run(fake.context_request(CONTEXT, ["a8", "b8"]))
    before = fake.engine.status().counters.prefill_tokens_run
    for adapter in ("a8", "b8"):
        request_id = fake.add(fake.request(CONTEXT, [1, 2], adapter))
        fake.drain()
        usage = fake.last[request_id].usage
        assert usage is not None
        assert (usage.useful_hit_tokens, usage.prefill_tokens_run) == (len(CONTEXT), 2)
    assert before == len(CONTEXT)
    assert fake.engine.status().counters.prefill_tokens_run == len(CONTEXT) + 4


def test_branches_that_arrive_together_share_one_context_pass(fake: FakeEngine) -> None:
    for adapter in ("a8", "b8", "c16"):
        fake.add(fake.request(CONTEXT, [1], adapter, declared=["a8", "b8", "c16"]))
    fake.drain()
    assert fake.engine.status().counters.prefill_tokens_run == len(CONTEXT) + 3


def test_a_branch_that_waited_for_a_context_pass_finds_the_whole_context(fake: FakeEngine) -> None:
    request_id = fake.add(fake.request(CONTEXT, [1, 2], "a8"))
    fake.drain()
    usage = fake.last[request_id].usage
    assert usage is not None
    assert (usage.useful_hit_tokens, usage.prefill_tokens_run) == (len(CONTEXT), 2)
    assert fake.engine.status().counters.prefill_tokens_run == len(CONTEXT) + 2


def test_an_agents_own_pass_over_the_context_is_counted_as_its_own(fake: FakeEngine) -> None:
    request_id = fake.add(fake.request(CONTEXT, [1, 2], "a8", "residual"))
    fake.drain()
    usage = fake.last[request_id].usage
    assert usage is not None
    assert (usage.base_hit_tokens, usage.residual_hit_tokens, usage.useful_hit_tokens) == (len(CONTEXT), 0, 0)
    assert usage.prefill_tokens_run == len(CONTEXT) + 2


def test_a_late_adapter_costs_one_pass_that_writes_no_base_page(fake: FakeEngine) -> None:
    fake.run(fake.context_request(CONTEXT, ["a8"]))
    held = fake.engine.status().base_bytes_held
    output = fake.run(fake.request(CONTEXT, [1], "c16", max_tokens=1))
    assert output == expected_tokens(CONTEXT, [1], "c16", "eager", 1, vocab_size=97)
    assert fake.engine.status().base_bytes_held - held == fake.engine.status().pools[0].page_bytes  # its own tail page


def test_a_second_turn_runs_only_what_the_first_left_without_kv(fake: FakeEngine) -> None:
    first = fake.run(fake.request(CONTEXT, [1, 2], "a8"))
    request_id = fake.add(fake.request(CONTEXT, [1, 2, *first, 9], "a8"))
    fake.drain()
    usage = fake.last[request_id].usage
    assert usage is not None
    assert usage.prefill_tokens_run == 2  # the last generated token and the appended one
    assert fake.outputs[request_id] == expected_tokens(CONTEXT, [1, 2, *first, 9], "a8", "eager", 6, vocab_size=97)


def test_a_fork_copies_at_most_the_partly_filled_page(fake: FakeEngine) -> None:
    fake.run(fake.context_request(CONTEXT, ["a8", "b8"]))
    before = fake.engine.status().counters.cow_copies
    for adapter in ("a8", "b8"):
        fake.run(fake.request(CONTEXT, [1], adapter))
    assert fake.engine.status().counters.cow_copies - before == 2


def test_a_join_extends_the_context_and_reruns_less_than_a_page_of_it(fake: FakeEngine) -> None:
    fake.run(fake.context_request(CONTEXT, ["a8"]))
    answer = fake.run(fake.request(CONTEXT, [1], "a8"))
    joined = [*CONTEXT, 1, *answer]
    before = fake.engine.status().counters.prefill_tokens_run
    assert fake.run(fake.request(joined, [2], "b8", declared=["a8", "b8"])) == expected_tokens(
        joined, [2], "b8", "eager", 6, vocab_size=97
    )
    # b8 was not declared before, so its residual needs the whole context; a8's needs the new part and a page at most.
    assert fake.engine.status().counters.prefill_tokens_run - before == len(joined) + 1


@pytest.mark.parametrize("sharing", SHARINGS)
def test_a_small_pool_preempts_and_evicts_without_changing_a_token(sharing: str) -> None:
    fake = FakeEngine(num_slabs=24, max_num_batched_tokens=8)
    branches = [(adapter, [i]) for i in range(3) for adapter in ("a8", "b8", "c16")]
    ids = [fake.add(fake.request(CONTEXT, own, adapter, sharing, max_tokens=12)) for adapter, own in branches]
    fake.drain()
    for request_id, (adapter, own) in zip(ids, branches, strict=True):
        assert fake.outputs[request_id] == expected_tokens(CONTEXT, own, adapter, sharing, 12, vocab_size=97)
    counters = fake.engine.status().counters
    assert counters.evictions > 0


def test_a_resumed_request_goes_on_where_the_other_worker_stopped(fake: FakeEngine) -> None:
    whole = expected_tokens(CONTEXT, [1, 2], "a8", "eager", 10, vocab_size=97)
    output = fake.run(fake.request(CONTEXT, [1, 2], "a8", max_tokens=10, resumed=whole[:4]))
    assert output == whole[4:]


def test_tenants_share_no_page(fake: FakeEngine) -> None:
    runs = []
    for namespace in ("one", "two", "two"):
        before = fake.engine.status().counters.prefill_tokens_run
        fake.run(fake.request(CONTEXT, [1], "a8", namespace=namespace))
        runs.append(fake.engine.status().counters.prefill_tokens_run - before)
    assert runs == [len(CONTEXT) + 1, len(CONTEXT) + 1, 1]


def test_eos_ends_a_request_unless_it_is_ignored() -> None:
    stop = expected_tokens(CONTEXT, [1], None, "isolated", 3, vocab_size=97)[2]
    fake = FakeEngine(eos=(stop,))
    request_id = fake.add(fake.request(CONTEXT, [1], None, "isolated"))
    ignoring = fake.add(fake.request(CONTEXT, [1], None, "isolated", ignore_eos=True))
    fake.drain()
    assert fake.last[request_id].finish_reason is FinishReason.STOP
    assert fake.last[request_id].matched_stop == stop
    assert fake.last[ignoring].finish_reason is FinishReason.LENGTH


def test_an_idle_engine_holds_no_pins_and_every_page_is_free_or_cached(fake: FakeEngine) -> None:
    for adapter in ("a8", "b8"):
        fake.run(fake.request(CONTEXT, [1], adapter))
    status = fake.engine.status()
    assert (status.num_running, status.num_waiting, status.num_pinned_pages) == (0, 0, 0)
    assert all(pool.num_free + pool.num_cached == pool.num_total for pool in status.pools)


def test_a_status_says_what_the_whole_keys_of_a_long_answer_borrow() -> None:
    fake = FakeEngine()
    assert fake.engine.status().merged_bytes_held == 0
    fake.add(fake.request(CONTEXT, [1], "a8", max_tokens=64))
    for _ in range(8):
        fake.step()
    status = fake.engine.status()
    borrowed = {pool.name: pool.num_total * pool.page_bytes for pool in status.pools}
    assert status.merged_bytes_held == borrowed["merged-keys"] > 0


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 5])
def test_a_cancelled_request_gives_back_all_that_it_held(fake: FakeEngine, num_steps: int) -> None:
    request_id = fake.add(fake.request(CONTEXT, [1], "a8", max_tokens=50))
    for _ in range(num_steps):
        fake.step()
    fake.engine.abort(request_id)
    fake.drain()
    assert isinstance(fake.errors[request_id], Cancelled)
    status = fake.engine.status()
    assert (status.num_running, status.num_waiting, status.num_pinned_pages) == (0, 0, 0)


def test_cancelling_the_branch_that_started_a_context_pass_does_not_stop_those_that_wait_for_it(fake: FakeEngine) -> None:
    first = fake.add(fake.request(CONTEXT, [1], "a8"))
    fake.step()
    second = fake.add(fake.request(CONTEXT, [2], "a8"))
    fake.step()
    fake.engine.abort(first)
    fake.drain()
    assert fake.outputs[second] == expected_tokens(CONTEXT, [2], "a8", "eager", 6, vocab_size=97)


def test_a_request_past_its_deadline_fails_and_frees_its_pages(fake: FakeEngine) -> None:
    request_id = fake.add(fake.request(CONTEXT, [1], "a8", max_tokens=50, deadline_s=fake.clock.wall() + 5))
    fake.step()
    fake.clock.advance(6)
    fake.drain()
    assert isinstance(fake.errors[request_id], DeadlineExceeded)
    assert fake.engine.status().num_pinned_pages == 0


def test_a_request_that_arrives_too_late_is_refused_at_once(fake: FakeEngine) -> None:
    with pytest.raises(DeadlineExceeded):
        fake.add(fake.request(CONTEXT, [1], "a8", deadline_s=fake.clock.wall() - 1))


def test_a_full_queue_refuses_with_a_retry_hint() -> None:
    fake = FakeEngine(max_num_waiting=1)
    fake.add(fake.request(CONTEXT, [1], "a8"))
    with pytest.raises(ResourceExhausted) as refused:
        fake.add(fake.request(CONTEXT, [2], "a8"))
    assert refused.value.retry_after_s > 0


def test_an_unloaded_adapter_finishes_what_it_runs_and_takes_nothing_new(fake: FakeEngine) -> None:
    request_id = fake.add(fake.request(CONTEXT, [1], "a8"))
    fake.step()
    fake.engine.unload_adapter("a8")
    with pytest.raises(NotFound, match="a8"):
        fake.add(fake.request(CONTEXT, [2], "a8"))
    fake.drain()
    assert fake.outputs[request_id] == expected_tokens(CONTEXT, [1], "a8", "eager", 6, vocab_size=97)


def test_unloading_one_declared_adapter_does_not_concern_branches_of_another(fake: FakeEngine) -> None:
    fake.engine.unload_adapter("c16")
    fake.run(fake.context_request(CONTEXT, ["a8", "c16"]))
    output = fake.run(fake.request(CONTEXT, [1], "a8", declared=["a8", "c16"]))
    assert output == expected_tokens(CONTEXT, [1], "a8", "eager", 6, vocab_size=97)


def test_logits_that_are_no_numbers_end_their_own_request_alone(fake: FakeEngine) -> None:
    poisoned = fake.add(fake.request(CONTEXT, [1], "b8", "isolated"))
    sound = fake.add(fake.request(CONTEXT, [1], "a8", "isolated"))
    run = fake.runner.run

    def overflowing(batch: Batch, sampling: Sequence[SamplingRow]) -> StepResult:
        slots = [s.adapter_slot for row in batch.logit_rows for s in batch.lora_segments if s.row_start <= row < s.row_end]
        tokens = run(batch, sampling).tokens
        return StepResult([None if slot == 1 else token for slot, token in zip(slots, tokens, strict=True)])

    fake.runner.run = overflowing  # type: ignore[assignment]
    fake.drain()
    assert "b8" in str(fake.errors[poisoned])
    assert fake.outputs[sound] == expected_tokens(CONTEXT, [1], "a8", "isolated", 6, vocab_size=97)
    assert fake.engine.status().num_pinned_pages == 0


def test_a_reload_under_the_same_name_with_other_content_never_hits_the_old_pages(fake: FakeEngine) -> None:
    fake.run(fake.request(CONTEXT, [1], "a8"))
    fake.engine.unload_adapter("a8")
    info = fake.engine.load_adapter("a8", "fake:a8-retrained:8")
    fake.adapters["a8"] = type(fake.adapters["a8"])("a8", info.digest)
    assert fake.run(fake.request(CONTEXT, [1], "a8")) == expected_tokens(
        CONTEXT, [1], "a8-retrained", "eager", 6, vocab_size=97
    )


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"own": []}, "append"),
        ({"own": [1, 97]}, "tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5000}, "tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"writer": "a8"}, "writer"),
    ],
)
def test_a_bad_request_names_the_field_and_holds_nothing(fake: FakeEngine, changes: dict, field: str) -> None:
    arguments = {"context": CONTEXT, "own": [1], "adapter": "a8"} | changes
    request = fake.request(**arguments)
    with pytest.raises(InvalidArgument) as refused:
        fake.add(request)
    assert refused.value.field == field
    fake.engine.unload_adapter("a8")
    assert fake.runner.num_adapters == len(fake.adapters) - 1, "a refused request still holds its adapter"


def test_a_prompt_that_no_empty_pool_could_hold_is_refused() -> None:
    fake = FakeEngine(num_slabs=4)
    with pytest.raises(InvalidArgument, match="bytes of KV"):
        fake.add(fake.request(CONTEXT, [1], "a8"))
