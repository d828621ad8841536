"""What a stream leaves in the metrics."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from forkkv_cluster.core.errors import ResourceExhausted
from forkkv_cluster.core.request import FinishReason
from forkkv_cluster.gateway.commands import TurnDelta, TurnEvent, TurnFinished, TurnStarted
from forkkv_cluster.gateway.metered import metered
from forkkv_cluster.observability.metrics import GatewayMetrics
from forkkv_cluster.testing.manual_clock import ManualClock


async def turn(clock: ManualClock, error: Exception | None = None) -> AsyncGenerator[TurnEvent, None]:
    yield TurnStarted("request-1", 7, 0, 4)
    clock.advance(0.5)
    yield TurnDelta((1,))
    clock.advance(0.2)
    if error is not None:
        raise error
    yield TurnDelta((2, 3))
    yield TurnFinished(FinishReason.LENGTH, 7, 3, num_resumes=2)


def value(metrics: GatewayMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


async def test_a_turn_that_ends_well_is_counted() -> None:
    clock, metrics = ManualClock(), GatewayMetrics()
    assert len([event async for event in metered(turn(clock), metrics, clock)]) == 4
    assert value(metrics, "forkkv_gateway_requests_total", method="generate", code="OK") == 1
    assert value(metrics, "forkkv_gateway_tokens_total", direction="prompt") == 7
    assert value(metrics, "forkkv_gateway_tokens_total", direction="output") == 3
    assert value(metrics, "forkkv_gateway_stream_resumes_total") == 2
    assert value(metrics, "forkkv_gateway_ttft_seconds_sum") == pytest.approx(0.5)
    assert value(metrics, "forkkv_gateway_itl_seconds_count") == 2
    assert value(metrics, "forkkv_gateway_request_seconds_sum", method="generate") == pytest.approx(0.7)
    assert value(metrics, "forkkv_gateway_in_flight_requests", method="generate") == 0


async def test_a_failed_turn_is_counted_by_its_status() -> None:
    clock, metrics = ManualClock(), GatewayMetrics()
    with pytest.raises(ResourceExhausted):
        async for _ in metered(turn(clock, ResourceExhausted("full", 1.0)), metrics, clock):
            pass
    assert value(metrics, "forkkv_gateway_requests_total", method="generate", code="RESOURCE_EXHAUSTED") == 1


async def test_a_turn_that_is_left_is_cancelled_and_no_longer_in_flight() -> None:
    clock, metrics = ManualClock(), GatewayMetrics()
    async with aclosing(metered(turn(clock), metrics, clock)) as events:
        await anext(events)
        assert value(metrics, "forkkv_gateway_in_flight_requests", method="generate") == 1
    assert value(metrics, "forkkv_gateway_requests_total", method="generate", code="CANCELLED") == 1
    assert value(metrics, "forkkv_gateway_in_flight_requests", method="generate") == 0
