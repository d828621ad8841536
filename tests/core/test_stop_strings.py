"""Stop strings over every way to cut a text into pieces."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from forkkv_cluster.core.stop_strings import StopStringMatcher


def run(pieces: list[str], stop: tuple[str, ...]) -> tuple[str, str | None]:
    matcher = StopStringMatcher(stop)
    text = "".join(matcher.push(piece) for piece in pieces)
    return (text if matcher.matched is not None else text + matcher.flush()), matcher.matched


def test_text_passes_at_once_without_stop_strings() -> None:
    assert StopStringMatcher().push("anything") == "anything"


def test_a_tail_that_may_become_a_stop_string_is_held_back() -> None:
    matcher = StopStringMatcher(("END",))
    assert matcher.push("the EN") == "the "
    assert matcher.push("glish") == "ENglish"


def test_the_stop_string_is_no_part_of_the_output() -> None:
    assert run(["an E", "N", "D and more"], ("END",)) == ("an ", "END")


def test_the_first_occurrence_of_any_stop_string_counts() -> None:
    assert run(["a;b.c"], (".", ";")) == ("a", ";")


def test_the_longer_stop_string_wins_where_two_begin_together() -> None:
    assert run(["x\n\ny"], ("\n", "\n\n")) == ("x", "\n\n")


def test_what_was_held_back_comes_with_the_end() -> None:
    assert run(["an EN"], ("END",)) == ("an EN", None)


@given(
    st.text("ab.", max_size=30),
    st.lists(st.integers(0, 30), max_size=6),
    st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3),
)
def test_the_output_does_not_depend_on_the_pieces(text: str, cuts: list[int], stop: list[str]) -> None:
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in pairwise(borders)]
    output, matched = run(pieces, tuple(stop))
    positions = [text.index(s) for s in stop if s in text]
    assert (matched is not None) == bool(positions)
    # A short stop string may be seen before a longer one that begins earlier has ended, but never the other way round.
    assert text.startswith(output)
    if matched is None:
        assert output == text
    else:
        assert text[len(output) :].startswith(matched)
