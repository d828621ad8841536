"""The demo's plan: eight agents with the role adapters that ship, over the sample casebook."""

from __future__ import annotations

from collections import Counter
from itertools import islice

from forkkv_cluster.bench.demo_plan import Agent, DemoPlan, Question
from forkkv_cluster.training.casebook import assets
from forkkv_cluster.training.casebook.roles import Turn, json_of
from forkkv_cluster.training.casebook.sample import sample_book, sample_turns
from forkkv_cluster.training.casebook.schema import attribute_of
from forkkv_cluster.training.casebook.scoring import score
from forkkv_cluster.training.casebook.tokenizer import turn_text

NUM_AGENTS = 8


def casebook_plan(num_questions: int, max_tokens: int) -> DemoPlan:
    """``num_questions`` to each agent. Each shipped adapter has an agent, the first ones a second where there are few.

    Raises NotFound where the installation holds no casebook model.
    """
    assets.model_dir()
    adapters = tuple(assets.adapter_dirs())
    agents = _agents([adapters[index % len(adapters)] for index in range(NUM_AGENTS)], num_questions)
    hop = next(agent for agent in agents if agent.adapter == "hop")
    return DemoPlan(sample_book().text, agents, hop.name, _follow_up(hop), is_right, max_tokens)


def _agents(adapters: list[str], num_questions: int) -> tuple[Agent, ...]:
    """Agents of one role share a draw of questions, so that none is asked twice."""
    num_agents = Counter(assets.role_of(adapter) for adapter in adapters)
    drawn = {role: iter(sample_turns(role, count * num_questions)) for role, count in num_agents.items()}
    agents: list[Agent] = []
    for index, adapter in enumerate(adapters):
        role, number = assets.role_of(adapter), 1 + adapters[:index].count(adapter)
        questions = tuple(_question(role, turn) for turn in islice(drawn[role], num_questions))
        agents.append(Agent(adapter if number == 1 else f"{adapter}-{number}", adapter, questions))
    return tuple(agents)


def _follow_up(hop: Agent) -> Agent:
    """It reads what ``hop`` found out: where someone's manager lives. Asked for that one's home, it answers in JSON."""
    found = hop.questions[0].answer
    fact = next(fact for fact in sample_book().stating("home") if fact.sentence == found)
    question = fact.put(attribute_of("home").questions[0])
    return Agent("follow-up", "formatter", (_question("formatter", Turn(question, json_of(fact))),))


def _question(role: str, turn: Turn) -> Question:
    return Question(turn.question, turn_text(turn.question), role, turn.answer)


def is_right(question: Question, answer: str) -> bool:
    return score(question.role, answer, question.answer) == 1.0
