"""One adapter's calibration: sample contexts through the engine itself, under every sharing that may serve the adapter.

On each sample the adapter answers greedily under its reference; then prompt and answer are scored as a prompt, under the
reference and under every candidate, and the next-token distributions over the answer are compared. All are prefills of the
same rows, so that what differs is the sharing and not the shape of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from forkkv_cluster.core.agreement import Agreement, compare
from forkkv_cluster.core.clock import Clock
from forkkv_cluster.core.config import CalibrationConfig
from forkkv_cluster.core.errors import ForkKVError
from forkkv_cluster.core.ids import new_id
from forkkv_cluster.core.prefix import TokenArray
from forkkv_cluster.core.request import AdapterInfo, GenerateRequest, SamplingParams, Sharing
from forkkv_cluster.core.request_builder import Envelope, PromptSharing, RequestBuilder
from forkkv_cluster.core.verdict import PolicyAgreement
from forkkv_cluster.engine.background import Outcome, Rounds
from forkkv_cluster.engine.sample_contexts import Sample, SampleSource

INTERNAL_TENANT = "(calibration)"
NUM_TOP = 20
"""Alternatives that are compared: what a request may ask for."""

_SAMPLES_PER_ROUND = 4


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a calibration found; ``error`` ended it before its time."""

    measured: tuple[PolicyAgreement, ...]
    error: ForkKVError | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Text:
    """A sample with its answer, continuation [k >= 1] int32."""

    sample: Sample
    continuation: TokenArray

    @property
    def tokens(self) -> TokenArray:
        return np.concatenate([self.sample.context, self.sample.prompt, self.continuation]).astype(np.int32)


class Calibration:
    """The time that it may take counts from its first request."""

    def __init__(
        self,
        info: AdapterInfo,
        reference: Sharing,
        candidates: tuple[Sharing, ...],
        source: SampleSource,
        config: CalibrationConfig,
        builder: RequestBuilder,
        clock: Clock,
    ) -> None:
        self._info = info
        self._reference = reference
        self._source = source
        self._config = config
        self._builder = builder
        self._clock = clock
        self._deadline_s: float | None = None
        self._totals = {sharing: Agreement() for sharing in candidates}

    def rounds(self, on_end: Callable[[Measurement], None]) -> Rounds:
        """The task; ``on_end`` is called once, unless the task is closed before."""
        error: ForkKVError | None = None
        self._deadline_s = self._clock.wall() + self._config.timeout_s
        samples = islice((s for s in self._source.samples() if self._fits(s)), self._config.max_samples)
        for batch in _batches(samples, _SAMPLES_PER_ROUND):
            if self._has_enough:
                break
            try:
                texts = yield from self._answers(batch)
                yield from self._compare(texts)
            except ForkKVError as failure:
                error = failure
                break
        measured = tuple(PolicyAgreement(sharing, total) for sharing, total in self._totals.items())
        on_end(Measurement(measured, error))

    @property
    def _has_enough(self) -> bool:
        return all(total.num_positions >= self._config.min_positions for total in self._totals.values())

    def _fits(self, sample: Sample) -> bool:
        answer = len(sample.continuation) if sample.continuation is not None else self._config.continuation_tokens
        return len(sample.context) + len(sample.prompt) + answer < self._builder.model.max_model_len

    def _answers(self, batch: list[Sample]) -> Generator[list[GenerateRequest], list[Outcome], list[_Text]]:
        """The batch with its answers: those that it names, and the adapter's own under its reference."""
        asked = [sample for sample in batch if sample.continuation is None]
        sampling = SamplingParams(max_tokens=self._config.continuation_tokens)
        outcomes = iter((yield [self._request(_prompt_of(sample), sample, self._reference, sampling) for sample in asked]))
        texts = []
        for sample in batch:
            answer = sample.continuation
            if answer is None:
                answer = np.asarray(_checked(next(outcomes)).token_ids, dtype=np.int32)
            texts.append(_Text(sample, answer))
        return texts

    def _compare(self, texts: list[_Text]) -> Generator[list[GenerateRequest], list[Outcome], None]:
        sharings = (self._reference, *self._totals)
        sampling = SamplingParams(max_tokens=1, prompt_logprobs=NUM_TOP, ignore_eos=True)
        asked = [(text, sharing) for text in texts for sharing in sharings]
        outcomes = iter((yield [self._request(text.tokens, text.sample, sharing, sampling) for text, sharing in asked]))
        for _ in texts:
            reference, *others = [_checked(next(outcomes)).scores for _ in sharings]
            for sharing, other in zip(self._totals, others, strict=True):
                if reference is not None and other is not None:
                    self._totals[sharing] += compare(reference, other).agreement

    def _request(self, tokens: TokenArray, sample: Sample, sharing: Sharing, sampling: SamplingParams) -> GenerateRequest:
        choice = PromptSharing(sharing, len(sample.context)) if sharing is not Sharing.ISOLATED else PromptSharing()
        envelope = Envelope(new_id("calibration"), INTERNAL_TENANT, self._deadline_s)
        request = self._builder.prompt(tokens, self._info.ref, choice, sampling, envelope)
        return replace(request, is_background=True, scored_from=len(sample.context) + len(sample.prompt))


def _prompt_of(sample: Sample) -> TokenArray:
    return np.concatenate([sample.context, sample.prompt]).astype(np.int32)


def _checked(outcome: Outcome) -> Outcome:
    if outcome.error is not None:
        raise outcome.error
    return outcome


def _batches(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    iterator = iter(samples)
    while batch := list(islice(iterator, size)):
        yield batch
