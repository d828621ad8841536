"""One request's way out of the engine: chunks wait here for their consumer, and are coalesced while they do."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from forkkv_cluster.core.clock import Clock
from forkkv_cluster.core.errors import ForkKVError
from forkkv_cluster.core.request import TokenChunk, joined_prompt_logprobs


def merge_chunks(chunks: Sequence[TokenChunk]) -> TokenChunk:
    """Consecutive chunks of one request (at least one) as a single chunk that says the same."""
    last = chunks[-1]
    usages = [chunk.usage for chunk in chunks if chunk.usage is not None]
    return replace(
        last,
        token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        logprobs=tuple(logprob for chunk in chunks for logprob in chunk.logprobs),
        usage=usages[-1] if usages else None,
        prompt_logprobs=joined_prompt_logprobs([c.prompt_logprobs for c in chunks if c.prompt_logprobs is not None]),
    )


class OutputStream:
    """The first chunk goes out at once, later ones at most every ``flush_interval_s``, the end at once.

    Single consumer. ``put`` and ``fail`` run on the consumer's loop.
    """

    def __init__(self, clock: Clock, flush_interval_s: float) -> None:
        self._clock = clock
        self._flush_interval_s = flush_interval_s
        self._chunks: list[TokenChunk] = []
        self._error: ForkKVError | None = None
        self._has_news = asyncio.Event()
        self._has_end = asyncio.Event()
        self._flushed_s: float | None = None

    def put(self, chunk: TokenChunk) -> None:
        self._chunks.append(chunk)
        self._has_news.set()
        if chunk.finish_reason is not None:
            self._has_end.set()

    def fail(self, error: ForkKVError) -> None:
        """End the stream with ``error``, after the chunks that came before it."""
        self._error = error
        self._has_news.set()
        self._has_end.set()

    async def next_chunk(self) -> TokenChunk:
        """All that came since the last call, merged. Raises the request's error when that is all there is left."""
        await self._has_news.wait()
        await self._hold_back()
        if not self._chunks and self._error is not None:
            raise self._error
        chunks, self._chunks = self._chunks, []
        if self._error is None:
            self._has_news.clear()
        self._flushed_s = self._clock.monotonic()
        return merge_chunks(chunks)

    async def _hold_back(self) -> None:
        if self._flushed_s is None or self._has_end.is_set():
            return
        remaining_s = self._flushed_s + self._flush_interval_s - self._clock.monotonic()
        if remaining_s <= 0:
            return
        try:
            async with asyncio.timeout(remaining_s):
                await self._has_end.wait()
        except TimeoutError:
            return
