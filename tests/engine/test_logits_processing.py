"""Penalties, bias and minimum length, against Hugging Face's processors and arithmetic by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from forkkv_cluster.core.errors import InvalidArgument
from forkkv_cluster.core.request import SamplingParams
from forkkv_cluster.engine.logits_processing import process_logits
from forkkv_cluster.engine.sampler import sample
from forkkv_cluster.engine.sampling_row import SamplingRow

VOCAB_SIZE = 12
LOGITS = torch.randn(5, VOCAB_SIZE, generator=torch.Generator().manual_seed(0)) * 2


def row(prompt: list[int], generated: list[int], room: int = 3, **params: Any) -> SamplingRow:
    """A row as the engine makes it: its buffer has room after the position, which holds zeros."""
    tokens = np.array(prompt + generated + [0] * room, dtype=np.int32)
    return SamplingRow(SamplingParams(max_tokens=8, **params), len(prompt) + len(generated), tokens, len(prompt))


def processed(one: SamplingRow, logits: torch.Tensor = LOGITS[:1], eos: tuple[int, ...] = ()) -> torch.Tensor:
    return process_logits(logits, [one], eos)[0]


def test_rows_that_ask_for_nothing_get_their_logits_uncopied() -> None:
    rows = [row([1], [2], temperature=1.0, top_p=0.5)] * 5
    assert process_logits(LOGITS, rows, (3,)) is LOGITS


def test_the_logits_that_came_are_left_alone() -> None:
    before = LOGITS.clone()
    processed(row([1], [2], presence_penalty=1.0, logit_bias=((3, 1.0),), min_tokens=4), eos=(5,))
    assert torch.equal(LOGITS, before)


def test_frequency_counts_and_presence_does_not() -> None:
    change = processed(row([4, 4], [1, 1, 2], frequency_penalty=0.5, presence_penalty=0.25)) - LOGITS[0]
    expected = torch.zeros(VOCAB_SIZE)
    expected[1], expected[2] = -1.25, -0.75
    assert torch.allclose(change, expected, atol=1e-6)


def test_repetition_is_that_of_hugging_face_over_prompt_and_output() -> None:
    prompt, generated = [4, 4, 7], [1, 1, 2]
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + generated]), LOGITS[:1].clone())[0]
    assert torch.allclose(processed(row(prompt, generated, repetition_penalty=1.7)), expected)


def test_bias_is_added_to_its_tokens_alone() -> None:
    change = processed(row([1], [], logit_bias=((0, -100.0), (11, 2.5)))) - LOGITS[0]
    assert change[[0, 11]].tolist() == pytest.approx([-100.0, 2.5], abs=1e-4)
    assert not change[1:11].any()


@pytest.mark.parametrize(("num_generated", "is_held_back"), [(0, True), (1, True), (2, False)])
def test_ends_are_held_back_until_min_tokens(num_generated: int, is_held_back: bool) -> None:
    one = row([1, 1, 1], [5] * num_generated, min_tokens=2, stop_token_ids=(7,))
    found = processed(one, eos=(3, 9))
    assert [token for token in range(VOCAB_SIZE) if found[token] == float("-inf")] == ([3, 7, 9] if is_held_back else [])


def test_a_greedy_row_follows_its_penalties() -> None:
    best = int(LOGITS[0].argmax())
    (token,) = sample(LOGITS[:1], [row([1], [best], presence_penalty=2.0, logit_bias=((best, -50.0),), logprobs=0)])
    assert token.token_id != best
    assert token.logprob is not None
    assert token.logprob.logprob == pytest.approx(float(LOGITS[0].log_softmax(-1)[token.token_id]))


histories = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=6)
fields = st.fixed_dictionaries(
    {},
    optional={
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(0.5, 2),
        "min_tokens": st.integers(0, 4),
        "logit_bias": st.dictionaries(st.integers(0, VOCAB_SIZE - 1), st.floats(-5, 5), max_size=3).map(
            lambda bias: tuple(bias.items())
        ),
    },
)


@given(st.lists(st.tuples(histories, histories, fields), min_size=5, max_size=5))
def test_a_row_comes_out_the_same_in_any_batch(asked: list[tuple[list[int], list[int], dict[str, Any]]]) -> None:
    rows = [row(prompt, generated, **params) for prompt, generated, params in asked]
    together = process_logits(LOGITS, rows, (3,))
    alone = [process_logits(LOGITS[i : i + 1], [rows[i]], (3,))[0] for i in range(5)]
    assert torch.equal(together, torch.stack(alone))


@given(histories, histories, fields)
def test_what_stands_behind_the_position_does_not_count(prompt: list[int], out: list[int], params: dict[str, Any]) -> None:
    assert torch.equal(processed(row(prompt, out, room=0, **params)), processed(row(prompt, out, room=5, **params)))


def test_a_bias_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"logit_bias\[12\]"):
        SamplingParams(logit_bias=((12, 1.0),)).validate(VOCAB_SIZE)
