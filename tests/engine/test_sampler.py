"""Sampling is a function of logits, parameters and (seed, choice, position)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forkkv_cluster.core.errors import Internal
from forkkv_cluster.core.request import SamplingParams
from forkkv_cluster.engine.sampler import SampledToken, sample, uniform
from forkkv_cluster.engine.sampling_row import SamplingRow

LOGITS = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 2
HOT = SamplingParams(temperature=1.0, seed=7)


def ids(tokens: list[SampledToken]) -> list[int]:
    return [token.token_id for token in tokens]


def draws(row: torch.Tensor, params: SamplingParams, count: int) -> np.ndarray:
    """The same logits drawn at ``count`` positions."""
    return np.array(ids(sample(row.expand(count, -1), [SamplingRow(params, position) for position in range(count)])))


def test_greedy_takes_the_largest_logit() -> None:
    rows = [SamplingRow(SamplingParams(), i) for i in range(6)]
    assert ids(sample(LOGITS, rows)) == LOGITS.argmax(-1).tolist()


def test_no_rows_give_no_tokens() -> None:
    assert sample(torch.empty(0, 50), []) == []


def test_a_row_draws_the_same_in_any_batch() -> None:
    rows = [
        SamplingRow(SamplingParams(temperature=0.5 + 0.3 * i, seed=i, top_k=5 * (i % 2), top_p=0.9 if i > 2 else 1.0), i)
        for i in range(6)
    ]
    together = ids(sample(LOGITS, rows))
    assert together == [ids(sample(LOGITS[i : i + 1], rows[i : i + 1]))[0] for i in range(6)]
    assert together == ids(sample(LOGITS.flip(0), rows[::-1]))[::-1]


def test_seed_and_position_both_change_the_draw() -> None:
    row = LOGITS[0]
    assert len(set(draws(row, HOT, 100))) > 5
    assert (draws(row, HOT, 100) != draws(row, SamplingParams(temperature=1.0, seed=8), 100)).sum() > 20


def test_draws_follow_the_distribution() -> None:
    row = LOGITS[0]
    counts = np.bincount(draws(row, HOT, 20_000), minlength=50) / 20_000
    assert np.abs(counts - row.softmax(-1).numpy()).max() < 0.015


def test_filtered_draws_follow_the_renormalised_distribution() -> None:
    row = LOGITS[0]
    counts = np.bincount(draws(row, SamplingParams(temperature=1.0, seed=7, top_k=5), 20_000), minlength=50) / 20_000
    top = row.softmax(-1).topk(5)
    wanted = np.zeros(50)
    wanted[top.indices.numpy()] = (top.values / top.values.sum()).numpy()
    assert np.abs(counts - wanted).max() < 0.015


def test_temperature_sharpens() -> None:
    row = LOGITS[0]
    assert (draws(row, SamplingParams(temperature=1e-4, seed=1), 50) == int(row.argmax())).all()
    assert len(set(draws(row, SamplingParams(temperature=100.0, seed=1), 200))) > 40


def test_top_k_keeps_the_k_most_likely() -> None:
    row = LOGITS[0]
    drawn = set(draws(row, SamplingParams(temperature=5.0, top_k=3, seed=1), 300).tolist())
    assert drawn == set(row.topk(3).indices.tolist())


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    row = torch.log(torch.tensor([0.1, 0.5, 0.2, 0.15, 0.05]))
    assert set(draws(row, SamplingParams(temperature=1.0, top_p=0.65, seed=1), 300).tolist()) == {1, 2}
    assert set(draws(row, SamplingParams(temperature=1.0, top_p=0.01, seed=1), 50).tolist()) == {1}


def test_top_p_counts_within_what_top_k_left() -> None:
    row = torch.log(torch.tensor([0.1, 0.5, 0.2, 0.15, 0.05]))
    # Of the two kept by top-k, the first has 0.71 of what is left.
    assert set(draws(row, SamplingParams(temperature=1.0, top_k=2, top_p=0.7, seed=1), 100).tolist()) == {1}


def test_min_p_keeps_what_is_near_the_most_likely() -> None:
    row = torch.log(torch.tensor([0.1, 0.5, 0.2, 0.15, 0.05]))
    assert set(draws(row, SamplingParams(temperature=1.0, min_p=0.25, seed=1), 300).tolist()) == {1, 2, 3}
    assert set(draws(row, SamplingParams(temperature=1.0, min_p=1.0, seed=1), 50).tolist()) == {1}


def test_choices_of_one_seed_draw_differently() -> None:
    row = LOGITS[0]
    other = draws(row, SamplingParams(temperature=1.0, seed=7, choice=1), 100)
    assert (draws(row, HOT, 100) != other).sum() > 20


@given(seed=st.integers(0, 2**63 - 1), position=st.integers(0, 2**20))
def test_a_token_of_probability_zero_is_never_drawn(seed: int, position: int) -> None:
    row = torch.tensor([[float("-inf"), 0.0, float("-inf"), 1.0, float("-inf")]])
    params = SamplingParams(temperature=1.0, seed=seed)
    assert ids(sample(row, [SamplingRow(params, position)]))[0] in (1, 3)


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**31))
def test_uniform_numbers_lie_in_the_unit_interval(seed: int, position: int) -> None:
    assert 0.0 <= uniform([seed], [0], [position])[0] < 1.0


def test_uniform_numbers_of_neighbours_are_uncorrelated() -> None:
    values = np.array([uniform([seed] * 200, [0] * 200, range(200)) for seed in range(50)])
    assert abs(values.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(values[:, :-1].ravel(), values[:, 1:].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(values[:-1].ravel(), values[1:].ravel())[0, 1]) < 0.03


def test_the_uniform_number_of_a_key_never_changes() -> None:
    """Pinned: another value would break the resumption of streams between versions."""
    assert uniform([7], [0], [3])[0] == 0.9853481694572552


def test_logprobs_are_those_of_the_unmodified_softmax() -> None:
    params = SamplingParams(temperature=3.0, top_k=2, seed=5, logprobs=4)
    (token,) = sample(LOGITS[:1], [SamplingRow(params, 9)])
    wanted = LOGITS[0].log_softmax(-1)
    assert token.logprob is not None
    assert token.logprob.token_id == token.token_id
    assert token.logprob.logprob == pytest.approx(float(wanted[token.token_id]))
    assert [token_id for token_id, _ in token.logprob.top] == wanted.topk(4).indices.tolist()
    assert [value for _, value in token.logprob.top] == pytest.approx(wanted.topk(4).values.tolist())


def test_logprobs_are_given_to_those_who_ask() -> None:
    rows = [SamplingRow(SamplingParams(logprobs=n), 0) for n in (None, 0, 2)]
    silent, chosen, alternatives = sample(LOGITS[:3], rows)
    assert silent.logprob is None
    assert chosen.logprob is not None
    assert alternatives.logprob is not None
    assert (len(chosen.logprob.top), len(alternatives.logprob.top)) == (0, 2)


def test_logits_that_are_not_numbers_are_an_error_of_ours() -> None:
    with pytest.raises(Internal, match="NaN"):
        sample(torch.full((1, 4), float("nan")), [SamplingRow(SamplingParams(), 0)])


def filtered_by_hand(logits: np.ndarray, params: SamplingParams) -> set[int]:
    """What min-p, top-k and top-p leave, by sorting the whole vocabulary: most likely first, equals by id."""
    scaled = logits.astype(np.float64) / params.temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    kept = [i for i in np.lexsort((np.arange(len(probs)), -logits)) if probs[i] >= params.min_p * probs.max() * (1 - 1e-7)]
    kept = kept[: params.top_k or len(kept)]
    total, before, result = sum(probs[kept]), 0.0, set()
    for i in kept:
        if params.top_p < 1.0 and before >= params.top_p * total:
            break
        result.add(int(i))
        before += probs[i]
    return result


@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 1},
        {"top_k": 40},
        {"top_k": 64},
        {"top_k": 100},
        {"top_p": 0.5},
        {"top_p": 0.97, "temperature": 3.0},
        {"min_p": 0.3, "temperature": 2.0},
        {"min_p": 0.01, "temperature": 8.0},
        {"top_k": 90, "top_p": 0.8, "min_p": 0.05, "temperature": 2.0},
    ],
)
@pytest.mark.parametrize("has_ties", [False, True])
def test_filters_keep_what_a_sort_of_the_whole_vocabulary_keeps(params: dict[str, float], has_ties: bool) -> None:
    """More tokens than the candidates that are put in order at first, so that every stage is needed by some case."""
    logits = torch.randn(1, 3000, generator=torch.Generator().manual_seed(3)) * 2
    if has_ties:
        logits = logits.round()
    sampling = SamplingParams(**{"temperature": 1.0, "seed": 11, **params})  # type: ignore[arg-type]
    drawn = set(draws(logits[0], sampling, 600).tolist())
    kept = filtered_by_hand(logits[0].numpy(), sampling)
    assert drawn <= kept
    if len(kept) < 100:  # few enough for all the likelier ones to come up
        likely = torch.softmax(logits[0] / sampling.temperature, -1)[sorted(kept)]
        assert len(drawn) >= int((likely / likely.sum() > 0.02).sum())


def test_a_filtered_row_draws_the_same_beside_rows_that_need_the_whole_vocabulary() -> None:
    logits = torch.randn(3, 3000, generator=torch.Generator().manual_seed(4))
    params = [
        SamplingParams(temperature=1.0, seed=1, top_p=0.999),
        SamplingParams(temperature=0.1, seed=2, top_p=0.9),
        SamplingParams(temperature=1.0, seed=3, top_k=50),
    ]
    rows = [SamplingRow(p, 9) for p in params]
    assert ids(sample(logits, rows)) == [ids(sample(logits[i : i + 1], rows[i : i + 1]))[0] for i in range(3)]


def test_large_vocabularies_are_drawn_from_by_their_probabilities() -> None:
    """Over many blocks of the CDF, the last one cut short; compared by sums over slices of the vocabulary."""
    row = torch.randn(1000, generator=torch.Generator().manual_seed(5)) * 2
    counts = np.bincount(draws(row, HOT, 20_000), minlength=1000).reshape(20, 50).sum(-1) / 20_000
    assert np.abs(counts - row.softmax(-1).reshape(20, 50).sum(-1).numpy()).max() < 0.015


def test_the_coldest_temperature_is_greedy() -> None:
    params = SamplingParams(temperature=1e-300, seed=1)
    assert (draws(LOGITS[0] * 1e4, params, 20) == int(LOGITS[0].argmax())).all()
