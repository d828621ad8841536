from __future__ import annotations

import json

import numpy as np
import pytest

from forkkv_cluster.bench.quality.comparison import Outcome, compared, first_divergence, rows_of
from forkkv_cluster.bench.quality.policies import Cell, Policy, Subject
from forkkv_cluster.core.agreement import Agreement
from forkkv_cluster.core.request import PromptLogprobs, WriterMode

CELL = Cell("a", Policy.EAGER, WriterMode.CANONICAL, "b", "a")
SUBJECT = Subject("a", 8)


def outcome(length: int, *, right: bool = True, ids: tuple[int, ...] = (1, 2), divergence: int | None = None) -> Outcome:
    return Outcome(length, right, 1.0 if right else 0.5, ids, Agreement(4, 0 if right else 1, 0.25), divergence)


def scored(token_ids: list[int], best: list[int]) -> PromptLogprobs:
    top = np.array([[one, 9] if one != 9 else [9, 2] for one in best], dtype=np.int32)
    logs = np.log(np.tile([0.75, 0.25], (len(best), 1))).astype(np.float32)
    return PromptLogprobs(5, np.array(token_ids, dtype=np.int32), logs[:, 0], np.ones(len(best), dtype=np.int32), top, logs)


@pytest.mark.parametrize(
    ("reference", "other", "index"),
    [((1, 2), (1, 2), None), ((1, 2), (1, 3), 1), ((1, 2), (1,), 1), ((), (4,), 0), ((5, 2), (6, 2), 0)],
)
def test_answers_part_at_their_first_other_token_or_where_one_ends(
    reference: tuple[int, ...], other: tuple[int, ...], index: int | None
):
    assert first_divergence(reference, other) == index


def test_positions_agree_where_the_most_likely_tokens_do():
    found = compared(scored([1, 2, 3], [1, 2, 3]), scored([1, 2, 3], [1, 9, 3]))
    assert (found.num_positions, found.num_disagreements) == (3, 1)
    assert found.kl_sum == pytest.approx(0.5 * np.log(3), rel=1e-3)


def test_a_forced_token_that_another_list_lacks_still_counts_in_kl():
    reference, other = scored([1], [1]), scored([1], [7])
    other.logprobs[:] = np.log(0.05)
    expected = 0.75 * np.log(0.75 / 0.05) + 0.25 * np.log(0.25 / 0.25) + 0.0  # token 1, token 9, all others (none in one)
    assert compared(reference, other).kl_sum == pytest.approx(expected, abs=1e-3)


def test_scores_of_different_tokens_are_not_compared():
    with pytest.raises(ValueError, match="different tokens"):
        compared(scored([1, 2], [1, 2]), scored([1, 3], [1, 3]))


def test_a_row_over_all_lengths_has_the_errors_and_each_length_a_row():
    outcomes = [outcome(64), outcome(128, right=False, ids=(1, 3), divergence=1), outcome(128)]
    references = [outcome(64), outcome(128), outcome(128)]
    errors = {"k": [0.1, 0.2], "v": [0.1, 0.1], "hidden": [0.3, 0.3]}
    whole, short, long = rows_of(CELL, SUBJECT, outcomes, references, alone=references, errors=errors)
    assert [row.context_tokens for row in (whole, short, long)] == [0, 64, 128]
    assert [row.num_samples for row in (whole, short, long)] == [3, 1, 2]
    assert (whole.errors, short.errors) == (errors, {})
    assert whole.accuracy.value == pytest.approx(2 / 3)
    assert whole.accuracy_loss.value == pytest.approx(1 / 3)
    assert (short.accuracy_loss.value, long.f1_loss.value) == (0.0, 0.25)
    assert whole.agreement.value == pytest.approx(11 / 12)
    assert whole.kl == pytest.approx(0.75 / 12)
    assert (whole.divergence, short.divergence) == (1, None)
    assert whole.same_as_alone == pytest.approx(2 / 3)


def test_of_one_length_there_is_one_row():
    (row,) = rows_of(CELL, SUBJECT, [outcome(64)], [outcome(64)])
    assert row.context_tokens == 64
    assert row.same_as_alone is None


def test_a_row_goes_through_json():
    (row,) = rows_of(CELL, SUBJECT, [outcome(64)], [outcome(64)], errors={"k": [0.5], "v": [0.5], "hidden": [0.5]})
    found = json.loads(json.dumps(row.to_json()))
    assert found["accuracy"] == {"value": 1.0, "low": pytest.approx(row.accuracy.low), "high": 1.0}
    assert found["errors"]["k"] == [0.5]
