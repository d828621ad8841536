"""When copying KV back is worth it, by given rates."""

from __future__ import annotations

import pytest

from forkkv_cluster.cache.swap_estimate import RunningRate, SwapEstimate


def estimate(bytes_per_s: float | None, tokens_per_s: float | None) -> SwapEstimate:
    made = SwapEstimate()
    if bytes_per_s is not None:
        made.copied_bytes.note(bytes_per_s, 1.0)
    if tokens_per_s is not None:
        made.prefilled_tokens.note(tokens_per_s, 1.0)
    return made


@pytest.mark.parametrize(
    ("num_bytes", "num_tokens", "pays"),
    [(999, 10, True), (1000, 10, False), (1001, 10, False), (10**6, 10**6, True), (1, 0, False)],
)
def test_a_copy_pays_when_it_takes_less_time_than_the_tokens(num_bytes: int, num_tokens: int, pays: bool) -> None:
    """1000 bytes a second against 10 tokens a second."""
    assert estimate(1000, 10).pays(num_bytes, num_tokens) is pays


@pytest.mark.parametrize(("copied", "prefilled"), [(None, 10.0), (1000.0, None), (None, None)])
def test_an_unmeasured_rate_is_measured_by_swapping(copied: float | None, prefilled: float | None) -> None:
    assert estimate(copied, prefilled).pays(10**9, 1)
    assert not estimate(copied, prefilled).pays(10**9, 0)


def test_a_rate_is_weighted_by_size_and_follows_what_is_measured_now() -> None:
    rate = RunningRate()
    rate.note(100, 1.0)
    rate.note(1, 1.0)
    assert rate.per_second == pytest.approx((0.9 * 100 + 1) / (0.9 + 1))
    for _ in range(200):
        rate.note(7, 1.0)
    assert rate.per_second == pytest.approx(7)


def test_a_measurement_without_a_duration_says_nothing() -> None:
    rate = RunningRate()
    rate.note(100, 0.0)
    rate.note(0, 1.0)
    assert rate.per_second is None
