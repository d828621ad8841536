"""The sample casebook: the files that ship are what the generator gives, and every adapter can be asked about it."""

from __future__ import annotations

from pathlib import Path

import pytest

from forkkv_cluster.training.casebook import assets
from forkkv_cluster.training.casebook.roles import ROLES
from forkkv_cluster.training.casebook.sample import NUM_TOKENS, sample_book, sample_turns, write_sample
from forkkv_cluster.training.casebook.schema import attribute_of
from forkkv_cluster.training.casebook.split import is_held_out
from forkkv_cluster.training.casebook.tokenizer import Encoder


@pytest.mark.parametrize("name", ["casebook.txt", "questions.json"])
def test_the_shipped_file_is_what_the_generator_gives(tmp_path: Path, name: str) -> None:
    write_sample(tmp_path)
    written, shipped = ((directory / name).read_text() for directory in (tmp_path, assets.ROOT / "sample"))
    assert shipped == written, "run python -m forkkv_cluster.training.casebook.sample"


@pytest.mark.parametrize("role", list(ROLES))
def test_each_role_has_eight_questions_to_ask(role: str) -> None:
    questions = [turn.question for turn in sample_turns(role, 8)]
    assert len(set(questions)) == 8


def test_no_fact_of_it_stood_in_training() -> None:
    for fact in sample_book().facts:
        assert is_held_out(fact.entity, fact.value, attribute_of(fact.attribute).pool), fact


def test_it_fills_the_length_that_it_is_said_to_have(encoder: Encoder) -> None:
    assert NUM_TOKENS - 64 <= len(encoder.context(sample_book().text)) <= NUM_TOKENS
