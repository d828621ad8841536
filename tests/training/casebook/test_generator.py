from __future__ import annotations

import random

import pytest

from forkkv_cluster.training.casebook.generator import Level, build_casebook, num_words
from forkkv_cluster.training.casebook.schema import KINDS
from forkkv_cluster.training.casebook.split import allowed_values


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_a_seed_gives_the_same_casebook(split: str) -> None:
    one, other, third = (build_casebook(random.Random(seed), 400, split) for seed in (3, 3, 4))
    assert one == other
    assert one.text != third.text


@pytest.mark.parametrize("max_tokens", [32, 100, 256, 1000, 2048, 3000])
def test_a_casebook_is_nearly_as_long_as_asked_and_never_longer(max_tokens: int) -> None:
    for seed in range(5):
        length = num_words(build_casebook(random.Random(seed), max_tokens).text) + 1
        assert max(max_tokens - 64, max_tokens // 4) <= length <= max_tokens


def test_a_casebook_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 32"):
        build_casebook(random.Random(0), 31)


@pytest.mark.parametrize("level", list(Level))
def test_every_fact_stands_in_the_text_its_entity_before_its_value(level: Level) -> None:
    for seed in range(10):
        book = build_casebook(random.Random(seed), 600, level=level)
        for fact in book.facts:
            assert fact.value in book.text[book.text.index(fact.entity) :]


def test_an_entity_has_one_value_of_an_attribute() -> None:
    for seed in range(10):
        facts = build_casebook(random.Random(seed), 2048).facts
        assert len({(fact.entity, fact.attribute) for fact in facts}) == len(facts)


def test_no_training_casebook_states_a_pair_that_a_held_out_one_states() -> None:
    pairs: dict[str, set[tuple[str, str]]] = {}
    for split in ("train", "held_out"):
        books = [build_casebook(random.Random(f"{split}/{seed}"), 1500, split) for seed in range(60)]
        pairs[split] = {(fact.entity, fact.value) for book in books for fact in book.facts}
    assert min(len(found) for found in pairs.values()) > 2000
    assert pairs["train"].isdisjoint(pairs["held_out"])


def test_all_pairs_are_split_without_overlap_and_without_a_name_that_has_none() -> None:
    from forkkv_cluster.training.casebook.lexicon import POOLS

    for kind in KINDS:
        for attribute in kind.attributes:
            for entity in POOLS[kind.pool]:
                train, held_out = (set(allowed_values(entity, attribute.pool, split)) for split in ("train", "held_out"))
                assert train
                assert held_out
                assert not train & held_out
                assert train | held_out == set(POOLS[attribute.pool]) - {entity}
