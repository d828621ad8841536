"""Text of an output under stop strings, stop tokens and min_tokens, in any chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkkv_cluster.core.detokenizer import IncrementalDetokenizer
from forkkv_cluster.core.output_text import OutputText
from forkkv_cluster.core.request import SamplingParams


class Letters:
    """A token is the code point of its character."""

    def decode(self, token_ids: Sequence[int], **_: Any) -> str:
        return "".join(map(chr, token_ids))


def run(text: str, sizes: Sequence[int] = (1,), *, ends: bool = False, **params: Any) -> tuple[str, int]:
    """The output's text and tokens; ``ends``: the last token is one that ended it."""
    output = OutputText(IncrementalDetokenizer(Letters()), SamplingParams(max_tokens=1000, **params))
    tokens, found, num_taken, number = [ord(c) for c in text], "", 0, 0
    while tokens:
        size = sizes[number % len(sizes)]
        chunk, tokens, number = tokens[:size], tokens[size:], number + 1
        taken, new = output.push(chunk, chunk[-1] if ends and not tokens else None)
        found, num_taken = found + new, num_taken + taken
        if output.has_stopped:
            return found, num_taken
    return found + output.finish(), num_taken


@pytest.mark.parametrize(("is_included", "text"), [(False, "ab"), (True, "ab;;")])
def test_a_stop_string_is_shown_where_it_is_asked_for(is_included: bool, text: str) -> None:
    assert run("ab;;cd", stop=(";;",), include_stop_str_in_output=is_included) == (text, 4)


@pytest.mark.parametrize(("is_included", "text"), [(False, "ab"), (True, "ab.")])
def test_so_is_a_token_that_ended_the_output(is_included: bool, text: str) -> None:
    assert run("ab.", ends=True, include_stop_str_in_output=is_included) == (text, 3)


def test_stop_strings_do_not_count_before_min_tokens() -> None:
    assert run("a;b;c;d", stop=(";",), min_tokens=3) == ("a;b", 4)
    assert run("a;b;c;d", stop=(";",), min_tokens=4) == ("a;b;c", 6)


def test_a_stop_string_may_begin_before_min_tokens_and_end_after() -> None:
    assert run("ab;;c", stop=(";;",), min_tokens=3) == ("ab", 4)


def test_one_that_ended_before_min_tokens_inside_held_text_does_not_count() -> None:
    # "xab" is held as the beginning of "xabyy" when the bound comes; "ab" ended before it.
    assert run("xabz", stop=("ab", "xabyy"), min_tokens=3) == ("xabz", 4)


@given(
    text=st.text("ab;", max_size=12),
    stop=st.lists(st.text("ab;", min_size=1, max_size=3), max_size=3).map(tuple),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    min_tokens=st.integers(0, 6),
    is_included=st.booleans(),
)
def test_chunks_make_no_difference(
    text: str, stop: tuple[str, ...], sizes: list[int], min_tokens: int, is_included: bool
) -> None:
    """Against a search for the first stop string to be complete, letter by letter from min_tokens on."""
    wanted, num_tokens = text, len(text)
    for end in range(min_tokens + 1, len(text) + 1):
        ended = [s for s in stop if text[:end].endswith(s)]
        if ended:
            longest = max(ended, key=len)
            wanted, num_tokens = text[: end if is_included else end - len(longest)], end
            break
    params: dict[str, Any] = {"stop": stop, "min_tokens": min_tokens, "include_stop_str_in_output": is_included}
    assert run(text, sizes, **params) == (wanted, num_tokens)
