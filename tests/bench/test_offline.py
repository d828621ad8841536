import json
from typing import Any

import pytest

from forkkv_cluster.bench.offline import OfflineTarget
from forkkv_cluster.bench.runner import RunResult, run_trace
from forkkv_cluster.bench.trace import Trace
from forkkv_cluster.bench.trace_file import parse_trace
from forkkv_cluster.cache.geometry import KVGeometry
from forkkv_cluster.core.config import SchedulerConfig
from forkkv_cluster.core.errors import ForkKVError, InvalidArgument, NotFound, Unsupported
from forkkv_cluster.core.request import Sharing, WriterMode
from forkkv_cluster.engine.engine import Engine
from forkkv_cluster.testing.fake_model_runner import FakeModelRunner
from forkkv_cluster.testing.manual_clock import ManualClock

PAGE = 4
CONTEXT_LEN = 40
HEADER = {"format": "forkkv-trace/1", "vocab_size": 97, "adapters": ["a", "b"]}
CONTEXT = {"type": "context", "id": "c0", "adapters": ["a", "b"], "num_tokens": CONTEXT_LEN, "seed": 1}


def turn(id: str, branch: str, adapter: str | None, **more: Any) -> dict[str, Any]:
    values = {"type": "turn", "id": id, "context": "c0", "branch": branch, "adapter": adapter, "max_tokens": 3}
    return {**values, "append": {"num_tokens": 6, "seed": 2}, **more}


def trace_of(*events: dict[str, Any]) -> Trace:
    return parse_trace([json.dumps(line) for line in (HEADER, CONTEXT, *events)])


class Bench:
    """An engine over a fake model with adapters a and b, and a clock that only the runs move: 10 ms a step."""

    def __init__(self) -> None:
        geometry = KVGeometry(num_layers=1, num_kv_heads=1, head_dim=16, page_size=PAGE, dtype_bytes=4, rank_classes=(8, 16))
        self.clock = ManualClock()
        self.engine = Engine(FakeModelRunner(geometry), 2**20, SchedulerConfig(max_num_batched_tokens=16), self.clock)
        self.engine.load_adapter("a", "fake:a:8")
        self.engine.load_adapter("b", "fake:b:16")
        self.slept_s: list[float] = []
        self._step = self.engine.step
        self.engine.step = self._timed_step  # type: ignore[method-assign]

    def _timed_step(self) -> Any:
        self.clock.advance(0.01)
        return self._step()

    def _sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        self.clock.advance(seconds)

    def run(self, trace: Trace, sharing: Sharing = Sharing.EAGER, writer: WriterMode = WriterMode.CANONICAL) -> RunResult:
        target = OfflineTarget(
            self.engine, block_size=PAGE, sharing=sharing, writer=writer, clock=self.clock, sleep=self._sleep
        )
        return run_trace(trace, target, sharing=sharing, seed=0, on_progress=lambda num_ended: None)


@pytest.fixture
def bench() -> Bench:
    return Bench()


TWO_AGENTS = trace_of(turn("t0", "b0", "a"), turn("t1", "b1", "b"))


@pytest.mark.parametrize(
    ("sharing", "prefill_tokens"),
    [
        (Sharing.ISOLATED, 2 * (CONTEXT_LEN + 6)),  # every agent runs everything
        (Sharing.EAGER, CONTEXT_LEN + 2 * 6),  # one context pass for all
        (Sharing.RESIDUAL, CONTEXT_LEN + 2 * (CONTEXT_LEN + 6)),  # the canonical pass, then each agent's own
        (Sharing.BASE, CONTEXT_LEN + 2 * 6),
    ],
)
def test_prefill_counts_every_context_pass_of_a_sharing_mode(bench: Bench, sharing: Sharing, prefill_tokens: int):
    assert bench.run(TWO_AGENTS, sharing).report["prefill_tokens_run"] == prefill_tokens


def test_under_eager_every_agent_hits_the_whole_context(bench: Bench):
    report = bench.run(TWO_AGENTS).report
    assert [row["useful_hit_tokens"] for row in report["turns"]] == [CONTEXT_LEN, CONTEXT_LEN]
    assert report["useful_hit_tokens"] == 2 * CONTEXT_LEN


def test_with_the_first_agent_as_writer_no_pass_of_the_base_model_runs(bench: Bench):
    trace = trace_of(turn("t0", "b0", "a"), turn("t1", "b1", "b", after=["t0"]))
    report = bench.run(trace, Sharing.RESIDUAL, WriterMode.FIRST).report
    assert report["writer"] == "first"
    assert report["prefill_tokens_run"] == (CONTEXT_LEN + 6) + (CONTEXT_LEN + 6)


def test_a_turn_generates_exactly_what_the_trace_asks_for(bench: Bench):
    result = bench.run(trace_of(turn("t0", "b0", "a", max_tokens=5), turn("t1", "b1", None, max_tokens=1)))
    assert [len(line["token_ids"]) for line in result.outputs()] == [5, 1]
    assert result.report["output_tokens"] == 6


