from dataclasses import replace

import pytest

from forkkv_cluster.bench.demo_checks import Check, check_kill, check_policies, savings, to_json
from forkkv_cluster.bench.demo_plan import Agent, AgentResult, KillResult, PolicyResult
from tests.bench import demo_values
from tests.bench.demo_values import AGENTS, FOLLOW_UP, answered

CONTEXT_LEN, NUM_TOKENS = 100, 12


def stream(agent: Agent, num_context_tokens: int = CONTEXT_LEN, useful: int | None = None, **changes: object) -> AgentResult:
    return demo_values.stream(agent, num_context_tokens, NUM_TOKENS, useful, **changes)


def result(sharing: str, prefill_tokens_run: int, **changes) -> PolicyResult:
    plain = PolicyResult(
        sharing=sharing,
        wall_s=2.0,
        num_context_tokens=CONTEXT_LEN,
        num_joined_tokens=NUM_TOKENS,
        agents=tuple(stream(agent) for agent in AGENTS),
        follow_up=stream(FOLLOW_UP, CONTEXT_LEN + NUM_TOKENS),
        prefill_tokens_run=prefill_tokens_run,
        base_bytes_held=1000,
        residual_bytes_held=200,
    )
    return replace(plain, **changes)


EAGER, ISOLATED = result("eager", 300), result("isolated", 600)


def with_first(run: PolicyResult, first: AgentResult) -> PolicyResult:
    return replace(run, agents=(first, *run.agents[1:]))


def wrong(agent: Agent) -> AgentResult:
    return stream(agent, answers=answered(agent, NUM_TOKENS, is_right=False))


def failed(checks: list[Check]) -> list[str]:
    return [f"{check.promise}: {check.evidence}" for check in checks if not check.holds]


def test_results_that_keep_every_promise_pass():
    assert failed(check_policies(EAGER, ISOLATED)) == []


def test_an_agent_that_missed_a_part_of_the_context_fails_by_name():
    (message,) = failed(check_policies(with_first(EAGER, stream(AGENTS[0], useful=99)), ISOLATED))
    assert message.endswith("planner: 99 of 100")


def test_fewer_than_twice_the_prefill_fails():
    (message,) = failed(check_policies(replace(EAGER, prefill_tokens_run=301), ISOLATED))
    assert "301 against 600: 2.0 times" in message


def test_an_answer_without_its_end_fails():
    cut = stream(AGENTS[0], answers=answered(AGENTS[0], NUM_TOKENS)[:1])
    (message,) = failed(check_policies(EAGER, with_first(ISOLATED, cut)))
    assert message.startswith("every question of the isolated run")
    assert "6 of 7" in message


def test_wrong_answers_under_eager_are_a_result_and_no_failure():
    assert failed(check_policies(with_first(EAGER, wrong(AGENTS[0])), ISOLATED)) == []


def test_a_model_that_is_wrong_without_sharing_fails():
    (message,) = failed(check_policies(EAGER, with_first(ISOLATED, wrong(AGENTS[0]))))
    assert message.endswith("at least 80% of the answers are right: 5 of 7")


@pytest.mark.parametrize("changes", [{"num_joined_tokens": 0}, {"follow_up": stream(FOLLOW_UP)}])
def test_a_follow_up_that_did_not_read_the_joined_answer_fails(changes):
    (message,) = failed(check_policies(replace(EAGER, **changes), ISOLATED))
    assert message.startswith("the branch forked after the join")


def killed_run(num_moved: int = 2, num_resumes: int = 1, tokens_at_kill: tuple[int, ...] = (8, 9, 12)) -> PolicyResult:
    """The first streams were on the worker that died."""
    workers = (("w", "v") if index < num_moved else ("v",) for index in range(len(AGENTS)))
    agents = [stream(agent, workers=each) for agent, each in zip(AGENTS, workers, strict=True)]
    agents[0].num_resumes = num_resumes
    return replace(EAGER, agents=tuple(agents), kill=KillResult("w", 1, 2, tokens_at_kill))


@pytest.mark.parametrize("tokens_at_kill", [(8, 9, 12), (8, 9, NUM_TOKENS)])
def test_a_killed_run_with_the_same_tokens_passes(tokens_at_kill: tuple[int, ...]):
    assert failed(check_kill(EAGER, killed_run(tokens_at_kill=tokens_at_kill))) == []


def test_a_stream_that_had_ended_before_its_eighth_token_may_have_fewer_when_the_worker_dies():
    short = stream(AGENTS[2], answers=answered(AGENTS[2], 4), workers=("v",))
    unkilled, killed = (replace(run, agents=(*run.agents[:2], short)) for run in (EAGER, killed_run(tokens_at_kill=(8, 9, 4))))
    assert failed(check_kill(unkilled, killed)) == []


def test_a_token_that_differs_after_the_kill_fails_by_name():
    run = killed_run()
    run.agents[1].answers[-1].token_ids[-1] = 77
    (message,) = failed(check_kill(EAGER, run))
    assert message.endswith("different: critic")


@pytest.mark.parametrize("run", [killed_run(num_moved=0), killed_run(num_resumes=0), killed_run(tokens_at_kill=(7, 9, 12))])
def test_a_kill_that_proves_nothing_fails(run: PolicyResult):
    assert len(failed(check_kill(EAGER, run))) == 1


def test_a_worker_that_could_not_be_killed_in_time_fails():
    assert failed(check_kill(EAGER, EAGER)) == [
        "a worker dies while all streams run: the streams ended before the worker could be killed"
    ]


def test_savings_are_differences_and_ratios_of_the_two_runs():
    saved = savings(EAGER, replace(ISOLATED, base_bytes_held=4800, residual_bytes_held=0, wall_s=5.0))
    assert (saved.prefill_tokens, saved.prefill_ratio) == (300, 2.0)
    assert (saved.kv_bytes, saved.kv_ratio) == (3600, 4.0)
    assert (saved.wall_s, saved.wall_ratio) == (3.0, 2.5)
    assert saved.lost_answers == {}


def test_answers_that_sharing_lost_are_counted_by_adapter():
    assert savings(with_first(EAGER, wrong(AGENTS[0])), ISOLATED).lost_answers == {"planner": 2}
    assert savings(EAGER, with_first(ISOLATED, wrong(AGENTS[0]))).lost_answers == {}


def test_the_json_has_every_stream_with_its_answers_tokens_and_hits():
    checks = check_policies(EAGER, ISOLATED)
    values = to_json([with_first(EAGER, wrong(AGENTS[0])), killed_run()], savings(EAGER, ISOLATED), checks)
    run = values["runs"][0]
    row = run["agents"][0]
    assert (row["name"], row["adapter"], row["useful_hit_tokens"]) == ("planner", "planner", CONTEXT_LEN)
    answer = row["answers"][1]
    assert (answer["question"], answer["right_answer"], answer["text"]) == ("planner 1?", "1.", " planner 1? yes")
    assert (answer["is_right"], answer["finish_reason"], answer["token_ids"]) == (False, "stop", list(range(6)))
    assert (run["num_right"], run["num_answers"], run["kv_bytes_held"]) == (5, 7, 1200)
    assert values["runs"][1]["kill"]["worker_id"] == "w"
    assert [check["holds"] for check in values["checks"]] == [True] * len(checks)
