"""Workers without engines, a tokenizer of bytes, and a service over both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from forkkv_cluster.core.clock import Clock
from forkkv_cluster.core.config import ClusterConfig, parse_config
from forkkv_cluster.core.errors import ForkKVError, NotFound
from forkkv_cluster.core.ids import AdapterDigest
from forkkv_cluster.core.request import (
    AdapterInfo,
    ContextRequest,
    FinishReason,
    GenerateRequest,
    ModelInfo,
    PrefixUsage,
    PromptLogprobs,
    Sharing,
    TokenChunk,
    TokenLogprob,
)
from forkkv_cluster.core.status import EngineCounters, EngineStatus, WorkerStatus
from forkkv_cluster.gateway.service import GatewayService
from forkkv_cluster.gateway.session_store import MemorySessionStore, SessionStore
from forkkv_cluster.gateway.tokenization import Tokenization
from forkkv_cluster.gateway.worker_pool import WorkerLost
from forkkv_cluster.testing.manual_clock import ManualClock

BOS = 256
EOS = 257
VOCAB_SIZE = 300
MODEL = ModelInfo("tiny", "m" * 32, VOCAB_SIZE, 512, 64, "float32", (EOS,))


class ByteTokenizer:
    """One token a byte of UTF-8, so that characters do split; 256 is BOS."""

    bos_token_id = BOS
    chat_template: str | None = "<role>content"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        begins_with_bos = text.startswith("<bos>")
        tokens = list(text.removeprefix("<bos>").encode())
        return [BOS, *tokens] if add_special_tokens or begins_with_bos else tokens

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False, **kwargs: Any) -> str:
        return bytes(token for token in token_ids if token < 256).decode(errors="replace")

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> str:
        if conversation[0]["role"] == "tool":
            raise ValueError("a conversation cannot start with a tool")
        shown = "".join(f"<{message['role']}>{message['content']}" for message in conversation)
        return f"<bos>{kwargs.get('mood', '')}{shown}<assistant>"


def adapter_info(name: str, version: str = "") -> AdapterInfo:
    digest = AdapterDigest((name + version).encode().hex().ljust(32, "0")[:32])
    return AdapterInfo(name, digest, f"/adapters/{name}{version}", 8, ("k_proj", "v_proj"), 16)


def prompt_parts(request: GenerateRequest) -> list[PromptLogprobs]:
    """The prompt's scores in two parts: position p has logprob -p and rank 2, and the byte "z" is always likeliest."""
    num_top = request.sampling.prompt_logprobs
    if num_top is None or request.num_resumed:
        return []
    positions = np.arange(request.context_len + 1, request.num_prompt_tokens)
    top_ids = np.tile(np.array([ord("z"), 7], np.int32), (len(positions), 1))[:, :num_top]
    top = np.tile(np.array([-0.25, -3.0], np.float32), (len(positions), 1))[:, :num_top]
    whole = PromptLogprobs(
        request.context_len + 1,
        request.tokens[positions],
        -positions.astype(np.float32),
        np.full(len(positions), 2, np.int32),
        top_ids,
        top,
    )
    middle = whole.first + len(positions) // 2
    return [whole.between(whole.first, middle), whole.between(middle, whole.end)] if len(positions) > 1 else [whole]


