import pytest

from forkkv_cluster.bench.metrics import (
    RunConditions,
    RunRecord,
    TurnRecord,
    add_counters,
    counters_between,
    report,
    summary,
)
from forkkv_cluster.core.request import PrefixUsage
from forkkv_cluster.core.status import EngineCounters

CONDITIONS = RunConditions(
    trace="hand.jsonl",
    trace_sha256="ab",
    target="offline",
    model="m",
    sharing="eager",
    writer="canonical",
    dtype="float32",
    kv_bytes=1024,
    seed=0,
    host={"name": "h"},
    commit="c",
)


def record(due_s: float, *arrivals: tuple[float, int]) -> TurnRecord:
    """A turn due at ``due_s``, with (time, number of tokens) arrivals."""
    turn = TurnRecord("t", "b", "a", due_s)
    for now_s, num_tokens in arrivals:
        turn.add_tokens(range(num_tokens), now_s)
    return turn


def test_ttft_and_e2e_run_from_the_due_time():
    turn = record(1.0, (1.5, 1), (3.0, 1))
    assert (turn.ttft_s, turn.e2e_s) == (0.5, 2.0)


def test_tpot_is_the_time_after_the_first_token_over_the_tokens_after_it():
    assert record(0.0, (1.0, 1), (2.0, 1), (5.0, 1)).tpot_s == 2.0


def test_a_turn_of_one_token_has_no_tpot_and_no_gaps():
    turn = record(0.0, (1.0, 1))
    assert (turn.tpot_s, turn.itl_s) == (None, [])


def test_tokens_that_arrive_together_share_the_gap_before_them():
    assert record(0.0, (1.0, 1), (2.0, 4)).itl_s == [0.25] * 4


def test_a_chunk_without_tokens_changes_nothing():
    turn = record(0.0, (1.0, 1))
    turn.add_tokens((), 9.0)
    assert turn.e2e_s == 1.0


def test_a_summary_interpolates_its_percentiles():
    assert summary([float(k) for k in range(101)]) == {"p50": 50.0, "p90": 90.0, "p99": 99.0, "mean": 50.0}


def test_a_summary_of_nothing_is_not_zero():
    assert summary([]) == {"p50": None, "p90": None, "p99": None, "mean": None}


def test_between_two_readings_counts_are_differences_and_peaks_are_levels():
    before = EngineCounters(prefill_tokens_run=10, peak_base_bytes=5)
    after = EngineCounters(prefill_tokens_run=30, peak_base_bytes=7)
    between = counters_between(before, after)
    assert (between.prefill_tokens_run, between.peak_base_bytes) == (20, 7)


def test_counters_of_workers_add_up():
    total = add_counters([EngineCounters(evictions=1, peak_base_bytes=3), EngineCounters(evictions=2, peak_base_bytes=4)])
    assert (total.evictions, total.peak_base_bytes) == (3, 7)


def test_the_report_has_the_fields_of_the_format_in_its_order():
    run = RunRecord([record(1.0, (2.0, 2), (3.0, 2))])
    run.event_started(0.5)
    values = report(CONDITIONS, run, EngineCounters(prefill_tokens_run=9))
    expected = """trace trace_sha256 target model sharing writer dtype kv_bytes seed host commit
        wall_s output_tokens output_tokens_per_s prefill_tokens_run base_hit_tokens residual_hit_tokens useful_hit_tokens
        peak_base_bytes peak_residual_bytes cow_copies evictions preemptions ttft_s tpot_s itl_s e2e_s turns"""
    assert list(values) == [*expected.split()]
    assert values["prefill_tokens_run"] == 9
    assert values["wall_s"] == pytest.approx(2.5)
    assert values["output_tokens_per_s"] == pytest.approx(4 / 2.5)


def test_the_clock_of_a_report_starts_when_its_first_event_is_due():
    run = RunRecord([record(4.0, (5.0, 1))])
    run.event_started(3.0)
    run.event_started(4.0)
    values = report(CONDITIONS, run, EngineCounters())
    assert values["turns"][0]["start_s"] == 1.0
    assert values["wall_s"] == 2.0


def test_a_turn_reports_its_hits_and_its_worker():
    turn = record(0.0, (1.0, 1))
    turn.usage = PrefixUsage(base_hit_tokens=8, residual_hit_tokens=6, useful_hit_tokens=6, prefill_tokens_run=3)
    turn.worker = "w1"
    values = turn.to_json(0.0)
    assert (values["id"], values["branch"], values["adapter"], values["worker"]) == ("t", "b", "a", "w1")
    assert (values["base_hit_tokens"], values["residual_hit_tokens"], values["useful_hit_tokens"]) == (8, 6, 6)
