"""Counts what passes through a stream of turn events: requests by status, tokens, latencies, resumptions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from forkkv_cluster.core.clock import Clock
from forkkv_cluster.core.errors import Cancelled, ForkKVError, Internal
from forkkv_cluster.gateway.commands import TurnDelta, TurnEvent, TurnFinished
from forkkv_cluster.observability.metrics import GatewayMetrics

METHOD = "generate"


async def metered(
    events: AsyncGenerator[TurnEvent, None], metrics: GatewayMetrics, clock: Clock
) -> AsyncGenerator[TurnEvent, None]:
    """``events``, counted. A stream that is closed before its end counts as CANCELLED."""
    arrival = last = clock.monotonic()
    has_tokens = False
    code = Cancelled.code
    metrics.request_started(METHOD)
    try:
        async with aclosing(events):
            async for event in events:
                now = clock.monotonic()
                if isinstance(event, TurnDelta) and event.token_ids:
                    if has_tokens:
                        metrics.later_tokens(len(event.token_ids), now - last)
                    else:
                        metrics.first_token(now - arrival)
                    has_tokens, last = True, now
                elif isinstance(event, TurnFinished):
                    code = "OK"
                    _count_end(metrics, event)
                yield event
    except ForkKVError as error:
        code = error.code
        raise
    except Exception:
        code = Internal.code
        raise
    finally:
        metrics.request_ended(METHOD, code, clock.monotonic() - arrival)


def _count_end(metrics: GatewayMetrics, event: TurnFinished) -> None:
    metrics.tokens(num_prompt=event.num_prompt_tokens, num_output=event.num_generated_tokens)
    for _ in range(event.num_resumes):
        metrics.stream_resumed()