@dataclass
class FakePool:
    """One worker that writes ``answer``, byte by byte, and its misfortunes.

    ``die_after``: for each attempt in turn, the tokens after which its worker is lost. ``errors``: raised by attempts in turn.
    ``break_after``: tokens after which an exception comes that no worker means to raise. ``gate``: when set, every token
    waits for it. ``missing``: adapters that the worker lost.
    """

    answer: bytes = b"abcdefghijklmnopqrstuvwxyz" * 8
    adapters: dict[str, AdapterInfo] = field(default_factory=dict)
    die_after: list[int] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    break_after: int | None = None
    gate: asyncio.Event | None = None
    missing: set[str] = field(default_factory=set)
    fail_loading: Exception | None = None
    chunk_len: int = 1
    generated: list[GenerateRequest] = field(default_factory=list)
    contexts: list[ContextRequest] = field(default_factory=list)
    released_hints: list[str] = field(default_factory=list)
    num_open: int = 0
    num_cancelled: int = 0
    opened: asyncio.Event = field(default_factory=asyncio.Event)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        self.generated.append(request)
        self._check(request)
        lives = self.die_after.pop(0) if self.die_after else None
        self.num_open += 1
        self.opened.set()
        is_over = False
        try:
            index = request.num_resumed
            usage = PrefixUsage(3, 2, 2, request.num_prompt_tokens - 2)
            for part in prompt_parts(request):
                yield TokenChunk(request.request_id, prompt_logprobs=part)
            while True:
                if self.gate is not None:
                    await self.gate.wait()
                if lives is not None and index - request.num_resumed >= lives:
                    is_over = True
                    raise WorkerLost("it was killed")
                if index == self.break_after:
                    raise RuntimeError("a bug")
                chunk = self._chunk(request, index, usage if index == request.num_resumed else None)
                index += len(chunk.token_ids)
                is_over = chunk.finish_reason is not None
                yield chunk
                if is_over:
                    return
        finally:
            self.num_open -= 1
            self.num_cancelled += not is_over

    def _check(self, request: GenerateRequest) -> None:
        if self.errors:
            raise self.errors.pop(0)
        if request.adapter is not None and request.adapter.name in self.missing:
            raise NotFound("adapter", request.adapter.name, "Load it first.")

    def _chunk(self, request: GenerateRequest, index: int, usage: PrefixUsage | None) -> TokenChunk:
        room = request.sampling.max_tokens - index
        tokens = list(self.answer[index : index + min(self.chunk_len, room)])
        reason, matched = (FinishReason.LENGTH, None) if len(tokens) == room else (None, None)
        if not tokens:
            tokens, reason, matched = [EOS], FinishReason.STOP, EOS
        logprobs: tuple[TokenLogprob, ...] = ()
        if request.sampling.logprobs is not None:
            top = ((tokens[0], -0.5), (7, -1.5))[: request.sampling.logprobs]
            logprobs = tuple(TokenLogprob(token, -0.5, top) for token in tokens)
        worker = f"worker-{len(self.generated)}"
        final_usage = PrefixUsage(3, 2, 2, request.num_prompt_tokens - 2) if reason is not None else usage
        return TokenChunk(request.request_id, tuple(tokens), logprobs, reason, matched, final_usage, worker)

    async def run_context(self, request: ContextRequest) -> TokenChunk:
        self.contexts.append(request)
        return TokenChunk(request.request_id, finish_reason=FinishReason.STOP, usage=PrefixUsage())

    async def model_info(self) -> ModelInfo:
        return MODEL

    async def broadcast(self, method: str, *arguments: Any) -> list[Any]:
        try:
            return [getattr(self, f"_{method}")(*arguments)]
        except ForkKVError as error:
            return [error]

    def _release_hint(self, session_id: str) -> None:
        self.released_hints.append(session_id)

    def _list_adapters(self) -> tuple[AdapterInfo, ...]:
        return tuple(self.adapters.values())

    def _load_adapter(self, name: str, path: str, sharing: Sharing | None = None) -> AdapterInfo:
        if self.fail_loading is not None:
            raise self.fail_loading
        self.missing.discard(name)
        # As of real ones, the digest is of the files, not of the name.
        info = self.adapters[name] = replace(adapter_info(path.removeprefix("/adapters/")), name=name, sharing=sharing)
        return info

    def _unload_adapter(self, name: str) -> None:
        if self.adapters.pop(name, None) is None:
            raise NotFound("adapter", name, "List them.")

    def _status(self) -> WorkerStatus:
        engine = EngineStatus(self.num_open, 0, 0, 1024, 0, 0, (), EngineCounters(), self._list_adapters())
        return WorkerStatus("worker-1", 1, 42, "cpu", MODEL, engine)


def make_service(
    pool: FakePool,
    *,
    config: dict[str, Any] | None = None,
    store: SessionStore | None = None,
    clock: Clock | None = None,
) -> GatewayService:
    """A service over ``pool`` with two adapters, in memory, on a clock that stands still."""
    if not pool.adapters:
        pool.adapters = {name: adapter_info(name) for name in ("planner", "critic")}
    return GatewayService(
        parsed(config),
        pool,
        store or MemorySessionStore(),
        Tokenization(ByteTokenizer()),
        clock or ManualClock(),
        version="1.2.3",
        directory_status=no_directory,
    )


def parsed(config: dict[str, Any] | None) -> ClusterConfig:
    return parse_config({"cache": {"page_size": 4}, "gateway": {"session_store": "memory:"}, **(config or {})})


async def no_directory() -> None:
    return None
