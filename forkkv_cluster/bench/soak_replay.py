"""Spot checks of a soak run: a request that ended well, alone on an engine that has seen nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from forkkv_cluster.bench.soak_ledger import Flight, SoakFailure
from forkkv_cluster.core.ids import AdapterDigest
from forkkv_cluster.core.request import GenerateRequest, PromptLogprobs, SamplingParams, TokenLogprob, joined_prompt_logprobs
from forkkv_cluster.core.request_builder import RequestBuilder
from forkkv_cluster.engine.engine import Engine

MIN_MARGIN = 1e-3
"""Greedy tokens must agree where the two best logits differ by more than this (fp32)."""
MAX_SCORE_GAP = 1e-3
"""What a prompt token's log probability may differ by (fp32)."""


def is_replayable(flight: Flight) -> bool:
    """Greedy, and by the model's own logits alone."""
    request = flight.request
    if not isinstance(request, GenerateRequest) or flight.error is not None:
        return False
    sampling = request.sampling
    return sampling == SamplingParams(
        max_tokens=sampling.max_tokens,
        stop_token_ids=sampling.stop_token_ids,
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
    )


@dataclass(slots=True)
class _Alone:
    """What came back from the empty engine."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    scores: list[PromptLogprobs] = field(default_factory=list)


class Replay:
    """``fresh_engine`` makes an empty engine without adapters; ``paths`` says where the content of a digest lies."""

    def __init__(self, fresh_engine: Callable[[], Engine], builder: RequestBuilder, paths: Mapping[AdapterDigest, str]) -> None:
        self._fresh_engine = fresh_engine
        self._builder = builder
        self._paths = paths
        self.num_requests = 0
        self.num_tokens = 0
        self.num_ties = 0
        self.num_scored = 0

    def check(self, flight: Flight) -> None:
        """Raises SoakFailure for a token that differs where the margin is clear. A tie is taken as it fell, and counted."""
        request, wanted, done = flight.request, flight.generated, 0
        if not isinstance(request, GenerateRequest):
            raise TypeError("a context pass generates nothing to compare")
        while done < len(wanted):
            alone = self._run(request, wanted[:done])
            tokens, logprobs = alone.tokens, alone.logprobs
            if done == 0:
                self._check_scores(flight, alone)
            differs = next((i for i, pair in enumerate(zip(tokens, wanted[done:], strict=False)) if pair[0] != pair[1]), None)
            if differs is None and len(tokens) == len(wanted) - done:
                break
            place = differs if differs is not None else min(len(tokens), len(wanted) - done)
            if differs is None or _margin(logprobs, differs) > MIN_MARGIN:
                raise SoakFailure("outputs", _difference(request, wanted[done:], tokens, place, done))
            self.num_ties += 1
            done += differs + 1
        self.num_requests += 1
        self.num_tokens += len(wanted)

    def _check_scores(self, flight: Flight, alone: _Alone) -> None:
        """Of the prompt's tokens; a resumed request's were scored before it broke off, and not again."""
        mine, theirs = joined_prompt_logprobs(flight.scores), joined_prompt_logprobs(alone.scores)
        if mine is None:
            return
        if theirs is None or (mine.first, mine.end) != (theirs.first, theirs.end):
            raise SoakFailure("outputs", f"{flight.request.request_id} was scored at other tokens when run alone")
        differs = np.flatnonzero(~(np.abs(mine.logprobs - theirs.logprobs) <= MAX_SCORE_GAP))
        if len(differs):
            here, place = int(differs[0]), int(differs[0]) + mine.first
            raise SoakFailure("outputs", f"{flight.request.request_id} scored prompt token {place} {mine.logprobs[here]:.4f}, "
                              f"alone {theirs.logprobs[here]:.4f}")  # fmt: skip
        self.num_scored += len(mine.logprobs)

    def _run(self, request: GenerateRequest, generated: Sequence[int]) -> _Alone:
        """The rest of the output after ``generated``."""
        engine = self._fresh_engine()
        for ref in (request.adapter, request.writer):
            if ref is not None:
                engine.load_adapter(ref.name, self._paths[ref.digest])
        sampling = replace(request.sampling, logprobs=2)
        alone = replace(self._builder.resumed(request, generated, 1), deadline_s=None, sampling=sampling)
        engine.add_request(alone)
        result = _Alone()
        while engine.has_work:
            output = engine.step()
            if output.failures:
                raise SoakFailure("outputs", f"{request.request_id} failed when run alone: {output.failures[0].error}")
            for chunk in output.chunks:
                result.tokens += chunk.token_ids
                result.logprobs += chunk.logprobs
                result.scores += [chunk.prompt_logprobs] if chunk.prompt_logprobs is not None else []
        return result


def _margin(logprobs: Sequence[TokenLogprob], place: int) -> float:
    """Distance of the two best; infinite where the model gave none."""
    if place >= len(logprobs) or len(logprobs[place].top) < 2:
        return float("inf")
    (_, best), (_, second) = logprobs[place].top[:2]
    return best - second


def _difference(request: GenerateRequest, wanted: Sequence[int], tokens: Sequence[int], place: int, done: int) -> str:
    adapter = request.adapter.name if request.adapter is not None else "the base model"
    here = f"{request.sharing}, {adapter}, context of {request.context_len} in {request.num_prompt_tokens} tokens"
    mine, alone = list(wanted[place : place + 3]), list(tokens[place : place + 3])
    return f"{request.request_id} ({here}) gave {mine} at generated token {done + place}, alone {alone}"
