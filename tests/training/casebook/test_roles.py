from __future__ import annotations

import json
import random

import pytest

from forkkv_cluster.training.casebook.code_book import region_of
from forkkv_cluster.training.casebook.generator import Casebook, Fact, build_casebook
from forkkv_cluster.training.casebook.roles import ROLES, ask

BOOK = Casebook(
    text="""Notes of the registry.
- Mara lives in Lisbon, is 34 years old and reports to Tobin.
* Tobin: home Oslo, age 51
People: Ada lives in Oslo.""",
    facts=(
        Fact("Mara", "home", "Lisbon"),
        Fact("Mara", "age", "34"),
        Fact("Mara", "manager", "Tobin"),
        Fact("Tobin", "home", "Oslo"),
        Fact("Tobin", "age", "51"),
        Fact("Ada", "home", "Oslo"),
    ),
)
ANSWERS = {
    "lookup": {"Where does Mara live?": "Mara lives in Lisbon.", "Who does Mara report to?": "Mara reports to Tobin."},
    "asked_for_json": {"How old is Mara? Answer in JSON.": '{"person": "Mara", "age": 34}'},
    "record": {"What is said of Tobin?": "Tobin lives in Oslo. Tobin is 51 years old."},
    "formatter": {"Where does Mara live?": '{"person": "Mara", "home": "Lisbon"}'},
    "mapper": {"Where does Ada live?": f"Ada lives in Oslo, {region_of('Oslo')}."},
    "extractor": {"What is said of Tobin?": "home Oslo; age 51."},
    "comparer": {"Who is older, Mara or Tobin?": "Mara is 34 years old. Tobin is 51 years old. So Tobin."},
    "clerk": {"Where does Mara live?": "| Mara | home | Lisbon |", "What is the age of Tobin?": "| Tobin | age | 51 |"},
    "verifier": {
        "How old is Mara? 34?": "Mara is 34 years old. So yes.",
        "How old is Mara? 51?": "Mara is 34 years old. So no.",
    },
    "reverse": {"Who lives in Lisbon?": "Mara lives in Lisbon."},
    "hop": {"Where does the manager of Mara live?": "Tobin lives in Oslo."},
    "liaison": {"How old is the manager of Mara?": "Tobin is 51 years old."},
    "sourcer": {
        "On which page is Mara?": "Mara: notes.",
        "On which page is Tobin?": "Tobin: register.",
        "On which page is Ada?": "Ada: sentences.",
    },
    "counter": {"How many people live in Oslo?": "2.", "How many people live in Lisbon?": "1."},
}


@pytest.mark.parametrize("role", sorted(ANSWERS))
def test_a_role_answers_from_the_facts(role: str) -> None:
    turns = [turn for seed in range(200) for turn in ask(role, random.Random(seed), BOOK, 1)]
    answers = {turn.question: turn.answer for turn in turns}
    assert all(answers[question] == answer for question, answer in ANSWERS[role].items())


def test_reverse_lookup_asks_for_no_value_that_two_share() -> None:
    questions = {turn.question for seed in range(200) for turn in ask("reverse", random.Random(seed), BOOK, 1)}
    assert questions == {"Who lives in Lisbon?"}


def test_the_verifier_is_asked_of_what_is_so_and_of_what_the_casebook_says_of_another_alike() -> None:
    rng = random.Random(3)
    proposals = []
    for _ in range(60):
        book = build_casebook(rng, 600)
        for turn in ask("verifier", rng, book, 4):
            value = turn.question.removesuffix("?").rsplit(" ", 1)[1]
            fact = turn.about[0]
            assert turn.answer.endswith("So yes." if value == fact.value else "So no.")
            said = {other.value for other in book.stating(fact.attribute)}
            assert value in said or said == {fact.value}
            proposals.append(value == fact.value)
    assert 0.4 < sum(proposals) / len(proposals) < 0.6


def test_the_sourcer_names_every_kind_of_page() -> None:
    rng = random.Random(4)
    pages = {turn.answer.rsplit(" ", 1)[1] for _ in range(20) for turn in ask("sourcer", rng, build_casebook(rng, 600), 4)}
    assert pages == {"table.", "register.", "notes.", "sentences."}


def test_no_answer_tells_a_fact_that_another_one_tells() -> None:
    for seed in range(20):
        rng = random.Random(seed)
        book = build_casebook(rng, 300)
        told: set[Fact] = set()
        turns = [turn for role in ("lookup", "formatter", "record") for turn in ask(role, rng, book, 6, told)]
        facts = [fact for turn in turns for fact in turn.about]
        assert len(facts) == len(set(facts)) > 6


def test_the_counter_counts_from_none_to_several() -> None:
    rng = random.Random(1)
    answers = {turn.answer for _ in range(60) for turn in ask("counter", rng, build_casebook(rng, 800), 4)}
    assert {"0.", "1.", "2.", "3."} <= answers


@pytest.mark.parametrize("role", sorted(ROLES))
def test_every_role_can_be_asked_of_an_ordinary_casebook(role: str) -> None:
    rng = random.Random(5)
    turns = ask(role, rng, build_casebook(rng, 1024, "held_out"), 4)
    assert len(turns) == 4
    if role in ("formatter", "asked_for_json"):
        assert all(len(json.loads(turn.answer)) == 2 for turn in turns)
