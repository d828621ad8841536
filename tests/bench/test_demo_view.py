import io

from rich.console import Console

from forkkv_cluster.bench.demo_checks import Check, savings
from forkkv_cluster.bench.demo_plan import Agent, AgentResult, Answer, KillResult, PolicyResult, Question
from forkkv_cluster.bench.demo_view import (
    agent_table,
    answer_table,
    check_lines,
    cost_line,
    policy_table,
    savings_line,
    streams_side_by_side,
)
from forkkv_cluster.core.request import PrefixUsage
from tests.bench.demo_values import AGENTS, FOLLOW_UP, answered


def stream(index: int, **changes) -> AgentResult:
    usage = PrefixUsage(base_hit_tokens=5658, residual_hit_tokens=5601, useful_hit_tokens=5602)
    values = {"worker": "worker-ab", "workers": ("worker-ab", "worker-cd"), "answers": answered(AGENTS[index], 48)}
    return AgentResult(AGENTS[index], 5600, usage=usage, ttft_s=0.123, is_done=True, **{**values, **changes})


RESULT = PolicyResult(
    sharing="eager",
    wall_s=4.25,
    num_context_tokens=5658,
    num_joined_tokens=48,
    agents=(stream(0), stream(1)),
    follow_up=AgentResult(FOLLOW_UP, 5706, answered(FOLLOW_UP, 10, is_right=False)),
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
    assert row == ["eager", "4", "of", "5", "4.25", "11,531", "24.0", "MiB", "0.5", "MiB", "24.5", "MiB"]


def test_the_line_of_savings_has_the_figures_of_the_two_runs():
    isolated = PolicyResult("isolated", 8.5, 5658, 48, RESULT.agents, RESULT.follow_up, 34593, 98 * 2**20)
    line = savings_line(savings(RESULT, isolated))
    assert "23,062 prefill tokens (3.0 times fewer), 73.5 MiB of KV (4.0 times less) and 4.2 s (2.0 times faster)" in line


def test_the_line_of_costs_names_the_adapters_that_lost():
    lost = PolicyResult("isolated", 8.5, 5658, 48, (stream(0, answers=[]), stream(1)), RESULT.follow_up)
    assert cost_line(savings(lost, RESULT)).startswith("It cost 2 right answers (planner 2): ")
    assert cost_line(savings(RESULT, lost)) == "It cost no right answer."


HOME = Agent("hop", "hop", (Question("Where?", "", "hop", "In Riga."), Question("And when?", "", "hop", "In May.")))


def policy(sharing: str, *said: tuple[str, bool], kill: KillResult | None = None) -> PolicyResult:
    answers = [Answer(q, text, [1], "stop", is_right) for q, (text, is_right) in zip(HOME.questions, said, strict=True)]
    return PolicyResult(sharing, 1.0, 10, 1, (AgentResult(HOME, 10, answers),), AgentResult(FOLLOW_UP, 11, []), kill=kill)


def test_each_different_answer_has_a_row_that_says_under_which_policy_it_is_right():
    eager = policy("eager", (" In Oslo.", False), ("In May.", True))
    isolated = policy("isolated", ("In Riga.", True), (" In  May.", True))
    lines = [line.split() for line in shown(answer_table([eager, isolated])).splitlines() if line.strip()]
    rows = lines[3:]
    assert rows[0] == ["hop", "Where?", "In", "Oslo.", "wrong"]
    assert rows[1] == ["In", "Riga.", "right"]
    assert rows[2] == ["And", "when?", "In", "May.", "right", "right"]
    assert rows[3] == ["right", "1", "of", "2", "2", "of", "2"]


def test_the_run_with_a_kill_has_a_column_of_its_own():
    said = (("In Riga.", True), ("In May.", True))
    text = shown(answer_table([policy("eager", *said), policy("eager", *said, kill=KillResult("w", 1, 1, (8,)))]))
    assert row_of(text, "agent") == ["agent", "question", "answer", "eager", "killed"]


def test_a_promise_that_did_not_hold_stands_out():
    ok, bad = check_lines([Check("a", True, "x"), Check("b", False, "y")])
    assert ok.plain == "    ok  a  (x)"
    assert bad.plain == "FAILED  b  (y)"


def test_without_a_terminal_each_stream_is_one_line_when_it_ends():
    console = Console(file=io.StringIO(), width=120)
    running = AgentResult(AGENTS[1], 10, answered(AGENTS[1], 3, finish_reason=""))
    with streams_side_by_side(console, "eager") as on_update:
        on_update([stream(0), running])
        on_update([stream(0), stream(1)])
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines == [
        "eager · planner (worker-ab): planner 0? yes | planner 1? yes",
        "eager · critic (worker-ab): critic 0? yes | critic 1? yes",
    ]


def test_on_a_terminal_the_streams_stand_side_by_side():
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    running = AgentResult(AGENTS[2], 10, answered(AGENTS[2], 3, finish_reason="")[:1])
    with streams_side_by_side(console, "eager") as on_update:
        on_update([stream(0), stream(1), running])
    text = console.file.getvalue()  # type: ignore[attr-defined]
    line = next(line for line in text.splitlines() if "planner · 48" in line)
    assert "critic · 48" in line
    assert "coder · 2" in line


def test_on_a_terminal_a_finished_answer_is_green_or_red():
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="standard")
    wrong = stream(1, answers=answered(AGENTS[1], 4, is_right=False))
    with streams_side_by_side(console, "eager") as on_update:
        on_update([stream(0), wrong])
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[32mplanner 0? yes" in text
    assert "\x1b[31mcritic 0? yes" in text
