from __future__ import annotations

from itertools import islice

import numpy as np

from forkkv_cluster.training.casebook.batches import BUCKETS, CasebookBatches, batch_of
from forkkv_cluster.training.casebook.generator import Level
from forkkv_cluster.training.casebook.samples import Sample, examples, samples
from forkkv_cluster.training.casebook.tokenizer import INVOCATION, Encoder


def draw(encoder: Encoder, seed: int, count: int = 3) -> list[Sample]:
    stream = samples(encoder, {"lookup": 0.5, "mapper": 0.5}, seed=seed, context_tokens=(200, 400), num_turns=6)
    return list(islice(stream, count))


def test_a_seed_gives_the_same_stream(encoder: Encoder) -> None:
    for one, other, third in zip(draw(encoder, 1), draw(encoder, 1), draw(encoder, 2), strict=True):
        assert np.array_equal(one.branch_ids, other.branch_ids)
        assert np.array_equal(one.context_ids, other.context_ids)
        assert not np.array_equal(one.context_ids, third.context_ids)


def test_the_mask_covers_each_answer_and_its_end_and_nothing_of_the_questions(encoder: Encoder) -> None:
    invocation = encoder.words(INVOCATION)
    for sample in draw(encoder, 3):
        starts = np.flatnonzero(np.diff(sample.is_answer.astype(int), prepend=0) == 1)
        ends = np.flatnonzero(np.diff(sample.is_answer.astype(int), append=0) == -1)
        assert len(starts) == len(ends) > 1
        for start, end in zip(starts, ends, strict=True):
            assert sample.branch_ids[start - len(invocation) : start].tolist() == invocation
            assert sample.branch_ids[end] == encoder.eos


def test_a_context_begins_with_its_token_and_has_nothing_of_a_role(encoder: Encoder) -> None:
    for sample in draw(encoder, 4):
        assert sample.context_ids[0] == encoder.bos
        assert encoder.eos not in sample.context_ids
        assert 100 < len(sample.context_ids) <= 400


def test_examples_are_the_same_for_the_same_arguments_and_fit_their_length(encoder: Encoder) -> None:
    one, other = (examples("hop", seed=1, context_tokens=300, count=4) for _ in range(2))
    assert one == other
    assert all(len(encoder.context(example.context)) <= 300 for example in one)


def test_a_batch_pads_short_rows_and_cuts_long_ones(encoder: Encoder) -> None:
    rows = draw(encoder, 5, 2)
    row_len = len(rows[0].context_ids) + len(rows[0].branch_ids) + 5
    batch = batch_of(rows, row_len, encoder.pad, 0)
    assert batch.input_ids[0, -5:].tolist() == [encoder.pad] * 5
    cut = batch_of(rows, 60, encoder.pad, 0)
    assert cut.input_ids[1].tolist() == rows[1].context_ids[:60].tolist()
    assert len(cut.answer_at) == 0


def test_answers_are_where_the_batch_says(encoder: Encoder) -> None:
    rows = draw(encoder, 6, 2)
    batch = batch_of(rows, 800, encoder.pad, 0)
    wanted = np.concatenate([row.branch_ids[row.is_answer] for row in rows])
    assert batch.input_ids.flatten()[batch.answer_at].tolist() == wanted.tolist()


def test_batches_come_from_the_stage_and_those_below(encoder: Encoder, tokenizer_dir: object) -> None:
    batches = CasebookBatches(str(tokenizer_dir), {"lookup": 1.0}, seed=0, batch_tokens=600, stage=1)
    assert {batch.bucket for batch in islice(batches, 12)} == {0, 1}
    batches.stage = 3
    assert max(batch.bucket for batch in islice(batches, 12)) == 3


def test_the_curriculum_grows_in_length_and_variety() -> None:
    lengths = [bucket.context_tokens for bucket in BUCKETS]
    assert lengths == sorted(lengths)
    assert BUCKETS[0].level is Level.PLAIN
    assert BUCKETS[-1].level is Level.FULL
    assert lengths[-1] > 2048
