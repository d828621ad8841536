"""Chunks of tokens into deltas with text: detokenised without half characters, cut at stop strings. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from forkkv_cluster.core.request import FinishReason, PrefixUsage, TokenChunk
from forkkv_cluster.gateway.commands import TurnDelta
from forkkv_cluster.gateway.stop_strings import StopStringMatcher
from forkkv_cluster.gateway.tokenization import IncrementalDetokenizer


class TurnOutput:
    """The output of one turn as it grows, over every worker that serves it.

    ``token_ids`` is what the branch keeps: it ends with the token that completed a stop string, if one did.
    """

    def __init__(self, detokenizer: IncrementalDetokenizer, stop: tuple[str, ...] = ()) -> None:
        self._detokenizer = detokenizer
        self._stop = StopStringMatcher(stop)
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

    def push(self, chunk: TokenChunk) -> Iterator[TurnDelta]:
        """The delta of one chunk, if it brings anything; afterwards ``finish_reason`` says whether the turn is over."""
        if chunk.usage is not None:
            self._usage_of_attempt = chunk.usage
        if chunk.worker_id and chunk.worker_id not in self.worker_ids[-1:]:
            self.worker_ids.append(chunk.worker_id)
        taken, text = self._take_tokens(chunk)
        if self._stop.matched is not None:
            self.finish_reason = FinishReason.STOP
        elif chunk.finish_reason is not None:
            self.finish_reason = chunk.finish_reason
            text += self._flush()
        if taken or text:
            yield TurnDelta(chunk.token_ids[:taken], text, chunk.logprobs[:taken], chunk.worker_id)

    def finish(self, reason: FinishReason) -> Iterator[TurnDelta]:
        """End the turn without a worker's word; yields the text that was held back."""
        self.finish_reason = reason
        text = self._flush()
        if text:
            yield TurnDelta(text=text)

    def _take_tokens(self, chunk: TokenChunk) -> tuple[int, str]:
        text = ""
        for taken, token_id in enumerate(chunk.token_ids, start=1):
            self.token_ids.append(token_id)
            is_stop_token = chunk.matched_stop is not None and taken == len(chunk.token_ids)
            if not is_stop_token:
                text += self._stop.push(self._detokenizer.push(token_id))
            if self._stop.matched is not None:
                return taken, text
        return len(chunk.token_ids), text

    def _flush(self) -> str:
        return self._stop.push(self._detokenizer.flush()) + self._stop.flush()
