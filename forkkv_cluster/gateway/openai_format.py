"""Response bodies of the OpenAI-compatible API from turn events. Pure: no server, no clock."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from forkkv_cluster.core.errors import ForkKVError, InvalidArgument, ResourceExhausted
from forkkv_cluster.core.request import AdapterInfo, PromptLogprobs, TokenLogprob
from forkkv_cluster.gateway.choices import whole_usage
from forkkv_cluster.gateway.commands import TurnDelta, TurnFinished

TokenText = Callable[[int], str]

_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


def error_body(error: ForkKVError) -> dict[str, Any]:
    return {
        "error": {
            "message": error.message,
            "type": _ERROR_TYPES.get(error.http_status, "server_error"),
            "param": error.field if isinstance(error, InvalidArgument) else None,
            "code": error.code.lower(),
        }
    }


def error_headers(error: ForkKVError) -> dict[str, str]:
    """Retry-After in whole seconds, where trying again can help."""
    if isinstance(error, ResourceExhausted) and error.retry_after_s > 0:
        return {"Retry-After": str(max(1, round(error.retry_after_s)))}
    return {}


def usage_body(finished: TurnFinished) -> dict[str, Any]:
    """OpenAI's usage; ``forkkv`` adds what the caches saved and who served it."""
    usage = finished.usage
    return {
        "prompt_tokens": finished.num_prompt_tokens,
        "completion_tokens": finished.num_generated_tokens,
        "total_tokens": finished.num_prompt_tokens + finished.num_generated_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.useful_hit_tokens},
        "forkkv": {
            "base_hit_tokens": usage.base_hit_tokens,
            "residual_hit_tokens": usage.residual_hit_tokens,
            "useful_hit_tokens": usage.useful_hit_tokens,
            "prefill_tokens_run": usage.prefill_tokens_run,
            "worker_ids": list(finished.worker_ids),
            "num_resumes": finished.num_resumes,
            "is_adapter_inactive": finished.is_adapter_inactive,
            "sharing": str(finished.sharing) if finished.sharing is not None else None,
            "mismatched_training": finished.mismatched_training,
        },
    }


def adapter_body(info: AdapterInfo) -> dict[str, Any]:
    """What a model list says of an adapter besides OpenAI's fields: how ``auto`` is served on it, and why."""
    verdict = info.verdict
    if verdict is None:
        return {"digest": info.digest, "verdict": None}
    measured = {
        str(entry.sharing): {
            "num_positions": entry.agreement.num_positions,
            "num_disagreements": entry.agreement.num_disagreements,
            "disagreement": entry.agreement.disagreement,
            "upper_bound": entry.agreement.upper_bound,
            "mean_kl": entry.agreement.mean_kl,
        }
        for entry in verdict.measured
    }
    facts = {"sharing": str(verdict.sharing), "state": str(verdict.state), "reference": str(verdict.reference)}
    figures = {"max_disagreement": verdict.max_disagreement, "measured": measured, "decided_s": verdict.decided_s}
    return {
        "digest": info.digest,
        "verdict": {**facts, "reason": verdict.reason, **figures, "samples": verdict.samples},
    }  # fmt: skip


