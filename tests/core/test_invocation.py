"""Where an aLoRA starts: at the last whole occurrence of its invocation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkkv_cluster.core.invocation import last_invocation


def find(prompt: list[int], invocation: list[int]) -> int | None:
    return last_invocation(np.asarray(prompt, dtype=np.int32), invocation)


@pytest.mark.parametrize(
    ("prompt", "start"),
    [
        ([5, 6, 5], 0),
        ([1, 5, 6, 5, 2], 1),
        ([5, 6, 5, 6, 5], 2),  # overlapping
        ([5, 6, 5, 1, 5, 6], 0),  # the second is cut off
        ([5, 6, 1, 5], None),
        ([5, 6], None),
        ([], None),
    ],
)
def test_the_last_whole_occurrence_counts(prompt: list[int], start: int | None) -> None:
    assert find(prompt, [5, 6, 5]) == start


@given(st.lists(st.integers(0, 2), max_size=30), st.lists(st.integers(0, 2), min_size=1, max_size=4))
def test_no_other_place_matches_later(prompt: list[int], invocation: list[int]) -> None:
    length = len(invocation)
    starts = [start for start in range(len(prompt) - length + 1) if prompt[start : start + length] == invocation]
    assert find(prompt, invocation) == (starts[-1] if starts else None)
