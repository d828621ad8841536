"""Response bodies of the OpenAI-compatible API from turn events. Pure: no server, no clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from forkkv_cluster.core.errors import ForkKVError, InvalidArgument, ResourceExhausted
from forkkv_cluster.core.request import TokenLogprob
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
        },
    }


class ResponseFormat:
    """Bodies of one response. ``token_text`` gives a token's own text, for log probabilities."""

    object_name = ""
    chunk_name = ""

    def __init__(self, response_id: str, model: str, created_s: int, token_text: TokenText) -> None:
        self._head = {"id": response_id, "created": created_s, "model": model}
        self._token_text = token_text

    def opening(self, index: int) -> list[dict[str, Any]]:
        """Chunks of choice ``index`` before its first delta."""
        return []

    def chunk(self, index: int, delta: TurnDelta) -> dict[str, Any]:
        raise NotImplementedError

    def closing(self, index: int, finished: TurnFinished) -> dict[str, Any]:
        raise NotImplementedError

    def ending(self, index: int, finished: TurnFinished) -> dict[str, Any]:
        """The last chunk of choice ``index``: in a stream without usage, this says that the adapter did not run."""
        notes = {"forkkv": {"is_adapter_inactive": True}} if finished.is_adapter_inactive else {}
        return {**self.closing(index, finished), **notes}

    def usage_chunk(self, finished: TurnFinished) -> dict[str, Any]:
        """The extra last chunk of stream_options.include_usage."""
        return {**self._head, "object": self.chunk_name, "choices": [], "usage": usage_body(finished)}

    def whole(self, answers: Sequence[tuple[Sequence[TurnDelta], TurnFinished]]) -> dict[str, Any]:
        """The body of all choices, in order: what each streamed, and its end."""
        choices = [self._choice(index, deltas, finished) for index, (deltas, finished) in enumerate(answers)]
        usage = usage_body(whole_usage([finished for _, finished in answers]))
        return {**self._head, "object": self.object_name, "choices": choices, "usage": usage}

    def _choice(self, index: int, deltas: Sequence[TurnDelta], finished: TurnFinished) -> dict[str, Any]:
        text = "".join(delta.text for delta in deltas)
        logprobs = [logprob for delta in deltas for logprob in delta.logprobs]
        head = {"index": index, "finish_reason": finish_reason(finished), "logprobs": self._logprobs(logprobs)}
        return {**head, **self._content(text)}

    def _chunk(self, index: int, choice: dict[str, Any]) -> dict[str, Any]:
        return {
            **self._head,
            "object": self.chunk_name,
            "choices": [{"index": index, "finish_reason": None, "logprobs": None, **choice}],
        }

    def _content(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        raise NotImplementedError


def finish_reason(finished: TurnFinished) -> str:
    """OpenAI's word; a turn that was replayed from the store stopped."""
    return str(finished.finish_reason or "stop")


class CompletionFormat(ResponseFormat):
    """text_completion."""

    object_name = "text_completion"
    chunk_name = "text_completion"

    def chunk(self, index: int, delta: TurnDelta) -> dict[str, Any]:
        return self._chunk(index, {"text": delta.text, "logprobs": self._logprobs(delta.logprobs)})

    def closing(self, index: int, finished: TurnFinished) -> dict[str, Any]:
        return self._chunk(index, {"text": "", "finish_reason": finish_reason(finished)})

    def _content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not logprobs:
            return None
        tokens = [self._token_text(logprob.token_id) for logprob in logprobs]
        offsets = [sum(len(token) for token in tokens[:index]) for index in range(len(tokens))]
        return {
            "tokens": tokens,
            "token_logprobs": [logprob.logprob for logprob in logprobs],
            "top_logprobs": [{self._token_text(token): value for token, value in logprob.top} for logprob in logprobs],
            "text_offset": offsets,
        }


class ChatFormat(ResponseFormat):
    """chat.completion."""

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def opening(self, index: int) -> list[dict[str, Any]]:
        return [self._chunk(index, {"delta": {"role": "assistant", "content": ""}})]

    def chunk(self, index: int, delta: TurnDelta) -> dict[str, Any]:
        return self._chunk(index, {"delta": {"content": delta.text}, "logprobs": self._logprobs(delta.logprobs)})

    def closing(self, index: int, finished: TurnFinished) -> dict[str, Any]:
        return self._chunk(index, {"delta": {}, "finish_reason": finish_reason(finished)})

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

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
