"""What ``auto`` measures the shipped adapters on."""

from __future__ import annotations

from pathlib import Path

import pytest

from forkkv_cluster.engine.sample_contexts import SAMPLES_FILE, FileSamples
from forkkv_cluster.training.casebook import assets, write_samples
from forkkv_cluster.training.casebook.schema import attribute_of
from forkkv_cluster.training.casebook.split import is_held_out
from forkkv_cluster.training.casebook.tokenizer import INVOCATION, Encoder
from forkkv_cluster.training.casebook.write_samples import asked_books, measured_adapters, sample_lines

pytestmark = pytest.mark.skipif(not assets.is_shipped(), reason="the casebook model is not in this installation")


@pytest.fixture(scope="module")
def shipped() -> Encoder:
    return Encoder(assets.model_dir())


def test_nothing_that_is_held_out_is_told(shipped: Encoder) -> None:
    books = [book for book, _ in asked_books(shipped, "extractor", positions=400, seed=3)]
    facts = [fact for book in books for fact in book.facts]
    assert len(facts) > 100
    assert not any(is_held_out(fact.entity, fact.value, attribute_of(fact.attribute).pool) for fact in facts)


def test_the_engine_reads_a_file_as_questions_over_contexts_and_a_seed_repeats_it(shipped: Encoder, tmp_path: Path) -> None:
    text = sample_lines(shipped, "hop", positions=60, seed=5)
    assert text == sample_lines(shipped, "hop", positions=60, seed=5) != sample_lines(shipped, "hop", positions=60, seed=6)
    (tmp_path / SAMPLES_FILE).write_text(text)
    tokens = shipped.context, shipped.words
    samples = FileSamples(
        tmp_path / SAMPLES_FILE, lambda text, special: list(tokens[not special](text)), shipped.size
    ).samples()
    for sample in samples:
        assert sample.context[0] == shipped.bos
        assert sample.prompt[-len(shipped.words(INVOCATION)) :].tolist() == shipped.words(INVOCATION)
        assert sample.continuation is None


@pytest.mark.parametrize("adapter", list(measured_adapters()))
def test_a_shipped_file_is_what_the_command_writes(shipped: Encoder, adapter: str) -> None:
    found = measured_adapters()[adapter] / SAMPLES_FILE
    is_fresh = found.is_file() and found.read_text() == sample_lines(shipped, assets.role_of(adapter))
    assert is_fresh, f"run python -m {write_samples.__name__} {adapter}"
