"""Requests of the offline API from start to end on an engine that nobody else drives."""

from __future__ import annotations

from collections.abc import Sequence

from forkkv_cluster.core.errors import Internal
from forkkv_cluster.core.output_text import OutputText
from forkkv_cluster.core.request import (
    ContextRequest,
    FinishReason,
    GenerateRequest,
    PrefixUsage,
    PromptLogprobs,
    TokenChunk,
    TokenLogprob,
)
from forkkv_cluster.engine.engine import Engine
from forkkv_cluster.engine.outputs import StepOutput


class LocalRun:
    """One request and what it brought. ``text`` is given where the request has stop strings.

    token_ids    all generated tokens: they end with the token that completed a stop string, if one did
    visible_ids  those that make text: without a stop token, unless it is asked for
    """

    def __init__(self, request: GenerateRequest | ContextRequest, text: OutputText | None = None) -> None:
        self.request = request
        self.token_ids: list[int] = []
        self.visible_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[PromptLogprobs] = []
        self.usage = PrefixUsage()
        self._text = text
        self._pieces: list[str] = []
        self._reason: FinishReason | None = None

    @property
    def is_done(self) -> bool:
        return self._reason is not None

    @property
    def finish_reason(self) -> FinishReason:
        if self._reason is None:
            raise Internal(f"request {self.request.request_id} ended without a terminal result.")
        return self._reason

    @property
    def text(self) -> str | None:
        """None where there are no stop strings: the text is that of ``visible_ids``."""
        return "".join(self._pieces) if self._text is not None else None

    def take(self, chunk: TokenChunk) -> None:
        if chunk.prompt_logprobs is not None:
            self.prompt_logprobs.append(chunk.prompt_logprobs)
        self.token_ids += chunk.token_ids
        self.logprobs += chunk.logprobs
        self.usage = chunk.usage or self.usage
        self._reason = chunk.finish_reason
        is_hidden = chunk.matched_stop is not None and not self._includes_stop
        self.visible_ids += chunk.token_ids[:-1] if is_hidden else chunk.token_ids
        if self._text is not None:
            self._pieces.append(self._text.push(chunk.token_ids, chunk.matched_stop)[1])
            if self._text.has_stopped:
                self._reason = FinishReason.STOP
            elif self._reason is not None:
                self._pieces.append(self._text.finish())

    @property
    def _includes_stop(self) -> bool:
        return isinstance(self.request, GenerateRequest) and self.request.sampling.include_stop_str_in_output


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
        settle(engine)


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


def settle(engine: Engine) -> None:
    """Step until nothing is left to do, the engine's own work included."""
    while engine.has_work:
        engine.step()
