from dataclasses import replace

import pytest

from forkkv_cluster.bench.demo_checks import Check, check_kill, check_policies, savings, to_json
from forkkv_cluster.bench.demo_plan import AGENTS, FOLLOW_UP, Agent, AgentResult, KillResult, PolicyResult
from forkkv_cluster.core.request import PrefixUsage

CONTEXT_LEN, MAX_TOKENS = 100, 12


def stream(agent: Agent, num_context_tokens: int = CONTEXT_LEN, useful: int | None = None, num_tokens: int = MAX_TOKENS):
    hit = num_context_tokens if useful is None else useful
    usage = PrefixUsage(base_hit_tokens=hit, residual_hit_tokens=hit, useful_hit_tokens=hit)
    return AgentResult(
        agent, num_context_tokens, token_ids=list(range(num_tokens)), worker="w", workers=("w",), is_done=True, usage=usage
    )


def result(sharing: str, prefill_tokens_run: int, **changes) -> PolicyResult:
    plain = PolicyResult(
        sharing=sharing,
        wall_s=2.0,
        num_context_tokens=CONTEXT_LEN,
        num_joined_tokens=MAX_TOKENS,
        agents=tuple(stream(agent) for agent in AGENTS),
        follow_up=stream(FOLLOW_UP, CONTEXT_LEN + MAX_TOKENS),
        prefill_tokens_run=prefill_tokens_run,
        base_bytes_held=1000,
        residual_bytes_held=200,
    )
    return replace(plain, **changes)


EAGER, ISOLATED = result("eager", 300), result("isolated", 900)


def failed(checks: list[Check]) -> list[str]:
    return [f"{check.promise}: {check.evidence}" for check in checks if not check.holds]


def test_results_that_keep_every_promise_pass():
    assert failed(check_policies(EAGER, ISOLATED, MAX_TOKENS)) == []


def test_an_agent_that_missed_a_part_of_the_context_fails_by_name():
    agents = (stream(AGENTS[0], useful=99), *EAGER.agents[1:])
    (message,) = failed(check_policies(replace(EAGER, agents=agents), ISOLATED, MAX_TOKENS))
    assert message.endswith("planner: 99 of 100")


def test_fewer_than_three_times_the_prefill_fails():
    (message,) = failed(check_policies(replace(EAGER, prefill_tokens_run=301), ISOLATED, MAX_TOKENS))
    assert "301 against 900: 3.0 times" in message


def test_a_stream_that_ended_early_fails():
    agents = (stream(AGENTS[0], num_tokens=3), *ISOLATED.agents[1:])
    (message,) = failed(check_policies(EAGER, replace(ISOLATED, agents=agents), MAX_TOKENS))
    assert message.startswith("every stream of the isolated run")


@pytest.mark.parametrize("changes", [{"num_joined_tokens": 0}, {"follow_up": stream(FOLLOW_UP)}])
def test_a_follow_up_that_did_not_read_the_joined_answer_fails(changes):
    (message,) = failed(check_policies(replace(EAGER, **changes), ISOLATED, MAX_TOKENS))
    assert message.startswith("the branch forked after the join")


def killed_run(num_streams: int = 2, num_resumed: int = 2, tokens_at_kill: tuple[int, ...] = (8, 9)) -> PolicyResult:
    agents = tuple(replace(s, num_resumes=int(i < num_resumed)) for i, s in enumerate(EAGER.agents))
    return replace(EAGER, agents=agents, kill=KillResult("w", 1, num_streams, tokens_at_kill))


def test_a_killed_run_with_the_same_tokens_passes():
    assert failed(check_kill(EAGER, killed_run())) == []


def test_a_token_that_differs_after_the_kill_fails_by_name():
    run = killed_run()
    run.agents[1].token_ids = [*run.agents[1].token_ids[:-1], 77]
    (message,) = failed(check_kill(EAGER, run))
    assert message.endswith("different: critic")


@pytest.mark.parametrize("run", [killed_run(num_resumed=1), killed_run(tokens_at_kill=(7, 9))])
def test_a_kill_that_proves_nothing_fails(run: PolicyResult):
    assert len(failed(check_kill(EAGER, run))) == 1


def test_a_worker_that_could_not_be_killed_in_time_fails():
    assert failed(check_kill(EAGER, EAGER)) == [
        "a worker dies while all streams run: the streams ended before the worker could be killed"
    ]


def test_savings_are_differences_and_ratios_of_the_two_runs():
    saved = savings(EAGER, replace(ISOLATED, base_bytes_held=4800, residual_bytes_held=0, wall_s=5.0))
    assert (saved.prefill_tokens, saved.prefill_ratio) == (600, 3.0)
    assert (saved.kv_bytes, saved.kv_ratio) == (3600, 4.0)
    assert (saved.wall_s, saved.wall_ratio) == (3.0, 2.5)


def test_the_json_has_every_stream_with_its_tokens_and_hits():
    checks = check_policies(EAGER, ISOLATED, MAX_TOKENS)
    values = to_json([EAGER, killed_run()], savings(EAGER, ISOLATED), checks)
    row = values["runs"][0]["agents"][0]
    assert (row["name"], row["adapter"], row["useful_hit_tokens"]) == ("planner", "planner", CONTEXT_LEN)
    assert row["token_ids"] == list(range(MAX_TOKENS))
    assert values["runs"][0]["kv_bytes_held"] == 1200
    assert values["runs"][1]["kill"]["worker_id"] == "w"
    assert [check["holds"] for check in values["checks"]] == [True] * len(checks)


def test_eight_agents_run_with_at_least_four_adapters():
    assert len(AGENTS) == 8
    assert len({agent.adapter for agent in AGENTS}) >= 4
