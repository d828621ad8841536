"""What a soak run asked for and what came back: every accepted request has one terminal result, in time, and a fit one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from forkkv_cluster.core.errors import Cancelled, DeadlineExceeded, ForkKVError, Internal
from forkkv_cluster.core.prefix import TokenArray
from forkkv_cluster.core.request import ContextRequest, FinishReason, GenerateRequest, ModelInfo, PromptLogprobs, TokenChunk
from forkkv_cluster.engine.outputs import StepOutput


class SoakFailure(Internal):
    """A promise that did not hold. ``check`` names it."""

    def __init__(self, check: str, detail: str) -> None:
        super().__init__(f"{check}: {detail}", check=check)

    @property
    def check(self) -> str:
        return str(self.attributes["check"])


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """A request, and the branch that it is a turn of: (session id, branch name) and what it appends, [k] int32."""

    request: GenerateRequest | ContextRequest
    branch: tuple[str, str] | None = None
    appended: TokenArray | None = None


@dataclass(slots=True, eq=False)
class Flight:
    """An accepted request. ``is_interrupted``: cancelled, to be resumed with what it has generated so far."""

    ask: Ask
    tokens: list[int] = field(default_factory=list)
    scores: list[PromptLogprobs] = field(default_factory=list)
    is_aborted: bool = False
    is_interrupted: bool = False
    error: ForkKVError | None = None

    @property
    def request(self) -> GenerateRequest | ContextRequest:
        return self.ask.request

    @property
    def num_scored(self) -> int:
        """Prompt tokens whose log probabilities have come."""
        return sum(len(part.token_ids) for part in self.scores)

    @property
    def generated(self) -> list[int]:
        """All that was generated for the request, before a resume too."""
        request = self.request
        if isinstance(request, ContextRequest) or not request.num_resumed:
            return list(self.tokens)
        return [*(int(t) for t in request.tokens[-request.num_resumed :]), *self.tokens]


def scored_positions(request: GenerateRequest | ContextRequest) -> range:
    """Of the prompt tokens that come with a log probability: all after the first that the request runs itself."""
    if isinstance(request, ContextRequest) or request.sampling.prompt_logprobs is None or request.num_resumed:
        return range(0)
    return range(1 + (request.context_len if request.adapter is not None else 0), request.num_prompt_tokens)


class Ledger:
    """Requests under way, and how many ended how. Raises SoakFailure at the first result that breaks a promise.

    num_scored   prompt tokens that came with a log probability
    num_invoked  requests that an aLoRA finished
    """

    def __init__(self, model: ModelInfo) -> None:
        self.live: dict[str, Flight] = {}
        self.ends: Counter[str] = Counter()
        self.num_accepted = self.num_scored = self.num_invoked = 0
        self._model = model

    def accept(self, ask: Ask) -> Flight:
        flight = Flight(ask)
        self.live[ask.request.request_id] = flight
        self.num_accepted += 1
        return flight

    def take(self, output: StepOutput, now_s: float) -> list[Flight]:
        """The requests that this step ended. ``now_s`` is the wall clock during the step."""
        ended = []
        for chunk in output.chunks:
            flight = self._find(chunk.request_id)
            if chunk.prompt_logprobs is not None:
                self._take_scores(flight, chunk.prompt_logprobs)
            flight.tokens += chunk.token_ids
            self._check_chunk(flight, chunk)
            if chunk.finish_reason is not None:
                ended.append(self._end(flight, "finished"))
        for failure in output.failures:
            flight = self._find(failure.request_id)
            flight.error = failure.error
            ended.append(self._end(flight, self._name_end(flight, failure.error, now_s)))
        self._check_late(now_s)
        return ended

    def check_settled(self) -> None:
        """Nothing is under way, and the ends add up to what was accepted."""
        if self.live:
            raise SoakFailure("one terminal result", f"{len(self.live)} requests have none, as {next(iter(self.live))}")
        if self.ends.total() != self.num_accepted:
            raise SoakFailure("one terminal result", f"{self.num_accepted} accepted, {self.ends.total()} ended")

    def _find(self, request_id: str) -> Flight:
        try:
            return self.live[request_id]
        except KeyError:
            raise SoakFailure("one terminal result", f"{request_id} has ended or was refused, and got another") from None

    def _end(self, flight: Flight, name: str) -> Flight:
        del self.live[flight.request.request_id]
        self.ends[name] += 1
        request = flight.request
        if name == "finished" and isinstance(request, GenerateRequest) and request.invocation_start is not None:
            self.num_invoked += 1
        return flight

    def _take_scores(self, flight: Flight, part: PromptLogprobs) -> None:
        """Parts are of the prompt's own tokens, one after the other, and all before the first generated one."""
        request, here, done = flight.request, range(part.first, part.end), flight.num_scored
        fits = len(here) > 0 and not flight.tokens and here == scored_positions(request)[done : done + len(here)]
        if not fits or not np.array_equal(part.token_ids, request.tokens[part.first : part.end]):
            raise SoakFailure("fit results", f"{request.request_id} got log probabilities of prompt tokens {here}, "
                              f"after {done} of {scored_positions(request)}")  # fmt: skip
        flight.scores.append(part)
        self.num_scored += len(here)

    def _check_chunk(self, flight: Flight, chunk: TokenChunk) -> None:
        request, last = flight.request, chunk.finish_reason
        if isinstance(request, ContextRequest):
            if flight.tokens:
                raise SoakFailure("fit results", f"context pass {request.request_id} generated {flight.tokens}")
            return
        if chunk.token_ids and flight.num_scored != len(scored_positions(request)):
            raise SoakFailure("fit results", f"{request.request_id} generates before its prompt is scored")
        limit = request.sampling.max_tokens - request.num_resumed
        if not all(0 <= token < self._model.vocab_size for token in chunk.token_ids):
            raise SoakFailure("fit results", f"{request.request_id} got {chunk.token_ids}, outside the vocabulary")
        if len(flight.tokens) > limit or (last is FinishReason.LENGTH and len(flight.tokens) != limit):
            raise SoakFailure("fit results", f"{request.request_id} got {len(flight.tokens)} tokens of {limit}, {last}")
        if last is FinishReason.STOP and chunk.matched_stop not in (
            *request.sampling.stop_token_ids,
            *self._model.eos_token_ids,
        ):
            raise SoakFailure("fit results", f"{request.request_id} stopped at {chunk.matched_stop}, which ends nothing")

    def _name_end(self, flight: Flight, error: ForkKVError, now_s: float) -> str:
        request = flight.request
        if isinstance(error, Cancelled) and flight.is_aborted:
            return "cancelled"
        if isinstance(error, DeadlineExceeded) and request.deadline_s is not None and request.deadline_s <= now_s:
            return "expired"
        raise SoakFailure("fit results", f"{request.request_id} failed: {error!r}")

    def _check_late(self, now_s: float) -> None:
        for request_id, flight in self.live.items():
            if flight.is_aborted:
                raise SoakFailure("cancelled within one step", f"{request_id} runs on after a cancel")
            if flight.request.deadline_s is not None and flight.request.deadline_s <= now_s:
                raise SoakFailure("deadlines", f"{request_id} runs on after its deadline")
