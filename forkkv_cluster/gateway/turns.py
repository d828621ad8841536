"""One turn, from the frozen request to its one terminal result, over as many workers as it takes.

A worker that dies takes nothing with it: the request goes to another one with three spans (context, own tokens, what was
generated so far), the same seed and the same positions, so the stream goes on token by token as it would have.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing

from forkkv_cluster.core.adapter_semantics import mismatched_training
from forkkv_cluster.core.clock import Clock
from forkkv_cluster.core.errors import DeadlineExceeded, Internal, NotFound, Unavailable
from forkkv_cluster.core.output_text import OutputText
from forkkv_cluster.core.request import AdapterRef, FinishReason, GenerateRequest, TokenChunk
from forkkv_cluster.gateway.commands import TurnDelta, TurnEvent, TurnFinished, TurnStarted
from forkkv_cluster.gateway.request_builder import RequestBuilder
from forkkv_cluster.gateway.tokenization import Tokenization
from forkkv_cluster.gateway.turn_output import TurnOutput
from forkkv_cluster.gateway.worker_pool import WorkerLost, WorkerPool

logger = logging.getLogger(__name__)

MAX_FAULTS = 2
"""Failed engines after which a request is the suspect and is not tried again: it must not walk through the cluster."""

RestoreAdapter = Callable[[AdapterRef], Awaitable[bool]]
"""Load an adapter again where it is missing; False when its files are not known here."""


class TurnRunner:
    """Runs requests on the pool. Holds nothing of any turn."""

    def __init__(
        self,
        pool: WorkerPool,
        builder: RequestBuilder,
        tokenization: Tokenization,
        clock: Clock,
        *,
        max_resumes: int,
        restore_adapter: RestoreAdapter,
    ) -> None:
        self._pool = pool
        self._builder = builder
        self._tokenization = tokenization
        self._clock = clock
        self._max_resumes = max_resumes
        self._restore_adapter = restore_adapter

    async def run(self, request: GenerateRequest, output: TurnOutput) -> AsyncGenerator[TurnEvent, None]:
        """``TurnStarted``, deltas, ``TurnFinished``; or a ForkKVError. ``output`` holds the tokens when it ends.

        Closing the iterator, or cancelling the task that iterates, cancels the request on its worker.
        """
        arrival = self._clock.monotonic()
        first_token: float | None = None
        params = request.sampling
        yield TurnStarted(request.request_id, request.num_prompt_tokens, params.seed, params.max_tokens)
        attempts = _Attempts(request)
        while output.finish_reason is None:
            try:
                async with aclosing(self._attempt(attempts.current)) as chunks:
                    async for chunk in chunks:
                        for event in output.push(chunk):
                            if first_token is None and isinstance(event, TurnDelta):
                                first_token = self._clock.monotonic()
                            yield event
                        if output.finish_reason is not None:
                            break
                    else:
                        raise WorkerLost("its stream ended without a terminal result")
            except WorkerLost as lost:
                for delta in self._resume(attempts, output, lost):
                    yield delta
            except NotFound as error:
                await self._restore(error, attempts)
        end = self._clock.monotonic()
        yield TurnFinished(
            finish_reason=output.finish_reason,
            num_prompt_tokens=request.num_prompt_tokens,
            num_generated_tokens=len(output.token_ids),
            usage=output.usage,
            worker_ids=tuple(output.worker_ids),
            num_resumes=attempts.num_resumes,
            ttft_s=(first_token if first_token is not None else end) - arrival,
            e2e_s=end - arrival,
            is_adapter_inactive=request.is_adapter_inactive,
            sharing=request.sharing,
            mismatched_training=mismatched_training(request.adapter, request.sharing),
        )

    def output_of(self, request: GenerateRequest) -> TurnOutput:
        """An empty output for ``request``: its detokeniser has seen the end of the prompt."""
        sampling = request.sampling
        tail = request.tokens[-16:].tolist()
        detokenizer = self._tokenization.detokenizer(tail, skip_special_tokens=sampling.skip_special_tokens)
        return TurnOutput(OutputText(detokenizer, sampling))

    async def _attempt(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        """One worker's stream, cut at the deadline: the engine keeps it too, but not while no worker answers."""
        chunks = self._pool.generate(request)
        try:
            while True:
                try:
                    async with asyncio.timeout(self._remaining_s(request)):
                        chunk = await anext(chunks)
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    raise DeadlineExceeded(f"request {request.request_id} passed its deadline. Give it more time.") from None
                yield chunk
        finally:
            await chunks.aclose()

    def _remaining_s(self, request: GenerateRequest) -> float | None:
        return None if request.deadline_s is None else max(0.0, request.deadline_s - self._clock.wall())

    def _resume(self, attempts: _Attempts, output: TurnOutput, lost: WorkerLost) -> Iterator[TurnDelta]:
        """Prepare the next attempt, or end a turn whose last token had arrived; yields text that was held back."""
        request = attempts.current
        if len(output.token_ids) >= request.sampling.max_tokens:
            yield from output.finish(FinishReason.LENGTH)
            return
        attempts.num_faults += lost.is_fault
        if attempts.num_faults >= MAX_FAULTS:
            raise Internal(f"request {request.request_id} met {MAX_FAULTS} failing engines, the last because {lost}") from lost
        if attempts.num_resumes >= self._max_resumes:
            raise Unavailable(
                f"request {request.request_id} lost {attempts.num_resumes + 1} workers, the last because {lost}. Send it again."
            ) from lost
        attempts.num_resumes += 1
        output.start_attempt()
        lost_workers = output.worker_ids[-1:]
        attempts.current = self._builder.resumed(request, output.token_ids, attempts.num_resumes, lost_workers)
        logger.warning(
            "request %s resumes after %d tokens (%d of at most %d): %s",
            request.request_id,
            len(output.token_ids),
            attempts.num_resumes,
            self._max_resumes,
            lost,
        )

    async def _restore(self, error: NotFound, attempts: _Attempts) -> None:
        """A worker that started after LoadAdapter does not know the adapter: load it there, once, and try again."""
        request, name = attempts.current, error.attributes.get("name")
        named = [ref for ref in (request.adapter, *request.declared) if ref is not None and ref.name == name]
        if error.attributes.get("kind") != "adapter" or not named or named[0] in attempts.restored:
            raise error
        attempts.restored.add(named[0])
        if not await self._restore_adapter(named[0]):
            raise error


class _Attempts:
    """Which request runs now, and how often it had to move."""

    def __init__(self, request: GenerateRequest) -> None:
        self.current = request
        self.num_resumes = 0
        self.num_faults = 0
        self.restored: set[AdapterRef] = set()