class ResponseFormat:
    """Bodies of one response: of each prompt in turn its ``n`` choices.

    ``token_text`` gives a token's own text, for log probabilities. ``has_prompt_logprobs``: the body shows them.
    """

    object_name = ""
    chunk_name = ""

    def __init__(
        self,
        response_id: str,
        model: str,
        created_s: int,
        token_text: TokenText,
        *,
        n: int = 1,
        has_prompt_logprobs: bool = False,
    ) -> None:
        self._head = {"id": response_id, "created": created_s, "model": model}
        self._token_text = token_text
        self._n = n
        self._has_prompt_logprobs = has_prompt_logprobs
        self._scored: defaultdict[int, list[PromptLogprobs]] = defaultdict(list)

    def take_prompt(self, index: int, part: PromptLogprobs) -> None:
        """Log probabilities of the prompt of choice ``index``, before its first delta; they are those of all its choices."""
        self._scored[index // self._n].append(part)

    def _prompt_logprobs(self, index: int, finished: TurnFinished) -> list[dict[str, Any] | None]:
        """As vLLM has them: null where nothing is known, else the token itself and the most likely ones, by id."""
        scored = [entry for part in self._scored[index // self._n] for entry in part.entries()]
        known = [self._prompt_entry(entry) for entry in scored]
        return [*[None] * (finished.num_prompt_tokens - len(known)), *known]

    def _prompt_entry(self, entry: TokenLogprob) -> dict[str, Any]:
        tokens = [(entry.token_id, entry.logprob, entry.rank)]
        tokens += [(token, value, rank) for rank, (token, value) in enumerate(entry.top, start=1) if token != entry.token_id]
        return {
            str(token): {"logprob": value, "rank": rank, "decoded_token": self._token_text(token)}
            for token, value, rank in tokens
        }

    def opening(self, index: int) -> list[dict[str, Any]]:
        """Chunks of choice ``index`` before its first delta."""
        return []

    def chunks(self, index: int, delta: TurnDelta) -> list[dict[str, Any]]:
        """What a delta of choice ``index`` streams."""
        raise NotImplementedError

    def closing(self, index: int, finished: TurnFinished) -> list[dict[str, Any]]:
        """What the end of choice ``index`` streams."""
        raise NotImplementedError

    def ending(self, index: int, finished: TurnFinished) -> list[dict[str, Any]]:
        """``closing``, whose last chunk says that the adapter did not run, or was trained for another sharing: in a stream
        without usage, nothing else does."""
        bodies = self.closing(index, finished)
        notes: dict[str, Any] = {"is_adapter_inactive": True} if finished.is_adapter_inactive else {}
        if finished.mismatched_training is not None:
            notes["mismatched_training"] = finished.mismatched_training
        return [*bodies[:-1], {**bodies[-1], **({"forkkv": notes} if notes else {})}]

    def usage_chunk(self, finished: TurnFinished) -> dict[str, Any]:
        """The extra last chunk of stream_options.include_usage."""
        return {**self._head, "object": self.chunk_name, "choices": [], "usage": usage_body(finished)}

    def whole(self, answers: Sequence[tuple[Sequence[TurnDelta], TurnFinished]]) -> dict[str, Any]:
        """The body of all choices, in order: what each streamed, and its end."""
        choices = [self._choice(index, deltas, finished) for index, (deltas, finished) in enumerate(answers)]
        usage = usage_body(whole_usage([finished for _, finished in answers], self._n))
        return {**self._head, "object": self.object_name, "choices": choices, "usage": usage}

    def _choice(self, index: int, deltas: Sequence[TurnDelta], finished: TurnFinished) -> dict[str, Any]:
        raise NotImplementedError

    def _chunk(self, index: int, choice: dict[str, Any]) -> dict[str, Any]:
        return {
            **self._head,
            "object": self.chunk_name,
            "choices": [{"index": index, "finish_reason": None, "logprobs": None, **choice}],
        }


def finish_reason(finished: TurnFinished) -> str:
    """OpenAI's word; a turn that was replayed from the store stopped."""
    return str(finished.finish_reason or "stop")


@dataclass(frozen=True, slots=True)
class EchoedPrompt:
    """A prompt that stands before its answers; ``logprobs`` alternatives of each token are shown, None: no logprobs."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: int | None


class CompletionFormat(ResponseFormat):
    """text_completion. ``echoes`` are the prompts, where they are shown."""

    object_name = "text_completion"
    chunk_name = "text_completion"

    def __init__(self, *head: Any, echoes: Sequence[EchoedPrompt] = (), **options: Any) -> None:
        super().__init__(*head, **options)
        self._echoes = echoes
        self._offsets: defaultdict[int, int] = defaultdict(int)
        self._is_begun: set[int] = set()

    def chunks(self, index: int, delta: TurnDelta) -> list[dict[str, Any]]:
        return [*self._begin(index), self._chunk(index, {"text": delta.text, "logprobs": self._offset(index, delta.logprobs)})]

    def closing(self, index: int, finished: TurnFinished) -> list[dict[str, Any]]:
        return [*self._begin(index), self._chunk(index, {"text": "", "finish_reason": finish_reason(finished)})]

    def _begin(self, index: int) -> list[dict[str, Any]]:
        """The echo, once, as soon as all that belongs to it is there."""
        if index in self._is_begun or not self._echoes:
            return []
        self._is_begun.add(index)
        echo = self._echoes[index // self._n]
        return [self._chunk(index, {"text": echo.text, "logprobs": self._offset(index, self._echoed(index))})]

    def _choice(self, index: int, deltas: Sequence[TurnDelta], finished: TurnFinished) -> dict[str, Any]:
        echoed = self._echoes[index // self._n].text if self._echoes else ""
        logprobs = [*self._echoed(index), *(logprob for delta in deltas for logprob in delta.logprobs)]
        choice = {
            "index": index,
            "finish_reason": finish_reason(finished),
            "logprobs": self._offset(index, logprobs),
            "text": echoed + "".join(delta.text for delta in deltas),
        }
        if self._has_prompt_logprobs:
            choice["prompt_logprobs"] = self._prompt_logprobs(index, finished)
        return choice

    def _echoed(self, index: int) -> list[TokenLogprob | int]:
        """The prompt's tokens: with what is known of them, or by themselves."""
        if not self._echoes or self._echoes[index // self._n].logprobs is None:
            return []
        echo = self._echoes[index // self._n]
        scored = [entry for part in self._scored[index // self._n] for entry in part.entries()]
        shown = [replace(entry, top=entry.top[: echo.logprobs]) for entry in scored]
        return [*echo.token_ids[: len(echo.token_ids) - len(shown)], *shown]

    def _offset(self, index: int, logprobs: Sequence[TokenLogprob | int]) -> dict[str, Any] | None:
        """Tokens with their places in the text of choice ``index``, which go on where the last call ended."""
        if not logprobs:
            return None
        known = [None if isinstance(entry, int) else entry for entry in logprobs]
        ids = [entry if isinstance(entry, int) else entry.token_id for entry in logprobs]
        tokens = [self._token_text(token_id) for token_id in ids]
        offsets = list(accumulate((len(token) for token in tokens), initial=self._offsets[index]))
        self._offsets[index] = offsets.pop()
        return {
            "tokens": tokens,
            "token_logprobs": [entry.logprob if entry is not None else None for entry in known],
            "top_logprobs": [self._top(entry) if entry is not None else None for entry in known],
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """By text: of tokens that read alike, as halves of characters do, the most likely one counts."""
        return {self._token_text(token): value for token, value in reversed(entry.top)}


class ChatFormat(ResponseFormat):
    """chat.completion."""

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def opening(self, index: int) -> list[dict[str, Any]]:
        return [self._chunk(index, {"delta": {"role": "assistant", "content": ""}})]

    def chunks(self, index: int, delta: TurnDelta) -> list[dict[str, Any]]:
        return [self._chunk(index, {"delta": {"content": delta.text}, "logprobs": self._logprobs(delta.logprobs)})]

    def closing(self, index: int, finished: TurnFinished) -> list[dict[str, Any]]:
        return [self._chunk(index, {"delta": {}, "finish_reason": finish_reason(finished)})]

    def whole(self, answers: Sequence[tuple[Sequence[TurnDelta], TurnFinished]]) -> dict[str, Any]:
        body = super().whole(answers)
        return {**body, "prompt_logprobs": self._prompt_logprobs(0, answers[0][1])} if self._has_prompt_logprobs else body

    def _choice(self, index: int, deltas: Sequence[TurnDelta], finished: TurnFinished) -> dict[str, Any]:
        logprobs = self._logprobs([logprob for delta in deltas for logprob in delta.logprobs])
        message = {"role": "assistant", "content": "".join(delta.text for delta in deltas), "refusal": None}
        return {"index": index, "finish_reason": finish_reason(finished), "logprobs": logprobs, "message": message}

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not logprobs:
            return None
        content = [
            {
                **self._token(logprob.token_id, logprob.logprob),
                "top_logprobs": [self._token(token, value) for token, value in logprob.top],
            }
            for logprob in logprobs
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._token_text(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
