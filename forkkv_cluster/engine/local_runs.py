"""Requests of the offline API from start to end on an engine that nobody else drives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from forkkv_cluster.core.errors import Internal
from forkkv_cluster.core.request import ContextRequest, FinishReason, GenerateRequest, PrefixUsage, TokenChunk, TokenLogprob
from forkkv_cluster.engine.engine import Engine
from forkkv_cluster.engine.outputs import StepOutput


class LocalRun:
    """One request and what it brought. ``decode`` is given where the request has stop strings.

    token_ids    all generated tokens: they end with the token that completed a stop string, if one did
    visible_ids  those that make text: without a stop token
    text         set where a stop string cut it
    """

    def __init__(self, request: GenerateRequest | ContextRequest, decode: Callable[[Sequence[int]], str] | None = None) -> None:
        self.request = request
        self.token_ids: list[int] = []
        self.visible_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.usage = PrefixUsage()
        self.text: str | None = None
        self._decode = decode
        self._reason: FinishReason | None = None

    @property
    def is_done(self) -> bool:
        return self._reason is not None

    @property
    def finish_reason(self) -> FinishReason:
        if self._reason is None:
            raise Internal(f"request {self.request.request_id} ended without a terminal result.")
        return self._reason

    def take(self, chunk: TokenChunk) -> None:
        self.token_ids += chunk.token_ids
        self.logprobs += chunk.logprobs
        self.visible_ids += chunk.token_ids if chunk.matched_stop is None else chunk.token_ids[:-1]
        self.usage = chunk.usage or self.usage
        self._reason = chunk.finish_reason
        if self._decode is not None and isinstance(self.request, GenerateRequest):
            self._cut(self._decode(self.visible_ids), self.request.sampling.stop)

    def _cut(self, text: str, stop: tuple[str, ...]) -> None:
        found = [text.index(string) for string in stop if string in text]
        if found:
            self.text, self._reason = text[: min(found)], FinishReason.STOP


def run_to_end(engine: Engine, runs: Sequence[LocalRun]) -> None:
    """Add all and step until all have ended. On an error none of them is left in the engine."""
    live: dict[str, LocalRun] = {}
    try:
        for run in runs:
            engine.add_request(run.request)
            live[run.request.request_id] = run
        while live:
            _deliver(engine, engine.step(), live)
    finally:
        for request_id in [run.request.request_id for run in runs]:
            engine.abort(request_id)
        _settle(engine)


def _deliver(engine: Engine, output: StepOutput, live: dict[str, LocalRun]) -> None:
    for chunk in output.chunks:
        if (run := live.get(chunk.request_id)) is None:
            continue
        run.take(chunk)
        if run.is_done:
            del live[chunk.request_id]
            engine.abort(chunk.request_id)  # ended by a stop string, which the engine knows nothing of
    errors = [failure.error for failure in output.failures if failure.request_id in live]
    if errors:
        raise errors[0]


def _settle(engine: Engine) -> None:
    while engine.has_work:
        engine.step()