def test_the_same_trace_gives_the_same_tokens(bench: Bench):
    assert bench.run(TWO_AGENTS).outputs() == Bench().run(TWO_AGENTS).outputs()


def test_a_second_turn_continues_its_branch(bench: Bench):
    trace = trace_of(turn("t0", "b0", "a"), turn("t1", "b0", "a", append={"tokens": []}))
    first, second = bench.run(trace).report["turns"]
    # All that has KV: context, the first turn's input and its output but the last token, which runs now.
    assert second["base_hit_tokens"] == CONTEXT_LEN + 6 + 3 - 1
    assert second["start_s"] == pytest.approx(first["start_s"] + first["e2e_s"])


def test_a_branch_forked_after_a_join_reads_the_joined_tokens(bench: Bench):
    join = {"type": "join", "id": "j0", "context": "c0", "from": "b0"}
    with_join = trace_of(turn("t0", "b0", "a"), join, turn("t1", "b1", "b", after=["j0"], at_s=5.0))
    without = trace_of(turn("t0", "b0", "a"), turn("t1", "b1", "b", after=["t0"], at_s=5.0))
    joined, plain = bench.run(with_join), Bench().run(without)
    assert joined.outputs()[1]["token_ids"] != plain.outputs()[1]["token_ids"]
    assert joined.report["turns"][1]["useful_hit_tokens"] == CONTEXT_LEN + 6 + 3
    assert joined.report["prefill_tokens_run"] == CONTEXT_LEN + 6 + (6 + 3) + 6


def test_a_join_of_the_output_leaves_out_what_was_appended(bench: Bench):
    join = {"type": "join", "id": "j0", "context": "c0", "from": "b0", "what": "output"}
    report = bench.run(trace_of(turn("t0", "b0", "a"), join, turn("t1", "b1", "b", after=["j0"], at_s=5.0))).report
    assert report["turns"][1]["useful_hit_tokens"] == CONTEXT_LEN + 3


def test_concurrent_turns_run_in_one_batch(bench: Bench):
    alone = bench.run(trace_of(turn("t0", "b0", "a", max_tokens=30))).report
    both = Bench().run(trace_of(turn("t0", "b0", "a", max_tokens=30), turn("t1", "b1", "b", max_tokens=30))).report
    assert both["wall_s"] < 1.2 * alone["wall_s"]


def test_a_run_sleeps_until_the_next_event_is_due(bench: Bench):
    trace = trace_of(turn("t0", "b0", "a"), turn("t1", "b1", "b", at_s=7.0), turn("t2", "b2", None, after=["t1"], think_s=2.0))
    report = bench.run(trace).report
    assert report["turns"][1]["start_s"] == 7.0
    assert report["turns"][2]["start_s"] == pytest.approx(7.0 + report["turns"][1]["e2e_s"] + 2.0)
    assert len(bench.slept_s) == 2


def test_ttft_waits_for_the_context_pass(bench: Bench):
    first, second = bench.run(trace_of(turn("t0", "b0", "a"), turn("t1", "b1", "a", at_s=5.0))).report["turns"]
    assert first["ttft_s"] >= 0.01 * CONTEXT_LEN / 16
    assert second["ttft_s"] == pytest.approx(0.01)


def test_the_engine_is_idle_after_a_run(bench: Bench):
    join = {"type": "join", "id": "j0", "context": "c0", "from": "b0"}
    report = bench.run(trace_of(turn("t0", "b0", "a"), join)).report
    assert not bench.engine.has_work
    # The pass over the joined tokens came after the last token and is counted none the less.
    assert report["prefill_tokens_run"] == CONTEXT_LEN + 6 + (6 + 3)
    bench.engine.check_invariants()


def test_an_adapter_that_is_not_loaded_is_named_with_the_remedy(bench: Bench):
    trace = parse_trace([json.dumps({**HEADER, "adapters": ["a", "missing"]})])
    with pytest.raises(NotFound, match=r"'missing'.*has: a, b.*--adapter missing=DIR"):
        bench.run(trace)


def test_a_trace_of_a_larger_vocabulary_is_refused(bench: Bench):
    with pytest.raises(InvalidArgument, match=r"vocab_size=98: is larger than the vocabulary of fake, 97 tokens"):
        bench.run(parse_trace([json.dumps({**HEADER, "vocab_size": 98})]))


def test_auto_is_refused_by_name(bench: Bench):
    with pytest.raises(Unsupported, match="is no policy to measure"):
        bench.run(TWO_AGENTS, Sharing.AUTO)


def test_a_turn_that_the_engine_refuses_ends_the_run_with_its_error(bench: Bench):
    with pytest.raises(ForkKVError, match="max_tokens"):
        bench.run(trace_of(turn("t0", "b0", "a", max_tokens=5000)))
