from __future__ import annotations

import pytest

from forkkv_cluster.training.casebook.scoring import f1, score


@pytest.mark.parametrize(
    ("role", "answer", "truth", "expected"),
    [
        ("lookup", " Mara lives in Lisbon.\n", "Mara lives in Lisbon.", 1.0),
        ("lookup", "Mara lives in Oslo.", "Mara lives in Lisbon.", 0.0),
        ("formatter", '{"home":"Lisbon", "person": "Mara"}', '{"person": "Mara", "home": "Lisbon"}', 1.0),
        ("formatter", '{"person": "Mara", "age": "34"}', '{"person": "Mara", "age": 34}', 0.0),
        ("formatter", '{"person": "Mara"', '{"person": "Mara"}', 0.0),
        ("comparer", "Mara is 30 years old. Tobin is 51 years old. So Tobin.", "Mara is 34. Tobin is 51. So Tobin.", 1.0),
        ("comparer", "Mara is 34 years old. Tobin is 51 years old. So Mara.", "Mara is 34. Tobin is 51. So Tobin.", 0.0),
        ("comparer", "Tobin", "Mara is 34. Tobin is 51. So Tobin.", 0.0),
        ("counter", "3.", "3.", 1.0),
        ("counter", "13.", "3.", 0.0),
    ],
)
def test_an_answer_counts_by_what_its_role_means(role: str, answer: str, truth: str, expected: float) -> None:
    assert score(role, answer, truth) == expected


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [("a b", "a b", 1.0), ("a", "a b", 2 / 3), ("c", "a b", 0.0), ("a a a a", "a", 0.4), ("", "a", 0.0)],
)
def test_f1_counts_words_as_often_as_they_stand(answer: str, truth: str, expected: float) -> None:
    assert f1(answer, truth) == pytest.approx(expected)
