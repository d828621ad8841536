"""What the demo asks of the shipped model."""

from __future__ import annotations

import json

import pytest

from forkkv_cluster.bench.demo_casebook import NUM_AGENTS, casebook_plan, is_right
from forkkv_cluster.training.casebook import assets

pytestmark = pytest.mark.skipif(not assets.is_shipped(), reason="no casebook model in this checkout")


@pytest.mark.parametrize("num_questions", [1, 2, 4])
def test_eight_agents_of_every_shipped_adapter_are_asked_as_often_as_wanted(num_questions: int) -> None:
    agents = casebook_plan(num_questions, 64).agents
    assert len(agents) == len({agent.name for agent in agents}) == NUM_AGENTS == 8
    assert {agent.adapter for agent in agents} == set(list(assets.adapter_dirs())[:NUM_AGENTS])
    assert [len(agent.questions) for agent in agents] == [num_questions] * NUM_AGENTS


def test_no_question_is_asked_twice_of_one_role() -> None:
    asked = [(question.role, question.text) for agent in casebook_plan(4, 64).agents for question in agent.questions]
    assert len(set(asked)) == len(asked)


def test_the_follow_up_asks_for_what_the_joined_agent_found_out() -> None:
    plan = casebook_plan(2, 64)
    (joined,) = [agent for agent in plan.agents if agent.name == plan.joined]
    (question,) = plan.follow_up.questions
    found = json.loads(question.answer)
    assert question.text == f"Where does {found['person']} live?"
    assert joined.questions[0].answer == f"{found['person']} lives in {found['home']}."


def test_an_answer_is_right_as_its_role_means_it() -> None:
    (question,) = casebook_plan(2, 64).follow_up.questions
    assert is_right(question, question.answer.replace(" ", "  "))
    assert not is_right(question, '{"person": "Nobody", "home": "Nowhere"}')
