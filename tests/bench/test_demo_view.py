import io

from rich.console import Console

from forkkv_cluster.bench.demo_checks import Check, savings
from forkkv_cluster.bench.demo_plan import AGENTS, FOLLOW_UP, AgentResult, KillResult, PolicyResult
from forkkv_cluster.bench.demo_view import (
    agent_table,
    check_lines,
    policy_table,
    savings_line,
    streams_side_by_side,
)
from forkkv_cluster.core.request import PrefixUsage


def stream(index: int, **changes) -> AgentResult:
    usage = PrefixUsage(base_hit_tokens=5658, residual_hit_tokens=5601, useful_hit_tokens=5602)
    values = {"token_ids": [1] * 48, "text": "some\nanswer", "worker": "worker-ab", "workers": ("worker-ab", "worker-cd")}
    return AgentResult(AGENTS[index], 5600, usage=usage, ttft_s=0.123, is_done=True, **{**values, **changes})


RESULT = PolicyResult(
    sharing="eager",
    wall_s=4.25,
    num_context_tokens=5658,
    num_joined_tokens=48,
    agents=(stream(0), stream(1)),
    follow_up=AgentResult(FOLLOW_UP, 5706),
    prefill_tokens_run=11531,
    base_bytes_held=24 * 2**20,
    residual_bytes_held=2**19,
    kill=KillResult("worker-ab", 7, 2, (8, 8)),
)


def shown(renderable: object, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


def row_of(text: str, start: str) -> list[str]:
    return next(line.split() for line in text.splitlines() if line.strip().startswith(start))


def test_an_agents_row_has_its_workers_time_tokens_and_hits():
    row = row_of(shown(agent_table(RESULT)), "planner")
    assert row == ["planner", "planner", "ab", ">", "cd", "123", "48", "5,600", "5,658", "5,601", "5,602"]


def test_the_title_says_which_worker_was_killed():
    assert "eager, worker-ab killed: 2 agents over 5,658 shared tokens" in shown(agent_table(RESULT))


def test_a_policys_row_has_its_wall_time_prefill_and_bytes():
    row = row_of(shown(policy_table([RESULT])), "eager")
    assert row == ["eager", "4.25", "11,531", "24.0", "MiB", "0.5", "MiB", "24.5", "MiB"]


def test_the_line_of_savings_has_the_figures_of_the_two_runs():
    isolated = PolicyResult("isolated", 8.5, 5658, 48, RESULT.agents, RESULT.follow_up, 34593, 98 * 2**20)
    line = savings_line(savings(RESULT, isolated))
    assert "23,062 prefill tokens (3.0 times fewer), 73.5 MiB of KV (4.0 times less) and 4.2 s (2.0 times faster)" in line


def test_a_promise_that_did_not_hold_stands_out():
    ok, bad = check_lines([Check("a", True, "x"), Check("b", False, "y")])
    assert ok.plain == "    ok  a  (x)"
    assert bad.plain == "FAILED  b  (y)"


def test_without_a_terminal_each_stream_is_one_line_when_it_ends():
    console = Console(file=io.StringIO(), width=120)
    with streams_side_by_side(console, "eager") as on_update:
        on_update([stream(0), AgentResult(AGENTS[1], 10, text="running")])
        on_update([stream(0), stream(1)])
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines == ["eager · planner (worker-ab): some answer", "eager · critic (worker-ab): some answer"]


def test_on_a_terminal_the_streams_stand_side_by_side():
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with streams_side_by_side(console, "eager") as on_update:
        on_update([stream(0), stream(1), AgentResult(AGENTS[2], 10, text="running", token_ids=[1, 2, 3])])
    text = console.file.getvalue()  # type: ignore[attr-defined]
    line = next(line for line in text.splitlines() if "planner · 48" in line)
    assert "critic · 48" in line
    assert "coder · 3" in line
