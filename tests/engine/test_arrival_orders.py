"""Branches of the trained casebook model over contexts that the base model writes: whoever comes, and whenever, each says what
it would say alone. The control lets the first agent write, and then it does not hold.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from forkkv_cluster.core.request import Sharing, WriterMode
from forkkv_cluster.training.casebook import assets
from forkkv_cluster.training.casebook.generator import Casebook, build_casebook
from forkkv_cluster.training.casebook.roles import ask as turns_of
from forkkv_cluster.training.casebook.tokenizer import Encoder
from tests.engine.arrivals import Answer, Ask, Composition, Played, Stage, compose

pytestmark = pytest.mark.skipif(not assets.is_shipped(), reason="the casebook model is not in this installation")

NUM_COMPOSITIONS = 100
CONTEXT_TOKENS = (192, 128)
CLEAR = 1e-2
"""Log probabilities further apart than this are told apart whatever the batch."""


def book_for_all_roles(max_tokens: int, adapters: Sequence[str]) -> Casebook:
    """The first held-out casebook that every adapter can be asked about."""
    for seed in range(1000):
        book = build_casebook(random.Random(seed), max_tokens, "held_out")
        if all(turns_of(assets.role_of(name), random.Random(0), book, 1) for name in adapters):
            return book
    raise AssertionError("no casebook has something for every adapter")


class Questions:
    """What adapters may be asked about each of the contexts, as tokens."""

    def __init__(self, adapters: Sequence[str]) -> None:
        self.adapters = adapters
        self._encoder = Encoder(assets.model_dir())
        self._books = [book_for_all_roles(max_tokens, adapters) for max_tokens in CONTEXT_TOKENS]
        self.contexts = [self._encoder.context(book.text).tolist() for book in self._books]

    def of(self, adapter: str | None, context: int, count: int) -> list[tuple[int, ...]]:
        """The ``count``, at most, with the longest answers."""
        turns = turns_of(assets.role_of(adapter), random.Random(0), self._books[context], 8)
        encoded = sorted((self._encoder.turn(turn) for turn in turns), key=lambda turn: -len(turn[1]))
        return [tuple(question) for question, _ in encoded[:count]]


@pytest.fixture(scope="module")
def questions() -> Questions:
    return Questions(list(assets.adapter_dirs()))


@pytest.fixture(scope="module")
def stage(questions: Questions) -> Stage:
    torch.set_num_threads(1)
    return Stage(assets.model_dir(), assets.adapter_dirs(), questions.contexts)


@pytest.fixture(scope="module")
def asks(questions: Questions, stage: Stage) -> list[Ask]:
    """Every adapter under every sharing that it can have, the base model, and strangers who share nothing."""
    found = []
    for adapter in questions.adapters:
        (own,), (other,) = questions.of(adapter, 0, 1), questions.of(adapter, 1, 1)
        second = Sharing.BASE if stage.is_activated(adapter) else Sharing.RESIDUAL
        found += [Ask(0, Sharing.EAGER, adapter, own), Ask(0, second, adapter, own), Ask(1, Sharing.EAGER, adapter, other)]
    (own,) = questions.of(None, 0, 1)
    found += [Ask(0, sharing, None, own) for sharing in (Sharing.EAGER, Sharing.RESIDUAL, Sharing.BASE)]
    for adapter in (None, *questions.adapters[:2]):
        (own,) = questions.of(adapter, 0, 1)
        found.append(Ask(0, Sharing.ISOLATED, adapter, own, tenant="stranger"))
    return found


@pytest.fixture(scope="module")
def alone(stage: Stage, asks: list[Ask]) -> dict[Ask, Answer]:
    return {ask: stage.alone(ask) for ask in asks}


@pytest.fixture(scope="module")
def played(stage: Stage, asks: list[Ask], questions: Questions) -> list[tuple[Composition, Played]]:
    compositions = [compose(seed, asks, questions.adapters) for seed in range(NUM_COMPOSITIONS)]
    return [(composition, stage.play(composition)) for composition in compositions]


def test_every_branch_answers_as_it_does_alone(alone: dict[Ask, Answer], played: list[tuple[Composition, Played]]) -> None:
    assert len(played) >= 100
    for seed, (composition, result) in enumerate(played):
        for ask, answer in result.answers.items():
            assert answer.token_ids == alone[ask].token_ids, f"{ask} in composition {seed}: {composition}"
            assert answer.distance(alone[ask]) < 1e-4, f"{ask} in composition {seed}: {composition}"


def test_no_answer_hangs_on_a_tie(alone: dict[Ask, Answer]) -> None:
    assert {ask: answer.margin for ask, answer in alone.items() if answer.margin < CLEAR} == {}


def test_the_compositions_are_many_and_unlike_each_other(
    asks: list[Ask], stage: Stage, played: list[tuple[Composition, Played]]
) -> None:
    compositions, results = zip(*played, strict=True)
    assert len(set(compositions)) == len(compositions)
    assert len({tuple(composition.asks) for composition in compositions}) > 90  # orders of arrival
    answered = [ask for result in results for ask in result.answers]
    assert set(answered) == set(asks)
    assert len(set(stage.ranks.values())) > 1
    assert sum(result.evictions > 0 for result in results) >= 10
    assert sum(result.preemptions > 0 for result in results) >= 1
    assert sum(result.most_at_once > 1 for result in results) >= 50
    assert sum(len(result.answers) < len(composition.asks) for composition, result in played) >= 10  # cancelled


@pytest.mark.parametrize("writer", [WriterMode.CANONICAL, WriterMode.FIRST])
def test_who_came_first_decides_what_the_extractor_says_only_where_the_first_agent_writes(
    stage: Stage, questions: Questions, writer: WriterMode
) -> None:
    (before,) = questions.of("hop", 0, 1)
    first = Ask(0, Sharing.RESIDUAL, "hop", before)
    extractors = [Ask(0, Sharing.RESIDUAL, "extractor", own) for own in questions.of("extractor", 0, 8)]
    declared = tuple(questions.adapters)
    last, later = (
        stage.play(Composition(tuple(order), declared), writer).answers
        for order in ([*extractors, first], [first, *extractors])
    )
    changed = [ask for ask in extractors if last[ask].token_ids != later[ask].token_ids]
    assert bool(changed) is (writer is WriterMode.FIRST)
