"""Chunks of tokens into events: deltas with text, log probabilities of the prompt. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from forkkv_cluster.core.output_text import OutputText
from forkkv_cluster.core.request import FinishReason, PrefixUsage, PromptLogprobs, TokenChunk
from forkkv_cluster.gateway.commands import TurnDelta, TurnPromptLogprobs

_MAX_SCORED = 1024
"""Prompt tokens in one event: with 20 alternatives each, well inside what one message of gRPC may hold."""


class TurnOutput:
    """The output of one turn as it grows, over every worker that serves it.

    ``token_ids`` is what the branch keeps: it ends with the token that completed a stop string, if one did.
    """

    def __init__(self, text: OutputText) -> None:
        self._text = text
        self._scored_end = 0
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.worker_ids: list[str] = []
        self._usages: list[PrefixUsage] = []
        self._usage_of_attempt: PrefixUsage | None = None

    @property
    def usage(self) -> PrefixUsage:
        """Hits of the first worker (what the client's prompt found), and prompt tokens run on all of them."""
        attempts = [*self._usages, *([self._usage_of_attempt] if self._usage_of_attempt else [])]
        if not attempts:
            return PrefixUsage()
        return attempts[0].plus_run(sum(usage.prefill_tokens_run for usage in attempts[1:]))

    def start_attempt(self) -> None:
        """Another worker takes over; what the lost one last said of its work is kept."""
        if self._usage_of_attempt is not None:
            self._usages.append(self._usage_of_attempt)
        self._usage_of_attempt = None

    def push(self, chunk: TokenChunk) -> Iterator[TurnDelta | TurnPromptLogprobs]:
        """What one chunk brings, if anything; afterwards ``finish_reason`` says whether the turn is over."""
        if chunk.usage is not None:
            self._usage_of_attempt = chunk.usage
        if chunk.worker_id and chunk.worker_id not in self.worker_ids[-1:]:
            self.worker_ids.append(chunk.worker_id)
        if chunk.prompt_logprobs is not None:
            yield from self._push_prompt(chunk.prompt_logprobs)
        taken, text = self._text.push(chunk.token_ids, chunk.matched_stop)
        self.token_ids += chunk.token_ids[:taken]
        if self._text.has_stopped:
            self.finish_reason = FinishReason.STOP
        elif chunk.finish_reason is not None:
            self.finish_reason = chunk.finish_reason
            text += self._text.finish()
        if taken or text:
            yield TurnDelta(chunk.token_ids[:taken], text, chunk.logprobs[:taken], chunk.worker_id)

    def finish(self, reason: FinishReason) -> Iterator[TurnDelta]:
        """End the turn without a worker's word; yields the text that was held back."""
        self.finish_reason = reason
        text = self._text.finish()
        if text:
            yield TurnDelta(text=text)

    def _push_prompt(self, part: PromptLogprobs) -> Iterator[TurnPromptLogprobs]:
        """A worker that takes over before the first token scores the prompt again: only what is new goes on."""
        new = part.between(self._scored_end, part.end)
        self._scored_end = max(self._scored_end, part.end)
        for first in range(new.first, new.end, _MAX_SCORED):
            yield TurnPromptLogprobs(new.between(first, first + _MAX_SCORED))
